"""The metrics of one update, brought to the host in a single copy.

While the update runs every figure stays on the device: each optimiser step leaves a `StepStats`,
and `read` turns the list of them, with the statistics of the rollout batch itself, into floats.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastppo import ops
from fastppo.ppo.advantages import num_valid_sequences
from fastppo.ppo.experience import PackedBatch


class StepStats(NamedTuple):
    """What one optimiser step leaves on the device."""

    policy: Tensor  # (M,) fp32, the vector of ops.PPO_METRIC_NAMES
    value_loss: Tensor  # () fp32
    actor_norm: Tensor  # () fp32, gradient norm before clipping
    critic_norm: Tensor  # () fp32
    skipped: Tensor  # () fp32, how many steps in a row up to this one were skipped; 0: it was not


def read(
    batch: PackedBatch, steps: list[StepStats], *, epochs: int, has_critic: bool
) -> tuple[dict[str, float], list[int]]:
    """CleanRL's metrics over all optimiser steps, and `skipped` of each.

    Args:
        batch: the rollout batch.
        steps: of the update.
        epochs: passes over the batch that they made.
        has_critic: whether there is a value loss.

    Returns:
        Means over the response tokens that reached the head, `coverage` of all that count; the
        losses and the gradient norms are means over steps. What has no input (no reference, no
        critic, no rollout log-probabilities, no such token) is NaN or left out.
    """
    reduced = ops.reduce_ppo_metrics([step.policy for step in steps])
    scalars = {**reduced, **batch_metrics(batch)}
    assert batch.loss_mask is not None
    scalars["coverage"] = reduced["num_tokens"] / (epochs * batch.loss_mask.sum()).clamp(min=1)
    for name in ("policy_loss", "kl_loss"):  # these add up over the steps
        scalars[name] = scalars[name] / len(steps)
    scalars["actor_grad_norm"] = torch.stack([step.actor_norm for step in steps]).mean()
    if has_critic:
        scalars["value_loss"] = torch.stack([step.value_loss for step in steps]).mean()
        scalars["critic_grad_norm"] = torch.stack([step.critic_norm for step in steps]).mean()
    values = torch.stack([value.float() for value in scalars.values()])
    host = torch.cat([values, torch.stack([step.skipped for step in steps])]).tolist()
    metrics = {"value_loss": math.nan, **dict(zip(scalars, host, strict=False))}
    if not metrics["num_tokens"]:  # of nothing there is no mean
        known = ("num_tokens", "policy_loss", "kl_loss", "entropy")
        metrics |= {name: math.nan for name in reduced if name not in known}
    skipped = [int(count) for count in host[len(scalars) :]]
    metrics["nonfinite_steps"] = float(np.count_nonzero(skipped))
    return metrics, skipped


def batch_metrics(batch: PackedBatch) -> dict[str, Tensor]:
    """`entropy`, `kl`, `kl_sequence`, `explained_variance` and `dropped` of a rollout batch, as ()
    tensors.

    The entropy is the policy's before the update, over all tokens that count. The KL is k1, the
    mean of ln π_old − ln π_ref: per token, and summed per sequence. The explained variance is
    1 − Var(returns − values) / Var(returns), 0 where the returns do not vary. `dropped` is the
    share of sequences of which no token is in the loss.
    """
    mask = batch.loss_mask
    assert mask is not None
    count = mask.sum().clamp(min=1)
    nan = torch.full((), math.nan, device=batch.device)
    result = {"entropy": nan, "kl": nan, "kl_sequence": nan, "explained_variance": nan}
    if batch.entropy is not None:
        entropy = torch.where(mask, batch.entropy, 0.0).sum() / count
        result["entropy"] = torch.where(mask.any(), entropy, nan)
    result["dropped"] = 1.0 - num_valid_sequences(batch) / batch.num_sequences
    if batch.ref_logprobs is not None and batch.old_logprobs is not None:
        kl = torch.where(mask, batch.old_logprobs - batch.ref_logprobs, 0.0).sum()
        result["kl"] = kl / count
        result["kl_sequence"] = kl / num_valid_sequences(batch).clamp(min=1)
    if batch.values is not None and batch.returns is not None:

        def mean(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0.0).sum() / count

        def variance(x: Tensor) -> Tensor:
            return mean((x - mean(x)).square())

        total = variance(batch.returns)
        # returns = A + V of equal returns differ by rounding, which grows with either
        varies = total > 1e-10 * mean(batch.returns.square() + batch.values.square())
        unexplained = variance(batch.returns - batch.values) / torch.where(varies, total, 1.0)
        result["explained_variance"] = torch.where(varies, 1.0 - unexplained, 0.0)
    return result
