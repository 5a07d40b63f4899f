"""Device functions over one row of logits, shared by every kernel that reads logits.

Notation: V vocabulary, x_j = cap(logit_j) with cap(a) = c·tanh(a / c) (no softcap: the identity),
τ temperature, z = x / τ, k = log2(e) / τ so that e^{z_i − z_j} = 2^{k·(x_i − x_j)}.

A block of BLOCK columns is a (BLOCK / WIDTH, WIDTH) tile whose rows of WIDTH columns are 16 bytes:
one load instruction of one thread. Each tile row keeps its own running (m, s, u), so the loop over
the vocabulary has no communication between threads, and one rescaling per WIDTH columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every finite logit, and finite: a block of −inf logits must not give −inf − (−inf).
LOWEST = tl.constexpr(-3.0e38)
# 2^−10000 is exactly 0, and 0·(−10000) is 0 where 0·(−inf) would be NaN.
FLOOR = tl.constexpr(-1.0e4)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(x, softcap, HAS_SOFTCAP: tl.constexpr):
    """c·tanh(x / c), to about 1e-7·c."""
    if HAS_SOFTCAP:
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
def row_statistics(
    row_ptr,
    target,
    vocab,
    stride_col,
    tau,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """logprob, entropy, max x and ln Σ e^{z − max z} of one row, float32. A target outside [0, V)
    gives a NaN logprob."""
    k = LOG2_E / tau
    inside = (target >= 0) & (target < vocab)
    x_target = tl.load(row_ptr + target.to(tl.int64) * stride_col, mask=inside, other=float("nan"))
    lane = tl.arange(0, BLOCK // WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    m = tl.full([BLOCK // WIDTH], LOWEST, tl.float32)
    s = tl.zeros([BLOCK // WIDTH], tl.float32)
    u = tl.zeros([BLOCK // WIDTH], tl.float32)
    whole = vocab // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK):
        offs = (start + lane).to(tl.int64) * stride_col
        x = tl.load(row_ptr + offs).to(tl.float32)
        m, s, u = fold(capped(x, softcap, HAS_SOFTCAP), m, s, u, k)
    if whole < vocab:
        mask = whole + lane < vocab
        offs = (whole + lane).to(tl.int64) * stride_col
        x = tl.load(row_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, capped(x, softcap, HAS_SOFTCAP), -float("inf"))
        m, s, u = fold(x, m, s, u, k)

    m_row = tl.max(m, axis=0)
    shift = tl.maximum((m - m_row) * k, FLOOR)
    rescale = tl.exp2(shift)
    u_row = tl.sum(rescale * (u + s * shift), axis=0)
    s_row = tl.sum(rescale * s, axis=0)
    log_sum = tl.log(s_row)
    x_target = capped(x_target.to(tl.float32), softcap, HAS_SOFTCAP)
    # Comparisons, not minimum and maximum, which may drop a NaN.
    logprob = (x_target - m_row) / tau - log_sum
    logprob = tl.where(logprob > 0, 0.0, logprob)
    entropy = log_sum - LN_2 * (u_row / s_row)
    entropy = tl.where(entropy < 0, 0.0, entropy)
    return logprob, entropy, m_row, log_sum


@triton.jit
def gradient_tile(
    x,
    offs,
    target,
    m,
    k,
    at_target,
    constant,
    slope,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
):
    """∂L/∂logit at columns offs, from the factors of `gradient_factors`."""
    x = capped(x, softcap, HAS_SOFTCAP)
    t = (x - m) * k
    grad = constant * tl.exp2(t)
    if HAS_ENTROPY_GRAD:
        grad = (constant + slope * tl.maximum(t, FLOOR)) * tl.exp2(t)
    grad = tl.where(offs == target, grad + at_target, grad)
    if HAS_SOFTCAP:
        y = x / softcap
        grad = grad * (1.0 - y * y)
    return grad


@triton.jit
def gradient_factors(g, h, entropy, log_sum, tau):
    """(at_target, constant, slope) with ∂L/∂x_j = at_target·1[j = y] + (constant +
    slope·t_j)·2^{t_j}, t_j = k·(x_j − m).

    From (1/τ)·[ g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy) ], p_j = 2^{t_j} / s and
    ln p_j = t_j·ln 2 − ln s.
    """
    share = tl.exp(-log_sum) / tau
    return g / tau, -(g + h * (entropy - log_sum)) * share, -LN_2 * h * share


@triton.jit
def write_gradient(
    in_ptr,
    out_ptr,
    start,
    target,
    live,
    vocab,
    stride_in,
    stride_out,
    m,
    k,
    at_target,
    constant,
    slope,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradient of columns [start, start + BLOCK) of one row; zeros, and nothing read,
    where the row is not live. The two pointers may be the same."""
    offs = start + tl.arange(0, BLOCK)
    wide = offs.to(tl.int64)
    if not live:
        zero = tl.zeros([BLOCK], tl.float32).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + wide * stride_out, zero, mask=offs < vocab)
    elif start + BLOCK <= vocab:
        x = tl.load(in_ptr + wide * stride_in).to(tl.float32)
        grad = gradient_tile(
            x, offs, target, m, k, at_target, constant, slope, softcap,
            HAS_SOFTCAP, HAS_ENTROPY_GRAD,
        )  # fmt: skip
        tl.store(out_ptr + wide * stride_out, grad.to(out_ptr.dtype.element_ty))
    else:
        mask = offs < vocab
        x = tl.load(in_ptr + wide * stride_in, mask=mask, other=0.0).to(tl.float32)
        grad = gradient_tile(
            x, offs, target, m, k, at_target, constant, slope, softcap,
            HAS_SOFTCAP, HAS_ENTROPY_GRAD,
        )  # fmt: skip
        tl.store(out_ptr + wide * stride_out, grad.to(out_ptr.dtype.element_ty), mask=mask)
