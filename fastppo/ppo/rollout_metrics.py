"""What a batch of rollouts and its scores come to, in figures and in rows for a person to read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastppo.rewards import RewardBatch, RewardError
from fastppo.rollout.engine import Rollouts
from fastppo.training.metrics import mean

UNSCORED_ITERATIONS = 10
"""So many at the start without a single score end a run: nothing is learned from them."""


def check_scored(scored: RewardBatch, rewards: Sequence[float], unscored: int) -> None:
    """Refuse to go on where nothing has ever been scored; a batch of None is else only skipped.

    Args:
        scored: of the iteration under way.
        rewards: mean score of each iteration before it, NaN where nothing was scored.
        unscored: iterations in a row, up to this one and in this process, without a score; a run
            that is resumed after all gets as many again.

    Raises:
        RewardError: no function could score any sample so far, in `UNSCORED_ITERATIONS`.
    """
    if unscored >= UNSCORED_ITERATIONS and np.isnan(rewards).all():
        names = ", ".join(map(repr, scored.per_function))
        raise RewardError(
            f"reward function {names}: expected a score for at least one sample of the first "
            f"{UNSCORED_ITERATIONS} iterations, got None for all. Mend the function; where None "
            "is right for them, --resume goes on",
            function=names,
        )


def score_metrics(scored: RewardBatch, rollouts: Rollouts) -> dict[str, float]:
    """The metrics of an iteration that are known before the update."""
    unscored = np.isnan(scored.scores)
    return {
        "reward": mean(scored.scores),
        "score_std": math.nan if unscored.all() else float(np.nanstd(scored.scores)),
        "unscored": float(unscored.mean()),
        "reward_failures": float(scored.lost),
        **{f"reward/{name}": mean(v) for name, v in scored.per_function.items()},
        **_rollout_metrics([rollouts]),
        "eos_rate": float(rollouts.finished.mean()),
    }


def evaluation(scored: Sequence[RewardBatch], rollouts: Sequence[Rollouts]) -> dict[str, Any]:
    """The figures of an evaluation that was done in several batches."""
    scores = np.concatenate([batch.scores for batch in scored])
    result = {"reward": mean(scores), **_rollout_metrics(rollouts), "prompts": len(scores)}
    if np.isin(scores, (0.0, 1.0)).all():
        result["accuracy"] = result["reward"]
    return result


def sample_rows(
    iteration: int,
    prompts: Sequence[Any],
    completions: Sequence[str],
    scored: RewardBatch,
    rollouts: Rollouts,
) -> list[dict[str, Any]]:
    """One row for each sample; `failure` says which reward function lost it and why."""
    failures = {failure.sample: str(failure) for failure in reversed(scored.failures)}
    rows = []
    for i, (prompt, text) in enumerate(zip(prompts, completions, strict=True)):
        row = {
            "iteration": iteration,
            "prompt": prompt,
            "response": text,
            "reward": float(scored.scores[i]),
            "truncated": bool(rollouts.truncated[i]),
        }
        rows.append(row | ({"failure": failures[i]} if i in failures else {}))
    return rows


def _rollout_metrics(rollouts: Sequence[Rollouts]) -> dict[str, float]:
    lengths = [len(ids) for batch in rollouts for ids in batch.responses]
    truncated = np.concatenate([batch.truncated for batch in rollouts])
    return {"response_length": float(np.mean(lengths)), "truncated": float(truncated.mean())}
