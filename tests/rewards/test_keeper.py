"""What a reward function starts, opens, prints and answers; real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fastppo.rewards import RewardLimits, Rewards
from fastppo.rewards.outcome import Outcome, Problem
from fastppo.rewards.reply import LENGTH, decoded, encoded, longest

LIMITS = RewardLimits(timeout=20, memory_gb=1, max_failure_rate=1)
linux = pytest.mark.skipif(sys.platform != "linux", reason="descendants are found in /proc")


def gone(pid: int, seconds: float = 5) -> bool:
    ends = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > ends:
            os.kill(pid, signal.SIGKILL)
            return False
        time.sleep(0.01)
    return True


def daemon() -> int:
    """Twice forked, in a session of its own, holding every descriptor; its process id."""
    receive, send = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.write(send, str(os.getpid()).encode())
            time.sleep(1000)
        os._exit(0)
    return int(os.read(receive, 20))


@linux
@pytest.mark.parametrize("end", ["close", "exit", "timeout"])
def test_a_daemon_ends_with_its_worker(tmp_path: Path, end: str) -> None:
    file = tmp_path / "pid"

    def judge(completions: list[str]) -> list[float]:
        file.write_text(str(daemon()))
        if end == "exit":
            os._exit(3)
        if end == "timeout":
            time.sleep(1000)
        return [1.0]

    before = time.monotonic()
    limits = RewardLimits(timeout=1 if end == "timeout" else 20, max_failure_rate=1)
    with Rewards(judge, limits=limits) as rewards:
        failures = rewards(["p"], ["t"]).failures
        assert [f.kind for f in failures] == {"exit": ["crash"], "timeout": ["timeout"]}.get(
            end, []
        )
        if end == "exit":
            assert "exit code 3" in failures[0].message
    assert gone(int(file.read_text()))
    assert time.monotonic() - before < 4  # nobody waits for a pipe that the daemon holds


PROGRAM = """
import os, signal, subprocess, sys, time
from fastppo.rewards import RewardLimits, Rewards
from fastppo.training import interrupts

def judge(completions):
    one = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    print(one.pid, os.getpid(), flush=True)
    time.sleep(1000)

with interrupts.handled():
    Rewards(judge, limits=RewardLimits(timeout=100))(["p"], ["t"])
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signals", "status"),
    [
        ((signal.SIGKILL,), -signal.SIGKILL),
        ((signal.SIGQUIT,), -signal.SIGQUIT),
        ((signal.SIGHUP, signal.SIGHUP), 129),
        ((signal.SIGINT, signal.SIGINT), 130),
    ],
)
def test_what_a_function_started_dies_with_the_run(signals: tuple[int, ...], status: int) -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        for signum in signals:
            process.send_signal(signum)
        assert process.wait(20) == status
        assert all([gone(pid, 2) for pid in pids])


def test_inherited_descriptors_are_closed_and_stay_taken(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as metrics, socket.create_server(("127.0.0.1", 0)) as server:
        taken = (metrics.fileno(), server.fileno())

        def judge(completions: list[str]) -> list[float]:
            assert os.open(tmp_path / "own", os.O_CREAT | os.O_WRONLY) not in taken
            lost = 0.0
            for descriptor in range(3, 200):
                with contextlib.suppress(OSError):
                    if not os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / "own")):
                        os.write(descriptor, b"")
            for descriptor in taken:
                try:
                    os.write(descriptor, b"from the worker")
                except OSError:
                    lost += 1
            assert sys.stdin.read() == ""
            return [lost]

        with Rewards(judge, limits=LIMITS) as rewards:
            batch = rewards(["p"], ["t"])
    assert (batch.scores.tolist(), batch.failures, file.read_text()) == ([2.0], (), "")


def test_a_print_that_cannot_be_written_fails_nothing() -> None:
    code = """
import sys
from fastppo.rewards import RewardLimits, Rewards
def judge(completions):
    print("x" * 100_000, flush=True)
    print("y", file=sys.stderr)
    return [1.0]
with Rewards(judge, limits=RewardLimits()) as rewards:
    sys.exit(10 + int(rewards(["p"], ["t"]).scores[0]))
"""
    with open("/dev/full", "w") as full:
        ran = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full, check=False)
    assert ran.returncode == 11


