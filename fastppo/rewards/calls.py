"""Calling reward functions: by keyword, all functions of a batch at the same time.

`call_functions` is the only place in fastppo where a reward function is called. A function runs
in a worker process (`pool`), or in this process (`inline`): where `workers` is 0, and always if it
is a `RewardModel`, whose memory and device cannot be shared with a forked process.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastppo.rewards import inline
from fastppo.rewards.failures import Losses
from fastppo.rewards.isolation import Task
from fastppo.rewards.limits import Declaration, RewardLimits, declaration_of
from fastppo.rewards.model import RewardModel
from fastppo.rewards.pool import CAN_FORK, Pool

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class BoundFunction:
    """A reward function, its display name, what its signature asks for and what was declared."""

    call: RewardFunction
    name: str
    required: tuple[str, ...]
    accepted: frozenset[str] | None  # None: takes **kwargs, so everything
    declared: Declaration

    @classmethod
    def of(cls, func: RewardFunction, name: str) -> BoundFunction:
        declared = declaration_of(func)
        try:
            parameters = inspect.signature(func).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature
            return cls(func, name, (), None, declared)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise TypeError(
                f"reward function {name!r} must take its arguments by keyword, got positional-only "
                "parameters; remove the '/' from its signature"
            )
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required = tuple(p.name for p in named if p.default is p.empty)
        accepted = None if everything else frozenset(p.name for p in named)
        return cls(func, name, required, accepted, declared)

    @property
    def model(self) -> RewardModel | None:
        """The reward model behind the function, if it is one."""
        func = self.call
        while isinstance(func, functools.partial):
            func = func.func
        func = getattr(func, "__self__", func)
        return func if isinstance(func, RewardModel) else None

    def arguments(
        self, provided: Mapping[str, Sequence[Any]], rows: Sequence[int]
    ) -> dict[str, list[Any]]:
        """The part of `provided` that the function takes, as fresh lists of these rows."""
        wanted = provided if self.accepted is None else self.accepted & provided.keys()
        return {name: [provided[name][row] for row in rows] for name in wanted}


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
    here: list[tuple[Task, BoundFunction]] = []
    pooled: list[tuple[Task, BoundFunction]] = []
    for function in functions:
        scores = np.full(size, np.nan, dtype=np.float32)
        results.append(scores)
        in_worker = CAN_FORK and limits.workers > 0 and function.model is None
        parts = limits.workers if in_worker and function.declared.per_sample else 1
        for rows in _split(size, parts):
            task = Task(function.name, function.declared, rows, scores, losses, limits.timeout)
            (pooled if in_worker else here).append((task, function))
    with pool.shift(pooled, provided) as shift:
        inline.run(here, provided, between=shift.look)
        shift.finish()
    return results


def _split(size: int, parts: int) -> list[range]:
    """0 … size - 1 in at most `parts` pieces, equal but for one row; none is empty."""
    edges = [size * part // parts for part in range(parts + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges) if high > low]
