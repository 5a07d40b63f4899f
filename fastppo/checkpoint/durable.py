"""Files and folders that survive a power cut: written, synchronised, then named."""

from __future__ import annotations

import errno
import os
import re
import shutil
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
    """Write a file and bring it to the disk; a reader may see it half written."""
    # No buffer in the interpreter: a process forked meanwhile could write it a second time.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
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
