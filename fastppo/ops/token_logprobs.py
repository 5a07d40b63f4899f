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

from fastppo.ops._checks import (
    FLOATS,
    INTS,
    check_softcap,
    check_targets,
    check_temperature,
    check_tensor,
)
from fastppo.ops._precision import compute_dtype, without_autocast
from fastppo.ops._rows import RowStats, row_gradient, row_stats


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


_Implementation = tuple[Callable[..., RowStats], Callable[..., None]]


def _implementation(device: torch.device) -> _Implementation:
    """Statistics and gradient of rows for a device; the one place that chooses."""
    if device.type == "cuda":
        from fastppo.ops import _cuda

        return _cuda.row_stats, _cuda.row_gradient
    return row_stats, row_gradient


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        temperature: float | Tensor,
        softcap: float | None,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        statistics, ctx.gradient = _implementation(logits.device)
        with without_autocast(logits.device):
            stats = statistics(logits, targets, temperature, softcap)
        ctx.save_for_backward(logits, targets, *stats)
        ctx.temperature, ctx.softcap, ctx.inplace = temperature, softcap, inplace
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        logits, targets, *rows = ctx.saved_tensors
        stats, tau = RowStats(*rows), ctx.temperature
        g = torch.zeros_like(stats.logprobs) if logprob_grad is None else logprob_grad
        out = logits if ctx.inplace else torch.empty_like(logits)
        with without_autocast(logits.device):
            ctx.gradient(logits, targets, stats, g, entropy_grad, tau, ctx.softcap, out=out)
        return out, None, None, None, None


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
    tau = temperature.detach() if isinstance(temperature, Tensor) else float(temperature)
    return LogProbs(*_apply(logits, targets.long(), tau, softcap, inplace_backward))
