"""The PPO loss of one token and its derivatives, for kernels over logits and over tokens alike.

With w the weight, A the advantage and r = exp(clamp(logprob − old, ±20)), a token adds

    w·( is·pg + kl_coef·kl − ent_coef·entropy )
    pg = max(−A·r, −A·clip(r, low, high)), bounded by −A·dual_clip for A < 0

Every function takes scalars (one row per program) or blocks of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastppo_kernels import ppo_entries
from fastppo_kernels.ppo_entries import ENTRIES, PPOTerms

# Exponents of ratios and of the KL estimate are clamped to ± this.
LIMIT = tl.constexpr(20.0)
NUM_ENTRIES = tl.constexpr(len(ENTRIES))
FIRST_ENTRY = tl.constexpr(ppo_entries.FIRST_ENTRY)


class PPOInputs(NamedTuple):
    """What the loss takes as constant, for each token: of a launch (N,) tensors, in a kernel
    pointers, then numbers. None where not given."""

    old: Any
    advantages: Any
    weights: Any
    ref: Any
    rollout: Any


class PPONumbers(NamedTuple):
    """Those of `PPOKnobs` that do not change what is compiled."""

    low: float
    high: float
    dual_clip: float
    kl_coef: float
    ent_coef: float
    is_cap: float
    is_low: float
    is_high: float


class PPOChoices(NamedTuple):
    """What is compiled. `kl`: as in `PPOKnobs`, 0 where no KL is in the loss."""

    kl: int
    correction: int
    entropy_grad: bool


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

    def numbers(self) -> PPONumbers:
        return PPONumbers(*(float(getattr(self, name)) for name in PPONumbers._fields))

    def choices(self) -> PPOChoices:
        kl = self.kl if self.kl_coef != 0 else 0
        return PPOChoices(kl, self.correction, self.ent_coef != 0)


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
def ppo_terms(lp, ent, token, numbers, CHOICES: tl.constexpr):
    """`PPOTerms` of log-probability, entropy and `PPOInputs` of one token or a block. Where the
    weight is 0 the others must be 0 too, and every result is 0, except that what was not measured
    is NaN."""
    old, adv, w = token.old, token.advantages, token.weights
    valid = w != 0
    one = tl.where(valid, 1.0, 0.0)
    nan = tl.where(valid, float("nan"), float("nan"))
    log_ratio = lp - old
    r = tl.exp(clamp(log_ratio, LIMIT))
    inside = tl.where(r < numbers.low, numbers.low, tl.where(r > numbers.high, numbers.high, r))
    unclipped, clipped = -adv * r, -adv * inside
    # Not >=: a NaN has to reach the gradient and be seen there.
    cut = unclipped < clipped
    pg = tl.where(cut, clipped, unclipped)
    bound = -adv * numbers.dual_clip
    bounded = (adv < 0) & (pg > bound)
    pg = tl.where(bounded, bound, pg)
    active = (cut | bounded | (tl.abs(log_ratio) > LIMIT)) == 0

    is_weight = one
    is_cut = w != w
    drift = nan
    drift_kl = nan
    if token.rollout is not None:
        drift = tl.abs(lp - token.rollout)
        drift_kl = k3(lp - token.rollout)
        if CHOICES.correction != 0:
            is_weight = tl.exp(clamp(old - token.rollout, LIMIT))
            if CHOICES.correction == 1:
                is_cut = is_weight > numbers.is_cap
                is_weight = tl.where(is_cut, numbers.is_cap, is_weight)
            else:
                is_cut = (is_weight < numbers.is_low) | (is_weight > numbers.is_high)
                is_weight = tl.where(is_cut, 0.0, is_weight)

    policy_loss = w * is_weight * pg
    g = tl.where(active, -adv * r * is_weight * w, 0.0)
    kl_loss = one * 0.0
    ref_kl = nan
    if token.ref is not None:
        d = lp - token.ref
        ref_kl = k3(-d)
        if CHOICES.kl == 1:
            kl_loss = numbers.kl_coef * w * d
            g += numbers.kl_coef * w
        elif CHOICES.kl == 2:
            kl_loss = numbers.kl_coef * w * (d * d / 2.0)
            g += numbers.kl_coef * w * d
        elif CHOICES.kl == 3:
            kl_loss = numbers.kl_coef * w * ref_kl
            slope = tl.where(tl.abs(d) > LIMIT, 1.0, -expm1(clamp(-d, LIMIT)))
            g += numbers.kl_coef * w * slope
    loss = policy_loss + kl_loss
    h = one * 0.0
    if CHOICES.entropy_grad:
        loss -= numbers.ent_coef * w * ent
        h = -numbers.ent_coef * w

    # A token that does not count has r = 1 and A = 0: outside no bound.
    below, above = r < numbers.low, r > numbers.high
    return PPOTerms(
        logprob_grad=g,
        entropy_grad=h,
        loss=loss,
        num_tokens=one,
        policy_loss=policy_loss,
        kl_loss=kl_loss,
        clipfrac=(below | above).to(tl.float32),
        clipfrac_low=(below & (adv < 0)).to(tl.float32),
        clipfrac_high=(above & (adv > 0)).to(tl.float32),
        clipfrac_dual=bounded.to(tl.float32),
        approx_kl=k3(log_ratio),
        old_approx_kl=-log_ratio,
        entropy=ent,
        ratio=one * r,
        ratio_squared=one * r * r,
        ref_kl=ref_kl,
        logprob_diff=drift,
        rollout_kl=drift_kl,
        is_weight=one * is_weight,
        is_clipfrac=one * is_cut.to(tl.float32),
        ratio_max=one * r,
        logprob_diff_max=drift,
    )