@linux
def test_memory_is_limited_for_all_processes_together() -> None:
    def judge(completions: list[str]) -> list[float]:
        for _ in range(4 if completions == ["many"] else 1):
            if os.fork() == 0:
                held = np.ones(5 * 2**24)  # 640 MiB, below the limit by itself
                time.sleep(1000)
                held.sum()
        time.sleep(15 if completions == ["many"] else 0.5)
        return [1.0]

    with Rewards(judge, limits=LIMITS) as rewards:
        assert rewards(["p"], ["one"]).failures == ()
        (failure,) = rewards(["p"], ["many"]).failures
    assert failure.kind == "memory"
    assert "took more than memory_gb = 1 together with" in failure.message


@linux
def test_memory_that_processes_share_counts_once() -> None:
    def judge(completions: list[str]) -> list[float]:
        held = np.ones(5 * 2**24)
        for _ in range(4):
            if os.fork() == 0:
                time.sleep(1000)
        time.sleep(1.0)
        return [float(held[0])]

    with Rewards(judge, limits=LIMITS) as rewards:
        assert rewards(["p"], ["t"]).failures == ()


GOOD = {"scores": [1.0, None], "problems": [], "failure": None, "suspect": None, "text": ""}
BAD: dict[str, Callable[[], Any]] = {
    "no object": lambda: [],
    "a key is missing": lambda: {"scores": [1.0]},
    "too few scores": lambda: GOOD | {"scores": [1.0]},
    "a text as a score": lambda: GOOD | {"scores": ["1", None]},
    "a score beyond float32": lambda: GOOD | {"scores": [1e39, None]},
    "nan": lambda: GOOD | {"scores": [float("nan"), None]},
    "neither scores nor failure": lambda: GOOD | {"scores": None},
    "an unknown kind": lambda: GOOD | {"scores": None, "failure": ["odd", "m", None, False]},
    "a sample out of range": lambda: GOOD | {"problems": [["wrong_type", "m", 2, False]]},
    "the same sample twice": lambda: GOOD | {"problems": [["wrong_type", "m", 1, False]] * 2},
    "a suspect out of range": lambda: GOOD | {"suspect": 10**30},
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_none_is_refused(name: str) -> None:
    assert decoded(json.dumps(GOOD).encode(), 2)[0].problem is None
    with pytest.raises(ValueError, match=r"no answer"):
        decoded(json.dumps(BAD[name]()).encode(), 2)


def test_deep_json_is_refused() -> None:
    with pytest.raises(ValueError, match="no answer"):
        decoded(b"[" * 200_000, 2)


def test_an_answer_comes_back_bit_by_bit() -> None:
    scores = np.array([np.float32(0.1), np.nan, -3e38, 1e-45], np.float32)
    problem = Problem("wrong_type", "\udc80\U0001f600", 1)
    outcome, text = decoded(encoded(Outcome(scores, (problem,)), "t\ud800")[LENGTH.size :], 4)
    assert outcome.scores is not None and outcome.scores.tobytes() == scores.tobytes()
    assert (outcome.problems, text) == ((problem,), "t\ud800")


def test_the_longest_answer_is_within_its_limit() -> None:
    problems = tuple(Problem("wrong_type", "\0" * 2002, i) for i in range(8))
    frame = encoded(Outcome(np.full(8, np.nan, np.float32), problems), "\0" * 8000)
    assert len(frame) < longest(8)


@linux
@pytest.mark.parametrize("frame", [LENGTH.pack(2**63), LENGTH.pack(4) + b"junk", b"\0" * 10**6])
def test_a_worker_that_forges_an_answer_crashes_alone(frame: bytes) -> None:
    def judge(completions: list[str]) -> list[float]:
        completions._note[0] = 10**12  # type: ignore[attr-defined]  # where the suspect is noted
        for descriptor in range(3, 100):
            with contextlib.suppress(OSError):
                os.write(descriptor, frame)
        time.sleep(1000)
        return [0.0]

    with Rewards(judge, limits=LIMITS) as rewards:
        (failure,) = rewards(["p"], ["t"]).failures
    assert failure.kind == "crash" and "wrote something else" in failure.message
