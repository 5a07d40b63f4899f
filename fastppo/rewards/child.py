"""The worker's side of a reward worker: a forked process that calls a function until it is killed.

Requests and replies are frames on a socket: 8 bytes of length, then a pickle. A request holds the
number of samples and the arguments by name, a reply an `Outcome` (checked here, so that only plain
numbers and messages travel) and the text of a traceback.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import torch

from fastppo.rewards.outcome import NO_ROW, Outcome, WatchedList, checked, failed, suspect_of
from fastppo.training import interrupts

LENGTH = struct.Struct("!Q")
READING, TAKEN = 0, 1  # slots of the shared note: element being read, number of requests taken

_PR_SET_PDEATHSIG = 1
_LONGEST_TRACEBACK = 8000  # characters

# Looked up before any fork: afterwards a lock of the loader might be held by a thread that is gone.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


@dataclass(frozen=True)
class Setting:
    """What a worker has from its parent."""

    connection: socket.socket
    note: MutableSequence[int]  # int64, shared with the parent
    parent: int  # process id
    memory_gb: float
    close: tuple[socket.socket, ...]  # the parent's ends, which no other process may hold open


def serve(call: Callable[..., Any], setting: Setting) -> None:
    """Answers requests until the parent closes the connection or dies; never returns."""
    _settle(setting)
    loop, requests = asyncio.new_event_loop(), setting.connection.makefile("rb")
    with contextlib.suppress(ConnectionError):
        while request := _receive(requests):
            setting.note[READING] = NO_ROW
            setting.note[TAKEN] += 1
            reply = _reply(call, request, setting, loop)
            setting.connection.sendall(LENGTH.pack(len(reply)) + reply)
    os._exit(0)


def _settle(setting: Setting) -> None:
    os.setpgid(0, 0)  # so that the parent can kill what a function starts together with it
    interrupts.forget_in_child()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts.SIGNALS)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # print from the background of a terminal
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != setting.parent:  # it died before the line above
        os._exit(0)
    for other in setting.close:
        other.close()
    gc.freeze()  # garbage of the parent, such as a file with a full buffer, is not ours to collect
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    _limit_memory(setting.memory_gb)
    # The parent's streams may be a display whose locks are held by a thread that is gone; and lines
    # written before a crash should be seen.
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", None) or "utf-8"
        with contextlib.suppress(OSError):
            stream = open(  # noqa: SIM115  it lives as long as the process
                descriptor, "w", 1, encoding, "backslashreplace", closefd=False
            )
            setattr(sys, name, stream)


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
    return pickle.dumps((_explained(outcome, setting.memory_gb), text))


def _explained(outcome: Outcome, memory_gb: float) -> Outcome:
    failure = outcome.failure
    if failure is not None and failure.kind == "memory":
        message = f"{failure.message} (its limit is memory_gb = {memory_gb:g})"
        failure = replace(failure, message=message)
    return replace(outcome, failure=failure, cause=None)


def _traceback(error: BaseException) -> str:
    try:
        below = error.__traceback__.tb_next if error.__traceback__ else None
        text = "".join(traceback.format_exception(type(error), error, below))
    except Exception:  # a broken __str__
        return ""
    return text[-_LONGEST_TRACEBACK:]
