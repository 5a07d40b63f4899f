"""Log-probabilities and entropies straight from hidden states, never holding [N, V] logits.

Shapes: N rows, H hidden, V vocabulary. The maths is `token_logprobs` of

    logits = softcap·tanh((hidden · weightᵀ + bias) / softcap)

done for one chunk of rows at a time. The backward pass computes each chunk's logits again, turns
them into their gradient in place, and multiplies: 4 matrix passes in all (forward 1, backward 3),
2 of the 3 only where hidden and weight need gradients.

    ∂L/∂hidden = ∂L/∂logits · weight,   ∂L/∂weight = ∂L/∂logitsᵀ · hidden,   ∂L/∂bias = Σ_rows
    ∂L/∂logits
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops._checks import check_targets
from fastppo.ops._head import (
    Head,
    HeadGradients,
    HeadOptions,
    check_head,
    chunks,
    head_operands,
    head_options,
)
from fastppo.ops._precision import compute_dtype, without_autocast
from fastppo.ops._rows import RowStats, row_gradient, row_stats
from fastppo.ops.token_logprobs import LogProbs, token_logprobs_reference


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LogProbs:
    """Full [N, V] logits, then `token_logprobs_reference`; differentiable by autograd."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return token_logprobs_reference(logits, targets, temperature=temperature, softcap=softcap)


def linear_logprobs_forward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    options: HeadOptions,
    row_stats: Callable[..., RowStats] = row_stats,
) -> RowStats:
    """Statistics of every row, chunk by chunk."""
    dtype = compute_dtype(hidden)
    stats = RowStats(*(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)))
    for rows, buffer in chunks(hidden, head.weight.shape[0], options.chunk_bytes):
        logits = head.logits(hidden[rows], out=buffer)
        tau = options.temperature_at(rows)
        for result, part in zip(
            stats, row_stats(logits, targets[rows], tau, options.softcap), strict=True
        ):
            result[rows] = part
    return stats


def linear_logprobs_backward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    stats: RowStats,
    logprob_grad: Tensor | None,
    entropy_grad: Tensor | None,
    options: HeadOptions,
    row_gradient: Callable[..., None] = row_gradient,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias. Rows whose incoming gradients are 0 are skipped."""
    g = torch.zeros_like(stats.logprobs) if logprob_grad is None else logprob_grad
    h = entropy_grad
    live = (g != 0 if h is None else (g != 0) | (h != 0)).nonzero().squeeze(1)
    x = hidden.index_select(0, live) if live.shape[0] < hidden.shape[0] else hidden
    total = HeadGradients(x, head, options)
    for rows, buffer in chunks(x, head.weight.shape[0], options.chunk_bytes):
        at = live[rows]
        logits = head.logits(x[rows], out=buffer)
        row_gradient(
            logits,
            targets[at],
            RowStats(*(x[at] for x in stats)),
            g[at],
            None if h is None else h[at],
            options.temperature_at(at),
            options.softcap,
            out=logits,
        )
        total.add(rows, logits)
    hidden_grad, weight_grad, bias_grad = total.finish()
    if hidden_grad is not None and live.shape[0] < hidden.shape[0]:
        hidden_grad = torch.zeros_like(hidden).index_copy_(0, live, hidden_grad)
    return hidden_grad, weight_grad, bias_grad


_Implementation = tuple[Callable[..., RowStats], Callable[..., tuple[Tensor | None, ...]]]


def _implementation(device: torch.device) -> _Implementation:
    """Forward and backward for a device; the one place that chooses."""
    if device.type == "cuda":
        from fastppo.ops import _cuda

        return (
            partial(linear_logprobs_forward, row_stats=_cuda.row_stats),
            partial(linear_logprobs_backward, row_gradient=_cuda.row_gradient),
        )
    return linear_logprobs_forward, linear_logprobs_backward


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        forward, ctx.run_backward = _implementation(hidden.device)
        x, head = head_operands(hidden, weight, bias)
        with without_autocast(hidden.device):
            stats = forward(x, head, targets, options)
        ctx.save_for_backward(x, head.weight, head.bias, targets, *stats)
        ctx.options = options
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.set_materialize_grads(False)
        return stats.logprobs, stats.entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, logprob_grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets, *stats = ctx.saved_tensors
        with without_autocast(x.device):
            grads = ctx.run_backward(
                x,
                Head(weight, bias),
                targets,
                RowStats(*stats),
                logprob_grad,
                entropy_grad,
                ctx.options,
            )
        cast = [None if t is None else t.to(d) for t, d in zip(grads, ctx.dtypes, strict=True)]
        return (*cast, None, None)


_apply: Callable[..., tuple[Tensor, Tensor]] = _LinearLogProbs.apply


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> LogProbs:
    """Log-probabilities of `targets` and entropies under softmax of the head's logits.

    Args:
        hidden: (N, H) floating, the state before each target.
        weight: (V, H), the head's matrix; bias: (V,) or None. One dtype with `hidden`, except under
            autocast, which casts all three.
        targets: (N,) int32 or int64 token ids.
        temperature: a number, or (N,) floating; divides the (soft-capped) logits, also for entropy.
        softcap: None or c > 0: logits become c·tanh(logits / c).
        chunk_bytes: bytes of one chunk of logits; None picks a default for the device. Changes
            speed and memory, and results only by rounding.

    Returns:
        LogProbs(logprobs, entropy), (N,) float32 in nats. Gradients reach hidden, weight and bias
        where they require them, each in its own dtype, the last two summed in float32. The backward
        pass skips rows whose incoming gradients are 0, whose list costs one host sync on a GPU.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; on CPU, ids outside [0, V).
    """
    check_head(hidden, weight, targets, bias, temperature, softcap, chunk_bytes)
    check_targets(targets, weight.shape[0])
    options = head_options(hidden, weight, bias, temperature, softcap, chunk_bytes)
    return LogProbs(*_apply(hidden, weight, bias, targets.long(), options))
