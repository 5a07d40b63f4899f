"""GAE of (T, E) rollouts: T steps of E environments, several episodes in a column.

A step is the affine map A ← a·A + b of the advantage behind it,

    a = γλ, or 0 where the episode ended;   b = r + γ·V' − V,
    V' = 0 where terminated, final_values_t where truncated, else V_{t+1}

One launch, one program a group of environments: it goes backwards through tiles of steps, scans a
tile of maps along time, all its environments at once, and carries A to the next tile. Rows of a
tile are contiguous in memory. Products with 0 are 0, so a NaN stays in its episode.

Bytes per step, fp32: r, V (the next step's is in L1) and two masks read (10), A, R written (8);
final_values only where truncated.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import Launch, check_device, launch
from fastppo_kernels.scan import contiguous, times

# Steps × environments of a tile. Not measured on a GPU yet.
LAUNCH = Launch(block=2048, num_warps=8)
MAX_ENVS = 32  # in one tile; a warp then reads rows of 128 bytes


@triton.jit
def _compose(ra, rb, la, lb):
    """The map of the later steps, then that of the earlier ones."""
    return la * ra, times(la, rb) + lb


@triton.jit(do_not_specialize=["num_steps"])
def gae_classic_kernel(
    advantages_ptr,
    returns_ptr,
    rewards_ptr,
    values_ptr,
    next_value_ptr,
    terminated_ptr,
    truncated_ptr,
    final_values_ptr,
    discounts_ptr,  # (2,) float64, or None: gamma and gae_lambda
    num_steps,
    num_envs,
    gamma,
    gae_lambda,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The columns of BLOCK_E environments, in tiles of BLOCK_T steps from the last one back."""
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty  # noqa: N806
    env = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    here = env < num_envs
    row = tl.arange(0, BLOCK_T)[:, None]
    zero = tl.zeros([BLOCK_T, BLOCK_E], DTYPE)
    if discounts_ptr is not None:
        g = zero + tl.load(discounts_ptr)
        lam = zero + tl.load(discounts_ptr + 1)
    else:
        g, lam = (zero + gamma).to(DTYPE), (zero + gae_lambda).to(DTYPE)
    after = tl.load(next_value_ptr + env, mask=here, other=0.0).to(DTYPE)
    carried = tl.sum(zero, axis=0)[None, :]
    tiles = (num_steps + BLOCK_T - 1) // BLOCK_T
    for i in range(tiles):
        step = (tiles - 1 - i) * BLOCK_T + row
        inside = here & (step < num_steps)
        offs = step.to(tl.int64) * num_envs + env
        v = tl.load(values_ptr + offs, mask=inside, other=0.0).to(DTYPE)
        r = tl.load(rewards_ptr + offs, mask=inside, other=0.0).to(DTYPE)
        ended = tl.load(terminated_ptr + offs, mask=inside, other=0) != 0
        later = inside & (step + 1 < num_steps)
        following = tl.load(values_ptr + offs + num_envs, mask=later, other=0.0).to(DTYPE)
        following = tl.where(step + 1 == num_steps, after, following)
        stop = ended
        if truncated_ptr is not None:
            cut = tl.load(truncated_ptr + offs, mask=inside, other=0) != 0
            final = tl.load(final_values_ptr + offs, mask=inside & cut, other=0.0).to(DTYPE)
            following = tl.where(cut, final, following)
            stop = ended | cut
        following = tl.where(ended, 0.0, following)
        # Past the last step: the identity.
        a = tl.where(inside, tl.where(stop, 0.0, g * lam), 1.0)
        b = tl.where(inside, r + g * following - v, 0.0)
        a, b = tl.associative_scan((a, b), 0, _compose, reverse=True)
        advantage = times(a, carried) + b
        tl.store(advantages_ptr + offs, advantage, mask=inside)
        tl.store(returns_ptr + offs, advantage + v, mask=inside)
        carried = tl.sum(tl.where(row == 0, advantage, 0.0), axis=0)[None, :]


def gae_classic_fwd(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    final_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
    knobs: Launch = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), (T, E), float64 for float64 values, else float32.

    Args:
        rewards, values, final_values: (T, E) floating of any dtype; next_value: (E,).
        terminated, truncated: (T, E) bool; truncated needs final_values.
    """
    check_device("values", values)
    assert truncated is None or final_values is not None
    steps, envs = values.shape
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    advantages = torch.empty((steps, envs), dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    if advantages.numel() == 0:
        return advantages, returns
    discounts = None
    if dtype == torch.float64:  # a kernel's number is float32
        discounts = torch.stack([values.new_full((), x) for x in (gamma, gae_lambda)])
    block_e = min(MAX_ENVS, triton.next_power_of_2(envs))
    launch(
        gae_classic_kernel,
        (triton.cdiv(envs, block_e),),
        knobs,
        advantages_ptr=advantages,
        returns_ptr=returns,
        rewards_ptr=contiguous(rewards),
        values_ptr=contiguous(values),
        next_value_ptr=contiguous(next_value),
        terminated_ptr=contiguous(terminated),
        truncated_ptr=contiguous(truncated),
        final_values_ptr=contiguous(final_values),
        discounts_ptr=discounts,
        num_steps=steps,
        num_envs=envs,
        gamma=float(gamma),
        gae_lambda=float(gae_lambda),
        BLOCK_T=knobs.block // block_e,
        BLOCK_E=block_e,
    )
    return advantages, returns
