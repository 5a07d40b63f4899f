"""What bounds a reward function, and what the function says about itself."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from fastppo.options import Options, option

_ATTRIBUTE = "fastppo_declaration"

_jitter = random.Random()  # not the shared generator, whose state may be a run's

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class RewardLimits(Options):
    """How reward functions run and how much may go wrong.

    Raises:
        ValueError: a value outside its range.
    """

    workers: int = option(1, "≥ 0")
    """Processes per function. 0 calls it in this process: state is kept and a debugger works, but
    no time or memory limit applies and a crash ends the run."""
    timeout: float = option(60.0, "> 0")
    """Seconds a call may take before its worker is killed."""
    memory_gb: float = option(4.0, "> 0")
    """GiB that a worker may map beyond what this process has mapped when the worker starts, and
    that it and all that it starts may take together."""
    max_failure_rate: float = option(0.0, "[0, 1]")
    """Share of samples, over the last 10 batches, that may be lost before the run stops. 0 stops
    at the first one."""


@dataclass(frozen=True)
class Declaration:
    """What `declare` said of a function."""

    idempotent: bool | None = None
    per_sample: bool = False
    retries: int = 0


def declare(
    *, idempotent: bool | None = None, per_sample: bool = False, retries: int = 2
) -> Callable[[Function], Function]:
    """Says how a reward function may be called; a decorator that changes nothing else.

    Args:
        idempotent: True: calling it again does no harm, so what failed is tried again. False: it is
            never called twice for anything, and a call that fails loses all its samples. None: it
            is called again on parts of a failed batch to find the bad samples, and only for that.
        per_sample: the score of a sample does not depend on the others of its batch, so a batch may
            be split over several processes.
        retries: how often what failed is tried again before it is lost, where `idempotent` is True.

    Returns:
        A decorator for functions, methods, `functools.partial` and callable objects.

    Raises:
        ValueError: `retries` is negative.
        TypeError: the object takes no attributes (a builtin); wrap it in a function.
    """
    if retries < 0:
        raise ValueError(f"retries must be 0 or more, got {retries}")
    declaration = Declaration(idempotent, per_sample, retries if idempotent else 0)

    def mark(func: Function) -> Function:
        try:
            setattr(getattr(func, "__func__", func), _ATTRIBUTE, declaration)
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"declare: {func!r} takes no attributes; declare a function that calls it"
            ) from error
        return func

    return mark


def declaration_of(func: Callable[..., Any]) -> Declaration:
    """What was declared of `func`, of what a partial wraps, or of an object's `__call__`."""
    while True:
        found = getattr(func, _ATTRIBUTE, None) or getattr(type(func).__call__, _ATTRIBUTE, None)
        if isinstance(found, Declaration):
            return found
        if not isinstance(func, functools.partial):
            return Declaration()
        func = func.func


def backoff(first: float, tries: int) -> float:
    """Seconds before a call that follows `tries` failed ones, between half and all of a time that
    doubles with each, from `first` on.
    """
    return first * 2 ** (tries - 1) * _jitter.uniform(0.5, 1.0) if tries else 0.0
