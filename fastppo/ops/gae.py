"""Generalised advantage estimation on packed sequences (arXiv 1506.02438).

Shapes: N response tokens of B sequences back to back, cu_seqlens (B+1,). Backwards in each
sequence, with A = 0 and V' = bootstrap (0 where the sequence finished) after its last token,

    A_t = r_t + γ·V' − V_t + γλ·A_{t+1},   V' ← V_t;      returns = A + V

Masked tokens (tool output inside a response) follow the host's convention, `mask_mode`:
    carry       A and V' pass through unchanged (verl, NeMo-RL, AReaL)
    dense-zero  V ← V·m, r ← r·m, then the plain recurrence on every slot (OpenRLHF)
    none        the plain recurrence on every slot
In every mode masked slots come out with advantage 0 and return 0; give them loss weight 0.

How the recurrence is solved without a loop over time: carry first squeezes the masked tokens out.
Then A_t = δ_t + c·A_{t+1} with c = γλ constant, so over a block of K tokens A = δ·M + (carry
in)·c^{K−k} with M[j, k] = c^{j−k} for j ≥ k, one small matrix product; the blocks' first entries
satisfy the same recurrence with c^K, solved by the same function, ⌈log_K(longest)⌉ levels deep.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastppo.ops._checks import (
    check_choice,
    check_cu_seqlens,
    check_rows,
    check_tensor,
    check_unit_interval,
)
from fastppo.ops._precision import compute_dtype, without_autocast
from fastppo.ops._segments import segment_ids

MaskMode = Literal["carry", "dense-zero", "none"]
MASK_MODES = ("carry", "dense-zero", "none")


class GAE(NamedTuple):
    """Per-token results, each (N,) float32, constants."""

    advantages: Tensor
    returns: Tensor


def gae_reference(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None = None,
    mask_mode: MaskMode = "carry",
    bootstrap: Tensor | None = None,
    returns_lambda: float | None = None,
) -> GAE:
    """A Python loop over tokens."""
    n = rewards.shape[0]
    offsets = cu_seqlens.tolist()
    m = [True] * n if mask is None else mask.tolist()
    end = [0.0] * (len(offsets) - 1) if bootstrap is None else bootstrap.tolist()

    def advantages(lam: float) -> Tensor:
        out = [0.0] * n
        for i, (start, stop) in enumerate(pairwise(offsets)):
            adv, next_value = 0.0, end[i]
            for t in reversed(range(start, stop)):
                r, v = float(rewards[t]), float(values[t])
                if not m[t] and mask_mode == "carry":
                    continue
                if not m[t] and mask_mode == "dense-zero":
                    r = v = 0.0
                adv = r + gamma * next_value - v + gamma * lam * adv
                next_value = v
                out[t] = adv if m[t] else 0.0
        return torch.tensor(out, dtype=torch.float64)

    adv = advantages(gae_lambda)
    critic = adv if returns_lambda is None else advantages(returns_lambda)
    returns = torch.where(torch.tensor(m, dtype=torch.bool), critic + values.double(), 0.0)
    dtype = compute_dtype(values)
    return GAE(adv.to(dtype), returns.to(dtype))


def solve_recurrence(x: Tensor, cu_seqlens: Tensor, decay: float) -> Tensor:
    """y (N,) with y_t = x_t + decay·y_{t+1} inside each sequence, y = 0 past its end."""
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest <= 1 or decay == 0.0:
        return x
    block = min(64, 1 << (longest - 1).bit_length())
    blocks_per_sequence = (lengths + block - 1) // block
    cu_blocks = torch.cat([cu_seqlens.new_zeros(1), blocks_per_sequence.cumsum(0)])
    sequence = segment_ids(cu_seqlens, x.shape[0])
    slot = torch.arange(x.shape[0], device=x.device)
    slot = slot + (cu_blocks[:-1] * block - cu_seqlens[:-1])[sequence]

    padded = x.new_zeros((int(cu_blocks[-1]), block))
    padded.view(-1)[slot] = x
    k = torch.arange(block, device=x.device)
    powers = torch.pow(torch.tensor(decay, dtype=torch.float64, device=x.device), k)
    toeplitz = torch.tril(powers[(k[:, None] - k[None, :]).clamp(min=0)])
    y = padded @ toeplitz.to(x.dtype)
    if longest > block:
        starts = solve_recurrence(y[:, 0].contiguous(), cu_blocks, decay**block)
        carry = torch.cat([starts[1:], starts.new_zeros(1)])
        last = cu_blocks[1:][lengths > 0] - 1
        carry[last] = 0.0
        y.addr_(carry, (decay * powers.flip(0)).to(x.dtype))
    return y.view(-1)[slot]


def gae_torch(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    *,
    gamma: float,
    gae_lambda: float,
    mask_mode: str,
    returns_lambda: float | None,
) -> GAE:
    """Blocks of matrix products; on a GPU it waits for the host a few times."""
    dtype = compute_dtype(values)
    r, v = rewards.to(dtype), values.to(dtype)
    cu = cu_seqlens.long()
    kept = None
    if mask is not None and mask_mode == "carry":
        kept = mask.nonzero().squeeze(1)
        r, v = r[kept], v[kept]
        cu = torch.cat([cu.new_zeros(1), mask.long().cumsum(0)])[cu]
    elif mask is not None and mask_mode == "dense-zero":
        r, v = torch.where(mask, r, 0.0), torch.where(mask, v, 0.0)
    next_value = torch.cat([v[1:], v.new_zeros(min(1, v.numel()))])
    nonempty = cu.diff() > 0
    end = torch.zeros_like(nonempty, dtype=dtype) if bootstrap is None else bootstrap.to(dtype)
    next_value[cu[1:][nonempty] - 1] = end[nonempty]
    delta = r + gamma * next_value - v
    with without_autocast(values.device):
        advantages = solve_recurrence(delta, cu, gamma * gae_lambda)
        critic = advantages
        if returns_lambda is not None:
            critic = solve_recurrence(delta, cu, gamma * returns_lambda)
    returns = critic + v
    if mask is None:
        return GAE(advantages, returns)
    if kept is None:
        return GAE(torch.where(mask, advantages, 0.0), torch.where(mask, returns, 0.0))
    zeros = values.new_zeros(mask.shape[0], dtype=dtype)
    return GAE(zeros.index_copy(0, kept, advantages), zeros.index_copy(0, kept, returns))


def _implementation(device: torch.device) -> Callable[..., GAE]:
    """The scan for a device; the one place that chooses."""
    return gae_torch


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    mask: Tensor | None = None,
    mask_mode: MaskMode = "carry",
    bootstrap: Tensor | None = None,
    returns_lambda: float | None = None,
) -> GAE:
    """Advantages and returns of packed sequences.

    Args:
        rewards, values: (N,) floating: reward of each token, value of the state before it.
        cu_seqlens: (B+1,) int offsets of the sequences; empty sequences are fine.
        gamma, gae_lambda: discount γ and λ, in [0, 1].
        mask: (N,) bool, False for tokens the policy did not choose; None: all count. Values and
            rewards there may be NaN, except in mask_mode "none".
        mask_mode: "carry", "dense-zero" or "none", see the module.
        bootstrap: (B,) value of the state after the last token, for truncated sequences; 0 for
            finished ones; None: all 0.
        returns_lambda: λ of the critic's returns when it differs (arXiv 2503.01491); None:
        gae_lambda.

    Returns:
        GAE(advantages, returns), (N,) float32 without gradient; both 0 at masked tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; on CPU, malformed cu_seqlens.
    """
    check_tensor("values", values, ("N",))
    check_rows("rewards", rewards, values)
    check_cu_seqlens(cu_seqlens, values.shape[0], values.device)
    check_unit_interval("gamma", gamma)
    check_unit_interval("gae_lambda", gae_lambda)
    if returns_lambda is not None:
        check_unit_interval("returns_lambda", returns_lambda)
    if mask is not None:
        check_tensor("mask", mask, (values.shape[0],), (torch.bool,), values.device)
    check_choice("mask_mode", mask_mode, MASK_MODES)
    if bootstrap is not None:
        num_sequences = cu_seqlens.shape[0] - 1
        check_tensor("bootstrap", bootstrap, (num_sequences,), device=values.device)
    return _implementation(values.device)(
        rewards.detach(),
        values.detach(),
        cu_seqlens,
        mask,
        None if bootstrap is None else bootstrap.detach(),
        gamma=gamma,
        gae_lambda=gae_lambda,
        mask_mode=mask_mode,
        returns_lambda=returns_lambda,
    )
