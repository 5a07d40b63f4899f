"""The clipped value loss: loss, gradient and metrics from one read of the inputs.

N tokens. With v the values, R the returns, w the weights, ε the clip, and
ρ(x) = x²/2, or with huber = κ, κ·(|x| − κ/2) beyond |x| = κ,

    loss = Σ_t w_t·max( ρ(v − R), ρ(clip(v, v_old − ε, v_old + ε) − R) )
    ∂loss/∂v = w·ρ'(v − R), or 0 where the clipped branch is the larger one

One launch: every program writes the gradient of some blocks of tokens and their metrics (means and
second moments around them), and the last one to finish combines the programs' parts in their order;
see `last_block`. No float atomics: same input, same bits.

Bytes per token, fp32: v, v_old, R, w read (16) + gradient written (4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.last_block import arrival_counter, four, is_last, load_valid
from fastppo_kernels.launch import ReductionLaunch, check_device, launch

NUM_METRICS = 8
# Two programs for each of an H200's multiprocessors. Not measured on a GPU yet (docs/gpu.md).
LAUNCH = ReductionLaunch(block=512, num_warps=8, programs=264)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _twice_rho(x, huber):
    """2ρ(x)."""
    if huber is not None:
        size = tl.abs(x)
        return tl.where(size > huber, huber * (2.0 * size - huber), x * x)
    return x * x


@triton.jit
def _moments(counts, means, m2s):
    """Mean and second moment around it of parts (2, K) with counts (K,), by Chan's rule: (2,).
    Means are averaged around their average, which float32 rounds when they are large."""
    n = tl.maximum(tl.sum(counts, axis=0), 1.0)
    about = tl.sum(counts[None, :] * means, axis=1) / n
    off = means - about[:, None]
    rest = tl.sum(counts[None, :] * off, axis=1) / n
    away = off - rest[:, None]
    return about + rest, tl.sum(m2s + counts[None, :] * away * away, axis=1)


@triton.jit
def _combine(loss_ptr, metrics_ptr, parts_ptr, num_programs, PARTS: tl.constexpr):
    """Sums add; means and second moments combine by Chan's rule."""
    sum_rows, mean_rows = tl.arange(0, 4), 4 + 2 * tl.arange(0, 2)
    lane = tl.arange(0, PARTS)
    there = lane < num_programs
    sums_ptr = parts_ptr + sum_rows[:, None] * num_programs + lane[None, :]
    means_ptr = parts_ptr + mean_rows[:, None] * num_programs + lane[None, :]
    counts = tl.load(parts_ptr + lane, mask=there, other=0.0)
    sums = tl.load(sums_ptr, mask=there[None, :], other=0.0)
    means = tl.load(means_ptr, mask=there[None, :], other=0.0)
    m2s = tl.load(means_ptr + num_programs, mask=there[None, :], other=0.0)
    mean, m2 = _moments(counts, means, m2s)
    total = tl.sum(sums, axis=1)
    tl.store(loss_ptr + sum_rows - 1, total, mask=sum_rows == 1)
    tl.store(metrics_ptr + sum_rows, total)
    tl.store(metrics_ptr + mean_rows, mean)
    tl.store(metrics_ptr + mean_rows + 1, m2)


@triton.jit(do_not_specialize=["num_tokens"])
def value_loss_kernel(
    loss_ptr,  # ()
    grad_ptr,
    metrics_ptr,  # (8,)
    parts_ptr,  # (8, programs)
    arrivals_ptr,
    values_ptr,
    old_values_ptr,
    returns_ptr,
    weights_ptr,
    num_tokens,
    clip,
    huber,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    sums = tl.zeros([BLOCK, 4], tl.float32)
    counts = tl.zeros([BLOCK], tl.float32)
    origins = tl.zeros([2, BLOCK], tl.float32)  # what each lane saw first
    means = origins  # Welford's, of what is left without it: large numbers keep their spread
    m2s = origins
    for step in range(0, (num_tokens - 1) // (BLOCK * num_programs) + 1):
        offs = (program + step * num_programs) * BLOCK + tl.arange(0, BLOCK)
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
        sums += four(one, 0.5 * w * size, (cut & valid).to(tl.float32), v).reshape(BLOCK, 4)
        both = tl.join(target, -error).trans()
        origins = tl.where((valid & (counts == 0.0))[None, :], both, origins)
        counts += one
        both -= origins
        away = tl.where(valid[None, :], both - means, 0.0)
        means += away / tl.maximum(counts, 1.0)[None, :]
        m2s += tl.where(valid[None, :], away * (both - means), 0.0)
    part_ptr = parts_ptr + program
    sum_rows, mean_rows = tl.arange(0, 4), 4 + 2 * tl.arange(0, 2)
    about = tl.sum(counts[None, :] * origins, axis=1) / tl.maximum(tl.sum(counts, axis=0), 1.0)
    mean, m2 = _moments(counts, origins - about[:, None] + means, m2s)
    tl.store(part_ptr + sum_rows * num_programs, tl.sum(sums, axis=0))
    tl.store(part_ptr + mean_rows * num_programs, about + mean)
    tl.store(part_ptr + (mean_rows + 1) * num_programs, m2)
    if is_last(arrivals_ptr, num_programs):
        _combine(loss_ptr, metrics_ptr, parts_ptr, num_programs, PARTS)


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    huber: float | None,
    table: ReductionLaunch = LAUNCH,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), gradient (N,), metrics (8,), all float32, of (N,) inputs of any floating dtype."""
    check_device("values", values)
    n, dtype = values.shape[0], torch.float32
    grad = values.new_empty(n, dtype=dtype)
    if n == 0:
        return values.new_zeros((), dtype=dtype), grad, values.new_zeros(NUM_METRICS, dtype=dtype)
    programs = min(triton.cdiv(n, table.block), table.programs)
    loss = values.new_empty((), dtype=dtype)
    metrics = values.new_empty(NUM_METRICS, dtype=dtype)
    launch(
        value_loss_kernel,
        (programs,),
        table,
        loss_ptr=loss,
        grad_ptr=grad,
        metrics_ptr=metrics,
        parts_ptr=values.new_empty((NUM_METRICS, programs), dtype=dtype),
        arrivals_ptr=arrival_counter(values.device),
        values_ptr=values.contiguous(),
        old_values_ptr=None if old_values is None or clip is None else old_values.contiguous(),
        returns_ptr=returns.contiguous(),
        weights_ptr=weights.contiguous(),
        num_tokens=n,
        clip=None if clip is None else float(clip),
        huber=None if huber is None else float(huber),
        BLOCK=table.block,
        PARTS=triton.next_power_of_2(table.programs),
    )
    return loss, grad, metrics
