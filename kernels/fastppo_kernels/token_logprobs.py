"""Log-probability of the taken token and entropy of rows of logits, and their gradient.

Shapes: N rows, V vocabulary, b bytes per logit. With c a softcap (or none) and τ a temperature,

    z = c·tanh(logits / c) / τ
    logprob = z_y − lse(z),    entropy = lse(z) − Σ p z,    p = softmax(z)
    ∂L/∂logit_j = (1/τ)·[ g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy) ]·(1 − (z_j·τ/c)²)

with g = ∂L/∂logprob and h = ∂L/∂entropy. Derivation of the one-pass form: kernels/README.md.

Bytes moved per row: forward V·b read; backward V·b read and V·b written, V·b written only where
both gradients are 0. Logits float16, bfloat16 or float32; everything else float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import Launch, Table, check_device, choose, launch
from fastppo_kernels.row_math import (
    gradient_factors,
    matrix,
    row_of,
    row_statistics,
    write_gradient,
)

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# The order of a sum is part of its result: every kernel that computes statistics uses this table,
# so that a log-probability is bitwise the same from each op and an on-policy ratio exactly 1.
# Of six candidates on an H200 (docs/gpu.md) one of those within noise of the best, and the one that
# spills nowhere: several programs fill a multiprocessor, one reading while another reduces.
STATISTICS_LAUNCHES: Table = (
    (1024, Launch(block=1024, num_warps=4)),
    (float("inf"), Launch(block=4096, num_warps=8)),
)
# One tile per program; the best of the six.
GRADIENT_LAUNCHES: Table = (
    (1024, Launch(block=1024, num_warps=4)),
    (16384, Launch(block=4096, num_warps=8)),
    (float("inf"), Launch(block=8192, num_warps=16)),
)


class RowStatistics(NamedTuple):
    """Per-row results, each (N,) float32."""

    logprobs: Tensor
    entropy: Tensor
    max: Tensor
    """Largest soft-capped logit, before the temperature."""
    log_sum: Tensor
    """ln Σ_j e^{z_j − max z}."""


@triton.jit
def token_logprobs_fwd_kernel(
    logits,  # Matrix
    vocab,
    targets_ptr,
    temperatures_ptr,
    stats,  # RowStatistics
    temperature,
    softcap,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tau = temperature
    if temperatures_ptr is not None:
        tau = tl.load(temperatures_ptr + row).to(tl.float32)
    logprob, entropy, m, log_sum = row_statistics(
        row_of(logits, row), tl.load(targets_ptr + row), vocab, tau, softcap, BLOCK, WIDTH
    )
    tl.store(stats.logprobs + row, logprob)
    tl.store(stats.entropy + row, entropy)
    tl.store(stats.max + row, m)
    tl.store(stats.log_sum + row, log_sum)


@triton.jit
def token_logprobs_bwd_kernel(
    logits,  # Matrix
    out,  # Matrix
    targets_ptr,
    temperatures_ptr,
    stats,  # RowStatistics
    logprobs_grad_ptr,
    entropy_grad_ptr,
    vocab,
    temperature,
    softcap,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tau = temperature
    if temperatures_ptr is not None:
        tau = tl.load(temperatures_ptr + row).to(tl.float32)
    g = tl.load(logprobs_grad_ptr + row).to(tl.float32)
    live = g != 0
    h = 0.0
    if entropy_grad_ptr is not None:
        h = tl.load(entropy_grad_ptr + row).to(tl.float32)
        live = live | (h != 0)
    entropy, log_sum = tl.load(stats.entropy + row), tl.load(stats.log_sum + row)
    factors = gradient_factors(g, h, entropy, tl.load(stats.max + row), log_sum, tau)
    write_gradient(
        row_of(logits, row),
        row_of(out, row),
        tl.program_id(1) * BLOCK,
        tl.load(targets_ptr + row),
        live,
        vocab,
        factors,
        softcap,
        entropy_grad_ptr is not None,
        BLOCK,
    )


def check_logits(logits: Tensor, targets: Tensor, *rows: Tensor | None) -> None:
    """Raise unless the kernels can read logits (N, V) and contiguous (N,) companions."""
    check_device("logits", logits)
    if logits.dtype not in LOGIT_DTYPES:
        raise TypeError(
            f"logits: expected dtype float16, bfloat16 or float32 on {logits.device}, "
            f"got {str(logits.dtype).removeprefix('torch.')}; convert them first"
        )
    for x in (targets, *rows):
        assert x is None or (x.shape == logits.shape[:1] and x.device == logits.device)
        assert x is None or x.is_contiguous()


def token_logprobs_fwd(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor,
    softcap: float | None,
) -> RowStatistics:
    """Statistics of every row in one pass.

    Args:
        logits: (N, V) float16, bfloat16 or float32, any strides. Loads are 16 bytes wide where the
            columns are contiguous and the row stride is a multiple of 16 elements.
        targets: (N,) int32 or int64.
        temperature: a number or (N,) floating, > 0.
        softcap: None or > 0.
    """
    rows = temperature if isinstance(temperature, Tensor) else None
    check_logits(logits, targets, rows)
    n, vocab = logits.shape
    stats = RowStatistics(*(logits.new_empty(n, dtype=torch.float32) for _ in range(4)))
    if n == 0:
        return stats
    knobs = choose(STATISTICS_LAUNCHES, vocab)
    launch(
        token_logprobs_fwd_kernel,
        (n,),
        knobs,
        logits=matrix(logits),
        targets_ptr=targets,
        temperatures_ptr=rows,
        stats=stats,
        vocab=vocab,
        temperature=1.0 if rows is not None else float(temperature),
        softcap=None if softcap is None else float(softcap),
        BLOCK=knobs.block,
        WIDTH=16 // logits.itemsize,
    )
    return stats


def token_logprobs_bwd_out(
    logits: Tensor,
    targets: Tensor,
    stats: RowStatistics,
    logprobs_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Write ∂L/∂logits (N, V) into `out`, which may be `logits` itself or have another dtype.

    Rows whose gradients are both 0 become exactly 0, whatever their logits hold. `logits` may be
    some columns of those the statistics are of: targets then count from the first of them, and one
    that is none of them matches none.

    Args:
        logprobs_grad, entropy_grad: (N,) floating; entropy_grad None where the loss does not use
            the entropy.
    """
    rows = temperature if isinstance(temperature, Tensor) else None
    check_logits(logits, targets, rows, logprobs_grad, entropy_grad, *stats)
    assert out.shape == logits.shape
    n, vocab = logits.shape
    if n == 0:
        return
    knobs = choose(GRADIENT_LAUNCHES, vocab)
    launch(
        token_logprobs_bwd_kernel,
        (n, triton.cdiv(vocab, knobs.block)),
        knobs,
        logits=matrix(logits),
        out=matrix(out),
        targets_ptr=targets,
        temperatures_ptr=rows,
        stats=stats,
        logprobs_grad_ptr=logprobs_grad,
        entropy_grad_ptr=entropy_grad,
        vocab=vocab,
        temperature=1.0 if rows is not None else float(temperature),
        softcap=None if softcap is None else float(softcap),
        BLOCK=knobs.block,
    )
