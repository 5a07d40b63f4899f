"""The PPO loss of one token and its derivatives, for kernels over logits and over tokens alike.

With w the weight, A the advantage and r = exp(clamp(logprob − old, ±20)), a token adds

    w·( is·pg + kl_coef·kl − ent_coef·entropy )
    pg = max(−A·r, −A·clip(r, low, high)), bounded by −A·dual_clip for A < 0

Every function takes scalars (one row per program) or blocks of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Exponents of ratios and of the KL estimate are clamped to ± this.
LIMIT = tl.constexpr(20.0)
# What a token adds to the sums, and what it enters in the maxima; see `ppo_terms`.
NUM_SUMS = tl.constexpr(18)
NUM_ENTRIES = tl.constexpr(20)


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


@triton.jit
def ppo_terms(
    lp,
    ent,
    old,
    adv,
    w,
    ref,
    rollout,
    low,
    high,
    dual_clip,
    kl_coef,
    ent_coef,
    is_cap,
    is_low,
    is_high,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_KL: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
):
    """∂L/∂logprob, ∂L/∂entropy, then NUM_ENTRIES in the order of `ppo_rows.ENTRIES`: the loss, the
    metrics that are summed, those that are maximised. Where w is 0 the other inputs must be 0 too,
    and every result is 0, except that what was not measured is NaN."""
    valid = w != 0
    one = tl.where(valid, 1.0, 0.0)
    nan = tl.where(valid, float("nan"), float("nan"))
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

    is_weight = one
    is_cut = w != w
    drift = nan
    drift_kl = nan
    if HAS_ROLLOUT:
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
    kl_loss = one * 0.0
    ref_kl = nan
    if HAS_REF:
        d = lp - ref
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
    loss = policy_loss + kl_loss
    h = one * 0.0
    if HAS_ENTROPY_GRAD:
        loss -= ent_coef * w * ent
        h = -ent_coef * w

    # A token that does not count has r = 1 and A = 0: outside no bound.
    below, above = r < low, r > high
    return (
        g,
        h,
        loss,
        one,
        policy_loss,
        kl_loss,
        (below | above).to(tl.float32),
        (below & (adv < 0)).to(tl.float32),
        (above & (adv > 0)).to(tl.float32),
        bounded.to(tl.float32),
        k3(log_ratio),
        -log_ratio,
        ent,
        one * r,
        one * r * r,
        ref_kl,
        drift,
        drift_kl,
        one * is_weight,
        one * is_cut.to(tl.float32),
        one * r,
        drift,
    )
