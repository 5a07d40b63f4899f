"""Device functions over one row of logits, shared by every kernel that reads logits.

Notation: V vocabulary, x_j = cap(logit_j) with cap(a) = c·tanh(a / c) (no softcap: the identity),
τ temperature, z = x / τ, k = log2(e) / τ so that e^{z_i − z_j} = 2^{k·(x_i − x_j)}.

A block of BLOCK columns is a (BLOCK / WIDTH, WIDTH) tile whose rows of WIDTH columns are 16 bytes:
one load instruction of one thread. Each tile row keeps its own running (m, s, u), so the loop over
the vocabulary has no communication between threads, and one rescaling per WIDTH columns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Below every finite logit, and finite: a block of −inf logits must not give −inf − (−inf).
LOWEST = tl.constexpr(-3.0e38)
# 2^−10000 is exactly 0, and 0·(−10000) is 0 where 0·(−inf) would be NaN.
FLOOR = tl.constexpr(-1.0e4)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


class Matrix(NamedTuple):
    """(N, V) in memory."""

    ptr: Any
    stride_row: int
    stride_col: int


class Row(NamedTuple):
    """One row of a `Matrix`."""

    ptr: Any
    stride: Any


class Factors(NamedTuple):
    """∂L/∂x_j = at_target·1[j = y] + (constant + slope·t_j)·2^{t_j} with t_j = k·(x_j − m)."""

    at_target: Any
    constant: Any
    slope: Any
    m: Any
    k: Any


def matrix(x: Tensor) -> Matrix:
    return Matrix(x, x.stride(0), x.stride(1))


@triton.jit
def row_of(x, row):
    """A row of a `Matrix`, by an int64 number."""
    return Row(x.ptr + row * x.stride_row, x.stride_col)


@triton.jit
def capped(x, softcap):
    """c·tanh(x / c), to about 1e-7·c; x without a softcap."""
    if softcap is not None:
        # NaN passes; e^{2|a|} = inf gives 1 − 0.
        a = tl.abs(x) / softcap
        t = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
        x = softcap * tl.where(x < 0, -t, t)
    return x


@triton.jit
def fold(x, m, s, u, k):
    """Take a (R, WIDTH) tile into the running maximum, Σ e^{z−m} and Σ k·(x−m)·e^{z−m}, each
    (R,)."""
    m_new = tl.maximum(m, tl.max(x, axis=1))
    t = (x - m_new[:, None]) * k
    e = tl.exp2(t)
    shift = tl.maximum((m - m_new) * k, FLOOR)
    rescale = tl.exp2(shift)
    u = rescale * (u + s * shift) + tl.sum(tl.maximum(t, FLOOR) * e, axis=1)
    s = rescale * s + tl.sum(e, axis=1)
    return m_new, s, u


@triton.jit
def row_statistics(logits, target, vocab, tau, softcap, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """logprob, entropy, max x and ln Σ e^{z − max z} of one `Row`, float32. A target outside
    [0, V) gives a NaN logprob."""
    k = LOG2_E / tau
    inside = (target >= 0) & (target < vocab)
    x_target = tl.load(
        logits.ptr + target.to(tl.int64) * logits.stride, mask=inside, other=float("nan")
    )
    lane = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    m = tl.full([BLOCK // WIDTH], LOWEST, tl.float32)
    s = tl.zeros([BLOCK // WIDTH], tl.float32)
    u = tl.zeros([BLOCK // WIDTH], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        offs = (start + lane).to(tl.int64) * logits.stride
        x = tl.load(logits.ptr + offs).to(tl.float32)
        m, s, u = fold(capped(x, softcap), m, s, u, k)
    if whole < vocab:
        mask = whole + lane < vocab
        offs = (whole + lane).to(tl.int64) * logits.stride
        x = tl.load(logits.ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, capped(x, softcap), -float("inf"))
        m, s, u = fold(x, m, s, u, k)

    m_row = tl.max(m, axis=0)
    shift = tl.maximum((m - m_row) * k, FLOOR)
    rescale = tl.exp2(shift)
    u_row = tl.sum(rescale * (u + s * shift), axis=0)
    s_row = tl.sum(rescale * s, axis=0)
    log_sum = tl.log(s_row)
    x_target = capped(x_target.to(tl.float32), softcap)
    # Comparisons, not minimum and maximum, which may drop a NaN.
    logprob = (x_target - m_row) / tau - log_sum
    logprob = tl.where(logprob > 0, 0.0, logprob)
    entropy = log_sum - LN_2 * (u_row / s_row)
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return logprob, entropy, m_row, log_sum


@triton.jit
def gradient_tile(x, offs, target, factors, softcap, HAS_ENTROPY_GRAD: tl.constexpr):
    """∂L/∂logit at columns offs."""
    x = capped(x, softcap)
    t = (x - factors.m) * factors.k
    grad = factors.constant * tl.exp2(t)
    if HAS_ENTROPY_GRAD:
        grad = (factors.constant + factors.slope * tl.maximum(t, FLOOR)) * tl.exp2(t)
    grad = tl.where(offs == target, grad + factors.at_target, grad)
    if softcap is not None:
        y = x / softcap
        grad = grad * (1.0 - y * y)
    return grad


@triton.jit
def gradient_factors(g, h, entropy, m, log_sum, tau):
    """`Factors` from (1/τ)·[ g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy) ], p_j = 2^{t_j} / s and
    ln p_j = t_j·ln 2 − ln s.
    """
    share = tl.exp(-log_sum) / tau
    constant = -(g + h * (entropy - log_sum)) * share
    return Factors(g / tau, constant, -LN_2 * h * share, m, LOG2_E / tau)


@triton.jit
def write_gradient(
    logits,
    out,
    start,
    target,
    live,
    vocab,
    factors,
    softcap,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of columns [start, start + BLOCK) of one `Row`; zeros, and nothing read,
    where the row is not live. `out` may be `logits`."""
    offs = start + tl.arange(0, BLOCK)
    wide = offs.to(tl.int64)
    dtype = out.ptr.dtype.element_ty
    if not live:
        zero = tl.zeros([BLOCK], tl.float32).to(dtype)
        tl.store(out.ptr + wide * out.stride, zero, mask=offs < vocab)
    elif start + BLOCK <= vocab:
        x = tl.load(logits.ptr + wide * logits.stride).to(tl.float32)
        grad = gradient_tile(x, offs, target, factors, softcap, HAS_ENTROPY_GRAD)
        tl.store(out.ptr + wide * out.stride, grad.to(dtype))
    else:
        mask = offs < vocab
        x = tl.load(logits.ptr + wide * logits.stride, mask=mask, other=0.0).to(tl.float32)
        grad = gradient_tile(x, offs, target, factors, softcap, HAS_ENTROPY_GRAD)
        tl.store(out.ptr + wide * out.stride, grad.to(dtype), mask=mask)
