"""Log-probability of the taken token and entropy of the row, from logits.

Shapes: N rows, V vocabulary. With z = logits / τ, or z = c·tanh(logits / c) / τ under a softcap c:

    logprob = z_y − lse(z)                entropy = −Σ p ln p = lse(z) − Σ p z
    ∂L/∂z_j = g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy)

where g, h are the gradients arriving at the two outputs. Both are float32 for half-precision
logits: log-probabilities rounded to bf16 are off by up to 0.1, which alone clips PPO ratios. The
entropy is that of the tempered distribution, the one tokens were sampled from. A −inf logit has p
ln p = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from fastppo.ops._checks import (
    FLOATS,
    INTS,
    check_softcap,
    check_targets,
    check_temperature,
    check_tensor,
)
from fastppo.ops._precision import compute_dtype, without_autocast
from fastppo.ops._row_ops import row_ops
from fastppo.ops._rows import RowStats


class LogProbs(NamedTuple):
    """Per-token results in nats, each (N,) float32 (float64 for float64 logits)."""

    logprobs: Tensor
    entropy: Tensor


def token_logprobs_reference(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LogProbs:
    """The plain torch expression, differentiable by autograd; several [N, V] arrays stay alive."""
    tau = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    x = logits.to(compute_dtype(logits))
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    log_p = torch.log_softmax(x / tau, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(p == 0, 0.0)).sum(dim=-1)
    return LogProbs(log_p.gather(1, targets.long()[:, None]).squeeze(1), entropy)


_ROWS = "float temperature, Tensor? temperatures, float? softcap"
_BACKWARD = f"Tensor entropy, Tensor max, Tensor log_sum, Tensor g, Tensor? h, {_ROWS}"


@custom_op(
    "fastppo::token_logprobs_fwd",
    mutates_args=(),
    schema=f"(Tensor logits, Tensor targets, {_ROWS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> RowStats:
    tau = temperature if temperatures is None else temperatures
    with without_autocast(logits.device):
        return row_ops(logits.device).stats(logits, targets, tau, softcap)


@_forward.register_fake
def _(logits: Tensor, *_: object) -> RowStats:
    dtype, n = compute_dtype(logits), logits.shape[0]
    return RowStats(*(logits.new_empty(n, dtype=dtype) for _ in range(4)))


@custom_op(
    "fastppo::token_logprobs_bwd_out",
    mutates_args={"out"},
    schema=f"(Tensor logits, Tensor targets, {_BACKWARD}, Tensor(a!) out) -> ()",
)
def _backward_out(logits: Tensor, targets: Tensor, *rest: Any) -> None:
    *rows, out = rest
    _write_gradient(logits, targets, out, *rows)


@custom_op(
    "fastppo::token_logprobs_bwd_",
    mutates_args={"logits"},
    schema=f"(Tensor(a!) logits, Tensor targets, {_BACKWARD}) -> ()",
)
def _backward_(logits: Tensor, targets: Tensor, *rest: Any) -> None:
    _write_gradient(logits, targets, logits, *rest)


def _write_gradient(
    logits: Tensor,
    targets: Tensor,
    out: Tensor,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    g: Tensor,
    h: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    softcap: float | None,
) -> None:
    tau = temperature if temperatures is None else temperatures
    stats = RowStats(entropy, entropy, max, log_sum)  # logprobs themselves are not used
    with without_autocast(logits.device):
        row_ops(logits.device).gradient(logits, targets, stats, g, h, tau, softcap, out=out)


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        softcap: float | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, *rows = _forward(logits, targets, temperature, temperatures, softcap)
        ctx.save_for_backward(logits, targets, *rows, temperatures)
        ctx.temperature, ctx.softcap, ctx.inplace = temperature, softcap, inplace
        ctx.set_materialize_grads(False)
        return logprobs, rows[0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        logits, targets, entropy, max, log_sum, tau = ctx.saved_tensors
        g = torch.zeros_like(entropy) if logprob_grad is None else logprob_grad
        rows = (targets, entropy, max, log_sum, g, entropy_grad, ctx.temperature, tau, ctx.softcap)
        if ctx.inplace:
            _backward_(logits, *rows)
            return logits, None, None, None, None, None
        out = torch.empty_like(logits)
        _backward_out(logits, *rows, out)
        return out, None, None, None, None, None


_apply: Callable[..., tuple[Tensor, Tensor]] = _TokenLogProbs.apply


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    inplace_backward: bool = False,
) -> LogProbs:
    """Log-probabilities of `targets` and entropies under softmax(logits / temperature).

    On a CUDA device one Triton kernel reads the logits once, and one more writes their gradient.

    Args:
        logits: (N, V) floating, any strides; not float64 on a CUDA device.
        targets: (N,) int32 or int64 token ids.
        temperature: a number, or (N,) floating, one per row.
        softcap: None or c > 0: logits become c·tanh(logits / c) before the temperature.
        inplace_backward: the backward pass overwrites `logits` with their gradient and returns that
            storage, saving an [N, V] array. Only when nothing else reads the logits afterwards;
            a second backward through the same graph then raises torch's in-place error.

    Returns:
        LogProbs(logprobs, entropy), both (N,) float32 in nats; logprobs <= 0. Gradients reach
        `logits` from both, in the logits' dtype. Rows whose two incoming gradients are 0 get 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, temperature; on CPU, ids outside [0, V).
    """
    check_tensor("logits", logits, ("N", "V"), FLOATS)
    check_tensor("targets", targets, (logits.shape[0],), INTS, logits.device)
    check_targets(targets, logits.shape[1])
    check_temperature(temperature, targets)
    check_softcap(softcap)
    tau = (
        (1.0, temperature.detach())
        if isinstance(temperature, Tensor)
        else (float(temperature), None)
    )
    return LogProbs(*_apply(logits, targets.long(), *tau, softcap, inplace_backward))
