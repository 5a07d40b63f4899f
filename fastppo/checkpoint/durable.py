"""Files and folders that survive a power cut: written, synchronised, then named."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from pathlib import Path

_ADVICE = {
    errno.ENOSPC: "Free some space there, then go on",
    errno.EDQUOT: "Free some space within the quota, then go on",
    errno.EFBIG: "Raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "Mount the file system for writing, or choose another output_dir",
    errno.EACCES: "Make the folder writable for this user, or choose another output_dir",
    errno.EPERM: "Make the folder writable for this user, or choose another output_dir",
    errno.EXDEV: "Choose an output_dir that lies on one file system",
}


class ForeignFileError(OSError, ValueError):
    """Something under a name that is the run's own was put there by somebody else."""


def own(path: str | Path, flags: int) -> int:
    """The opener (see `open`) of all that is written to in a run directory.

    Raises:
        ForeignFileError: see `refuse_foreign`. Nothing has been changed or waited for.
    """
    refuse_foreign(path)
    # What was put there since is not followed, and does not block.
    safe = flags & ~os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(path, safe, 0o666)
    try:
        refuse_foreign(path, fd)
        if flags & os.O_TRUNC:
            os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def refuse_foreign(path: str | Path, fd: int | None = None, *, folder: bool = False) -> None:
    """Refuse what is no regular file with this one name, or no folder; what is absent is neither.

    Writing through a link, or to a file that has another name too, changes something elsewhere;
    opening a FIFO waits for whoever is at its other end.

    Args:
        path: what to look at, without following it.
        fd: it is open already.
        folder: expect a folder.

    Raises:
        ForeignFileError: it names `path` and says what is there.
    """
    try:
        found = os.lstat(path) if fd is None else os.fstat(fd)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        what = "" if folder else "a folder"
    elif stat.S_ISLNK(found.st_mode):
        what = "a symbolic link"
    elif not stat.S_ISREG(found.st_mode):
        what = "a FIFO, a socket or a device"
    elif folder:
        what = "a file"
    else:
        what = "a file that has another name too (a hard link)" if found.st_nlink > 1 else ""
    if what:
        raise ForeignFileError(
            f"{path}: expected a {'folder' if folder else 'file'} of the run's own, got {what}. "
            "Move it away, or choose another output_dir"
        )


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    """`sync` for everything below a folder and the folder itself."""
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent, name))
        sync(Path(parent))


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and bring it to the disk; a reader may see it half written."""
    # No buffer in the interpreter: a process forked meanwhile could write it a second time.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Make a folder that may exist, and its parents, and bring their names to the disk."""
    if not path.is_dir():
        if path.exists():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def delete(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def advice(error: Exception) -> str:
    """What to do about a file that could not be written."""
    return _ADVICE.get(_errno(error), "Mend that, then go on")


def _errno(error: Exception) -> int:
    """The system's error number; safetensors gives it only in words: "... (os error 28)"."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"\(os error (\d+)\)", str(error))
    return int(match[1]) if match else 0
