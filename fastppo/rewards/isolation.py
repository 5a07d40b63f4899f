"""Which calls a reward function gets: the batch, then retries and the search for bad samples.

A `Task` does not call anything. It says which rows to call the function on next, and whoever runs
it tells it what came of that. So calls in this process, calls in workers, and several functions at
the same time all follow the same rules:

- A call that succeeds scores its rows. A row whose own score is bad is lost by itself.
- After a failed call the sample that was being read is called alone. If that fails too it is lost,
  and the function is called on the rest. So a sample that hangs costs two time limits.
- If it is innocent, or unknown, halves are called until a single sample fails.
- If no single sample fails, no row of that call can be trusted, and all are lost.
- The search ends when it has taken five time limits, and as soon as too many samples are lost.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fastppo.rewards.failures import Losses
from fastppo.rewards.functions import BoundFunction
from fastppo.rewards.limits import backoff
from fastppo.rewards.outcome import Outcome, Problem

_SEARCH_LIMITS = 5  # time limits that searching a batch may take
_PAUSE = 0.1  # seconds before the first retry; doubles with each


@dataclass(frozen=True)
class Attempt:
    """A call of the function on these rows of the batch, not before `pause` seconds have passed."""

    rows: Sequence[int]
    pause: float = 0.0


class Task:
    """One function's way through its rows of a batch.

    Args:
        function: what is called.
        rows: of the batch, which this task scores.
        scores: (B,) float32, where the scores of `rows` are written.
        losses: told of every sample that is lost.
        timeout: seconds of a call, in which the search's own limit is counted.
    """

    def __init__(
        self,
        function: BoundFunction,
        rows: Sequence[int],
        scores: np.ndarray,
        losses: Losses,
        timeout: float,
    ) -> None:
        self.function = function
        self._declared = function.declared
        self._scores = scores
        self._losses = losses
        self._search_seconds = _SEARCH_LIMITS * timeout
        self._search_ends: float | None = None
        self._steps = self._score(list(rows))
        self.call: Attempt | None = next(self._steps, None)  # what comes next; None at the end

    def advance(self, outcome: Outcome) -> None:
        """Take what came of `call`, and set the next one.

        Raises:
            RewardError: more samples are lost than the run accepts.
        """
        try:
            self.call = self._steps.send(outcome)
        except StopIteration:
            self.call = None

    def _score(self, rows: list[int]) -> Generator[Attempt, Outcome, None]:
        tries = 0
        while rows:
            outcome = yield Attempt(rows, backoff(_PAUSE, tries))
            failure = outcome.failure
            if failure is None:
                yield from self._accept(rows, outcome)
                return
            search = self._search_is_worth_it(failure, rows)
            bad = (yield from self._try_suspect(rows, outcome)) if search else None
            if bad is None and tries < self._declared.retries:
                tries += 1
                continue
            if bad is None and search:
                bad = yield from self._bisect(rows, outcome)
            if bad is None:
                if search:
                    yield from self._no_single(rows, failure, outcome)
                else:
                    self._lose(rows, failure, outcome)
                return
            del rows[bad]
            tries = 0

    def _accept(self, rows: Sequence[int], outcome: Outcome) -> Generator[Attempt, Outcome, None]:
        """Keep the scores; try again, or lose, the samples whose own score is bad."""
        assert outcome.scores is not None
        self._scores[rows] = outcome.scores
        for problem in outcome.problems:
            assert problem.sample is not None
            row = rows[problem.sample]
            alone = yield from self._alone(row, self._declared.retries)
            if alone is None or alone.problem:
                self._lose([row], replace(problem, sample=0), outcome)

    def _alone(self, row: int, tries: int) -> Generator[Attempt, Outcome, Outcome | None]:
        """Call the function on one row up to `tries` times; its score is kept once it has one."""
        outcome = None
        for attempt in range(tries):
            retry = 1 + attempt if self._declared.retries else 0
            outcome = yield Attempt([row], backoff(_PAUSE, retry))
            if outcome.scores is not None and not outcome.problems:
                self._scores[row] = outcome.scores[0]
                break
        return outcome

    def _search_is_worth_it(self, failure: Problem, rows: Sequence[int]) -> bool:
        if self._search_ends is None:
            self._search_ends = time.monotonic() + self._search_seconds
        if (
            len(rows) == 1
            or failure.whole
            or self._declared.idempotent is False
            or time.monotonic() > self._search_ends
        ):
            return False
        # One call tells all there is to say of a result that is no list of scores, if it is the
        # end of the run anyway; for an exception or a crash the sample is still worth naming.
        shapeless = failure.kind in ("wrong_length", "wrong_type")
        return not (shapeless and self._losses.too_many_with(rows[:1]))

    def _try_suspect(
        self, rows: Sequence[int], outcome: Outcome
    ) -> Generator[Attempt, Outcome, int | None]:
        """Call the suspect alone. Its position in `rows` if it is lost, None if it is innocent."""
        suspect = outcome.suspect
        if suspect is None:
            return None
        alone = yield from self._alone(rows[suspect], max(1, self._declared.retries))
        if alone is None or not alone.problem:
            return None
        self._lose_single(rows[suspect], outcome, alone)
        return suspect

    def _bisect(
        self, rows: Sequence[int], outcome: Outcome
    ) -> Generator[Attempt, Outcome, int | None]:
        """The position of a row that fails alone and is lost; None if there is none."""
        low, high = 0, len(rows)
        alone: Outcome | None = None
        while high - low > 1:
            middle = (low + high) // 2
            part = yield Attempt(rows[low:middle])
            if part.failure:
                high, alone = middle, part
            else:
                low, alone = middle, None
        if alone is None or self._declared.retries:
            alone = yield from self._alone(rows[low], max(1, self._declared.retries))
        if alone is None or not alone.problem:
            return None
        self._lose_single(rows[low], outcome, alone)
        return low

    def _no_single(
        self, rows: list[int], failure: Problem, outcome: Outcome
    ) -> Generator[Attempt, Outcome, None]:
        if self._declared.idempotent:  # it fails now and then: smaller calls fail less
            yield from self._score(rows[: len(rows) // 2])
            yield from self._score(rows[len(rows) // 2 :])
            return
        note = f" (for the batch of {len(rows)}; no single sample does)"
        self._lose(rows, replace(failure, message=failure.message + note), outcome)

    def _lose_single(self, row: int, batch: Outcome, alone: Outcome) -> None:
        """Lose a row that fails alone, with the batch's message where that says the same."""
        problem = alone.problem
        assert problem is not None and batch.failure is not None
        if problem.kind == batch.failure.kind:  # its indices, if any, are those of the batch
            self._lose([row], replace(batch.failure, sample=0), batch)
        else:
            self._lose([row], replace(problem, sample=0), alone)

    def _lose(self, rows: Sequence[int], problem: Problem, outcome: Outcome) -> None:
        self._scores[rows] = np.nan
        blamed, message = problem.sample, problem.message
        if blamed is None and len(rows) == 1:
            blamed = 0
        elif blamed is None and self._declared.idempotent is False and outcome.suspect is not None:
            blamed = outcome.suspect
            message += f" (the sample read last; all {len(rows)} of the call are lost, because "
            message += "the function is declared not idempotent)"
        self._losses.add(
            self.function.name,
            rows,
            problem.kind,
            message,
            blamed=None if blamed is None else rows[blamed],
            cause=outcome.cause,
        )
