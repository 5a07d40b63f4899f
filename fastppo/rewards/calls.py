"""Calling reward functions: by keyword, all functions of a batch at the same time.

`call_functions` is the only place in fastppo where a reward function is called. A function runs
in a worker process (`pool`), or in this process (`inline`): where `workers` is 0, and always if it
is a `RewardModel`, whose memory and device cannot be shared with a forked process.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastppo.rewards import inline
from fastppo.rewards.failures import Losses
from fastppo.rewards.functions import BoundFunction
from fastppo.rewards.isolation import Task
from fastppo.rewards.limits import RewardLimits
from fastppo.rewards.pool import CAN_FORK, Pool


def call_functions(
    functions: Sequence[BoundFunction],
    provided: Mapping[str, Sequence[Any]],
    losses: Losses,
    limits: RewardLimits,
    pool: Pool,
) -> list[np.ndarray]:
    """Scores of each function for the batch: the only place where reward functions are called.

    Args:
        functions: F of them.
        provided: the columns of the batch, B values each.
        losses: told of every sample that a function could not score.
        limits: how functions run.
        pool: the workers.

    Returns:
        F times (B,) float32, NaN where the function returned None or failed.

    Raises:
        RewardError: more samples are lost than `limits` accepts.
    """
    size = len(provided["prompts"])
    results = []
    here: list[Task] = []
    pooled: list[Task] = []
    for function in functions:
        scores = np.full(size, np.nan, dtype=np.float32)
        results.append(scores)
        in_worker = CAN_FORK and limits.workers > 0 and function.model is None
        parts = limits.workers if in_worker and function.declared.per_sample else 1
        for rows in _split(size, parts):
            task = Task(function, rows, scores, losses, limits.timeout)
            (pooled if in_worker else here).append(task)
    with pool.batch(pooled, provided) as batch:
        inline.run(here, provided, between=batch.look)
        batch.finish()
    return results


def _split(size: int, parts: int) -> list[range]:
    """0 … size - 1 in at most `parts` pieces, equal but for one row; none is empty."""
    edges = [size * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges) if high > low]
