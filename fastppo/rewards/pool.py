"""The workers of all reward functions, and the batch that they compute at the same time."""

from __future__ import annotations

import atexit
import contextlib
import math
import multiprocessing.util  # before our own atexit below, so that it runs after it
import os
import select
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.rewards.isolation import Task
from fastppo.rewards.limits import RewardLimits
from fastppo.rewards.worker import Worker
from fastppo.training import interrupts

# macOS can fork, but its system libraries do not survive it.
CAN_FORK = sys.platform != "darwin" and "fork" in multiprocessing.get_all_start_methods()

_TICK = 0.1  # seconds between two looks for signals and for workers that are gone

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


class Pool:
    """Worker processes, kept between batches.

    Args:
        limits: of every call.
    """

    def __init__(self, limits: RewardLimits) -> None:
        self._limits = limits
        self._workers: dict[str, list[Worker]] = {}  # by name of the function
        self._process = os.getpid()
        self._one_batch = threading.Lock()
        _pools.add(self)

    @contextlib.contextmanager
    def batch(
        self, tasks: Sequence[Task], provided: Mapping[str, Sequence[Any]]
    ) -> Iterator[Batch]:
        """Start every task on a worker of its own; at the end kill the workers that still compute.

        Args:
            tasks: what is to be done.
            provided: the columns of the batch.
        """
        with self._one_batch:
            self._check_process()
            taken = Counter[str]()
            batch = Batch(provided)
            try:
                for task in tasks:
                    name = task.function.name
                    workers = self._workers.setdefault(name, [])
                    if taken[name] == len(workers):
                        workers.append(Worker(task.function.call, name, self._limits))
                    batch.add(task, workers[taken[name]])
                    taken[name] += 1
                yield batch
            finally:
                batch.abort()

    def close(self) -> None:
        """Kill the workers. The next batch would start new ones."""
        self._check_process()
        for workers in self._workers.values():
            for worker in workers:
                worker.stop()
        self._workers.clear()

    def _check_process(self) -> None:
        """After a fork of this process the workers are still those of the parent."""
        if self._process != os.getpid():
            for workers in self._workers.values():
                for worker in workers:
                    worker.abandon()
            self._workers.clear()
            self._process = os.getpid()
            self._one_batch = threading.Lock()


@dataclass(eq=False)
class _Member:
    """A task, the worker that has it, and whether a call is under way."""

    task: Task
    worker: Worker
    busy: bool = False
    due: float = 0.0  # when the next call may start, where none is under way


class Batch:
    """The calls of one batch that run in workers."""

    def __init__(self, provided: Mapping[str, Sequence[Any]]) -> None:
        self._provided = provided
        self._members: list[_Member] = []

    def add(self, task: Task, worker: Worker) -> None:
        """Begin a task."""
        member = _Member(task, worker)
        self._members.append(member)
        self._next_call(member)

    def look(self, seconds: float = 0.0) -> None:
        """Act on what has happened, waiting up to `seconds` for something to happen.

        Raises:
            RewardError: more samples are lost than the run accepts.
        """
        poll = select.poll()
        busy = {m.worker.watch(poll): m for m in self._members if m.busy}
        now = time.monotonic()
        times = [m.worker.deadline if m.busy else m.due for m in self._members]
        wait = max(0.0, min([seconds, *(moment - now for moment in times)]))
        # Rounded up: rounded down, the last millisecond would be spent in a loop.
        ready = {descriptor for descriptor, _ in poll.poll(math.ceil(wait * 1000))}
        for descriptor, member in busy.items():
            outcome = member.worker.proceed() if descriptor in ready else None
            outcome = outcome or member.worker.overdue()
            if outcome is not None:
                member.busy = False
                member.task.advance(outcome)
                self._next_call(member)
        for member in self._members:
            if not member.busy and member.due <= time.monotonic():
                self._begin(member)

    def finish(self) -> None:
        """Wait until every task is done.

        Raises:
            RewardError: more samples are lost than the run accepts.
            Interrupted: a signal asked the run to stop.
        """
        while self._members:
            self.look(_TICK)
            interrupts.check()

    def abort(self) -> None:
        """Kill the workers whose calls are under way."""
        for member in self._members:
            if member.busy:
                member.worker.stop()
        self._members.clear()

    def _next_call(self, member: _Member) -> None:
        if member.task.call is None:
            self._members.remove(member)
            return
        member.due = time.monotonic() + member.task.call.pause
        if not member.task.call.pause:
            self._begin(member)

    def _begin(self, member: _Member) -> None:
        call = member.task.call
        assert call is not None
        arguments = member.task.function.arguments(self._provided, call.rows)
        member.worker.begin(arguments, len(call.rows))
        member.busy = True


def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


# At exit multiprocessing waits for every process that is left, and a worker never ends by itself.
atexit.register(_close_all)
