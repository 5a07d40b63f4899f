"""Reward functions in this process: async ones in one event loop, the others one by one."""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from array import array
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from fastppo.rewards.functions import BoundFunction
from fastppo.rewards.isolation import Attempt, Task
from fastppo.rewards.outcome import NO_ROW, Outcome, WatchedList, checked, failed, suspect_of
from fastppo.training import interrupts

_TICK = 0.1  # seconds between two looks for a signal


def run(
    tasks: Sequence[Task],
    provided: Mapping[str, Sequence[Any]],
    between: Callable[[], None],
) -> None:
    """Calls the functions until every task is done.

    Async functions run concurrently in one event loop on a thread of its own (so a loop that
    already runs in the caller's thread, as in a notebook, is no obstacle); the others run
    meanwhile, in order, in the caller's thread.

    Args:
        tasks: what is to be done.
        provided: the columns of the batch.
        between: called between two calls, to look after other work.

    Raises:
        RewardError: more samples are lost than the run accepts.
    """
    waiting: dict[Future[Outcome], Task] = {}

    def proceed(task: Task) -> None:
        while call := task.call:
            outcome = _call(task.function, call, provided)
            if isinstance(outcome, Future):
                waiting[outcome] = task
                return
            between()
            task.advance(outcome)

    try:
        # Coroutine functions first, so that they are under way while the others compute.
        for task in sorted(tasks, key=lambda task: not _is_async(task.function.call)):
            proceed(task)
        while waiting:
            done, _ = wait(waiting, _TICK, FIRST_COMPLETED)
            interrupts.check()
            between()
            for future in done:
                task = waiting.pop(future)
                task.advance(future.result())
                proceed(task)
    finally:
        for future in waiting:
            future.cancel()


def _call(
    function: BoundFunction, call: Attempt, provided: Mapping[str, Sequence[Any]]
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
            awaited = _outcome(result, note, len(call.rows))
            return asyncio.run_coroutine_threadsafe(awaited, _loop())
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


_running: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
_starting = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """An event loop on a daemon thread; a new one after a fork, whose child has no threads.

    One for the whole process, kept between batches, so that a client which a reward function opened
    (and bound to the loop) on the first batch still works on the next.
    """
    global _running
    with _starting:
        if _running is None or not _running[1].is_alive():
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="fastppo-rewards", daemon=True)
            thread.start()
            _running = loop, thread
        return _running[0]
