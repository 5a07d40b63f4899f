"""One process per run directory.

filelock's lock on run_dir/.lock. The kernel gives it back when the process ends, however it ends,
and filelock closes it in a forked process: a reward worker that outlives the run keeps nothing
locked. The file stays; what is written in it only serves the message for a process that is refused.
"""

from __future__ import annotations

import contextlib
import os
import socket
from datetime import datetime
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from fastppo.checkpoint.durable import ForeignFileError, make_folder, own, refuse_foreign
from fastppo.checkpoint.run_dir import check_entries

LOCK = ".lock"


class RunInUseError(ValueError):
    """A running process has the run directory."""


def lock_run_dir(run_dir: Path, *, new: bool = False) -> AcquireReturnProxy[FileLock]:
    """Lock a run directory, which is made if it does not exist, for this process.

    Args:
        run_dir: the folder.
        new: nothing else may be in it.

    Returns:
        What gives the lock back: as a context manager, by `lock.release()`, or when it is dropped.

    Raises:
        RunInUseError: a running process, this one too, has it locked; or, if `new`, another run
            has been there.
        ValueError: .lock, or something else that a run writes to, is not a run's.
        OSError: the folder cannot be written, or its file system knows no locks.
    """
    make_folder(run_dir)
    path = run_dir / LOCK
    _holder(path)  # refuses what is not a lock, before anything is written to it

    def sign(fd: int) -> None:
        refuse_foreign(path, fd)  # it may have come since
        os.ftruncate(fd, 0)
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        os.pwrite(fd, f"{_this_process()} since {now}".encode(), 0)

    lock = FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=sign)
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        holder = _holder(path)
        by = "this process" if holder.startswith(f"{_this_process()} ") else holder
        raise RunInUseError(
            f"output_dir: {str(run_dir)!r} is in use by {by or 'another process'}. "
            "Wait for that run or stop it, or choose another folder"
        ) from None
    except ForeignFileError:
        raise
    except OSError as error:
        error.filename = str(path)
        raise
    try:
        check_entries(run_dir)
    except OSError:
        lock.release()
        raise
    if new and (others := sorted(p.name for p in run_dir.iterdir() if p != path)):
        lock.release()
        raise RunInUseError(
            f"output_dir: {str(run_dir)!r} was empty when this run was prepared, and now has "
            f"{', '.join(others[:3])}. Continue the run in it with resume, or choose another folder"
        )
    return held


def check_in_place(run_dir: Path, lock: os.stat_result) -> None:
    """Refuse to write where the run is not any more: what is there may be another run's.

    Args:
        run_dir: where it was.
        lock: what .lock was when it was locked.

    Raises:
        RunInUseError: the run directory was moved, removed or replaced.
    """
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(lock, os.lstat(run_dir / LOCK)):
            return
    raise RunInUseError(
        f"output_dir: {str(run_dir)!r} was moved or removed while the run was in it. What has been "
        "saved is where that folder is now: resume it there"
    )


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _holder(path: Path) -> str:
    """What the latest holder wrote; "" before the first."""
    try:
        with open(path, encoding="utf-8", errors="replace", opener=own) as file:
            holder = file.read(1000)
    except FileNotFoundError:
        return ""
    if not holder or holder.startswith("process "):
        return holder
    raise ValueError(f"{path} is not the lock of a run; move it away, or choose another output_dir")
