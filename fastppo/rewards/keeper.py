"""The process between this one and a reward worker, which outlives neither.

    trainer ── keeper ── worker ── whatever the function starts

Whatever a function starts, in a session of its own or twice forked, stays a descendant of its
keeper, which adopts what is orphaned below it. When the worker ends, when the trainer ends, however
that may be (the keeper has another parent then), or asks for it, the keeper kills all of them and
ends the way the worker did. It also adds up their memory. It holds no descriptor, and no signal but
SIGKILL and SIGSTOP reaches it. Where the system is not Linux, only the worker's process group is
killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, MutableSequence
from typing import Any, NoReturn

OVER = 2  # slot of the shared note: 1 once the memory of all processes is beyond the limit

_STOP = signal.SIGRTMIN + 7 if sys.platform == "linux" else signal.SIGUSR2  # nobody else sends it
_TICK = 0.1  # seconds between two looks at the trainer and at the memory
_SHARE = 0.1  # of a processor, that looking at the memory may take
_PATIENCE = 5.0  # seconds for what cannot be killed: stuck in the kernel, or another user's

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

# Looked up before any fork: afterwards a lock of the loader might be held by a thread that is gone.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def keep(
    work: Callable[[], None], trainer: int, memory_gb: float, note: MutableSequence[int]
) -> NoReturn:
    """Run `work` in a child, and be its keeper.

    Args:
        work: what the child does.
        trainer: process id of the parent.
        memory_gb: GiB that all processes together may take above what this one has.
        note: int64, shared with the trainer.
    """
    os.setpgid(0, 0)  # a terminal's signals, and a worker's to its group, are not for the keeper
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how a child ended
    if _prctl is not None:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            os.setpgid(0, 0)
            if _prctl is not None:
                _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() == keeper:  # else it died before the line above
                work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    status = 0
    try:
        blank_descriptors(())
        status = _watch(worker, trainer, memory_gb, note)
    finally:
        _kill_all(worker)
        _end_like(status)


def dismiss(process: Any) -> None:
    """In the trainer: have a keeper kill what it keeps, and wait for its end.

    Args:
        process: the keeper's, of multiprocessing.
    """
    pid = process.pid
    if how_ended(pid) is None:
        for signum in (signal.SIGCONT, _STOP):
            os.kill(pid, signum)
        if how_ended(pid, _PATIENCE + 1) is None:  # the function has stopped it for good
            _kill([*descendants(pid), pid])
    if how_ended(pid, 1.0) is not None:
        process.join()
        process.close()


def how_ended(pid: int, patience: float = 0.0) -> tuple[int, int] | None:
    """(si_code, si_status) of a child that has ended, which stays unreaped; None while it runs.

    Asks the kernel for the process, not for the end of a pipe that others may hold.
    """
    ends = time.monotonic() + patience
    while True:
        try:
            info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:  # reaped by somebody else
            return (os.CLD_EXITED, -1)
        if info is not None:
            return info.si_code, info.si_status
        if time.monotonic() >= ends:
            return None
        time.sleep(0.001)


def blank_descriptors(but: Iterable[int]) -> None:
    """Close every descriptor `but` these, and leave their numbers taken.

    An object that still has one of the numbers gets EBADF from it, and never another file.
    """
    blank = os.open(os.devnull, getattr(os, "O_PATH", os.O_RDONLY) | os.O_CLOEXEC)
    try:
        open_ones = [int(name) for name in os.listdir("/proc/self/fd")]
    except OSError:
        open_ones = list(range(os.sysconf("SC_OPEN_MAX")))
    for descriptor in set(open_ones) - {blank, *but}:
        with contextlib.suppress(OSError):
            os.fstat(descriptor)
            os.dup2(blank, descriptor, inheritable=False)


def descendants(root: int) -> list[int]:
    """Process ids of all below `root`, parents first; none where /proc does not tell."""
    found = [root]
    for pid in found:  # grows
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    found += map(int, _read(f"/proc/{pid}/task/{task}/children").split())
    return found[1:]


def _watch(worker: int, trainer: int, memory_gb: float, note: MutableSequence[int]) -> int:
    """Waits until the worker (whose wait status it returns) or the trainer ends, or until it has
    to be the end of both (0)."""
    pause = _TICK
    while True:
        received = signal.sigtimedwait({signal.SIGCHLD, _STOP}, pause)
        for pid, status in _reaped():
            if pid == worker:
                return status
        if os.getppid() != trainer or (received and received.si_signo == _STOP):
            return 0
        began = time.monotonic()
        if _too_much(memory_gb):
            note[OVER] = 1
            return 0
        pause = max(_TICK, (time.monotonic() - began) / _SHARE)


def _reaped() -> Iterable[tuple[int, int]]:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, status


def _too_much(gib: float) -> bool:
    """Whether all descendants have taken more than `gib` above what the worker was forked with.

    What several of them share counts once, and what they share with the trainer not at all. The
    exact number costs the kernel time, so it asks for that only where the sum of the parts is
    beyond the limit.
    """
    own = os.getpid()
    below = descendants(own)
    for file, names in (
        ("status", {"RssAnon", "RssShmem", "VmSwap"}),
        ("smaps_rollup", {"Pss_Anon", "Pss_Shmem", "SwapPss"}),
    ):
        total, base = 0, _kib(own, file, names)
        for pid in below:
            with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
                forked = _stack(pid) == _stack(own)  # and has not started another program since
                total += max(0, _kib(pid, file, names) - (base if forked else 0))
        if total <= gib * 2**20:
            return False
    return True


def _kib(pid: int, file: str, names: set[str]) -> int:
    lines = (line.partition(":") for line in _read(f"/proc/{pid}/{file}").splitlines())
    return sum(int(value.split()[0]) for name, _, value in lines if name in names)


def _stack(pid: int) -> str:
    """Where its stack starts, which forks have in common and programs started anew do not."""
    return _read(f"/proc/{pid}/stat").rpartition(")")[2].split()[25]


def _kill_all(worker: int) -> None:
    ends = time.monotonic() + _PATIENCE
    with contextlib.suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    while time.monotonic() < ends:
        _kill(descendants(os.getpid()))
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _end_like(status: int) -> NoReturn:
    """Ends with the wait status of a child, for the trainer to see."""
    with contextlib.suppress(OSError, ValueError):
        if os.WIFSIGNALED(status):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signum = os.WTERMSIG(status)
            if signum != signal.SIGKILL:
                signal.signal(signum, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
            os.kill(os.getpid(), signum)
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        return file.read()
