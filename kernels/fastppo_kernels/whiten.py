"""Whitening from the moments of blocks: y = (x − mean)·rsqrt(var + eps), var unbiased.

Each block of tokens has its number of valid entries n_i, their mean μ_i and M_i = Σ(x − μ_i)²,
written by `moments_kernel` or on the way by another kernel that had the tokens at hand. They
combine, in their order (Chan, Golub & LeVeque 1979), as

    mean = Σ n_i μ_i / n,   M = Σ ( M_i + n_i (μ_i − mean)² ),   var = M / (n − 1)

in float64, so that equal entries come out exactly 0. Every program of `whiten_kernel` combines all
blocks itself; where they are many, `combine_kernel` first makes groups of them one. No atomics:
same input, same bits.

Bytes per token, fp32: x and mask read twice (10) + y written (4).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import Launch, check_device, launch

# Tokens per program, of any of the kernels. Not measured on a GPU yet.
LAUNCH = Launch(block=1024, num_warps=8)


@triton.jit
def store_moments(row_ptr, x, valid):
    """Writes count, mean and Σ(x − mean)² of the valid entries."""
    x = tl.where(valid, x, 0.0).to(tl.float64)
    count = tl.sum(valid.to(tl.float64), axis=0)
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1.0)
    centred = tl.where(valid, x - mean, 0.0)
    tl.store(row_ptr, count)
    tl.store(row_ptr + 1, mean)
    tl.store(row_ptr + 2, tl.sum(centred * centred, axis=0))


@triton.jit
def _combined(moments_ptr, start, stop, BLOCK: tl.constexpr):
    """Count, mean and Σ(x − mean)² of rows [start, stop) of the moments together."""
    zeros = tl.zeros([BLOCK], tl.float64)
    counts, sums, squares = zeros, zeros, zeros
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        m = moments_ptr + rows.to(tl.int64) * 3
        n = tl.load(m, mask=rows < stop, other=0.0)
        counts += n
        sums += n * tl.load(m + 1, mask=rows < stop, other=0.0)
    count = tl.sum(counts, axis=0)
    mean = tl.sum(sums, axis=0) / tl.maximum(count, 1.0)
    for first in range(start, stop, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        m = moments_ptr + rows.to(tl.int64) * 3
        n = tl.load(m, mask=rows < stop, other=0.0)
        away = tl.load(m + 1, mask=rows < stop, other=0.0) - mean
        squares += tl.load(m + 2, mask=rows < stop, other=0.0) + n * away * away
    return count, mean, tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["num_tokens"])
def moments_kernel(moments_ptr, x_ptr, mask_ptr, num_tokens, BLOCK: tl.constexpr):
    """The moments of each block."""
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    valid = offs < num_tokens
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + offs, mask=valid, other=0) != 0
    store_moments(moments_ptr + block * 3, tl.load(x_ptr + offs, mask=valid, other=0.0), valid)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(out_ptr, moments_ptr, num_rows, BLOCK: tl.constexpr):
    """Each BLOCK rows of moments as one."""
    group = tl.program_id(0)
    stop = tl.minimum((group + 1) * BLOCK, num_rows)
    count, mean, squares = _combined(moments_ptr, group * BLOCK, stop, BLOCK)
    out_ptr += group.to(tl.int64) * 3
    tl.store(out_ptr, count)
    tl.store(out_ptr + 1, mean)
    tl.store(out_ptr + 2, squares)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def whiten_kernel(
    out_ptr,  # may be x_ptr
    x_ptr,
    mask_ptr,
    moments_ptr,
    num_tokens,
    num_rows,
    eps,
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Centres and scales the valid entries; the others become 0."""
    count, mean, squares = _combined(moments_ptr, 0, num_rows, BLOCK)
    scale = 1.0 / tl.sqrt(squares / tl.maximum(count - 1.0, 1.0) + eps)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_tokens
    valid = inside
    if mask_ptr is not None:
        valid &= tl.load(mask_ptr + offs, mask=inside, other=0) != 0
    x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    y = (x - mean) * scale
    if not SHIFT_MEAN:
        y += mean
    y = tl.where(valid, y, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, y, mask=inside)


def empty_moments(rows: int, device: torch.device) -> Tensor:
    """Room for (rows, 3) moments."""
    return torch.empty((rows, 3), dtype=torch.float64, device=device)


def whiten_from(
    moments: Tensor,
    x: Tensor,
    mask: Tensor | None,
    out: Tensor,
    eps: float,
    shift_mean: bool = True,
    knobs: Launch = LAUNCH,
) -> None:
    """Writes whitened x (N,) into `out`, which may be x, from its moments (blocks, 3) under the
    mask: one launch, one more for each power of 1024 that the blocks exceed."""
    if x.shape[0] == 0:
        return
    block = knobs.block
    while moments.shape[0] > block:
        fewer = empty_moments(triton.cdiv(moments.shape[0], block), x.device)
        rows = {"out_ptr": fewer, "moments_ptr": moments, "num_rows": moments.shape[0]}
        launch(combine_kernel, (fewer.shape[0],), knobs, **rows, BLOCK=block)
        moments = fewer
    launch(
        whiten_kernel,
        (triton.cdiv(x.shape[0], block),),
        knobs,
        out_ptr=out,
        x_ptr=x,
        mask_ptr=mask,
        moments_ptr=moments,
        num_tokens=x.shape[0],
        num_rows=moments.shape[0],
        eps=eps,
        SHIFT_MEAN=shift_mean,
        BLOCK=block,
    )


def whiten(
    x: Tensor, mask: Tensor | None, shift_mean: bool, eps: float, knobs: Launch = LAUNCH
) -> Tensor:
    """Whitened x (N,) floating, float64 for float64 x, else float32; mask (N,) bool or None."""
    check_device("x", x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    x, mask = x.contiguous(), None if mask is None else mask.contiguous()
    blocks = triton.cdiv(x.shape[0], knobs.block)
    moments = empty_moments(blocks, x.device)
    if blocks > 0:
        rows = {"moments_ptr": moments, "x_ptr": x, "mask_ptr": mask, "num_tokens": x.shape[0]}
        launch(moments_kernel, (blocks,), knobs, **rows, BLOCK=knobs.block)
    whiten_from(moments, x, mask, out, eps, shift_mean, knobs)
    return out
