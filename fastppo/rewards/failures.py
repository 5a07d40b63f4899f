"""What goes wrong with rewards: its names, its messages, and how much of it a run accepts."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastppo.training.errors import StopRunError

FailureKind = Literal[
    "exception", "timeout", "crash", "memory", "not_finite", "wrong_length", "wrong_type"
]

_WINDOW = 10  # batches


class RewardError(StopRunError):
    """Rewards failed, more than `max_failure_rate` allows.

    `function` is the name of the function, `sample` the index in the batch or None.
    """

    def __init__(self, message: str, *, function: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.function = function
        self.sample = sample


class RewardUnavailableError(RuntimeError):
    """For reward functions to raise: what they rely on is not there, whatever the samples are.

    The call fails as a whole and no bad sample is looked for.
    """


@dataclass(frozen=True)
class RewardFailure:
    """One sample that one function could not score. `sample` is the index in the batch."""

    function: str
    sample: int
    kind: FailureKind
    message: str

    def __str__(self) -> str:
        return f"reward function {self.function!r}: {self.message}"


def reward_error(
    name: str, sample: int | None, provided: Mapping[str, Sequence[Any]], problem: str
) -> RewardError:
    """A RewardError that names function and sample and shows the sample's prompt and completion."""
    where = f"reward function {name!r}"
    if sample is not None and sample < len(provided["prompts"]):
        where += f", sample {sample}"
        problem += (
            f"; prompt: {_shorten(provided['prompts'][sample])}, "
            f"completion: {_shorten(provided['completions'][sample])}"
        )
    return RewardError(f"{where}: {problem}", function=name, sample=sample)


def _shorten(value: Any, width: int = 120) -> str:
    """The repr of a prompt or completion (of the last message of a chat), cut in the middle."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    text = repr(value)
    if len(text) <= width:
        return text
    return f"{text[: width // 2]} … {text[-width // 2 :]}"


class FailureWindow:
    """How many samples of the last 10 batches were lost.

    Batches that have not been yet count as large as the current one and without a loss, so that the
    first lost batch of a run is a tenth, as any later one is.
    """

    def __init__(self) -> None:
        self._past: deque[tuple[int, int]] = deque(maxlen=_WINDOW - 1)  # (lost, size)

    def with_batch(self, lost: int, size: int) -> tuple[int, int]:
        """(lost, all) samples of the window that ends with a batch of `size`."""
        missing = _WINDOW - 1 - len(self._past)
        return (
            lost + sum(past for past, _ in self._past),
            size * (1 + missing) + sum(size for _, size in self._past),
        )

    def record(self, lost: int, size: int) -> None:
        """The batch is over; the next one follows."""
        self._past.append((lost, size))

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"batches": [list(batch) for batch in self._past]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self._past.clear()
        self._past.extend((int(lost), int(size)) for lost, size in state["batches"])


class Losses:
    """The samples that the current batch has lost so far; raises as soon as they are too many.

    Args:
        window: the batches before.
        max_failure_rate: the share of the window's samples that may be lost.
        provided: the columns of the batch, for messages.
    """

    def __init__(
        self, window: FailureWindow, max_failure_rate: float, provided: Mapping[str, Sequence[Any]]
    ) -> None:
        self.failures: list[RewardFailure] = []
        self._window = window
        self._rate = max_failure_rate
        self._provided = provided
        self._size = len(provided["prompts"])
        self._lost: set[int] = set()
        self._first: dict[str, tuple[RewardError, BaseException | None]] = {}

    def too_many_with(self, samples: Sequence[int]) -> bool:
        """Whether losing `samples` too is more than the rate allows."""
        lost, total = self._window.with_batch(len(self._lost.union(samples)), self._size)
        return lost - self._rate * total > 1e-9 * total  # a rate of 0.29 allows 29 of 100

    def add(
        self,
        function: str,
        samples: Sequence[int],
        kind: FailureKind,
        message: str,
        *,
        blamed: int | None = None,
        cause: BaseException | None = None,
    ) -> None:
        """Count `samples` as lost to `function`.

        Args:
            blamed: the sample to show in an error, None where it is no single one.
            cause: what an error is chained to.

        Raises:
            RewardError: more are lost than the rate allows.
        """
        if not samples:
            return
        first = (reward_error(function, blamed, self._provided, message), cause)
        self._first.setdefault(function, first)
        self.failures += [RewardFailure(function, sample, kind, message) for sample in samples]
        self._lost.update(samples)
        if self.too_many_with(()):
            raise self._error() from self._first[self._worst()][1]

    def close(self) -> int:
        """End the batch: its number of lost samples, which the window now counts as past."""
        self._window.record(len(self._lost), self._size)
        return len(self._lost)

    def _worst(self) -> str:
        return Counter(failure.function for failure in self.failures).most_common(1)[0][0]

    def _error(self) -> RewardError:
        worst = self._worst()
        first = self._first[worst][0]
        if self._rate == 0:
            return first
        lost, total = self._window.with_batch(len(self._lost), self._size)
        here = sum(failure.function == worst for failure in self.failures)
        return RewardError(
            f"rewards failed for {lost} of the {total} samples of the last {_WINDOW} batches "
            f"({lost / total:.2%}), more than max_failure_rate = {self._rate:g}; in this batch of "
            f"{self._size} most failed in {worst!r} ({here}). Its first failure: {first}. Mend "
            "the function, return None for a sample that cannot be scored, or raise "
            "max_failure_rate",
            function=worst,
            sample=first.sample,
        )
