"""Several reward functions, called together and summed with weights."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastppo.rewards.calls import call_functions
from fastppo.rewards.failures import FailureWindow, Losses, RewardFailure
from fastppo.rewards.functions import BoundFunction, RewardFunction
from fastppo.rewards.limits import RewardLimits
from fastppo.rewards.loading import resolve_reward
from fastppo.rewards.model import RewardModel
from fastppo.rewards.pool import Pool

_PROVIDED = ("prompts", "completions", "completion_ids")
_SUM = "weighted sum of all"  # what an overflow of the sum is blamed on


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of a batch of B samples.

    Attributes:
        scores: (B,) float32, the weighted sum; NaN where no function scored the sample, and where
            any function failed: a sum of the others would be another reward.
        per_function: name of the function → (B,) float32, unweighted; NaN where it returned None or
            failed.
        failures: one per sample and function that failed, by sample.
        lost: number of samples with a failure.
    """

    scores: np.ndarray
    per_function: dict[str, np.ndarray]
    failures: tuple[RewardFailure, ...] = ()
    lost: int = 0


class Rewards:
    """Several reward functions, called together and summed with weights.

    Args:
        funcs: one callable or several (functions, async functions, RewardModel), or their names;
            see `resolve_reward`.
        weights: one finite number per function; 1 each when None.
        limits: how functions run and how much may fail; in this process, and nothing, when None.

    A context manager: at its end, or with `close`, the worker processes end.

    Raises:
        TypeError: something is not callable, or cannot be called by keyword.
        ValueError: no function, none of a name, or weights of the wrong number or not finite.
    """

    def __init__(
        self,
        funcs: RewardFunction | str | Path | Sequence[RewardFunction | str | Path],
        weights: Sequence[float] | None = None,
        limits: RewardLimits | None = None,
    ) -> None:
        one = callable(funcs) or isinstance(funcs, (str, Path))
        if not one and not isinstance(funcs, Iterable):
            raise TypeError(f"reward_funcs: expected one function or several, got {funcs!r}")
        named: list[Any] = [funcs] if one else list(funcs)  # type: ignore[arg-type]
        listed = [resolve_reward(f) if isinstance(f, (str, Path)) else f for f in named]
        if not listed:
            raise ValueError("reward_funcs must hold at least one function, got none")
        for index, func in enumerate(listed):
            if isinstance(func, torch.nn.Module):
                raise TypeError(
                    f"reward_funcs[{index}] is a {type(func).__name__}, expected a function; wrap "
                    "it as RewardModel(model, tokenizer)"
                )
            if not callable(func) or isinstance(func, type):
                raise TypeError(
                    f"reward_funcs[{index}] must be a callable f(prompts, completions, **columns), "
                    f"got {func!r}"
                )
        self.weights = _checked_weights(weights, len(listed))
        names = unique_names(listed)
        self._functions = [BoundFunction.of(f, n) for f, n in zip(listed, names, strict=True)]
        self.limits = limits or RewardLimits(workers=0)
        self._window = FailureWindow()
        self._pool = Pool(self.limits)
        weakref.finalize(self, self._pool.close).atexit = False  # pool.py has its own

    def __enter__(self) -> Rewards:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. A later call would start new ones."""
        self._pool.close()

    def state_dict(self) -> dict[str, Any]:
        """The failures of the last batches, which `max_failure_rate` looks at, and the token
        budgets that reward models have come down to, as plain JSON.
        """
        budgets = {name: model.token_budget for name, model in self._models().items()}
        return {**self._window.state_dict(), "token_budgets": budgets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._window.load_state_dict(state)
        for name, model in self._models().items():
            model.token_budget = state["token_budgets"].get(name, model.token_budget)

    def _models(self) -> dict[str, RewardModel]:
        return {f.name: f.model for f in self._functions if f.model is not None}

    @property
    def names(self) -> list[str]:
        """The display name of each function, unique."""
        return [function.name for function in self._functions]

    def reads(self, column: str) -> bool:
        """Whether a function takes a column of the dataset."""
        return any(f.accepted is None or column in f.accepted for f in self._functions)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Refuses a function that requires a column which the dataset does not have.

        Args:
            columns: the dataset's columns other than `prompt`.

        Raises:
            ValueError: naming the function, the missing column, the nearest and the available ones.
        """
        self._check_available([*_PROVIDED, *columns])

    def _check_available(self, available: Sequence[str]) -> None:
        for function in self._functions:
            for name in function.required:
                if name not in available:
                    near = get_close_matches(name, available, 1)
                    hint = f" (did you mean {near[0]!r}?)" if near else ""
                    raise ValueError(
                        f"reward function {function.name!r} requires {name!r}, which is not a "
                        f"column of the dataset{hint}; available: {', '.join(available)}. Rename "
                        "the parameter, add the column, or give the parameter a default"
                    )

    def check_apart(self, trained: Sequence[torch.nn.Parameter]) -> None:
        """Refuses a reward model that would change while a run trains.

        Args:
            trained: what the run trains.

        Raises:
            ValueError: naming the reward model that shares one of these parameters.
        """
        ids = {id(p) for p in trained}
        for name, model in self._models().items():
            if any(id(p) in ids for p in model.load().parameters()):
                raise ValueError(
                    f"reward_funcs: {name!r} shares weights with what is trained, so that the "
                    "reward would move. Give value_model (or model) a copy, or name its folder"
                )

    def load_models(self) -> None:
        """Reads the weights of the reward models now instead of at the first call."""
        for model in self._models().values():
            model.load()

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        columns: Mapping[str, Sequence[Any]] | None = None,
        completion_ids: Sequence[Sequence[int] | np.ndarray] | None = None,
    ) -> RewardBatch:
        """Scores a batch of B samples.

        Args:
            prompts: B strings or B lists of chat messages.
            completions: B decoded texts; wrapped as an assistant message where the prompt is chat.
            columns: the dataset's other columns, B values each.
            completion_ids: B sequences of token ids, for functions that ask for them.

        Returns:
            The scores, with NaN where no function scored the sample or one failed.

        Raises:
            RewardError: more samples were lost to failures than `max_failure_rate` allows.
            ValueError: an argument does not hold B values, or a required column is missing.
            TypeError: a column cannot be sent to a worker.
        """
        provided: dict[str, Sequence[Any]] = dict(columns or {})
        provided["prompts"] = prompts
        provided["completions"] = [
            [{"role": "assistant", "content": text}]
            if isinstance(text, str) and not isinstance(prompt, str)
            else text
            for prompt, text in zip(prompts, completions, strict=False)
        ]
        if completion_ids is not None:
            provided["completion_ids"] = [[int(i) for i in ids] for ids in completion_ids]
        for name, values in [*provided.items(), ("completions", completions)]:
            if len(values) != len(prompts):
                raise ValueError(
                    f"{name} must have one value for each of the {len(prompts)} prompts, "
                    f"got {len(values)}"
                )
        self._check_available(list(provided))
        losses = Losses(self._window, self.limits.max_failure_rate, provided)
        results = call_functions(self._functions, provided, losses, self.limits, self._pool)
        scores = self._weighted_sum(results, losses)
        failures = sorted(losses.failures, key=lambda failure: failure.sample)
        per_function = dict(zip(self.names, results, strict=True))
        return RewardBatch(scores, per_function, tuple(failures), losses.close())

    def _weighted_sum(
        self, results: Sequence[np.ndarray], losses: Losses
    ) -> np.ndarray:  # (B,) float32
        total = np.zeros(len(results[0]))
        scored = np.zeros(len(results[0]), dtype=bool)
        for weight, scores in zip(self.weights, results, strict=True):
            here = ~np.isnan(scores)
            total[here] += weight * scores[here].astype(np.float64)
            scored |= here
        scored[[failure.sample for failure in losses.failures]] = False
        with np.errstate(over="ignore"):
            combined = np.where(scored, total, np.nan).astype(np.float32)
        for sample in np.flatnonzero(np.isinf(combined)).tolist():
            combined[sample] = np.nan
            losses.add(_SUM, [sample], "not_finite", "outside float32", blamed=sample)
        return combined


def unique_names(funcs: Sequence[RewardFunction]) -> list[str]:
    """Display names: the function's own; a repeated one becomes name_2, name_3 and so on."""
    names: list[str] = []
    for func in funcs:
        inner = func
        while isinstance(inner, functools.partial):
            inner = inner.func
        base = str(getattr(inner, "__name__", type(inner).__name__)).strip("<>")
        name, count = base, 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def _checked_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    given: Any = weights
    if not isinstance(given, Iterable) or not all(isinstance(w, Real) for w in given):
        raise TypeError(f"reward_weights: expected a list of numbers, got {given!r}")
    checked = [float(weight) for weight in given]
    if len(checked) != count:
        raise ValueError(
            f"reward_weights must have one number per reward function: expected {count}, "
            f"got {len(checked)}"
        )
    for index, weight in enumerate(checked):
        if not math.isfinite(weight):
            raise ValueError(
                f"reward_weights must be finite, got reward_weights[{index}] = {weight}"
            )
    return checked
