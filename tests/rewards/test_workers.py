"""Reward functions in worker processes: every way to fail, what it costs, and what is left behind.

Real processes throughout. A batch has 12 samples of which one is bad, unless a test says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import pytest

from fastppo.rewards import (
    RewardError,
    RewardLimits,
    Rewards,
)

SIZE = 12
PROMPTS = [f"prompt {i}" for i in range(SIZE)]
TEXTS = [f"text {i}" for i in range(SIZE)]
HERE = RewardLimits(workers=0, max_failure_rate=0.5)
WORKER = RewardLimits(timeout=20, memory_gb=1, max_failure_rate=0.5)
SHORT = RewardLimits(timeout=0.4, memory_gb=1, max_failure_rate=0.5)
GIB = 2**30


def hang() -> float:
    while True:
        pass


def raise_error() -> float:
    raise OSError("lost")


def write_into_nothing() -> float:
    faulthandler.disable()  # pytest's, which the worker has inherited
    ctypes.memset(8, 0, 1)
    return 0.0


def write_garbage() -> float:
    for descriptor in range(3, 100):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                os.write(descriptor, b"\0" * 7 + b"\4junk")
    time.sleep(1000)
    return 0.0


# What each function does on its bad sample. The first group is for workers only.
DEADLY: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "infinite loop": ("timeout", "did not return within 0.4 s", hang),
    "sleep": ("timeout", "did not return within 0.4 s", lambda: time.sleep(1000)),
    "exit 0": ("crash", "exit code 0", lambda: os._exit(0)),
    "exit 1": ("crash", "exit code 1", lambda: os._exit(1)),
    "segfault": ("crash", "Segmentation fault, signal 11", write_into_nothing),
    "killed": ("crash", "signal 9 .*lack of memory", lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "real-time signal": ("crash", "signal 40", lambda: os.kill(os.getpid(), 40)),
    "garbage": ("crash", "wrote something else", write_garbage),
    "closed": ("crash", "exit code 5", lambda: os.closerange(3, 100) or os._exit(5)),
    "bytearray": ("memory", "MemoryError.*memory_gb = 1", lambda: len(bytearray(8 * GIB))),
    "numpy": ("memory", "8.00 GiB.*memory_gb = 1", lambda: np.ones(GIB).sum()),
}
RAISED: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "exception": ("exception", "raised OSError: lost", raise_error),
    "sys.exit": ("exception", "raised SystemExit: 3", lambda: sys.exit(3)),
    "nan": ("not_finite", "got nan", lambda: float("nan")),
    "inf": ("not_finite", "got inf", lambda: float("inf")),
    "string": ("wrong_type", "got '1.0' of type str", lambda: "1.0"),
    "list": ("wrong_type", r"got \[1\] of type list", lambda: [1]),
}


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def bad_at(sample: int, do: Callable[[], Any]) -> Callable[..., Any]:
    def judge(completions: list[str]) -> list[Any]:
        return [do() if text == TEXTS[sample] else 1.0 for text in completions]

    return judge


def check_only_lost(rewards: Rewards, sample: int, kind: str, message: str) -> None:
    """The sample is lost, to `judge`; all others have both scores."""
    batch = rewards(PROMPTS, TEXTS)
    assert [(f.function, f.sample, f.kind) for f in batch.failures] == [("judge", sample, kind)]
    assert batch.lost == 1
    assert re.search(message, batch.failures[0].message)
    expected = np.ones(SIZE, np.float32)
    expected[sample] = np.nan
    np.testing.assert_array_equal(batch.per_function["judge"], expected)
    lengths = np.array(length(TEXTS))
    np.testing.assert_array_equal(batch.per_function["length"], lengths)
    np.testing.assert_array_equal(batch.scores, expected + lengths)  # NaN: no partial sum


@pytest.mark.parametrize("name", [*DEADLY, *RAISED])
def test_a_worker_loses_exactly_the_bad_sample(name: str) -> None:
    kind, message, do = (DEADLY | RAISED)[name]
    limits = SHORT if kind == "timeout" else WORKER
    with Rewards([length, bad_at(1, do)], limits=limits) as rewards:
        before = time.monotonic()
        check_only_lost(rewards, 1, kind, message)
        if kind == "timeout":  # once in the batch, once alone, and not in a search by halves
            assert 2 * 0.4 <= time.monotonic() - before < 5 * 0.4  # which would take five
        check_only_lost(rewards, 1, kind, message)  # and the next batch is as good


@pytest.mark.parametrize("name", RAISED)
def test_without_workers_exactly_the_bad_sample_is_lost(name: str) -> None:
    kind, message, do = RAISED[name]
    check_only_lost(Rewards([length, bad_at(5, do)], limits=HERE), 5, kind, message)


@pytest.mark.parametrize("limits", [HERE, WORKER], ids=["here", "worker"])
@pytest.mark.parametrize("sample", [0, 6, SIZE - 1])
@pytest.mark.parametrize("times", [0, 2], ids=["short", "long"])
def test_a_wrong_length_is_traced_to_its_sample(
    limits: RewardLimits, sample: int, times: int
) -> None:
    def judge(completions: list[str]) -> list[float]:
        return [1.0 for t in completions for _ in range(times if t == TEXTS[sample] else 1)]

    with Rewards([length, judge], limits=limits) as rewards:
        message = f"expected {SIZE}, got {SIZE - 1 + times}"
        check_only_lost(rewards, sample, "wrong_length", message)


@pytest.mark.parametrize("limits", [HERE, WORKER], ids=["here", "worker"])
def test_a_result_that_is_no_list_loses_everything(limits: RewardLimits) -> None:
    limits = RewardLimits(limits.workers, timeout=20, max_failure_rate=1.0)
    with Rewards([length, lambda completions: 1.0], limits=limits) as rewards:
        batch = rewards(PROMPTS, TEXTS)
    assert {f.sample for f in batch.failures} == set(range(SIZE)) and batch.lost == SIZE
    assert {f.kind for f in batch.failures} == {"wrong_type"}
    assert np.isnan(batch.scores).all()
    assert batch.per_function["length"].tolist() == length(TEXTS)


@pytest.mark.parametrize("name", ["sleep", "exit 0", "bytearray", "exception", "nan", "string"])
def test_at_rate_zero_the_first_failure_stops_with_function_and_sample(name: str) -> None:
    kind, message, do = (DEADLY | RAISED)[name]
    timeout = 0.4 if kind == "timeout" else 20
    limits = RewardLimits(timeout=timeout, memory_gb=1)
    with Rewards([length, bad_at(5, do)], limits=limits) as rewards:
        with pytest.raises(RewardError, match=f"'judge', sample 5: .*{message}") as info:
            rewards(PROMPTS, TEXTS)
        assert (info.value.function, info.value.sample) == ("judge", 5)
        assert "prompt: 'prompt 5', completion: 'text 5'" in str(info.value)
        if kind == "exception":
            assert 'raise OSError("lost")' in str(info.value.__cause__)  # the worker's traceback


def test_an_error_stops_the_functions_that_still_compute() -> None:
    limits = RewardLimits(timeout=60)
    others = len(psutil.Process().children())
    with Rewards([bad_at(0, hang), bad_at(3, raise_error)], limits=limits) as rewards:
        before = time.monotonic()
        with pytest.raises(RewardError, match=r"'judge_2', sample 3"):
            rewards(PROMPTS, TEXTS)
        assert time.monotonic() - before < 20
        left = len(psutil.Process().children()) - others
        assert left == 1  # the one that computed was killed


def test_several_bad_samples_of_several_functions() -> None:
    def parse(completions: list[str]) -> list[float]:
        return [1.0 / (int(text.split()[1]) % 4) for text in completions]  # 0, 4, 8

    with Rewards([parse, bad_at(4, raise_error)], limits=WORKER) as rewards:
        batch = rewards(PROMPTS, TEXTS)
    named = [(f.sample, f.function) for f in batch.failures]
    assert named == [(0, "parse"), (4, "parse"), (4, "judge"), (8, "parse")] or named == [
        *[(0, "parse"), (4, "judge"), (4, "parse"), (8, "parse")]
    ]
    assert batch.lost == 3
    assert np.flatnonzero(np.isnan(batch.scores)).tolist() == [0, 4, 8]


def test_async_functions_in_workers() -> None:
    loops = []

    async def judge(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        assert len(set(map(id, loops))) == 1
        return [await asyncio.sleep(1000 * (t == TEXTS[2]), len(loops)) for t in completions]

    with Rewards(judge, limits=SHORT) as rewards:
        assert [rewards(["p"], ["t"]).scores[0] for _ in range(3)] == [1, 2, 3]  # one loop
        assert [(f.sample, f.kind) for f in rewards(PROMPTS, TEXTS).failures] == [(2, "timeout")]
