"""stdout as what a run may do without: a reader that goes away, or a full disk, ends nothing.

Nothing that is printed here is read as rich's markup.
"""

from __future__ import annotations

import contextlib
import sys
from typing import IO, Any, cast

from rich.console import Console


def stdout_console() -> Console:
    """A console on stdout whose output is dropped, with one line on stderr, from the first that
    cannot be written.
    """
    return Console(file=cast("IO[str]", _Enduring(sys.stdout)), markup=False, emoji=False)


class _Enduring:
    """A text file to which writing never fails."""

    def __init__(self, file: IO[str] | None) -> None:
        self._file = file  # None: the process was started without

    def write(self, text: str) -> int:
        encoding = self.encoding
        self._attempt("write", text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    def isatty(self) -> bool:
        return self._file is not None and not self._file.closed and self._file.isatty()

    @property
    def encoding(self) -> str:
        return getattr(self._file, "encoding", None) or "utf-8"

    def fileno(self) -> int:
        if self._file is None:
            raise OSError("there is no stdout")
        return self._file.fileno()

    def _attempt(self, method: str, *args: Any) -> None:
        if self._file is None:
            return
        try:
            getattr(self._file, method)(*args)
        except (OSError, ValueError) as error:  # ValueError: it has been closed
            self._file = None
            reason = getattr(error, "strerror", None) or error
            with contextlib.suppress(OSError, ValueError, AttributeError):
                print(
                    f"fastppo: stdout cannot be written ({reason}): nothing more is shown, and "
                    "the work goes on",
                    file=sys.stderr,
                )
