"""The gradient of one minibatch: micro-batches of whole sequences, one fused loss each.

Shapes: B sequences, T packed tokens, N response tokens, H hidden size, M metrics.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastppo import ops
from fastppo.ppo.advantages import num_valid_sequences
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch, need
from fastppo.ppo.policy import Policy
from fastppo.training import interrupts


def accumulate(
    policy: Policy,
    batch: PackedBatch,
    config: PPOConfig,
    loss: ops.PPOLossConfig,
    *,
    token_budget: int,
    train_actor: bool,
) -> tuple[Tensor, Tensor]:
    """Add the gradient of one minibatch.

    Args:
        policy: actor and critic, whose parameters get the gradient.
        batch: the minibatch, with its advantages.
        config: how losses are aggregated and weighed.
        loss: the policy loss.
        token_budget: most tokens of a micro-batch. The normaliser is the whole minibatch's, so the
            gradient does not depend on how it is split.
        train_actor: False during the critic's warm-up.

    Returns:
        The metric vector of `ops.PPO_METRIC_NAMES` (M,) and the value loss (), both fp32.

    Raises:
        ValueError: a field that is missing.
        Interrupted: a signal came; see training/interrupts.py.
    """
    aggregation, has_critic = config.loss_aggregation, policy.value_head is not None
    mask = need(batch, "loss_mask", "step.advantages")
    if loss.kl_coef:
        need(batch, "ref_logprobs", "step.evaluate")
    if has_critic and config.clip_vloss:
        need(batch, "values", "step.evaluate")
    total: Tensor | float = mask.sum()
    if aggregation.startswith("seq-mean"):
        total = num_valid_sequences(batch)
    elif aggregation == "constant":
        total = batch.num_sequences * config.max_response_length
    weights = ops.loss_weights(batch.cu_responses, mask, aggregation=aggregation, total=total)
    live = needed = batch.valid_lengths
    if loss.zero_advantages_change_nothing:
        live = batch.active_lengths
        needed = needed if has_critic else live
    counted = np.flatnonzero(needed)
    batch = batch.replace(weights=weights)
    if 0 < len(counted) < batch.num_sequences:  # the others would be run for nothing
        live, batch = live[counted], batch.select(counted)
    parts = [
        _backward(policy, batch.select(b), config, loss, train_actor, int(live[b].sum()))
        for b in batch.bins(token_budget)
    ]
    metrics = ops.combine_ppo_metrics([part[0] for part in parts])
    return metrics, torch.stack([part[1] for part in parts]).sum()


def _backward(
    policy: Policy,
    batch: PackedBatch,
    config: PPOConfig,
    loss_config: ops.PPOLossConfig,
    train_actor: bool,
    num_live: int,
) -> tuple[Tensor, Tensor]:
    """Forward and backward of one micro-batch whose weights are already normalised; `num_live` of
    its rows reach the head.
    """
    interrupts.check()
    weights = need(batch, "weights", "ops.loss_weights")
    with policy.actor.autocast():
        with torch.set_grad_enabled(train_actor):
            hidden, head = policy.actor.hidden(batch), policy.actor.head  # (T, H)
            actor = ops.linear_ppo_loss(
                hidden.index_select(0, batch.rows),
                head.weight,
                batch.targets,
                need(batch, "old_logprobs", "step.evaluate"),
                need(batch, "advantages", "step.advantages"),
                weights,
                loss_config,
                ref_logprobs=batch.ref_logprobs,
                rollout_logprobs=batch.rollout_logprobs,
                bias=head.bias,
                temperature=config.temperature,
                cu_seqlens=batch.cu_responses,
                num_live=num_live,
                fp32_logits=config.fp32_logits,
            )
        loss = actor.loss
        value_loss = torch.zeros((), device=batch.device)
        if policy.value_head is not None:
            critic = ops.value_loss(
                policy.values(policy.critic_hidden(batch, hidden).index_select(0, batch.rows)),
                batch.values,
                need(batch, "returns", "step.advantages"),
                weights,
                clip=config.clip_vloss,
            )
            loss = loss + config.vf_coef * critic.loss
            value_loss = critic.loss.detach()
    loss.backward()
    return actor.metrics, value_loss
