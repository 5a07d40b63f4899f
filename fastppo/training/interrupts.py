"""SIGTERM, SIGINT (Ctrl-C) and SIGHUP as something a run acts on between two pieces of work.

    with interrupts.handled():
        ...
        interrupts.check()     # raises Interrupted where a signal has come

Signals belong to the process, and so does this module's state: whatever takes long calls `check`
between two micro-batches, tokens or waits, and nothing has to be handed through. Outside `handled`,
signals are what they were and `check` does nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

_pending: int | None = None
_came = False  # inside `handled`, a signal
_pipe: tuple[int, ...] = ()  # the descriptors of `handled`, inside it


class Interrupted(SystemExit):
    """A signal asked the run to stop; uncaught, it ends the program with status 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"received {signal.Signals(self.signum).name}"


def check() -> None:
    """Raise Interrupted once for the signal that has come since the last call, if any."""
    global _pending
    if _pending is not None:
        signum, _pending = _pending, None
        raise Interrupted(signum)


@contextmanager
def handled() -> Iterator[None]:
    """Inside, a first signal makes `check` raise and a second one ends the process at once.

    A second SIGHUP does nothing, because a terminal that closes and its shell send one each. Where
    SIGHUP is ignored, as under nohup, it stays so.

    The second one is seen by a thread that the interpreter's own C handler wakes, so that it works
    in the middle of a long matrix product too. Does nothing outside the main thread, where Python
    cannot handle signals.
    """
    global _pending, _came, _pipe
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _pending, _came = None, False
    _pipe = receive, send = os.pipe()
    os.set_blocking(send, False)
    before = {signum: signal.signal(signum, _note) for signum in _heeded()}
    wakeup = signal.set_wakeup_fd(send, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(receive,), name="fastppo-signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        os.close(send)  # the watcher sees the end of the pipe
        watcher.join()
        os.close(receive)
        _pending, _pipe = None, ()


def forget_in_child() -> None:
    """In a forked process: leave signals to the parent, which ends this process when it is done.

    What this process starts in turn has the usual handlers.
    """
    global _pending, _pipe
    signal.set_wakeup_fd(-1)
    for descriptor in _pipe:  # while one is open here, the parent's watcher sees no end of the pipe
        os.close(descriptor)
    _pending, _pipe = None, ()
    for signum in _heeded():
        signal.signal(signum, _do_nothing)  # SIG_IGN would be handed on to other programs
    # Held while forking: a signal that met the handler above would be lost on the new process.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS),
        after_in_child=_usual_handlers,
    )


def _heeded() -> list[signal.Signals]:
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signum for signum in SIGNALS if not (ignored and signum == signal.SIGHUP)]


def _usual_handlers() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.SIGHUP in _heeded():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _do_nothing(signum: int, frame: object) -> None:
    """What a child does at a signal that is meant for its parent."""


def _note(signum: int, frame: object) -> None:
    global _pending, _came
    if not _came:
        _pending, _came = signum, True


def _watch(receive: int) -> None:
    """Ends the process at the second signal; `receive` gets the number of each."""
    seen = 0
    while data := os.read(receive, 64):
        for signum in data:
            seen += signum in SIGNALS and not (seen and signum == signal.SIGHUP)
            if seen == 2:
                if sys.stdout.isatty():
                    os.write(1, b"\x1b[?25h\n")  # a live display has hidden the cursor
                os._exit(128 + signum)
