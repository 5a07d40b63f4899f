"""The life of reward workers: state, death, signals, and what they leave behind; real processes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from fastppo.rewards import (
    RewardLimits,
    Rewards,
)
from fastppo.training import interrupts

SIZE = 12
PROMPTS = [f"prompt {i}" for i in range(SIZE)]
TEXTS = [f"text {i}" for i in range(SIZE)]
HERE = RewardLimits(workers=0, max_failure_rate=0.5)
WORKER = RewardLimits(timeout=20, memory_gb=1, max_failure_rate=0.5)


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def bad_at(sample: int, do: Callable[[], Any]) -> Callable[..., Any]:
    def judge(completions: list[str]) -> list[Any]:
        return [do() if text == TEXTS[sample] else 1.0 for text in completions]

    return judge


def hang() -> float:
    while True:
        pass


def raise_error() -> float:
    raise OSError("lost")


# A worker's life


def test_a_worker_keeps_state_and_is_replaced_when_it_dies_idle() -> None:
    calls = []

    def pid(completions: list[str]) -> list[int]:
        calls.append(1)
        return [os.getpid(), len(calls)]

    with Rewards(pid, limits=RewardLimits()) as rewards:
        first, second = (rewards(["p"] * 2, ["t"] * 2).scores.tolist() for _ in range(2))
        assert first[0] == second[0] != os.getpid() and (first[1], second[1]) == (1, 2)
        os.kill(int(first[0]), signal.SIGKILL)
        third = rewards(["p"] * 2, ["t"] * 2)
        assert third.scores[0] != first[0] and third.scores[1] == 1 and not third.failures
    assert calls == []


def test_a_worker_that_dies_before_it_takes_a_call_is_replaced() -> None:
    def pid(completions: list[str]) -> list[int]:
        return [os.getpid()]

    with Rewards(pid, limits=RewardLimits(timeout=20)) as rewards:
        worker = int(rewards(["p"], ["t"]).scores[0])
        os.kill(worker, signal.SIGSTOP)  # the request is sent and not read
        threading.Timer(0.3, os.kill, (worker, signal.SIGKILL)).start()
        batch = rewards(["p"], ["t"])
        assert batch.scores[0] not in (worker, np.nan) and not batch.failures


def test_nothing_is_left_after_close(tmp_path: Path) -> None:
    me = psutil.Process()
    descriptors, processes = me.num_fds(), me.children()
    for _ in range(3):
        with Rewards([length, bad_at(5, lambda: os._exit(1))], limits=WORKER) as rewards:
            rewards(PROMPTS, TEXTS)
            assert len(me.children()) == len(processes) + 2
        rewards.close()  # twice is fine
    assert me.children() == processes  # no zombie either
    assert me.num_fds() == descriptors
    unclosed = Rewards(length, limits=WORKER)
    unclosed(PROMPTS, TEXTS)
    del unclosed
    assert me.children() == processes and me.num_fds() == descriptors


def test_descriptors_stay_flat_over_many_calls() -> None:
    with Rewards([length, bad_at(5, raise_error)], limits=WORKER) as rewards:
        rewards(PROMPTS, TEXTS)
        before = psutil.Process().num_fds()
        for _ in range(200):
            rewards(PROMPTS, TEXTS)
        assert psutil.Process().num_fds() == before


def test_what_a_function_started_dies_with_its_worker(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def shell(completions: list[str]) -> list[float]:
        with subprocess.Popen(["sleep", "1000"]) as process:
            file.write_text(str(process.pid))
        return [0.0]

    with Rewards(shell, limits=RewardLimits(timeout=0.4, max_failure_rate=1)) as rewards:
        assert rewards(["p"], ["t"]).failures[0].kind == "timeout"
    wait_for_end(int(file.read_text()))


def test_functions_may_start_and_end_processes() -> None:
    def judge(completions: list[str]) -> list[float]:
        with subprocess.Popen(["sleep", "1000"]) as program:
            program.terminate()
        process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        process.start()
        process.terminate()
        process.join()
        return [program.returncode, process.exitcode or 0]

    with Rewards(judge, limits=RewardLimits(timeout=10)) as rewards:
        assert rewards(["p"] * 2, ["t"] * 2).scores.tolist() == [-signal.SIGTERM] * 2


def test_prints_are_seen_even_before_a_crash(capfd: pytest.CaptureFixture[str]) -> None:
    def judge(completions: list[str]) -> list[float]:
        print("from the worker", len(completions))
        print("its error", file=sys.stderr)
        os._exit(1)

    with Rewards(judge, limits=RewardLimits(max_failure_rate=1)) as rewards:
        rewards(["p"], ["t"])
    seen = capfd.readouterr()
    assert (seen.out, seen.err) == ("from the worker 1\n", "its error\n")


def test_what_this_process_has_not_written_yet_is_written_once(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with file.open("w") as log:
        log.write("once\n")  # in a buffer when the worker is forked
        with Rewards(bad_at(5, lambda: sys.exit(1)), limits=WORKER) as rewards:
            rewards(PROMPTS, TEXTS)
    assert file.read_text() == "once\n"


def test_columns_that_cannot_be_sent_are_refused() -> None:
    with (
        Rewards(lambda lock: [1.0], limits=RewardLimits()) as rewards,
        pytest.raises(TypeError, match=r"'lambda': its columns lock .*set workers to 0"),
    ):
        rewards(["p"], ["t"], {"lock": [threading.Lock()]})


def test_functions_receive_fresh_plain_lists() -> None:
    def judge(completions: list[str], **columns: Any) -> list[float]:
        assert isinstance(completions, list) and completions == TEXTS
        assert type(completions[2:4]) is list and completions[-1] == TEXTS[-1]
        copied = [list(completions), completions[:], completions.copy(), [*completions]]
        assert all(type(c) is list and c == TEXTS for c in copied)
        completions.clear()
        return [1.0] * SIZE

    for limits in (HERE, WORKER):
        with Rewards(judge, limits=limits) as rewards:
            assert [rewards(PROMPTS, TEXTS).lost for _ in range(2)] == [0, 0]


# Signals and the end of this process


def wait_for_end(pid: int, seconds: float = 10) -> None:
    """A zombie, which somebody else has to collect, has ended too."""
    ends = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends, f"process {pid} is still there"
        time.sleep(0.01)


PROGRAM = """
import fcntl, os, sys, time
from fastppo.training import interrupts
from fastppo.rewards import RewardLimits, Rewards

lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)

def judge(completions):
    print(os.getpid())
    if completions == ["hang"]:
        while True: pass
    return [1.0] * len(completions)

with interrupts.handled():
    rewards = Rewards(judge, limits=RewardLimits(timeout=100))
    rewards(["p"], ["quick"])
    {end}
"""


@contextmanager
def running(tmp_path: Path, end: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The program, and its worker's id once the worker has computed."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(end=end), str(tmp_path / "lock")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: v for name, v in os.environ.items() if name != "PYTHONUNBUFFERED"},
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        try:
            yield process, worker
        finally:
            for pid in (process.pid, worker):
                with suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal on a parent's death")
def test_a_parent_killed_takes_its_worker_and_its_locks_along(tmp_path: Path) -> None:
    with running(tmp_path, "rewards(['p'], ['hang'])") as (process, worker):
        assert process.stdout is not None
        process.stdout.readline()  # it hangs now
        process.kill()
        process.wait(20)
        wait_for_end(worker)
        with (tmp_path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_ctrl_c_is_answered_at_once_and_quietly(tmp_path: Path) -> None:
    with running(tmp_path, "rewards(['p'], ['hang'])") as (process, worker):
        assert process.stdout is not None
        process.stdout.readline()
        before = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert time.monotonic() - before < 5
        assert (process.returncode, err) == (130, "")
        wait_for_end(worker, 1)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "rewards.close()"])
def test_a_program_that_does_not_close_ends_all_the_same(tmp_path: Path, end: str) -> None:
    with running(tmp_path, end) as (process, worker):
        _, err = process.communicate(timeout=20)
        assert (process.returncode, err) == (0, "")
        wait_for_end(worker, 1)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_worker_does_not_disturb_its_work(signum: int) -> None:
    def judge(completions: list[str]) -> list[int]:
        os.kill(os.getpid(), signum)
        time.sleep(0.05)
        return [1]

    with Rewards(judge, limits=RewardLimits()) as rewards:
        assert rewards(["p"], ["t"]).scores.tolist() == [1]


def test_handled_signals_end_while_a_worker_lives() -> None:
    with Rewards(length, limits=WORKER) as rewards:
        with interrupts.handled():
            rewards(PROMPTS, TEXTS)
        assert rewards(PROMPTS, TEXTS).lost == 0
