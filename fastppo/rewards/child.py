"""The worker's side of a reward worker: a forked process that calls a function until it is killed.

Requests and replies are frames on a socket: 8 bytes of length, then the rest. A request is a pickle
of the number of samples and the arguments by name. A reply is an `Outcome` and the text of a
traceback, as `reply.py` writes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import inspect
import io
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, BinaryIO

import torch

from fastppo.rewards.keeper import blank_descriptors
from fastppo.rewards.outcome import NO_ROW, Outcome, WatchedList, checked, failed, suspect_of
from fastppo.rewards.reply import LENGTH, LONGEST_TRACEBACK, encoded
from fastppo.training import interrupts

if TYPE_CHECKING:
    from typing_extensions import Buffer

READING, TAKEN = 0, 1  # slots of the shared note: element being read, number of requests taken


@dataclass(frozen=True)
class Setting:
    """What a worker has from its parent."""

    connection: socket.socket
    note: MutableSequence[int]  # int64, shared with the parent
    memory_gb: float


class _Quiet(io.FileIO):
    """A stream on which nothing that is written fails: a full disk, a pipe whose reader is gone."""

    def write(self, data: Buffer) -> int:
        with contextlib.suppress(OSError):
            if written := super().write(data):
                return written
        return memoryview(data).nbytes


def serve(call: Callable[..., Any], setting: Setting) -> None:
    """Answers requests until the parent closes the connection; never returns."""
    connection = _settle(setting)
    loop, requests = asyncio.new_event_loop(), connection.makefile("rb")
    with contextlib.suppress(ConnectionError):
        while request := _receive(requests):
            setting.note[READING] = NO_ROW
            setting.note[TAKEN] += 1
            connection.sendall(_reply(call, request, setting, loop))
    os._exit(0)


def _settle(setting: Setting) -> socket.socket:
    """Make this process the function's own; its end of the connection."""
    interrupts.forget_in_child()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # print from the background of a terminal
    gc.freeze()  # garbage of the parent, such as a file with a full buffer, is not ours to collect
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _limit_memory(setting.memory_gb)
    # Beyond 2, which a program that was started without standard streams uses for anything.
    connection = socket.socket(fileno=fcntl.fcntl(setting.connection, fcntl.F_DUPFD_CLOEXEC, 3))
    blank_descriptors((*_standard_streams(), connection.fileno()))
    return connection


def _standard_streams() -> tuple[int, ...]:
    """Nothing to read, and the parent's places to print to; their descriptors."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  it lives as long as the process
    # The parent's streams may be a display whose locks are held by a thread that is gone; and lines
    # written before a crash should be seen.
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        parents = getattr(sys, f"__{name}__")
        if parents is None or parents.closed:  # the number is that of some other file
            os.dup2(null, descriptor)
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        raw = io.BufferedWriter(_Quiet(descriptor, "w", closefd=False))
        stream = io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=True)
        setattr(sys, name, stream)
    return 0, 1, 2


def _limit_memory(gib: float) -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = mapped + int(gib * 2**30)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def _receive(requests: BinaryIO) -> bytes | None:
    header = requests.read(LENGTH.size)
    if len(header) < LENGTH.size:
        return None
    (size,) = LENGTH.unpack(header)
    data = requests.read(size)
    return data if len(data) == size else None


def _reply(
    call: Callable[..., Any],
    request: bytes,
    setting: Setting,
    loop: asyncio.AbstractEventLoop,
) -> bytes:
    text = ""
    try:
        expected, arguments = pickle.loads(request)
        result = call(
            **{name: WatchedList(values, setting.note) for name, values in arguments.items()}
        )
        if inspect.isawaitable(result):
            result = loop.run_until_complete(result)
        outcome = checked(result, expected)
    except BaseException as error:  # sys.exit() too: only the parent ends this process
        outcome = failed(error, suspect_of(setting.note))
        text = _traceback(error)
    return encoded(_explained(outcome, setting.memory_gb), text)


def _explained(outcome: Outcome, memory_gb: float) -> Outcome:
    failure = outcome.failure
    if failure is not None and failure.kind == "memory":
        message = f"{failure.message} (its limit is memory_gb = {memory_gb:g})"
        failure = replace(failure, message=message)
    return replace(outcome, failure=failure)


def _traceback(error: BaseException) -> str:
    try:
        below = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, below))
    except Exception:  # a broken __str__
        return ""
    return text[-LONGEST_TRACEBACK:]
