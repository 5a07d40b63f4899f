"""The PPO loss of rows of logits, and their gradient, in one launch.

Shapes: N rows, V vocabulary, b bytes per logit. For each row the kernel reads the logits once for
logprob and entropy, then knows the row's share of the loss

    L = w·( is·pg + kl_coef·kl − ent_coef·entropy ),   r = exp(clamp(logprob − old, ±20))
    pg = max(−A·r, −A·clip(r, low, high)), bounded by −A·dual_clip for A < 0

and with it g = ∂L/∂logprob and h = ∂L/∂entropy, reads the row again, backwards, the part read last
first, because it is still in the L2 cache, and writes

    ∂L/∂logit_j = (1/τ)·[ g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy) ]·(1 − (x_j/c)²)

over it, or into another array. Rows of weight 0 get a gradient of 0 and add nothing, whatever they
hold.

Every row also writes its entries of the loss and the metrics; summing (or maximising) them over the
rows is the second stage, so no sum depends on timing.

Bytes moved per row: V·b read from memory, V·b read again (from the L2 cache where it fits), V·b
written (of the other array's b); without gradients only the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import choose, launch
from fastppo_kernels.row_math import (
    LOG2_E,
    gradient_factors,
    row_statistics,
    write_gradient,
)
from fastppo_kernels.token_logprobs import STATISTICS_LAUNCHES, check_logits

# Exponents of ratios and of the KL estimate are clamped to ± this.
LIMIT = tl.constexpr(20.0)

ENTRIES = (
    "loss",
    "num_tokens",
    "policy_loss",
    "kl_loss",
    "clipfrac",
    "clipfrac_low",
    "clipfrac_high",
    "clipfrac_dual",
    "approx_kl",
    "old_approx_kl",
    "entropy",
    "ratio",
    "ratio_squared",
    "ref_kl",
    "logprob_diff",
    "rollout_kl",
    "is_weight",
    "is_clipfrac",
    "ratio_max",
    "logprob_diff_max",
)
"""What `ppo_rows` returns for each row, in this order."""


@dataclass(frozen=True, slots=True)
class PPOKnobs:
    """The numbers of the loss. `kl`: 1, 2, 3 for the estimators k1, k2, k3; `correction`: 0 none, 1
    TIS, 2 IcePop; dual_clip inf: no bound."""

    low: float
    high: float
    dual_clip: float
    kl_coef: float
    ent_coef: float
    is_cap: float
    is_low: float
    is_high: float
    kl: int
    correction: int


@triton.jit
def clamp(x, limit):
    """x within ± limit; NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def expm1(x):
    """e^x − 1, by its series near 0."""
    series = 1.0 + x / 7.0
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)


@triton.jit
def k3(x):
    """e^x − 1 − x, the k3 estimate of KL(p‖q) with x = ln q − ln p at samples of p."""
    return expm1(clamp(x, LIMIT)) - x


