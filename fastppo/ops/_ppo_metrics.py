"""One vector of statistics per PPO loss call, combined over micro-batches and ranks at the end.

The vector is float32, lives on the device and is never read by the host inside a step. Entries are,
in the order of PPO_METRIC_NAMES,
  sums that are already normalised by the loss weights: adding micro-batches gives the mean,
  sums over valid tokens (weight ≠ 0): added, then divided once by the number of valid tokens,
  maxima over valid tokens.
An entry whose input was not given (entropy, ref_logprobs, rollout_logprobs) is NaN: not measured.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastppo_kernels.ppo_entries import ENTRIES, SUMS
from torch import Tensor

from fastppo.ops.kl_penalty import LOG_RATIO_LIMIT

PPO_METRIC_NAMES = ENTRIES[1:]  # after the loss
"""Entry names of the vector `PPOLoss.metrics`:

num_tokens: valid tokens. policy_loss, kl_loss: Σ w·pg and kl_coef·Σ w·kl.
clipfrac: ratio outside [1 − low, 1 + high] (CleanRL's). clipfrac_low, clipfrac_high: those of them
whose gradient the clip really cuts (advantage < 0, > 0). clipfrac_dual: cut by the dual clip.
approx_kl, old_approx_kl: k3 and k1 of KL(old‖new). entropy: nats per token.
ratio, ratio_max; ratio_squared becomes ess = (Σr)²/(n·Σr²), effective sample size per token in (0,
1]. ref_kl: k3 of KL(new‖reference). logprob_diff(_max): |new − rollout|. rollout_kl: k3 of
KL(rollout‖new). is_weight: mean of the correction weight. is_clipfrac: tokens it capped (TIS) or
dropped (IcePop).
"""
NUM_SUMS = len(SUMS) - 1
_OF_TOKENS = frozenset(SUMS) - {"loss", "num_tokens", "policy_loss", "kl_loss"}
"""Sums over valid tokens."""


def ppo_metrics(
    *,
    valid: Tensor,
    ratio: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    clip_range: tuple[float, float],
    bounded: Tensor,
    is_weight: Tensor,
    is_cut: Tensor,
    policy_loss: Tensor,
    kl_loss: Tensor,
    entropy: Tensor | None,
    ref_log_ratio: Tensor | None,
    rollout_log_ratio: Tensor | None,
) -> Tensor:
    """The vector of one call from finite (N,) inputs; `ratio` is 0 at tokens that are not valid."""
    low, high = clip_range
    below, above = ratio < low, ratio > high
    zero = torch.zeros_like(log_ratio)
    drift = zero if rollout_log_ratio is None else rollout_log_ratio
    per_token = {
        "num_tokens": valid,
        "clipfrac": below | above,
        "clipfrac_low": below & (advantages < 0),
        "clipfrac_high": above & (advantages > 0),
        "clipfrac_dual": bounded,
        "approx_kl": _k3(log_ratio),
        "old_approx_kl": -log_ratio,
        "entropy": zero if entropy is None else entropy,
        "ratio": ratio,
        "ratio_squared": ratio.square(),
        "ref_kl": zero if ref_log_ratio is None else _k3(-ref_log_ratio),
        "logprob_diff": drift.abs(),
        "rollout_kl": _k3(drift),
        "is_weight": is_weight,
        "is_clipfrac": is_cut,
    }
    sums = torch.stack([x.to(zero.dtype) for x in per_token.values()]).mul_(valid).sum(dim=1)
    entries = dict(zip(per_token, sums.unbind(), strict=True))
    entries |= {"policy_loss": policy_loss, "kl_loss": kl_loss}
    entries |= {"ratio_max": _max(ratio), "logprob_diff_max": _max(drift.abs())}
    not_measured = torch.full_like(policy_loss, torch.nan)
    if entropy is None:
        entries["entropy"] = not_measured
    if ref_log_ratio is None:
        entries["ref_kl"] = not_measured
    if rollout_log_ratio is None:
        for name in ("logprob_diff", "logprob_diff_max", "rollout_kl"):
            entries[name] = not_measured
    return torch.stack([entries[name] for name in PPO_METRIC_NAMES]).float()


def _k3(log_ratio: Tensor) -> Tensor:
    """e^x − 1 − x, the k3 estimate of KL(p‖q) with x = ln q − ln p at samples of p."""
    return torch.expm1(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) - log_ratio


def _max(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_zeros(1)]).amax()


def combine_ppo_metrics(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """One vector from many: (K, M) or K vectors (M,) → (M,). Sums add, maxima take the maximum."""
    stacked = vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))
    if stacked.shape[-1] != len(PPO_METRIC_NAMES):
        raise ValueError(
            f"vectors: expected {len(PPO_METRIC_NAMES)} entries each, got {tuple(stacked.shape)}"
        )
    stacked = stacked.reshape(-1, stacked.shape[-1])
    return torch.cat([stacked[:, :NUM_SUMS].sum(0), stacked[:, NUM_SUMS:].amax(0)])


def reduce_ppo_metrics(vectors: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Means, fractions and maxima by name, as 0-d tensors on the vectors' device (no host sync).

    Args:
        vectors: the `PPOLoss.metrics` of the micro-batches and ranks of one step: (M,), (K, M) or
            a sequence of (M,).

    Returns:
        PPO_METRIC_NAMES with ratio_squared replaced by ess. Without valid tokens every mean is 0.
    """
    entries = dict(zip(PPO_METRIC_NAMES, combine_ppo_metrics(vectors).unbind(), strict=True))
    tokens = entries["num_tokens"].clamp(min=1.0)
    squares = entries.pop("ratio_squared")
    ess = entries["ratio"].square() / (tokens * squares).clamp(min=torch.finfo(squares.dtype).tiny)
    return {k: v / tokens if k in _OF_TOKENS else v for k, v in entries.items()} | {"ess": ess}
