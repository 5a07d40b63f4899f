"""From one score per response to rewards, advantages and returns per token.

    score, shaped for truncation, on the last token that counts; minus β·KL on every token
      → GAE of every token, or
      → summed per response, less a group baseline

B sequences, N response tokens. Everything stays on the batch's device and in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo import ops
from fastppo.ppo.config import AdvantageConfig
from fastppo.ppo.experience import PackedBatch, need
from fastppo.training.memory import is_out_of_memory


@torch.no_grad()
def add_advantages(
    batch: PackedBatch,
    scores: Tensor | np.ndarray | Sequence[float],
    group_ids: Tensor | np.ndarray | Sequence[int] | None,
    config: AdvantageConfig,
    kl_coef: float,
) -> PackedBatch:
    """The batch with `rewards`, `advantages` (N,) fp32, `loss_mask` (N,) bool, and GAE's `returns`.

    Args:
        batch: with `old_logprobs`, and `ref_logprobs` and `values` where the configuration needs
            them.
        scores: (B,) rewards of whole responses; NaN drops that response from the loss, and so does
            a log-probability or value of it that is not finite, or an infinite score on a GPU.
        group_ids: (B,) which responses share a prompt.
        config: the algorithm.
        kl_coef: the KL weight in force.

    Raises:
        ValueError: scores or group ids that are no numbers or of the wrong length, an infinite
            score on the CPU, no group ids or no field of the batch where needed.
    """
    score = _per_sequence("scores", scores, batch, torch.float32)
    if score.device.type == "cpu":  # on a GPU looking would mean to wait
        for i in np.flatnonzero(score.isinf().numpy())[:1]:
            raise ValueError(
                f"scores[{i}]: expected a finite float32 number, got {float(score[i])}. NaN drops "
                "a response"
            )
    score = score.to(batch.device)
    sequence = sequence_ids(batch)
    batch, finite = _finite(batch, sequence)
    score_given = score.isfinite()
    scored = finite & score_given
    score = _shaped(score.nan_to_num(0.0, 0.0, 0.0), batch.truncated, config)
    mask = scored[sequence]
    if batch.loss_mask is not None:
        mask = mask & batch.loss_mask
    rewards = torch.zeros_like(mask, dtype=torch.float32)
    if kl_coef > 0 and config.kl_in == "reward":
        old, ref = (need(batch, n, "step.evaluate") for n in ("old_logprobs", "ref_logprobs"))
        kl = ops.kl_penalty(old, ref, estimator=config.kl_estimator)
        rewards = torch.where(mask, -kl_coef * kl, 0.0)
    total = torch.zeros_like(score).index_add(0, sequence, rewards) + score
    ends = _last_valid(mask, sequence, batch.num_sequences)
    rewards = torch.where(ends, rewards + score[sequence], rewards)
    batch = batch.replace(loss_mask=mask, rewards=rewards)
    lost = (score_given & ~finite).any() & ~mask.any()
    if config.advantage == "gae":
        return _marked(_gae(batch, config), lost)
    if group_ids is None and config.advantage != "reinforce":
        raise ValueError(
            f"group_ids: expected (B,) integers with advantage = {config.advantage!r}, got None"
        )
    ids = np.zeros(len(score), np.int64) if group_ids is None else group_ids
    groups = _per_sequence("group_ids", ids, batch)
    total = torch.where(scored, total, math.nan)
    per_sequence = ops.group_advantages(total, groups.to(batch.device), kind=config.advantage)
    return _marked(batch.replace(advantages=torch.where(mask, per_sequence[sequence], 0.0)), lost)


def _marked(batch: PackedBatch, lost: Tensor) -> PackedBatch:
    """The batch, with advantages of NaN where it is `lost` (): the update counts its steps as not
    finite."""
    advantages = need(batch, "advantages", "step.advantages")
    return batch.replace(advantages=torch.where(lost, math.nan, advantages))


def _finite(batch: PackedBatch, sequence: Tensor) -> tuple[PackedBatch, Tensor]:
    """The batch with 0 for what is not finite, and (B,) bool: the sequences that had none of it."""
    names = ("rollout_logprobs", "old_logprobs", "ref_logprobs", "values")
    fields = {n: getattr(batch, n) for n in names}
    given = {n: x for n, x in fields.items() if x is not None}
    bad = ~torch.stack([x.isfinite() for x in given.values()]).all(0)
    if batch.loss_mask is not None:
        bad &= batch.loss_mask
    count = torch.zeros(batch.num_sequences, device=batch.device)
    finite = count.index_add(0, sequence, bad.float()) == 0
    if batch.bootstrap is not None:
        given["bootstrap"] = batch.bootstrap
        finite &= batch.bootstrap.isfinite()
    return batch.replace(**{n: x.nan_to_num(0.0, 0.0, 0.0) for n, x in given.items()}), finite


def _shaped(score: Tensor, truncated: Tensor, config: AdvantageConfig) -> Tensor:
    """(B,) the EOS trick: replace or lower the score of a response that did not end."""
    if config.missing_eos_score is not None:
        return torch.where(truncated, config.missing_eos_score, score)
    return score - config.missing_eos_penalty * truncated


def _gae(batch: PackedBatch, config: AdvantageConfig) -> PackedBatch:
    """GAE; the critic's returns come from the advantages before they are whitened."""
    assert batch.rewards is not None
    rewards, mask = batch.rewards, batch.loss_mask
    values = need(batch, "values", "step.evaluate")
    bootstrap = need(batch, "bootstrap", "step.evaluate") if config.bootstrap_truncated else None
    if config.whiten_rewards:
        rewards = ops.whiten(rewards, mask, shift_mean=False)
    advantages, returns = ops.gae(
        rewards,
        values,
        batch.cu_responses,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        returns_lambda=config.critic_lambda,
        mask=mask,
        bootstrap=bootstrap,
        norm_adv=config.norm_adv,
        max_seqlen=int(np.diff(batch.cu_responses_host).max(initial=0)),
    )
    return batch.replace(rewards=rewards, advantages=advantages, returns=returns)


def sequence_ids(batch: PackedBatch) -> Tensor:
    """(N,) int64, which sequence each response token belongs to."""
    lengths = batch.cu_responses.diff().long()
    return torch.repeat_interleave(lengths, output_size=batch.num_responses)


def num_valid_sequences(batch: PackedBatch) -> Tensor:
    """() number of sequences with a token that counts."""
    assert batch.loss_mask is not None
    counts = torch.zeros(batch.num_sequences, device=batch.device)
    return counts.index_add(0, sequence_ids(batch), batch.loss_mask.float()).gt(0).sum()


def _last_valid(mask: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """(N,) bool, whether a token is the last one of its sequence that counts."""
    position = torch.arange(mask.numel(), device=mask.device)
    empty = position.new_full((num_sequences,), -1)
    last = empty.scatter_reduce(0, sequence, torch.where(mask, position, -1), "amax")
    return position == last[sequence]


def _per_sequence(
    name: str, given: Any, batch: PackedBatch, dtype: torch.dtype | None = None
) -> Tensor:
    """(B,) where it was given."""
    try:
        value = torch.as_tensor(given, dtype=dtype)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        kind = "integers" if dtype is None else "numbers, NaN for no score"
        raise ValueError(
            f"{name}: expected (B,) {kind}, got {type(given).__name__}: {error}"
        ) from error
    if value.shape != (batch.num_sequences,):
        raise ValueError(
            f"{name}: expected one value for each of the {batch.num_sequences} sequences, "
            f"got shape {tuple(value.shape)}"
        )
    return value
