"""The clipped value loss: loss, gradient and metrics from one read of the inputs.

N tokens. With v the values, R the returns, w the weights, ε the clip, and
ρ(x) = x²/2, or with huber = κ, κ·(|x| − κ/2) beyond |x| = κ,

    loss = Σ_t w_t·max( ρ(v − R), ρ(clip(v, v_old − ε, v_old + ε) − R) )
    ∂loss/∂v = w·ρ'(v − R), or 0 where the clipped branch is the larger one

One launch: every program writes the gradient of a block of tokens and the metrics of that block
(means and second moments around them), and the last one to finish combines the blocks in their
order; see `last_block`. No float atomics: same input, same bits.

Bytes per token, fp32: v, v_old, R, w read (16) + gradient written (4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.last_block import arrival_counter, four, is_last, load_valid
from fastppo_kernels.launch import Launch, check_device, launch

NUM_METRICS = 8
# 128 programs at 65,536 tokens, one wave on an H200. Not measured on a GPU yet.
LAUNCH = Launch(block=512, num_warps=4)
# Blocks that the last program combines at a time.
CHUNK = 256
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _twice_rho(x, huber):
    """2ρ(x)."""
    if huber is not None:
        size = tl.abs(x)
        return tl.where(size > huber, huber * (2.0 * size - huber), x * x)
    return x * x


@triton.jit
def _combine_blocks(loss_ptr, metrics_ptr, blocks_ptr, num_blocks, CHUNK: tl.constexpr):
    """Sums add; means and second moments combine by Chan's rule."""
    sum_rows, mean_rows = tl.arange(0, 4), 4 + 2 * tl.arange(0, 2)
    sums_ptr = blocks_ptr + sum_rows.to(tl.int64)[:, None] * num_blocks
    means_ptr = blocks_ptr + mean_rows.to(tl.int64)[:, None] * num_blocks
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros([CHUNK], tl.float32)
    sums = tl.zeros([4, CHUNK], tl.float32)
    weighted = tl.zeros([2, CHUNK], tl.float32)
    for start in range(0, num_blocks, CHUNK):
        at = start + lane
        there = at < num_blocks
        n = tl.load(blocks_ptr + at, mask=there, other=0.0)
        counts += n
        sums += tl.load(sums_ptr + at[None, :], mask=there[None, :], other=0.0)
        weighted += n[None, :] * tl.load(means_ptr + at[None, :], mask=there[None, :], other=0.0)
    mean = tl.sum(weighted, axis=1) / tl.maximum(tl.sum(counts, axis=0), 1.0)
    m2s = tl.zeros([2, CHUNK], tl.float32)
    for start in range(0, num_blocks, CHUNK):
        at = start + lane
        there = at < num_blocks
        n = tl.load(blocks_ptr + at, mask=there, other=0.0)
        away = tl.load(means_ptr + at[None, :], mask=there[None, :], other=0.0) - mean[:, None]
        m2s += tl.load(means_ptr + num_blocks + at[None, :], mask=there[None, :], other=0.0)
        m2s += n[None, :] * away * away
    total = tl.sum(sums, axis=1)
    tl.store(loss_ptr + sum_rows - 1, total, mask=sum_rows == 1)
    tl.store(metrics_ptr + sum_rows, total)
    tl.store(metrics_ptr + mean_rows, mean)
    tl.store(metrics_ptr + mean_rows + 1, tl.sum(m2s, axis=1))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def value_loss_kernel(
    loss_ptr,  # ()
    grad_ptr,
    metrics_ptr,  # (8,)
    blocks_ptr,  # (8, blocks)
    arrivals_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    weights_ptr,
    num_tokens,
    num_blocks,
    clip,
    huber,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_tokens
    w = tl.load(weights_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    valid = w != 0.0
    v = load_valid(values_ptr, offs, inside, valid)
    target = load_valid(returns_ptr, offs, inside, valid)
    error = v - target
    size = _twice_rho(error, huber)
    slope = error
    if huber is not None:
        slope = tl.where(error > huber, huber, tl.where(error < -huber, -huber, error))
    cut = inside & (offs < 0)
    if clip is not None:
        old = load_valid(old_values_ptr, offs, inside, valid)
        moved = tl.maximum(v, old - clip, propagate_nan=ALL)
        moved = tl.minimum(moved, old + clip, propagate_nan=ALL)
        clipped = _twice_rho(moved - target, huber)
        cut = clipped > size
        size = tl.maximum(size, clipped, propagate_nan=ALL)
        slope = tl.where(cut, 0.0, slope)
    tl.store(grad_ptr + offs, (w * slope).to(tl.float32), mask=inside)

    one = valid.to(tl.float32)
    both = tl.join(target, -error)
    mean = tl.sum(both, axis=0) / tl.maximum(tl.sum(one, axis=0), 1.0)
    centred = tl.where(valid[:, None], both - mean[None, :], 0.0)
    sums = four(one, 0.5 * w * size, (cut & valid).to(tl.float32), v).reshape(BLOCK, 4)
    part_ptr = blocks_ptr + block
    sum_rows, mean_rows = tl.arange(0, 4), 4 + 2 * tl.arange(0, 2)
    tl.store(part_ptr + sum_rows * num_blocks, tl.sum(sums, axis=0))
    tl.store(part_ptr + mean_rows * num_blocks, mean)
    tl.store(part_ptr + (mean_rows + 1) * num_blocks, tl.sum(centred * centred, axis=0))
    if is_last(arrivals_ptr, num_blocks):
        _combine_blocks(loss_ptr, metrics_ptr, blocks_ptr, num_blocks, CHUNK)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    huber: float | None,
    table: Launch = LAUNCH,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), gradient (N,), metrics (8,), all float32, of (N,) inputs of any floating dtype."""
    check_device("values", values)
    n, dtype = values.shape[0], torch.float32
    grad = values.new_empty(n, dtype=dtype)
    if n == 0:
        return values.new_zeros((), dtype=dtype), grad, values.new_zeros(NUM_METRICS, dtype=dtype)
    blocks = triton.cdiv(n, table.block)
    loss = values.new_empty((), dtype=dtype)
    metrics = values.new_empty(NUM_METRICS, dtype=dtype)
    launch(
        value_loss_kernel,
        (blocks,),
        table,
        loss_ptr=loss,
        grad_ptr=grad,
        metrics_ptr=metrics,
        blocks_ptr=values.new_empty((NUM_METRICS, blocks), dtype=dtype),
        arrivals_ptr=arrival_counter(values.device),
        values_ptr=values.contiguous(),
        old_values_ptr=None if old_values is None or clip is None else old_values.contiguous(),
        returns_ptr=returns.contiguous(),
        weights_ptr=weights.contiguous(),
        num_tokens=n,
        num_blocks=blocks,
        clip=None if clip is None else float(clip),
        huber=None if huber is None else float(huber),
        BLOCK=table.block,
        CHUNK=chunk,
    )
    return loss, grad, metrics
