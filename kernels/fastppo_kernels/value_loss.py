"""The clipped value loss: loss, gradient and metrics from one read of the inputs.

N tokens. With v the values, R the returns, w the weights, ε the clip, and
ρ(x) = x²/2, or with huber = κ, κ·(|x| − κ/2) beyond |x| = κ,

    loss = Σ_t w_t·max( ρ(v − R), ρ(clip(v, v_old − ε, v_old + ε) − R) )
    ∂loss/∂v = w·ρ'(v − R), or 0 where the clipped branch is the larger one

`value_rows_kernel` writes the gradient and, for each block of tokens, the eight metrics of that
block (means and second moments around them); `value_metrics_kernel`, one program, combines the
blocks in their order. No atomics: same input, same bits.

Bytes per token, fp32: v, v_old, R, w read (16) + gradient written (4).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

NUM_METRICS = 8


@dataclass(frozen=True)
class Launch:
    """Tokens per program, block vectors combined at a time, warps. Not measured on a GPU yet."""

    block: int = 1024
    chunk: int = 256
    num_warps: int = 4


LAUNCH = Launch()
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _moments(x, valid, count):
    """Mean and Σ(x − mean)² over the valid entries."""
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    centred = tl.where(valid, x - mean, 0.0)
    return mean, tl.sum(centred * centred, axis=0)


@triton.jit
def _twice_rho(x, huber, HUBER: tl.constexpr):
    """2ρ(x)."""
    if HUBER:
        size = tl.abs(x)
        return tl.where(size > huber, huber * (2.0 * size - huber), x * x)
    return x * x


@triton.jit(do_not_specialize=["num_tokens"])
def value_rows_kernel(
    grad_ptr,
    metrics_ptr,  # (blocks, 8)
    values_ptr,
    old_values_ptr,
    returns_ptr,
    weights_ptr,
    num_tokens,
    clip,
    huber,
    CLIP: tl.constexpr,
    HUBER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradient of each token, metrics of each block."""
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_tokens
    w = tl.load(weights_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    valid = w != 0.0
    v = tl.load(values_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    target = tl.load(returns_ptr + offs, mask=valid, other=0.0).to(tl.float32)
    error = v - target
    size = _twice_rho(error, huber, HUBER)
    slope = error
    if HUBER:
        slope = tl.where(error > huber, huber, tl.where(error < -huber, -huber, error))
    cut = inside & (offs < 0)
    if CLIP:
        old = tl.load(old_values_ptr + offs, mask=valid, other=0.0).to(tl.float32)
        moved = tl.maximum(v, old - clip, propagate_nan=ALL)
        moved = tl.minimum(moved, old + clip, propagate_nan=ALL)
        clipped = _twice_rho(moved - target, huber, HUBER)
        cut = clipped > size
        size = tl.maximum(size, clipped, propagate_nan=ALL)
        slope = tl.where(cut, 0.0, slope)
    tl.store(grad_ptr + offs, (w * slope).to(tl.float32), mask=inside)

    count = tl.sum(valid.to(tl.float32), axis=0)
    return_mean, return_m2 = _moments(target, valid, count)
    error_mean, error_m2 = _moments(-error, valid, count)
    metrics_ptr += block * 8
    tl.store(metrics_ptr, count)
    tl.store(metrics_ptr + 1, 0.5 * tl.sum((w * size).to(tl.float32), axis=0))
    tl.store(metrics_ptr + 2, tl.sum((cut & valid).to(tl.float32), axis=0))
    tl.store(metrics_ptr + 3, tl.sum(v, axis=0))
    tl.store(metrics_ptr + 4, return_mean)
    tl.store(metrics_ptr + 5, return_m2)
    tl.store(metrics_ptr + 6, error_mean)
    tl.store(metrics_ptr + 7, error_m2)


@triton.jit(do_not_specialize=["num_blocks"])
def value_metrics_kernel(
    loss_ptr,  # ()
    metrics_ptr,  # (8,)
    blocks_ptr,  # (blocks, 8)
    num_blocks,
    CHUNK: tl.constexpr,
):
    """Sums add; means and second moments combine by Chan's rule."""
    lane = tl.arange(0, CHUNK)
    zeros = tl.zeros([CHUNK], tl.float32)
    counts, losses, cuts, values, targets, errors = zeros, zeros, zeros, zeros, zeros, zeros
    for start in range(0, num_blocks, CHUNK):
        there = start + lane < num_blocks
        row = blocks_ptr + (start + lane) * 8
        n = tl.load(row, mask=there, other=0.0)
        counts += n
        losses += tl.load(row + 1, mask=there, other=0.0)
        cuts += tl.load(row + 2, mask=there, other=0.0)
        values += tl.load(row + 3, mask=there, other=0.0)
        targets += n * tl.load(row + 4, mask=there, other=0.0)
        errors += n * tl.load(row + 6, mask=there, other=0.0)
    count = tl.sum(counts, axis=0)
    return_mean = tl.sum(targets, axis=0) / tl.maximum(count, 1.0)
    error_mean = tl.sum(errors, axis=0) / tl.maximum(count, 1.0)
    return_m2s, error_m2s = zeros, zeros
    for start in range(0, num_blocks, CHUNK):
        there = start + lane < num_blocks
        row = blocks_ptr + (start + lane) * 8
        n = tl.load(row, mask=there, other=0.0)
        away = tl.load(row + 4, mask=there, other=0.0) - return_mean
        return_m2s += tl.load(row + 5, mask=there, other=0.0) + n * away * away
        away = tl.load(row + 6, mask=there, other=0.0) - error_mean
        error_m2s += tl.load(row + 7, mask=there, other=0.0) + n * away * away
    loss = tl.sum(losses, axis=0)
    tl.store(loss_ptr, loss)
    tl.store(metrics_ptr, count)
    tl.store(metrics_ptr + 1, loss)
    tl.store(metrics_ptr + 2, tl.sum(cuts, axis=0))
    tl.store(metrics_ptr + 3, tl.sum(values, axis=0))
    tl.store(metrics_ptr + 4, return_mean)
    tl.store(metrics_ptr + 5, tl.sum(return_m2s, axis=0))
    tl.store(metrics_ptr + 6, error_mean)
    tl.store(metrics_ptr + 7, tl.sum(error_m2s, axis=0))


def value_rows(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    huber: float | None,
    launch: Launch = LAUNCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), gradient (N,), metrics (8,), all float32, of (N,) inputs of any floating dtype."""
    n, dtype = values.shape[0], torch.float32
    grad = torch.empty(n, dtype=dtype, device=values.device)
    if n == 0:
        zeros = torch.zeros(1 + NUM_METRICS, dtype=dtype, device=values.device)
        return zeros[0].clone(), grad, zeros[1:].clone()
    blocks = triton.cdiv(n, launch.block)
    partial = torch.empty((blocks, NUM_METRICS), dtype=dtype, device=values.device)
    loss = torch.empty((), dtype=dtype, device=values.device)
    metrics = torch.empty(NUM_METRICS, dtype=torch.float32, device=values.device)
    tensors = values, old_values if clip is not None else None, returns, weights
    value_rows_kernel[(blocks,)](
        grad,
        partial,
        *(None if x is None else x.contiguous() for x in tensors),
        n,
        0.0 if clip is None else float(clip),
        0.0 if huber is None else float(huber),
        CLIP=clip is not None,
        HUBER=huber is not None,
        BLOCK=launch.block,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )
    value_metrics_kernel[(1,)](
        loss,
        metrics,
        partial,
        blocks,
        CHUNK=launch.chunk,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )
    return loss, grad, metrics
