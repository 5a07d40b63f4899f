"""Generalised advantage estimation on rectangular rollouts of vectorised environments.

Shapes: T steps of E environments; a row of the rollout may hold several episodes. Backwards from
A = 0, with next_value (E,) the value of the state after the last step,

    V' = 0 where terminated, final_values_t where truncated, else V_{t+1}
    A_t = r_t + γ·V' − V_t + γλ·A_{t+1}·[neither terminated nor truncated];    returns = A + V

Source: CleanRL ppo.py, whose `dones` are terminated | truncated: a truncated episode then counts as
one that ended worthless. Here the value of the state that truncation cut off enters instead; for
CleanRL's numbers pass terminated = terminated | truncated. Sequences of language models are packed:
see `fastppo.ops.gae`.

On CPU the recurrence runs in C++ in double precision, on CUDA as one launch of tiled scans
(fastppo_kernels.gae_classic).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import _C
from fastppo.ops._checks import FLOATS, check_tensor, check_unit_interval
from fastppo.ops._precision import compute_dtype
from fastppo.ops.gae import GAE


def gae_classic_reference(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> GAE:
    """A Python loop over time."""
    advantages = torch.zeros(values.shape, dtype=torch.float64)
    following, adv = next_value.double(), torch.zeros(next_value.shape, dtype=torch.float64)
    for t in reversed(range(values.shape[0])):
        ended = terminated[t]
        if truncated is not None:
            assert final_values is not None
            following = torch.where(truncated[t], final_values[t].double(), following)
            ended = ended | truncated[t]
        following = torch.where(terminated[t], 0.0, following)
        delta = rewards[t].double() + gamma * following - values[t].double()
        adv = delta + gamma * gae_lambda * torch.where(ended, 0.0, adv)
        following = values[t].double()
        advantages[t] = adv
    dtype = compute_dtype(values)
    return GAE(advantages.to(dtype), (advantages + values.double()).to(dtype))


@torch.library.custom_op(
    "fastppo::gae_classic",
    mutates_args=(),
    schema="(Tensor rewards, Tensor values, Tensor next_value, Tensor terminated, "
    "Tensor? truncated, Tensor? final_values, float gamma, float gae_lambda) -> (Tensor, Tensor)",
)
def _gae_classic(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    final_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """In C++; tensors of a device without a kernel of its own come to the CPU and go back."""
    host = values.to("cpu").contiguous()
    advantages, returns = torch.empty_like(host), torch.empty_like(host)
    if host.numel() > 0:

        def flat(x: Tensor | None, dtype: torch.dtype) -> object:
            return None if x is None else x.to("cpu", dtype).contiguous().view(-1).numpy()

        _C.gae_classic(
            advantages.view(-1).numpy(),
            returns.view(-1).numpy(),
            flat(rewards, host.dtype),
            host.view(-1).numpy(),
            flat(next_value, host.dtype),
            flat(terminated, torch.bool),
            flat(truncated, torch.bool),
            flat(final_values, host.dtype),
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
    return advantages.to(values.device), returns.to(values.device)


@_gae_classic.register_kernel("cuda")
def gae_classic_triton(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor | None,
    final_values: Tensor | None,
    gamma: float,
    gae_lambda: float,
) -> tuple[Tensor, Tensor]:
    """One launch, no host sync."""
    from fastppo_kernels.gae_classic import gae_classic_fwd

    inputs = rewards, values, next_value, terminated, truncated, final_values
    return gae_classic_fwd(*inputs, gamma, gae_lambda)


@_gae_classic.register_fake
def _(rewards: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = values.shape
    return values.new_empty(shape), values.new_empty(shape)


def gae_classic(
    rewards: Tensor,
    values: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    truncated: Tensor | None = None,
    final_values: Tensor | None = None,
) -> GAE:
    """Advantages and returns of a (T, E) rollout.

    Args:
        rewards, values: (T, E) floating: reward of each step, value of the state before it.
        next_value: (E,) floating, value of the state after the last step.
        terminated: (T, E) bool, the step ended its episode for good: nothing follows.
        gamma, gae_lambda: discount γ and λ, in [0, 1].
        truncated: (T, E) bool, the step was the last one before a time limit; needs final_values.
        final_values: (T, E) floating, value of the state that a truncated step led to (the final
            observation, not the one after the reset); elsewhere it may be anything, even NaN.

    Returns:
        GAE(advantages, returns), (T, E) float32 without gradient.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range, or final_values missing.
    """
    check_tensor("values", values, ("T", "E"))
    check_tensor("rewards", rewards, tuple(values.shape), FLOATS, values.device)
    check_tensor("next_value", next_value, (values.shape[1],), FLOATS, values.device)
    check_tensor("terminated", terminated, tuple(values.shape), (torch.bool,), values.device)
    if truncated is not None:
        check_tensor("truncated", truncated, tuple(values.shape), (torch.bool,), values.device)
        if final_values is None:
            raise ValueError(
                "final_values: truncated needs a (T, E) tensor, got None; to count truncated "
                "episodes as ended pass terminated | truncated as terminated"
            )
    if final_values is not None:
        check_tensor("final_values", final_values, tuple(values.shape), FLOATS, values.device)
    check_unit_interval("gamma", gamma)
    check_unit_interval("gae_lambda", gae_lambda)
    final = None if final_values is None else final_values.detach()
    v = values.detach().to(compute_dtype(values))
    constants = rewards.detach(), v, next_value.detach(), terminated, truncated, final
    return GAE(*_gae_classic(*constants, float(gamma), float(gae_lambda)))
