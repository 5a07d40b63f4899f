"""The PPO loss of rows with its gradient, differentiated once for every op that needs it.

`ppo_loss` hands the gradients to autograd; `linear_ppo_loss` turns them into gradients of logits
on the spot. Formulas: see `fastppo.ops.ppo_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops._checks import check_cu_seqlens, check_rows
from fastppo.ops._ppo_loss_config import PPOLossConfig
from fastppo.ops._ppo_metrics import ppo_metrics
from fastppo.ops._precision import compute_dtype
from fastppo.ops._segments import segment_ids, segment_sum
from fastppo.ops.kl_penalty import LOG_RATIO_LIMIT, kl_and_slope


class PPORows(NamedTuple):
    """The loss of some rows, its gradient with respect to each of them, and their metrics."""

    loss: Tensor
    logprob_grad: Tensor
    entropy_grad: Tensor | None
    metrics: Tensor


class PPOInputs(NamedTuple):
    """Constant per-token inputs of the loss, each (N,) or None."""

    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None

    def select(self, rows: Tensor | slice) -> PPOInputs:
        """The same inputs at some rows."""
        return self._map(lambda x: x[rows])

    def detach(self) -> PPOInputs:
        """The same inputs outside autograd."""
        return self._map(torch.Tensor.detach)

    def contiguous(self) -> PPOInputs:
        """The same inputs in one piece of memory each."""
        return self._map(torch.Tensor.contiguous)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> PPOInputs:
        return PPOInputs(
            fn(self.old_logprobs),
            fn(self.advantages),
            fn(self.weights),
            None if self.ref_logprobs is None else fn(self.ref_logprobs),
            None if self.rollout_logprobs is None else fn(self.rollout_logprobs),
        )


def ppo_rows(
    logprobs: Tensor,
    entropy: Tensor | None,
    inputs: PPOInputs,
    config: PPOLossConfig,
    cu_seqlens: Tensor | None = None,
) -> PPORows:
    """Loss, gradients and metrics of (N,) rows; the only place where the loss is differentiated."""
    dtype = compute_dtype(logprobs)
    w = inputs.weights.to(dtype)
    valid = w != 0
    zero = torch.zeros((), dtype=dtype, device=w.device)

    def clean(x: Tensor) -> Tensor:
        return torch.where(valid, x.to(dtype), zero)

    lp, old, adv = clean(logprobs), clean(inputs.old_logprobs), clean(inputs.advantages)
    ref = None if inputs.ref_logprobs is None else clean(inputs.ref_logprobs)
    rollout = None if inputs.rollout_logprobs is None else clean(inputs.rollout_logprobs)
    log_ratio = token_log_ratio = lp - old
    if config.ratio_level == "sequence":
        assert cu_seqlens is not None
        sequence = segment_ids(cu_seqlens, w.shape[0])
        counts = segment_sum(valid.to(dtype), cu_seqlens).clamp(min=1.0)
        log_ratio = (segment_sum(token_log_ratio, cu_seqlens) / counts)[sequence]
    r = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    low, high = 1 - config.clip_coef_low, 1 + config.clip_coef_high
    unclipped, clipped = -adv * r, -adv * r.clamp(low, high)
    pg = torch.maximum(unclipped, clipped)
    active = ~(unclipped < clipped)  # not >=: a NaN has to reach the gradient and be seen there
    bounded = torch.zeros_like(valid)
    if config.dual_clip is not None:
        bound = -adv * config.dual_clip
        bounded = (adv < 0) & (pg > bound)
        pg = torch.where(bounded, bound, pg)
        active = active & ~bounded
    active = active & ~(log_ratio.abs() > LOG_RATIO_LIMIT)

    is_weight, is_cut = torch.ones_like(w), torch.zeros_like(valid)
    if config.is_correction is not None:
        assert rollout is not None
        is_weight = torch.exp((old - rollout).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
        if config.is_correction == "tis":
            is_cut = is_weight > config.is_cap
            is_weight = is_weight.clamp(max=config.is_cap)
        else:
            is_cut = (is_weight < config.is_low) | (is_weight > config.is_high)
            is_weight = torch.where(is_cut, zero, is_weight)

    policy_loss = (w * is_weight * pg).sum()
    g = torch.where(active, -adv * r * is_weight * w, zero)
    if config.ratio_level == "sequence":
        assert cu_seqlens is not None
        g = torch.where(valid, (segment_sum(g, cu_seqlens) / counts)[sequence], zero)
    loss, kl_loss, h = policy_loss, zero, None
    if config.kl_coef != 0:
        assert ref is not None
        kl, slope = kl_and_slope(lp - ref, config.kl_estimator)
        kl_loss = config.kl_coef * (w * kl).sum()
        loss = loss + kl_loss
        g = g + config.kl_coef * w * slope
    if config.ent_coef != 0:
        assert entropy is not None
        loss = loss - config.ent_coef * (w * clean(entropy)).sum()
        h = -config.ent_coef * w

    metrics = ppo_metrics(
        valid=valid,
        ratio=clean(r),
        log_ratio=token_log_ratio,
        advantages=adv,
        clip_range=(low, high),
        bounded=bounded,
        is_weight=is_weight,
        is_cut=is_cut,
        policy_loss=policy_loss,
        kl_loss=kl_loss,
        entropy=None if entropy is None else clean(entropy),
        ref_log_ratio=None if ref is None else lp - ref,
        rollout_log_ratio=None if rollout is None else lp - rollout,
    )
    return PPORows(loss, g, h, metrics)


def check_ppo_inputs(
    like: Tensor, inputs: PPOInputs, config: PPOLossConfig, cu_seqlens: Tensor | None
) -> None:
    """Raise unless the inputs fit the (N,) tensor `like` and hold what the config needs."""
    if not isinstance(config, PPOLossConfig):
        raise TypeError(f"config: expected a PPOLossConfig, got {type(config).__name__}")
    for name, x in zip(PPOInputs._fields, inputs, strict=True):
        check_rows(name, x, like)
    if config.kl_coef != 0 and inputs.ref_logprobs is None:
        raise ValueError(f"ref_logprobs: kl_coef = {config.kl_coef} needs a (N,) tensor, got None")
    if config.is_correction is not None and inputs.rollout_logprobs is None:
        raise ValueError(
            f"rollout_logprobs: is_correction = {config.is_correction!r} needs a (N,) tensor, "
            "got None"
        )
    if config.ratio_level == "sequence":
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: ratio_level = 'sequence' needs (B+1,) offsets, got None")
        check_cu_seqlens(cu_seqlens, like.shape[0], like.device)
