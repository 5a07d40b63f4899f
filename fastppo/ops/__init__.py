"""Differentiable building blocks of PPO on packed tokens, one per file.

Every op takes flat tensors over N response tokens, computes in float32 (float64 for float64
inputs) and names the argument when it refuses one. Beside each op `x` stands `x_reference`: the
same in plain torch, slow and obvious, which the tests hold it to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from fastppo.ops._ppo_loss_config import PPOLossConfig
from fastppo.ops._ppo_metrics import PPO_METRIC_NAMES, combine_ppo_metrics, reduce_ppo_metrics
from fastppo.ops.gae import GAE, gae, gae_reference
from fastppo.ops.gae_classic import gae_classic, gae_classic_reference
from fastppo.ops.group_advantages import group_advantages, group_advantages_reference
from fastppo.ops.kl_penalty import kl_penalty, kl_penalty_reference
from fastppo.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference
from fastppo.ops.linear_ppo_loss import linear_ppo_loss, linear_ppo_loss_reference, live_rows
from fastppo.ops.loss_weights import loss_weights, loss_weights_reference
from fastppo.ops.ppo_loss import PPOLoss, ppo_loss, ppo_loss_reference
from fastppo.ops.token_logprobs import LogProbs, token_logprobs, token_logprobs_reference
from fastppo.ops.value_loss import (
    VALUE_METRIC_NAMES,
    ValueLoss,
    combine_value_metrics,
    reduce_value_metrics,
    value_loss,
    value_loss_reference,
)
from fastppo.ops.whiten import whiten, whiten_reference

__all__ = [
    "GAE",
    "PPO_METRIC_NAMES",
    "VALUE_METRIC_NAMES",
    "LogProbs",
    "PPOLoss",
    "PPOLossConfig",
    "ValueLoss",
    "combine_ppo_metrics",
    "combine_value_metrics",
    "gae",
    "gae_classic",
    "gae_classic_reference",
    "gae_reference",
    "group_advantages",
    "group_advantages_reference",
    "kl_penalty",
    "kl_penalty_reference",
    "linear_logprobs",
    "linear_logprobs_reference",
    "linear_ppo_loss",
    "linear_ppo_loss_reference",
    "live_rows",
    "loss_weights",
    "loss_weights_reference",
    "ppo_loss",
    "ppo_loss_reference",
    "reduce_ppo_metrics",
    "reduce_value_metrics",
    "token_logprobs",
    "token_logprobs_reference",
    "value_loss",
    "value_loss_reference",
    "whiten",
    "whiten_reference",
]

_REMOVED = {
    "discounted_returns": "ops.gae with values of 0 and gae_lambda=1 gives them as its returns",
    "vtrace": "nothing in fastppo trained with it; for samples of another policy see is_correction "
    "of PPOLossConfig",
}

if not TYPE_CHECKING:  # else every name of this module would have a type

    def __getattr__(name: str) -> NoReturn:
        instead = _REMOVED.get(name.removesuffix("_reference"))
        reason = f" any more: {instead}" if instead else ""
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{reason}")
