"""Rewards: what a completion is worth, from functions and reward models.

A reward function is called as TRL calls it, by keyword, once for the whole batch:

    f(prompts, completions, completion_ids, **dataset_columns) -> list[float | None]

It receives only what its signature names, or everything when it takes **kwargs. It may be async;
the async ones run at the same time in one event loop. None says "I cannot score this sample": the
function is left out of that sample's weighted sum, and a sample that no function scored is NaN,
which the trainer keeps out of the loss. With chat prompts, `prompts` are lists of messages and
`completions` are [{"role": "assistant", "content": text}]; with plain prompts both are strings. The
lists are copies, the messages in them are shared: do not change them.

An exception, a wrong length, a wrong type or a score that is not finite raises RewardError. Every
call goes through `calls.call_functions`.
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch

from fastppo.rewards.calls import (
    BoundFunction,
    RewardError,
    RewardFunction,
    call_functions,
    reward_error,
)
from fastppo.rewards.loading import load_reward_func, resolve_reward
from fastppo.rewards.model import RewardModel

__all__ = [
    "RewardBatch",
    "RewardError",
    "RewardModel",
    "Rewards",
    "load_reward_func",
    "resolve_reward",
]

_PROVIDED = ("prompts", "completions", "completion_ids")
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class RewardBatch:
    """The rewards of a batch of B samples.

    Attributes:
        scores: (B,) float32, the weighted sum; NaN where no function scored the sample.
        per_function: name of the function → (B,) float32, unweighted; NaN where it returned None.
    """

    scores: np.ndarray
    per_function: dict[str, np.ndarray]


class Rewards:
    """Several reward functions, called together and summed with weights.

    Args:
        funcs: one callable or a sequence of them (functions, async functions, RewardModel).
        weights: one finite number per function; 1 each when None.

    Raises:
        TypeError: something is not callable, or cannot be called by keyword.
        ValueError: no function, or weights of the wrong number or not finite.
    """

    def __init__(
        self,
        funcs: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
    ) -> None:
        listed: list[Any] = [funcs] if callable(funcs) else list(funcs)
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

    @property
    def names(self) -> list[str]:
        """The display name of each function, unique."""
        return [function.name for function in self._functions]

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

    def load_models(self) -> None:
        """Reads the weights of the reward models now instead of at the first call."""
        for function in self._functions:
            if isinstance(function.call, RewardModel):
                function.call.load()

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
            The scores, with NaN where no function scored the sample.

        Raises:
            RewardError: a function failed or returned something that is not B scores.
            ValueError: an argument does not hold B values, or a required column is missing.
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
        results = call_functions(self._functions, provided)
        total = np.zeros(len(prompts))
        scored = np.zeros(len(prompts), dtype=bool)
        per_function: dict[str, np.ndarray] = {}
        for function, weight, result in zip(self._functions, self.weights, results, strict=True):
            scores = _checked_scores(function.name, result, provided)
            here = ~np.isnan(scores)
            total[here] += weight * scores[here].astype(np.float64)
            scored |= here
            per_function[function.name] = scores
        with np.errstate(over="ignore"):
            combined = np.where(scored, total, np.nan).astype(np.float32)
        if (overflow := np.flatnonzero(np.isinf(combined))).size:
            raise reward_error("weighted sum of all", int(overflow[0]), provided, "outside float32")
        return RewardBatch(combined, per_function)


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
    checked = [float(weight) for weight in weights]
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


def _checked_scores(
    name: str, result: Any, provided: Mapping[str, Sequence[Any]]
) -> np.ndarray:  # (B,) float32, NaN for None
    expected = len(provided["prompts"])
    if isinstance(result, (np.ndarray, torch.Tensor)) and result.ndim == 1:
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        raise reward_error(
            name,
            None,
            provided,
            f"must return a list of {expected} numbers or None, got {type(result).__name__}",
        )
    if len(result) != expected:
        raise reward_error(
            name,
            len(result) if len(result) < expected else None,
            provided,
            f"must return one score per sample: expected {expected}, got {len(result)}",
        )
    scores = np.full(expected, np.nan, dtype=np.float32)
    for sample, value in enumerate(result):
        if value is None:
            continue
        number = _as_number(value)
        if number is None:
            problem = f"must be a number or None, got {value!r} of type {type(value).__name__}"
            raise reward_error(name, sample, provided, f"score {problem}")
        if not abs(number) <= _FLOAT32_MAX:  # also catches NaN
            problem = f"must be finite in float32, got {number}"
            fix = "return None for a sample that cannot be scored"
            raise reward_error(name, sample, provided, f"score {problem}; {fix}")
        scores[sample] = number
    return scores


def _as_number(value: Any) -> float | None:
    """A bool, int, float, NumPy scalar or one-element tensor as a float; None for other types."""
    one_array = isinstance(value, (np.generic, np.ndarray)) and value.size == 1
    if one_array or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int beyond float64
        return math.inf
