"""Calling reward functions: by keyword, sync and async, with the failing sample named.

`call_functions` is the only place in fastppo where a reward function is called: to run them
elsewhere (other processes, with time limits), replace what stands behind it.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

RewardFunction = Callable[..., Any]


class RewardError(RuntimeError):
    """A reward function failed. `function` is its name, `sample` the index in the batch or None."""

    def __init__(self, message: str, *, function: str, sample: int | None = None) -> None:
        super().__init__(message)
        self.function = function
        self.sample = sample


@dataclass(frozen=True)
class BoundFunction:
    """A reward function, its display name and what its signature asks for."""

    call: RewardFunction
    name: str
    required: tuple[str, ...]
    accepted: frozenset[str] | None  # None: takes **kwargs, so everything

    @classmethod
    def of(cls, func: RewardFunction, name: str) -> BoundFunction:
        try:
            parameters = inspect.signature(func).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature
            return cls(func, name, (), None)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise TypeError(
                f"reward function {name!r} must take its arguments by keyword, got positional-only "
                "parameters; remove the '/' from its signature"
            )
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required = tuple(p.name for p in named if p.default is p.empty)
        return cls(func, name, required, None if everything else frozenset(p.name for p in named))

    def arguments(self, provided: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """The part of `provided` that the function takes, as fresh lists."""
        wanted = provided if self.accepted is None else self.accepted & provided.keys()
        return {name: list(provided[name]) for name in wanted}


def call_functions(
    functions: Sequence[BoundFunction], provided: Mapping[str, Sequence[Any]]
) -> list[Any]:
    """What each function returns for the batch: the only place where reward functions are called.

    Async functions run concurrently in one event loop on a thread of its own (so a loop that
    already runs in the caller's thread, as in a notebook, is no obstacle); sync ones run meanwhile,
    in order, in the caller's thread. A function that raised is called again on parts of the batch,
    at most log2(B) + 1 times, to find the sample; the run is lost at that point anyway.

    Raises:
        RewardError: from the exception of the first function that failed.
    """
    outcomes: list[Any] = [None] * len(functions)
    waiting: dict[int, Future[Any]] = {}
    # Coroutine functions first, so that they are under way while the sync ones compute.
    order = sorted(range(len(functions)), key=lambda i: not _is_async(functions[i].call))
    index = order[0]
    try:
        for index in order:
            outcomes[index] = functions[index].call(**functions[index].arguments(provided))
            if inspect.isawaitable(outcomes[index]):
                waiting[index] = _loop().submit(_await(outcomes[index]))
        for index, future in waiting.items():
            outcomes[index] = future.result()
    except Exception as error:
        function = functions[index]
        sample = _find_sample(function, provided, type(error))
        cause = f"raised {type(error).__name__}: {error}"
        if sample is None:
            cause += f" (for the batch of {len(provided['prompts'])}; no single sample does)"
        raise reward_error(function.name, sample, provided, cause) from error
    finally:
        for future in waiting.values():
            future.cancel()
    return outcomes


def _find_sample(
    function: BoundFunction, provided: Mapping[str, Sequence[Any]], kind: type[Exception]
) -> int | None:
    """Bisects for a sample that alone makes `function` raise `kind`; None if there is none."""

    def fails(low: int, high: int) -> bool:
        try:
            part = {name: values[low:high] for name, values in provided.items()}
            result = function.call(**function.arguments(part))
            if inspect.isawaitable(result):
                _loop().submit(_await(result)).result()
        except Exception as error:
            return type(error) is kind
        return False

    low, high = 0, len(provided["prompts"])
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(low, middle) else (middle, high)
    return low if high > low and fails(low, high) else None


def _is_async(func: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004  an instance whose __call__ is async
    )


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


class _Loop:
    """An event loop on a daemon thread.

    One for the whole process, kept between batches, so that a client which a reward function opened
    (and bound to the loop) on the first batch still works on the next.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(
            target=self._loop.run_forever, name="fastppo-rewards", daemon=True
        )
        self.thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)


_running_loop: _Loop | None = None
_starting = threading.Lock()


def _loop() -> _Loop:
    """The process's loop; a new one after a fork, whose child has no threads."""
    global _running_loop
    with _starting:
        if _running_loop is None or not _running_loop.thread.is_alive():
            _running_loop = _Loop()
        return _running_loop


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
