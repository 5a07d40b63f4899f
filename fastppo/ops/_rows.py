"""Softmax statistics and gradients of rows of logits, in torch, a cache-sized block at a time.

Shapes: N rows, V vocabulary. With x the raw logits, c a softcap and τ a temperature,

    z = c·tanh(x / c) / τ          (no softcap: z = x / τ)
    m = max z,  s = Σ e^{z−m},  u = Σ (z−m)·e^{z−m}
    logprob = (z_y − m) − ln s,    entropy = ln s − u / s

and with g = ∂L/∂logprob, h = ∂L/∂entropy, p = e^{z−m}/s,

    ∂L/∂z_j = g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy)
            = g·1[j = y] + e^{z_j−m}·(a + b·(z_j − m)),   b = −h/s,  a = −(g + h·(entropy − ln s))/s

m and ln s are kept apart: their sum would lose the digits that small |logprob| needs. z − m is
floored at −1e4, where e^{z−m} is exactly 0, so that a −inf logit adds 0·(−1e4) = 0, not NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops._precision import compute_dtype

# Bytes of one block of rows in the compute dtype. On a CPU a block and its exponentials should stay
# in the L2 cache through the half dozen passes; a GPU wants enough rows to fill it.
BLOCK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
FLOOR = -1e4


class RowStats(NamedTuple):
    """Per-row results, each (N,) in the compute dtype."""

    logprobs: Tensor
    entropy: Tensor
    max: Tensor
    log_sum: Tensor


def _rows_per_block(logits: Tensor) -> int:
    row_bytes = max(1, logits.shape[1]) * compute_dtype(logits).itemsize
    return max(1, BLOCK_BYTES.get(logits.device.type, 1 << 28) // row_bytes)


def _scaled(x: Tensor, temperature: float | Tensor, softcap: float | None, out: Tensor) -> Tensor:
    """z (n, V) in the compute dtype: `x` itself when there is nothing to do, else `out`, filled."""
    unit = isinstance(temperature, float) and temperature == 1.0
    if x.dtype == out.dtype and softcap is None:
        return x if unit else torch.div(x, _column(temperature), out=out)
    out.copy_(x)
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)
    return out if unit else out.div_(_column(temperature))


def _column(v: float | Tensor) -> float | Tensor:
    return v[:, None] if isinstance(v, Tensor) else v


def _at(temperature: float | Tensor, rows: slice, dtype: torch.dtype) -> float | Tensor:
    return temperature[rows].to(dtype) if isinstance(temperature, Tensor) else float(temperature)


def row_stats(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None
) -> RowStats:
    """Statistics of logits (N, V), any floating dtype and strides, at targets (N,) int64."""
    n, v = logits.shape
    dtype = compute_dtype(logits)
    stats = RowStats(*(logits.new_empty(n, dtype=dtype) for _ in range(4)))
    step = min(_rows_per_block(logits), max(n, 1))
    shifted_buffer = logits.new_empty((step, v), dtype=dtype)
    exp_buffer = torch.empty_like(shifted_buffer)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x = logits[rows]
        shifted, e = shifted_buffer[: x.shape[0]], exp_buffer[: x.shape[0]]
        z = _scaled(x, _at(temperature, rows, dtype), softcap, out=shifted)
        m = torch.amax(z, dim=1)
        z_target = z.gather(1, targets[rows, None]).squeeze(1)
        torch.sub(z, m[:, None], out=shifted).clamp_(min=FLOOR)
        torch.exp(shifted, out=e)
        s = e.sum(dim=1)
        u = torch.mul(e, shifted, out=e).sum(dim=1)
        log_sum = s.log()
        stats.logprobs[rows] = (z_target - m - log_sum).clamp_(max=0.0)
        stats.entropy[rows] = (log_sum - u / s).clamp_(min=0.0)
        stats.max[rows] = m
        stats.log_sum[rows] = log_sum
    return stats


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Write ∂L/∂logits (N, V) into `out`, which may be `logits` itself or have another dtype.

    Rows with both gradients 0 become exactly 0, whatever their logits hold.

    Args:
        logits: (N, V), or some columns of it; targets count from the first of them, and one that
            is none of them matches none.
        logprob_grad: g (N,), compute dtype.
        entropy_grad: h (N,) or None when the loss does not use the entropy (saves two passes).
    """
    n, v = logits.shape
    dtype = compute_dtype(logits)
    step = min(_rows_per_block(logits), max(n, 1))
    shifted_buffer = logits.new_empty((step, v), dtype=dtype)
    exp_buffer = torch.empty_like(shifted_buffer)
    inside = (targets >= 0) & (targets < v)
    index = torch.where(inside, targets, 0)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        x = logits[rows]
        shifted, e = shifted_buffer[: x.shape[0]], exp_buffer[: x.shape[0]]
        tau = _at(temperature, rows, dtype)
        z = _scaled(x, tau, softcap, out=shifted)
        slope = None if softcap is None else 1 - (z * _column(tau) / softcap).square()
        torch.sub(z, stats.max[rows, None], out=shifted)
        g = logprob_grad[rows] / tau
        log_sum = stats.log_sum[rows]
        inverse_sum = torch.exp(-log_sum)
        dead = g == 0
        if entropy_grad is None:
            grad = torch.exp(shifted, out=shifted).mul_((-g * inverse_sum)[:, None])
        else:
            h = entropy_grad[rows] / tau
            dead &= h == 0
            torch.exp(shifted.clamp_(min=FLOOR), out=e)
            b = -h * inverse_sum
            a = -(g + h * (stats.entropy[rows] - log_sum)) * inverse_sum
            grad = shifted.mul_(b[:, None]).add_(a[:, None]).mul_(e)
        at_target = torch.where(inside[rows], g, 0.0)
        grad.scatter_add_(1, index[rows, None], at_target[:, None])
        if slope is not None:
            grad.mul_(slope)
        grad.masked_fill_(dead[:, None], 0.0)
        out[rows].copy_(grad)
