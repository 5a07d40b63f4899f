"""The PPO policy loss from log-probabilities, with per-token weights.

Shapes: N response tokens of B sequences. With r = exp(clamp(logprob − old, ±20)), A the advantage,

    pg = max(−A·r, −A·clip(r, 1 − clip_coef_low, 1 + clip_coef_high))      (arXiv 1707.06347, eq. 7)
    pg = min(pg, −A·c)  for A < 0 with dual_clip = c                       (arXiv 1912.09729)
    loss = Σ_t weights_t·( is_t·pg_t + kl_coef·kl_t − ent_coef·entropy_t )

is_t = 1 without is_correction. `weights` hold mask and normaliser, so micro-batches add up exactly.
ratio_level "sequence" (GSPO, arXiv 2507.18071): every token of a sequence has
r = exp(clamp(mean over its valid tokens of (logprob − old), ±20)), and the gradient goes through
the mean.

    g = ∂L/∂logprob = w·( is·r·∂pg/∂r + kl_coef·∂kl/∂logprob ),    h = ∂L/∂entropy = −w·ent_coef

with ∂pg/∂r = −A where the unclipped branch is the active one, else 0. Token-level g and h depend on
their own token only, which is what lets `linear_ppo_loss` write gradients in its forward sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops._checks import check_rows, check_tensor
from fastppo.ops._ppo_loss_config import PPOLossConfig, config_arguments
from fastppo.ops._ppo_loss_op import ppo_loss_op
from fastppo.ops._ppo_metrics import PPO_METRIC_NAMES
from fastppo.ops._ppo_rows import PPOInputs, check_ppo_inputs
from fastppo.ops._segments import segment_ids
from fastppo.ops.kl_penalty import LOG_RATIO_LIMIT, kl_penalty_reference


class PPOLoss(NamedTuple):
    """Results of the policy losses."""

    loss: Tensor
    """() float32, differentiable."""
    metrics: Tensor
    """(len(PPO_METRIC_NAMES),) float32, detached; see `reduce_ppo_metrics`."""


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: PPOLossConfig,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PPOLoss:
    """Plain torch over the valid tokens picked out one by one; the loss differentiable by
    autograd."""
    keep = weights != 0
    lp, old, adv, w = logprobs[keep], old_logprobs[keep], advantages[keep], weights[keep]
    low, high = 1 - config.clip_coef_low, 1 + config.clip_coef_high
    log_ratio = lp - old
    if config.ratio_level == "sequence":
        assert cu_seqlens is not None
        sequence = segment_ids(cu_seqlens, keep.shape[0])[keep].tolist()
        members = {i: [j == i for j in sequence] for i in set(sequence)}
        means = {i: log_ratio[torch.tensor(m)].mean() for i, m in members.items()}
        log_ratio = torch.stack([means[i] for i in sequence]) if sequence else log_ratio
    r = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    pg = torch.max(-adv * r, -adv * r.clamp(low, high))
    bounded = torch.zeros_like(r)
    if config.dual_clip is not None:
        bounded = (adv < 0) & (pg > -adv * config.dual_clip)
        pg = torch.where(adv < 0, torch.min(pg, -adv * config.dual_clip), pg)
    is_weight, is_cut = torch.ones_like(r), torch.zeros_like(r)
    if config.is_correction is not None:
        assert rollout_logprobs is not None
        ratio = torch.exp((old - rollout_logprobs[keep]).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        is_cut = ratio > (config.is_cap if config.is_correction == "tis" else config.is_high)
        if config.is_correction == "tis":
            is_weight = ratio.clamp(max=config.is_cap)
        else:
            is_cut = is_cut | (ratio < config.is_low)
            is_weight = torch.where(is_cut, 0.0, ratio)
    policy_loss = loss = (w * is_weight * pg).sum()
    kl_loss = torch.zeros_like(loss)
    if config.kl_coef != 0:
        assert ref_logprobs is not None
        kl = kl_penalty_reference(lp, ref_logprobs[keep], estimator=config.kl_estimator)
        kl_loss = config.kl_coef * (w * kl).sum()
    loss = loss + kl_loss
    if config.ent_coef != 0:
        assert entropy is not None
        loss = loss - config.ent_coef * (w * entropy[keep]).sum()

    nan = torch.full_like(lp, torch.nan)
    to_old, to_ref = lp - old, nan if ref_logprobs is None else lp - ref_logprobs[keep]
    drift = nan if rollout_logprobs is None else lp - rollout_logprobs[keep]
    per_token = {
        "num_tokens": torch.ones_like(r),
        "clipfrac": (r < low) | (r > high),
        "clipfrac_low": (r < low) & (adv < 0),
        "clipfrac_high": (r > high) & (adv > 0),
        "clipfrac_dual": bounded,
        "approx_kl": to_old.exp() - 1 - to_old,
        "old_approx_kl": -to_old,
        "entropy": nan if entropy is None else entropy[keep],
        "ratio": r,
        "ratio_squared": r * r,
        "ref_kl": (-to_ref).exp() - 1 + to_ref,
        "logprob_diff": drift.abs(),
        "rollout_kl": drift.exp() - 1 - drift,
        "is_weight": is_weight,
        "is_clipfrac": is_cut,
    }
    entries = {name: x.to(lp.dtype).sum() for name, x in per_token.items()}
    entries |= {"policy_loss": policy_loss, "kl_loss": kl_loss}
    entries |= {"ratio_max": r.max(), "logprob_diff_max": drift.abs().max()} if r.numel() else {}
    zero = torch.zeros_like(loss)
    metrics = torch.stack([entries.get(name, zero) for name in PPO_METRIC_NAMES])
    return PPOLoss(loss, metrics.detach())


class _PPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor | None,
        inputs: PPOInputs,
        config: PPOLossConfig,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        tensors = (logprobs, entropy, *inputs, cu_seqlens)
        loss, g, h, metrics = ppo_loss_op(*tensors, *config_arguments(config))
        ctx.save_for_backward(g, h)
        ctx.dtypes = logprobs.dtype, None if entropy is None else entropy.dtype
        ctx.has_entropy_grad = config.ent_coef != 0
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor | None, None, None, None]:
        g, h = ctx.saved_tensors
        entropy_grad = (grad * h).to(ctx.dtypes[1]) if ctx.has_entropy_grad else None
        return (grad * g).to(ctx.dtypes[0]), entropy_grad, None, None, None


_apply: Callable[..., tuple[Tensor, Tensor]] = _PPOLoss.apply


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: PPOLossConfig,
    *,
    entropy: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> PPOLoss:
    """Weighted PPO policy loss and its metrics.

    Args:
        logprobs: (N,) floating, nats, under the policy being trained. Differentiable.
        old_logprobs: (N,) under the policy at the start of the update; a constant.
        advantages: (N,) constant.
        weights: (N,) from `loss_weights`: 0 for masked tokens, which may hold NaN anywhere.
        config: PPOLossConfig.
        entropy: (N,) nats, differentiable; required when ent_coef ≠ 0, else only a metric.
        ref_logprobs: (N,) constant; required when kl_coef ≠ 0, else only a metric.
        rollout_logprobs: (N,) constant, as reported by the sampler; required by is_correction.
        cu_seqlens: (B+1,) int offsets of the sequences; required by ratio_level "sequence".

    Returns:
        PPOLoss(loss, metrics). Without valid tokens the loss and every gradient are 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device, or an input the config needs is
        missing.
    """
    check_tensor("logprobs", logprobs, ("N",))
    inputs = PPOInputs(old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    check_ppo_inputs(logprobs, inputs, config, cu_seqlens)
    check_rows("entropy", entropy, logprobs)
    if config.ent_coef != 0 and entropy is None:
        raise ValueError(f"entropy: ent_coef = {config.ent_coef} needs a (N,) tensor, got None")
    return PPOLoss(*_apply(logprobs, entropy, inputs.detach(), config, cu_seqlens))
