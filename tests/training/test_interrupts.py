"""Signals: the first one is seen by `check`, the second one ends the process; real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from fastppo.training import interrupts

PROGRAM = """
import sys, time
from fastppo.training import interrupts
with interrupts.handled():
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
        {body}
"""
# One C call that takes a minute, without the interpreter lock, as a large matrix product is: no
# Python handler of the main thread can run meanwhile.
LONG_CALL = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)"


def start(body: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(body=body)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        assert lines.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_the_first_signal_is_raised_by_check(signum: int, status: int) -> None:
    process = start("interrupts.check()")
    process.send_signal(signum)
    assert process.wait(20) == status


def test_a_signal_alone_stops_nothing() -> None:
    process = start("pass")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130


def test_a_second_hangup_is_no_second_signal() -> None:
    process = start("pass")
    for _ in range(3):  # of the terminal, of its shell, and when the shell has ended
        process.send_signal(signal.SIGHUP)
        time.sleep(0.1)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


def test_under_nohup_a_hangup_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("interrupts.check()")
    finally:
        signal.signal(signal.SIGHUP, before)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143


def test_the_second_signal_does_not_wait_for_a_long_call() -> None:
    process = start(LONG_CALL)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    before = time.monotonic()
    assert process.wait(20) == 143
    assert time.monotonic() - before < 5


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(s) for s in interrupts.SIGNALS]
    with interrupts.handled():
        assert [signal.getsignal(s) for s in interrupts.SIGNALS] != before
        interrupts.check()
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        with pytest.raises(interrupts.Interrupted) as caught:
            interrupts.check()
        assert caught.value.signum == signal.SIGTERM and caught.value.code == 143
        interrupts.check()  # once
    assert [signal.getsignal(s) for s in interrupts.SIGNALS] == before
    assert not [t for t in threading.enumerate() if t.name == "fastppo-signals"]


def test_outside_the_main_thread_nothing_is_handled() -> None:
    handlers = []

    def run() -> None:
        with interrupts.handled():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]
