"""What every command says in the same way, and what becomes of an error that nobody foresaw."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastppo.reporting.formatting import one_line, shorten, visible

T = TypeVar("T")

TRACEBACK = "FASTPPO_TRACEBACK"
"""Set in the environment: an error that nobody foresaw is shown as Python shows it."""

_ADVICE = {
    errno.EACCES: "Give this user the right to it, or name another",
    errno.EPERM: "Give this user the right to it, or name another",
    errno.EROFS: "Mount that file system for writing, or name another place",
    errno.ENOENT: "Name what exists",
    errno.EEXIST: "Move away what is there, or name another",
    errno.ENOTDIR: "A file is in the place of a folder: move it away, or name another",
    errno.EISDIR: "A folder is in the place of a file: move it away, or name another",
    errno.ENAMETOOLONG: "Choose a shorter name",
    errno.ELOOP: "Mend the link, or name another",
    errno.ENOSPC: "Free some space there, then go on",
    errno.EDQUOT: "Free some space within the quota, then go on",
    errno.EMFILE: "Raise the limit on open files (ulimit -n)",
}


def quiet() -> None:
    """The display is the progress: transformers' own bars and warnings would tear it."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def parsed(kind: Callable[..., T] | type[T], **options: Any) -> T:
    """What `tyro.cli` makes of the arguments; what it refuses is a ValueError of one line."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            made: T = tyro.cli(kind, **options)
            return made
    except SystemExit as end:
        if not end.code:
            raise  # --help
        plain = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]", " ", said.getvalue())
        raise ValueError(" ".join(plain.split())) from None


def called(function: Callable[..., T], **options: Any) -> T:
    """A function, called with the arguments; errors as `parsed`, or its own."""

    @functools.wraps(function)
    def later(*args: Any, **kwargs: Any) -> Callable[[], T]:
        return functools.partial(function, *args, **kwargs)

    return parsed(later, **options)()


def refused(command: str, why: object) -> int:
    """One line on stderr, and the exit status of what a person can mend."""
    return say(command, described(why), status=2)


def described(why: object) -> str:
    """Text, or an error in words; of one of the system the file, and what to do."""
    if not isinstance(why, OSError) or why.strerror is None or why.errno is None:
        return str(why)
    files = [str(file) for file in (why.filename, why.filename2) if file is not None]
    where = f"{' → '.join(files)}: " if files else ""
    return f"{where}{why.strerror}. {_ADVICE.get(why.errno, 'Mend that, then go on')}"


def crashed(command: str, error: Exception, folder: Path | None = None) -> int:
    """One line about an error that nobody foresaw, and a file with its traceback.

    Args:
        command: that failed.
        error: whatever it is.
        folder: where to write; else, or where that fails, the folder of temporary files.
    """
    if os.environ.get(TRACEBACK):
        raise error
    where = f"{TRACEBACK}=1 shows where"
    for place in (folder, None):
        with contextlib.suppress(OSError):
            handle, path = tempfile.mkstemp(".txt", "traceback-", place)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(traceback.format_exception(error))
            where = f"the traceback is in {path}"
            break
    what = shorten(traceback.format_exception_only(error)[-1], 400)
    return say(command, f"unexpected error, {what.strip()}; {where}", status=1)


def out(text: object) -> None:
    """Print a line that may have names in it which come from files."""
    print(visible(str(text), keep="\n"))


def say(command: str, text: str, status: int) -> int:
    """One line on stderr; returns the status."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody is there to read it
        print(f"fastppo {command}: {one_line(text)}", file=sys.stderr, flush=True)
    return status
