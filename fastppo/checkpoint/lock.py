"""One process per run directory.

A POSIX record lock on run_dir/.lock. The kernel gives it back when the process ends, however it
ends, and a forked process does not inherit it: a reward worker that outlives the run keeps nothing
locked. The file stays; what is written in it only serves the message for a process that is refused.

A process loses the lock as soon as it closes the file anywhere: open run_dir/.lock nowhere else.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from datetime import datetime
from pathlib import Path
from types import TracebackType

from fastppo.checkpoint.durable import make_folder

LOCK = ".lock"

# Folder (device, inode) → the process that locked it: within one process record locks do not
# exclude each other, and a forked process gets a copy of this table without the locks.
_held: dict[tuple[int, int], int] = {}


class RunDirLock:
    """A run directory's lock, held until `release` or the end of the process."""

    def __init__(self, fd: int, key: tuple[int, int]) -> None:
        self._fd = fd
        self._key = key

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._fd >= 0:
            _held.pop(self._key, None)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> RunDirLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def lock_run_dir(run_dir: Path) -> RunDirLock:
    """Lock a run directory, which is made if it does not exist, for this process.

    Raises:
        ValueError: a running process, this one too, has it locked.
        OSError: the folder cannot be written, or its file system knows no locks.
    """
    make_folder(run_dir)
    status = run_dir.stat()
    key = (status.st_dev, status.st_ino)
    if _held.get(key) == os.getpid():
        raise _in_use(run_dir, "this process")
    fd = os.open(run_dir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(fd, 0)
        now = datetime.now().astimezone().isoformat(" ", "seconds")
        os.write(fd, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
    except OSError as error:
        holder = os.read(fd, 1000).decode(errors="replace")
        os.close(fd)
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise _in_use(run_dir, holder or "another process") from None
        error.filename = str(run_dir / LOCK)
        raise
    _held[key] = os.getpid()
    return RunDirLock(fd, key)


def _in_use(run_dir: Path, holder: str) -> ValueError:
    return ValueError(
        f"output_dir: {str(run_dir)!r} is in use by {holder}. "
        "Wait for that run or stop it, or choose another folder"
    )
