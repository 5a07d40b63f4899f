"""What one call of a reward function came to: scores, or the problem and who is suspected of it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastppo.rewards.failures import FailureKind, RewardUnavailableError

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_LONGEST = 2000  # characters of a message

NO_ROW = -1  # the note of a WatchedList that is not being read


@dataclass(frozen=True)
class Problem:
    """What is wrong with a call or with one of its samples.

    `sample` is an index in the call, `whole` says that no sample can be to blame.
    """

    kind: FailureKind
    message: str
    sample: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Outcome:
    """One call on n samples.

    Attributes:
        scores: (n,) float32, NaN for None and for the samples in `problems`; None with `failure`.
        problems: of single samples, whose scores are missing; the others are good.
        failure: why there are no scores at all.
        suspect: the sample that was being read when the call failed, if that is known.
        cause: the exception behind `failure`, to chain an error to.
    """

    scores: np.ndarray | None
    problems: tuple[Problem, ...] = ()
    failure: Problem | None = None
    suspect: int | None = None
    cause: BaseException | None = None

    @property
    def problem(self) -> Problem | None:
        """What kept a call on a single sample from scoring it."""
        return self.failure or (self.problems[0] if self.problems else None)


class WatchedList(list[Any]):
    """A list that notes which element is being read.

    A call that hangs or crashes on a sample has usually read that sample last. `note[0]` is the
    index, and NO_ROW again once a loop over the list has ended.
    """

    __slots__ = ("_note",)

    def __init__(self, values: Sequence[Any], note: MutableSequence[int]) -> None:
        super().__init__(values)
        self._note = note

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while index < len(self):
            self._note[0] = index
            yield list.__getitem__(self, index)
            index += 1
        self._note[0] = NO_ROW

    def __getitem__(self, key: Any) -> Any:
        value = list.__getitem__(self, key)
        if isinstance(key, int):
            self._note[0] = key % len(self)
        elif isinstance(key, slice):
            self._note[0] = min(key.indices(len(self))[0], len(self) - 1)
        return value

    def __reduce_ex__(self, protocol: Any) -> tuple[type, tuple[list[Any]]]:
        return list, (list[Any](list.__iter__(self)),)  # a copy is an ordinary list


def suspect_of(note: Sequence[int]) -> int | None:
    """The sample that was being read, None where no list was."""
    return None if note[0] == NO_ROW else note[0]


def failed(error: BaseException, suspect: int | None = None) -> Outcome:
    """The outcome of a call that raised."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception:  # a broken __str__
        text = "(no message)"
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in text
    )
    problem = Problem(
        "memory" if out_of_memory else "exception",
        _cut(f"raised {name}: {text}" if text else f"raised {name}"),
        whole=isinstance(error, RewardUnavailableError),
    )
    return Outcome(None, failure=problem, suspect=suspect, cause=error)


def checked(result: Any, expected: int) -> Outcome:
    """The outcome of a call on `expected` samples that returned `result`."""
    if isinstance(result, (np.ndarray, torch.Tensor)) and result.ndim == 1:
        result = result.tolist()
    if not isinstance(result, (list, tuple)):
        got = type(result).__name__
        message = f"must return a list of {expected} numbers or None, got {got}"
        return Outcome(None, failure=Problem("wrong_type", message))
    if len(result) != expected:
        message = f"must return one score per sample: expected {expected}, got {len(result)}"
        sample = len(result) if len(result) < expected else None
        return Outcome(None, failure=Problem("wrong_length", message, sample))
    scores = np.full(expected, np.nan, dtype=np.float32)
    problems: list[Problem] = []
    for sample, value in enumerate(result):
        if value is None:
            continue
        number = _as_number(value)
        if number is None:
            message = f"must be a number or None, got {value!r} of type {type(value).__name__}"
            problems.append(Problem("wrong_type", _cut(f"score {message}"), sample))
        elif not abs(number) <= _FLOAT32_MAX:  # also catches NaN
            message = f"score must be finite in float32, got {number}"
            message += "; return None for a sample that cannot be scored"
            problems.append(Problem("not_finite", message, sample))
        else:
            scores[sample] = number
    return Outcome(scores, tuple(problems))


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


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
