"""What a reward worker answers, as bytes: JSON, and nothing of it is believed unseen.

A function runs in the process that answers, so an answer may be anything. `decoded` makes plain
numbers and texts of it or refuses it; no code in it could run, as in a pickle.
"""

from __future__ import annotations

import json
import struct
from typing import Any, get_args

import numpy as np

from fastppo.rewards.failures import FailureKind
from fastppo.rewards.outcome import Outcome, Problem

LENGTH = struct.Struct("!Q")  # of a frame, before it
LONGEST_TRACEBACK = 8000  # characters
_LONGEST_MESSAGE = 4000  # characters: `outcome` cuts below it
_FLOAT32_MAX = float(np.finfo(np.float32).max)


def longest(count: int) -> int:
    """Bytes that the answer to a call on `count` samples may have."""
    return 2**18 + 13_000 * count  # a message for each of them, six bytes a character


def encoded(outcome: Outcome, text: str) -> bytes:
    """An outcome (its `cause` as `text`) as a frame."""
    scores = outcome.scores
    answer = {
        "scores": None if scores is None else [None if s != s else s for s in scores.tolist()],
        "problems": [_as_list(problem) for problem in outcome.problems],
        "failure": _as_list(outcome.failure) if outcome.failure else None,
        "suspect": outcome.suspect,
        "text": text,
    }
    body = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LENGTH.pack(len(body)) + body


def decoded(body: bytes, count: int) -> tuple[Outcome, str]:
    """The outcome of a call on `count` samples, and the text of a traceback.

    Raises:
        ValueError: it is none.
    """
    try:
        answer = json.loads(body.decode("utf-8", "surrogatepass"))
        _expect(type(answer) is dict and len(answer) == 5)
        scores, failure, text = answer["scores"], answer["failure"], answer["text"]
        problems = tuple(_problem(fields, count) for fields in answer["problems"])
        _expect(type(text) is str and (scores is None) != (failure is None))
        samples = {problem.sample for problem in problems}
        _expect(None not in samples and len(samples) == len(problems))
        outcome = Outcome(
            None if scores is None else _scores(scores, count),
            problems,
            None if failure is None else _problem(failure, count),
            _sample(answer["suspect"], count),
        )
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no answer: {error}") from error
    return outcome, text[:LONGEST_TRACEBACK]


def _as_list(problem: Problem) -> list[Any]:
    return [problem.kind, problem.message, problem.sample, problem.whole]


def _problem(fields: Any, count: int) -> Problem:
    kind, message, sample, whole = fields
    _expect(kind in get_args(FailureKind) and type(message) is str and type(whole) is bool)
    return Problem(kind, message[:_LONGEST_MESSAGE], _sample(sample, count), whole)


def _scores(values: Any, count: int) -> np.ndarray:
    _expect(type(values) is list and len(values) == count)
    good = (v is None or (type(v) is float and abs(v) <= _FLOAT32_MAX) for v in values)
    _expect(all(good))
    return np.array([np.nan if v is None else v for v in values], dtype=np.float32)


def _sample(value: Any, count: int) -> int | None:
    _expect(value is None or (type(value) is int and 0 <= value < count))
    return None if value is None else int(value)


def _expect(condition: bool) -> None:
    if not condition:
        raise ValueError("no answer to this call")
