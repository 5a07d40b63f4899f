"""The parent's side of a reward worker: a forked process and its keeper, its calls and its end."""

from __future__ import annotations

import contextlib
import functools
import mmap
import multiprocessing
import os
import pickle
import select
import signal
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from fastppo.rewards.child import READING, TAKEN, Setting, serve
from fastppo.rewards.failures import FailureKind
from fastppo.rewards.keeper import OVER, dismiss, how_ended, keep
from fastppo.rewards.limits import RewardLimits
from fastppo.rewards.outcome import NO_ROW, Outcome, Problem, suspect_of
from fastppo.rewards.reply import LENGTH, decoded, longest
from fastppo.training import interrupts

_LAST_BREATH = 1.0  # seconds for the exit status of a worker that closed its connection
_CHUNK = 1 << 16  # bytes


class WorkerError(Exception):
    """The traceback of an exception in a worker, as text; a RewardError is chained to it."""


class Worker:
    """A process that calls one function; forked at the first call, and anew after it was killed.

    Forking (not spawning) is what lets a function be a closure, a lambda or a bound method.

    Args:
        call: the reward function.
        name: of the process, as tools such as `ps` and a debugger may show it.
        limits: of a call.
    """

    def __init__(self, call: Callable[..., Any], name: str, limits: RewardLimits) -> None:
        self._call = call
        self._name = name
        self._limits = limits
        self._process: Any = None  # the keeper; its class depends on the platform
        self._socket: socket.socket | None = None
        self._memory: mmap.mmap | None = None
        self._note: Any = None  # int64 view of _memory
        self._count = 0  # samples of the call
        self._request = b""
        self._sent = 0  # bytes of the request
        self._reply = bytearray()
        self._requests = 0  # since the fork
        self._fresh_start = False  # the request was given to a second process already
        self.deadline = 0.0  # of the current call, on the monotonic clock

    def begin(self, arguments: dict[str, list[Any]], count: int) -> None:
        """Start a call on `count` samples.

        Raises:
            TypeError: an argument cannot be pickled.
        """
        try:
            body = pickle.dumps((count, arguments), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            raise TypeError(
                f"reward function {self._name!r}: its columns {', '.join(arguments)} must be plain "
                f"data to be sent to its worker process ({type(error).__name__}: {error}). Store "
                "plain values in the dataset, or set workers to 0"
            ) from error
        self._request = LENGTH.pack(len(body)) + body
        self._count = count
        self._fresh_start = False
        self._send()

    def _send(self) -> None:
        if self._process is None:
            self._start()
        self._sent = 0
        self._reply.clear()
        self._requests += 1
        self.deadline = time.monotonic() + self._limits.timeout
        self._write()

    def watch(self, poll: select.poll) -> int:
        """Register with `poll` for what the call waits for; the descriptor."""
        assert self._socket is not None
        unsent = self._sent < len(self._request)
        poll.register(self._socket, select.POLLIN | (select.POLLOUT if unsent else 0))
        return self._socket.fileno()

    def proceed(self) -> Outcome | None:
        """Write and read what can be without waiting: the outcome, once the call is over."""
        self._write()
        while True:
            assert self._socket is not None
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                return None
            except ConnectionError:
                data = b""
            if not data:
                return self._ended()
            self._reply += data
            if len(self._reply) >= LENGTH.size:
                (size,) = LENGTH.unpack_from(self._reply)
                if size > longest(self._count) or len(self._reply) >= LENGTH.size + size:
                    return self._answered(size)

    def overdue(self) -> Outcome | None:
        """The outcome of a call whose time is up or whose process is gone, having killed it."""
        if time.monotonic() < self.deadline:
            # A process that the function started may hold the connection open: no end is seen.
            process = self._process
            if how_ended(process.pid) is None:
                return None
            outcome = self.proceed()
            return self._ended() if outcome is None and process is self._process else outcome
        message = f"did not return within {self._limits.timeout:g} s and was killed"
        return self._killed("timeout", message)

    def stop(self) -> None:
        """Kill the process, and what it started, at once. Does nothing where there is none."""
        process, self._process = self._process, None
        if process is None:
            return
        assert self._socket and self._note and self._memory
        self._socket.close()
        dismiss(process)
        self._note.release()
        self._memory.close()
        self._socket = self._note = self._memory = None

    def abandon(self) -> None:
        """In a forked process: forget the parent's worker."""
        if self._socket:
            self._socket.close()
        self._process = self._socket = self._note = self._memory = None

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self._memory = mmap.mmap(-1, 24)
        self._note = memoryview(self._memory).cast("q")
        self._note[READING] = NO_ROW
        self._requests = 0
        memory_gb = self._limits.memory_gb
        work = functools.partial(serve, self._call, Setting(theirs, self._note, memory_gb))
        process = multiprocessing.get_context("fork").Process(
            target=keep,
            args=(work, os.getpid(), memory_gb, self._note),
            name=f"fastppo-reward-{self._name}",
        )
        try:
            with _signals_held(), warnings.catch_warnings():
                # Python warns of forking while other threads run, as torch's do. The worker uses
                # none of their locks: see child.py.
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._process, self._socket = process, ours

    def _write(self) -> None:
        assert self._socket is not None
        with contextlib.suppress(BlockingIOError, ConnectionError):  # its end is seen on reading
            while self._sent < len(self._request):
                view = memoryview(self._request)[self._sent :]
                self._sent += self._socket.send(view)

    def _answered(self, size: int) -> Outcome:
        try:
            if len(self._reply) != LENGTH.size + size:
                raise ValueError(f"an answer of {size} bytes")
            outcome, text = decoded(bytes(self._reply[LENGTH.size :]), self._count)
        except ValueError:
            message = "wrote something else into the connection of its worker process"
            return self._killed("crash", message)
        if outcome.failure is None:
            return outcome
        if outcome.failure.kind == "memory":
            self.stop()  # what it still holds is unknown
        cause = WorkerError(f"\n{text}") if text else None
        return Outcome(None, failure=outcome.failure, suspect=outcome.suspect, cause=cause)

    def _ended(self) -> Outcome | None:
        taken = self._note[TAKEN] >= self._requests
        how = _how_it_ended(self._process.pid)
        if self._note[OVER]:
            limit = f"memory_gb = {self._limits.memory_gb:g}"
            message = f"took more than {limit} together with the processes that it started"
            return self._killed("memory", message)
        crashed = self._killed("crash", how)
        if not taken and not self._fresh_start:  # it died before the call, by nobody's fault
            self._fresh_start = True
            self._send()
            return None
        return crashed

    def _killed(self, kind: FailureKind, message: str) -> Outcome:
        """The outcome of a call whose process is of no more use, having killed it."""
        suspect = suspect_of(self._note)
        if suspect not in range(self._count):  # the function can write there too
            suspect = None
        self.stop()
        return Outcome(None, failure=Problem(kind, message), suspect=suspect)


def _how_it_ended(pid: int) -> str:
    """How a worker came to close its connection."""
    end = how_ended(pid, _LAST_BREATH)
    if end is None:
        return "closed the connection of its worker process"
    code, status = end
    if code == os.CLD_EXITED:
        return f"ended its worker process with exit code {status}"
    hint = " (perhaps for lack of memory)" if status == signal.SIGKILL else ""
    return f"crashed its worker process: {signal.strsignal(status)}, signal {status}{hint}"


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait, so that none meets a process that is half forked."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts.SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
