"""The launchers as torch custom ops, so that torch.compile sees one opaque call with known shapes.

Importing this module registers `torch.ops.fastppo.*`. A temperature is two arguments here: a
number, and (N,) values that override it, because a schema has no unions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from fastppo_kernels.ppo_rows import ENTRIES, PPOKnobs, ppo_rows
from fastppo_kernels.token_logprobs import (
    RowStatistics,
    token_logprobs_bwd_out,
    token_logprobs_fwd,
)

_Four = tuple[Tensor, Tensor, Tensor, Tensor]
_BACKWARD = (
    "Tensor targets, Tensor entropy, Tensor max, Tensor log_sum, Tensor logprobs_grad, "
    "Tensor? entropy_grad, float temperature, Tensor? temperatures, float? softcap"
)


@custom_op(
    "fastppo::token_logprobs_fwd",
    mutates_args=(),
    schema="(Tensor logits, Tensor targets, float temperature, Tensor? temperatures, "
    "float? softcap) -> (Tensor, Tensor, Tensor, Tensor)",
)
def token_logprobs_fwd_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> _Four:
    """logprobs, entropy, max, log_sum; see `token_logprobs_fwd`."""
    tau = temperature if temperatures is None else temperatures
    return tuple(token_logprobs_fwd(logits, targets, tau, softcap))  # type: ignore[return-value]


@token_logprobs_fwd_op.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> _Four:
    one, two, three, four = (logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in "1234")
    return one, two, three, four


@custom_op(
    "fastppo::token_logprobs_bwd_out",
    mutates_args={"out"},
    schema=f"(Tensor logits, {_BACKWARD}, Tensor(a!) out) -> ()",
)
def token_logprobs_bwd_out_op(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    logprobs_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    out: Tensor,
) -> None:
    """See `token_logprobs_bwd_out`."""
    # The gradient does not use the log-probability itself.
    stats = RowStatistics(entropy, entropy, max, log_sum)
    tau = temperature if temperatures is None else temperatures
    token_logprobs_bwd_out(logits, targets, stats, logprobs_grad, entropy_grad, tau, softcap, out)


@custom_op(
    "fastppo::token_logprobs_bwd_",
    mutates_args={"logits"},
    schema=f"(Tensor(a!) logits, {_BACKWARD}) -> ()",
)
def token_logprobs_bwd_op_(
    logits: Tensor,
    targets: Tensor,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    logprobs_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> None:
    """The gradient of the logits over the logits; see `token_logprobs_bwd_out`."""
    stats = RowStatistics(entropy, entropy, max, log_sum)
    tau = temperature if temperatures is None else temperatures
    token_logprobs_bwd_out(
        logits, targets, stats, logprobs_grad, entropy_grad, tau, softcap, logits
    )


@custom_op(
    "fastppo::ppo_rows_",
    mutates_args={"logits"},
    schema="(Tensor(a!) logits, Tensor targets, Tensor old_logprobs, Tensor advantages, "
    "Tensor weights, Tensor? ref_logprobs, Tensor? rollout_logprobs, float[] numbers, int kl, "
    "int correction, float temperature, Tensor? temperatures, float? softcap, bool needs_grad) "
    "-> Tensor",
)
def ppo_rows_op_(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    numbers: list[float],
    kl: int,
    correction: int,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
    needs_grad: bool,
) -> Tensor:
    """See `ppo_rows`; numbers and kl, correction are `PPOKnobs.flat()`."""
    inputs = (old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    knobs = PPOKnobs.from_flat(numbers, kl, correction)
    tau = temperature if temperatures is None else temperatures
    return ppo_rows(logits, targets, *inputs, knobs, tau, softcap, needs_grad)


@ppo_rows_op_.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty((len(ENTRIES), logits.shape[0]), dtype=torch.float32)