@triton.jit(do_not_specialize=["stride_entry"])  # the number of rows
def ppo_rows_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    temperatures_ptr,
    old_ptr,
    advantages_ptr,
    weights_ptr,
    ref_ptr,
    rollout_ptr,
    entries_ptr,
    vocab,
    stride_row,
    stride_col,
    stride_out_row,
    stride_out_col,
    stride_entry,
    temperature,
    softcap,
    low,
    high,
    dual_clip,
    kl_coef,
    ent_coef,
    is_cap,
    is_low,
    is_high,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_KL: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    target = tl.load(targets_ptr + row)
    tau = temperature
    if HAS_TEMPERATURES:
        tau = tl.load(temperatures_ptr + row).to(tl.float32)
    logprob, entropy, m, log_sum = row_statistics(
        row_ptr, target, vocab, stride_col, tau, softcap, HAS_SOFTCAP, BLOCK, WIDTH
    )

    w = tl.load(weights_ptr + row).to(tl.float32)
    valid = w != 0
    nan = float("nan")
    lp = tl.where(valid, logprob, 0.0)
    ent = tl.where(valid, entropy, 0.0)
    old = tl.where(valid, tl.load(old_ptr + row).to(tl.float32), 0.0)
    adv = tl.where(valid, tl.load(advantages_ptr + row).to(tl.float32), 0.0)

    log_ratio = lp - old
    r = tl.exp(clamp(log_ratio, LIMIT))
    inside = tl.where(r < low, low, tl.where(r > high, high, r))
    unclipped, clipped = -adv * r, -adv * inside
    # Not >=: a NaN has to reach the gradient and be seen there.
    cut = unclipped < clipped
    pg = tl.where(cut, clipped, unclipped)
    bound = -adv * dual_clip
    bounded = (adv < 0) & (pg > bound)
    pg = tl.where(bounded, bound, pg)
    active = (cut | bounded | (tl.abs(log_ratio) > LIMIT)) == 0

    is_weight = 1.0
    is_cut = w != w
    drift = nan
    drift_kl = nan
    if HAS_ROLLOUT:
        rollout = tl.where(valid, tl.load(rollout_ptr + row).to(tl.float32), 0.0)
        drift = tl.abs(lp - rollout)
        drift_kl = k3(lp - rollout)
        if CORRECTION != 0:
            is_weight = tl.exp(clamp(old - rollout, LIMIT))
            if CORRECTION == 1:
                is_cut = is_weight > is_cap
                is_weight = tl.where(is_cut, is_cap, is_weight)
            else:
                is_cut = (is_weight < is_low) | (is_weight > is_high)
                is_weight = tl.where(is_cut, 0.0, is_weight)

    policy_loss = w * is_weight * pg
    g = tl.where(active, -adv * r * is_weight * w, 0.0)
    kl_loss = 0.0
    ref_kl = nan
    if HAS_REF:
        d = lp - tl.where(valid, tl.load(ref_ptr + row).to(tl.float32), 0.0)
        ref_kl = k3(-d)
        if HAS_KL:
            if KL == 1:
                kl_loss = kl_coef * w * d
                g += kl_coef * w
            elif KL == 2:
                kl_loss = kl_coef * w * (d * d / 2.0)
                g += kl_coef * w * d
            else:
                kl_loss = kl_coef * w * ref_kl
                slope = tl.where(tl.abs(d) > LIMIT, 1.0, -expm1(clamp(-d, LIMIT)))
                g += kl_coef * w * slope
    h = 0.0
    if HAS_ENTROPY_GRAD:
        h = -ent_coef * w

    # A row that does not count has r = 1 and A = 0: outside no bound.
    below, above = r < low, r > high
    one = tl.where(valid, 1.0, 0.0)
    at = entries_ptr + row
    tl.store(at, policy_loss + kl_loss - ent_coef * w * ent)
    tl.store(at + 1 * stride_entry, one)
    tl.store(at + 2 * stride_entry, policy_loss)
    tl.store(at + 3 * stride_entry, kl_loss)
    tl.store(at + 4 * stride_entry, (below | above).to(tl.float32))
    tl.store(at + 5 * stride_entry, (below & (adv < 0)).to(tl.float32))
    tl.store(at + 6 * stride_entry, (above & (adv > 0)).to(tl.float32))
    tl.store(at + 7 * stride_entry, bounded.to(tl.float32))
    tl.store(at + 8 * stride_entry, k3(log_ratio))
    tl.store(at + 9 * stride_entry, -log_ratio)
    tl.store(at + 10 * stride_entry, ent)
    tl.store(at + 11 * stride_entry, one * r)
    tl.store(at + 12 * stride_entry, one * r * r)
    tl.store(at + 13 * stride_entry, ref_kl)
    tl.store(at + 14 * stride_entry, drift)
    tl.store(at + 15 * stride_entry, drift_kl)
    tl.store(at + 16 * stride_entry, one * is_weight)
    tl.store(at + 17 * stride_entry, one * is_cut.to(tl.float32))
    tl.store(at + 18 * stride_entry, one * r)
    tl.store(at + 19 * stride_entry, drift)

    if out_ptr is not None:
        # Every thread has read the row, the target's logit included, before one writes to it.
        tl.debug_barrier()
        live = valid & ((g != 0) | (h != 0))
        at_target, constant, slope = gradient_factors(g, h, entropy, log_sum, tau)
        steps = tl.cdiv(vocab, BLOCK)
        for step in tl.range(0, steps):
            write_gradient(
                row_ptr,
                out_ptr + row * stride_out_row,
                (steps - 1 - step) * BLOCK,
                target,
                live,
                vocab,
                stride_col,
                stride_out_col,
                m,
                LOG2_E / tau,
                at_target,
                constant,
                slope,
                softcap,
                HAS_SOFTCAP,
                HAS_ENTROPY_GRAD,
                BLOCK,
            )


def ppo_rows(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    knobs: PPOKnobs,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Entries (len(ENTRIES), N) float32 of every row, and the gradient of the summed loss.

    The gradient (N, V) goes to `out`, which may be `logits` itself or have another dtype; None:
    nobody wants it.

    An entry that needs ref_logprobs or rollout_logprobs and has none is NaN. Arguments as in
    `token_logprobs_fwd`; the per-row inputs are (N,) floating and contiguous.
    """
    rows = temperature if isinstance(temperature, Tensor) else None
    inputs = (old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    check_logits(logits, targets, rows, *inputs)
    assert out is None or out.shape == logits.shape
    assert knobs.kl_coef == 0 or ref_logprobs is not None
    assert knobs.correction == 0 or rollout_logprobs is not None
    n, vocab = logits.shape
    entries = logits.new_empty((len(ENTRIES), n), dtype=torch.float32)
    if n == 0:
        return entries
    table = choose(STATISTICS_LAUNCHES, vocab)
    launch(
        ppo_rows_kernel,
        (n,),
        table,
        logits_ptr=logits,
        out_ptr=out,
        targets_ptr=targets,
        temperatures_ptr=rows,
        old_ptr=old_logprobs,
        advantages_ptr=advantages,
        weights_ptr=weights,
        ref_ptr=ref_logprobs,
        rollout_ptr=rollout_logprobs,
        entries_ptr=entries,
        vocab=vocab,
        stride_row=logits.stride(0),
        stride_col=logits.stride(1),
        stride_out_row=0 if out is None else out.stride(0),
        stride_out_col=0 if out is None else out.stride(1),
        stride_entry=n,
        temperature=1.0 if rows is not None else float(temperature),
        softcap=1.0 if softcap is None else float(softcap),
        low=float(knobs.low),
        high=float(knobs.high),
        dual_clip=float(knobs.dual_clip),
        kl_coef=float(knobs.kl_coef),
        ent_coef=float(knobs.ent_coef),
        is_cap=float(knobs.is_cap),
        is_low=float(knobs.is_low),
        is_high=float(knobs.is_high),
        HAS_TEMPERATURES=rows is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_REF=ref_logprobs is not None,
        HAS_ROLLOUT=rollout_logprobs is not None,
        HAS_KL=knobs.kl_coef != 0,
        KL=knobs.kl,
        CORRECTION=knobs.correction,
        HAS_ENTROPY_GRAD=knobs.ent_coef != 0,
        BLOCK=table.block,
        WIDTH=16 // logits.itemsize,
    )
    return entries
