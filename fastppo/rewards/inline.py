"""Reward functions in this process: async ones in one event loop, the others one by one."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from fastppo.rewards.functions import BoundFunction
from fastppo.rewards.isolation import Call, Task
from fastppo.rewards.outcome import NO_ROW, Outcome, WatchedList, checked, failed, suspect_of
from fastppo.training import interrupts

_TICK = 0.1  # seconds between two looks for a signal


def run(
    work: Sequence[tuple[Task, BoundFunction]],
    provided: Mapping[str, Sequence[Any]],
    between: Callable[[], None],
) -> None:
    """Calls the functions until every task is done.

    Async functions run concurrently in one event loop on a thread of its own (so a loop that
    already runs in the caller's thread, as in a notebook, is no obstacle); the others run
    meanwhile, in order, in the caller's thread.

    Args:
        work: tasks and their functions.
        provided: the columns of the batch.
        between: called between two calls, to look after other work.

    Raises:
        RewardError: more samples are lost than the run accepts.
    """
    waiting: dict[Future[Outcome], tuple[Task, BoundFunction]] = {}

    def proceed(task: Task, function: BoundFunction) -> None:
        while call := task.call:
            outcome = _call(function, call, provided)
            if isinstance(outcome, Future):
                waiting[outcome] = (task, function)
                return
            between()
            task.advance(outcome)

    try:
        # Coroutine functions first, so that they are under way while the others compute.
        for task, function in sorted(work, key=lambda pair: not _is_async(pair[1].call)):
            proceed(task, function)
        while waiting:
            done, _ = wait(waiting, _TICK, FIRST_COMPLETED)
            interrupts.check()
            between()
            for future in done:
                task, function = waiting.pop(future)
                task.advance(future.result())
                proceed(task, function)
    finally:
        for future in waiting:
            future.cancel()


def _call(
    function: BoundFunction, call: Call, provided: Mapping[str, Sequence[Any]]
) -> Outcome | Future[Outcome]:
    ends = time.monotonic() + call.pause
    while (left := ends - time.monotonic()) > 0:
        interrupts.check()
        time.sleep(min(left, _TICK))
    note = array("q", [NO_ROW])
    arguments = function.arguments(provided, call.rows)
    watched = {name: WatchedList(values, note) for name, values in arguments.items()}
    try:
        result = function.call(**watched)
        if inspect.isawaitable(result):
            return _loop().submit(_outcome(result, note, len(call.rows)))
        return checked(result, len(call.rows))
    except (Exception, SystemExit) as error:
        if isinstance(error, interrupts.Interrupted):
            raise
        return failed(error, suspect_of(note))


async def _outcome(awaitable: Awaitable[Any], note: Sequence[int], expected: int) -> Outcome:
    try:
        return checked(await awaitable, expected)
    except (Exception, SystemExit) as error:
        return failed(error, suspect_of(note))


def _is_async(func: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(
        getattr(func, "__call__", None)  # noqa: B004  an instance whose __call__ is async
    )


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

    def submit(self, coroutine: Coroutine[Any, Any, Outcome]) -> Future[Outcome]:
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
