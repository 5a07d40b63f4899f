"""How often a reward function is called, on what, and what runs at the same time."""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import BertConfig, BertForSequenceClassification

from fastppo.rewards import (
    RewardLimits,
    RewardModel,
    Rewards,
    RewardUnavailableError,
    declare,
)

SIZE = 12
PROMPTS = [f"prompt {i}" for i in range(SIZE)]
TEXTS = [f"text {i}" for i in range(SIZE)]
WORKER = RewardLimits(timeout=20, memory_gb=1, max_failure_rate=0.5)
SHORT = RewardLimits(timeout=0.4, memory_gb=1, max_failure_rate=0.5)


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


# How often a function is called


def note_call(file: Path, completions: list[str]) -> int:
    """Writes a line per call; how many there are."""
    with file.open("a") as out:
        out.write(f"{len(completions)} {completions[0]}\n")
    return len(file.read_text().splitlines())


@pytest.mark.parametrize("workers", [0, 1])
def test_idempotent_function_is_tried_again(tmp_path: Path, workers: int) -> None:
    @declare(idempotent=True, retries=2)
    def flaky(completions: list[str]) -> list[float]:
        if note_call(tmp_path / "calls", list.copy(completions)) <= 2:
            raise ConnectionError("try again")
        return [1.0] * len(completions)

    with Rewards(flaky, limits=RewardLimits(workers)) as rewards:
        assert rewards(PROMPTS, TEXTS).scores.tolist() == [1.0] * SIZE
    assert (tmp_path / "calls").read_text() == f"{SIZE} text 0\n" * 3


@pytest.mark.parametrize("workers", [0, 1])
def test_idempotent_function_that_often_fails_is_scored_in_the_end(workers: int) -> None:
    random = np.random.default_rng(0)

    @declare(idempotent=True, retries=3)
    def flaky(completions: list[str]) -> list[float]:
        return [1.0 / float(random.random() > 0.15) for _ in completions]  # ZeroDivisionError

    with Rewards(flaky, limits=RewardLimits(workers)) as rewards:
        assert rewards(PROMPTS, TEXTS).scores.tolist() == [1.0] * SIZE


def test_a_bad_score_of_an_idempotent_function_is_asked_for_again(tmp_path: Path) -> None:
    @declare(idempotent=True, retries=1)
    def flaky(completions: list[str]) -> list[float]:
        first = note_call(tmp_path / "calls", list.copy(completions)) == 1
        return [float("nan") if first and text == TEXTS[7] else 2.0 for text in completions]

    with Rewards(flaky, limits=RewardLimits()) as rewards:
        assert rewards(PROMPTS, TEXTS).scores.tolist() == [2.0] * SIZE
    assert (tmp_path / "calls").read_text() == "12 text 0\n1 text 7\n"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("do", [raise_error, lambda: float("nan")], ids=["exception", "nan"])
def test_a_function_that_is_not_idempotent_is_called_once(
    tmp_path: Path, workers: int, do: Callable[[], Any]
) -> None:
    judge = bad_at(5, do)

    @declare(idempotent=False)
    def pays(completions: list[str]) -> list[Any]:
        note_call(tmp_path / "calls", list.copy(completions))
        return judge(completions)

    with Rewards(pays, limits=RewardLimits(workers, max_failure_rate=0.5)) as rewards:
        batch = rewards(PROMPTS, TEXTS)
    assert (tmp_path / "calls").read_text() == "12 text 0\n"
    assert batch.lost == (SIZE if do is raise_error else 1)  # a bad score needs no second call
    assert re.search("not idempotent", batch.failures[0].message) or do is not raise_error


@pytest.mark.parametrize("workers", [0, 1])
def test_undeclared_functions_are_called_again_to_find_the_sample_only(
    tmp_path: Path, workers: int
) -> None:
    judge = bad_at(5, raise_error)

    def undeclared(completions: list[str]) -> list[Any]:
        note_call(tmp_path / "calls", list.copy(completions))
        return judge(completions)

    with Rewards(undeclared, limits=RewardLimits(workers, max_failure_rate=0.5)) as rewards:
        assert rewards(PROMPTS, TEXTS).lost == 1
    assert (tmp_path / "calls").read_text() == "12 text 0\n1 text 5\n11 text 0\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_that_has_read_everything_gives_no_suspect(tmp_path: Path, workers: int) -> None:
    def judge(prompts: list[str], completions: list[str]) -> list[float]:
        pairs = list(zip(prompts, completions, strict=True))
        note_call(tmp_path / "calls", list.copy(completions))
        return [raise_error() if text == TEXTS[1] else 1.0 for _, text in pairs]

    with Rewards(judge, limits=RewardLimits(workers, max_failure_rate=0.5)) as rewards:
        assert [f.sample for f in rewards(PROMPTS, TEXTS).failures] == [1]
    sizes = [int(line.split()[0]) for line in (tmp_path / "calls").read_text().splitlines()]
    assert sizes == [12, 6, 3, 1, 1, 11]  # halves at once, and the sample that is left over


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_unavailable_is_not_searched_for(tmp_path: Path, workers: int) -> None:
    def remote(completions: list[str]) -> list[float]:
        note_call(tmp_path / "calls", list.copy(completions))
        raise RewardUnavailableError("no server")

    with Rewards(remote, limits=RewardLimits(workers, max_failure_rate=0.5)) as rewards:
        assert rewards(PROMPTS, TEXTS).lost == SIZE
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_a_function_that_always_hangs_costs_a_bounded_time() -> None:
    limits = RewardLimits(timeout=0.1, max_failure_rate=1.0)
    with Rewards(lambda completions: [hang() for _ in completions], limits=limits) as rewards:
        before = time.monotonic()
        assert rewards(PROMPTS, TEXTS).lost == SIZE
        assert time.monotonic() - before < 2.4  # 24 calls would take longer


# Running at the same time


def test_functions_run_at_the_same_time() -> None:
    def one(completions: list[str]) -> list[float]:
        time.sleep(1.0)
        return [1.0] * len(completions)

    def two(completions: list[str]) -> list[float]:
        return one(completions)

    with Rewards([one, two], limits=WORKER) as rewards:
        before = time.monotonic()
        assert rewards(PROMPTS, TEXTS).scores.tolist() == [2.0] * SIZE
        assert time.monotonic() - before < 2.0  # one after the other they take longer


def test_a_function_that_is_declared_per_sample_is_split_over_processes() -> None:
    @declare(per_sample=True)
    def pid(completions: list[str]) -> list[float]:
        time.sleep(0.15 * len(completions))
        return [float("nan") if text == TEXTS[8] else os.getpid() for text in completions]

    def whole(completions: list[str]) -> list[int]:
        return [os.getpid()] * len(completions)

    limits = RewardLimits(workers=3, max_failure_rate=0.5)
    with Rewards([pid, whole], limits=limits) as rewards:
        before = time.monotonic()
        batch = rewards(PROMPTS, TEXTS)
        assert time.monotonic() - before < 0.15 * SIZE  # in one process it takes longer
        pids = batch.per_function["pid"]
        assert [len(set(pids[i : i + 4].tolist())) for i in (0, 4)] == [1, 1]
        assert len({*pids[[0, 4, 11]].tolist()}) == 3
        assert len(set(batch.per_function["whole"].tolist())) == 1
        assert [f.sample for f in batch.failures] == [8]
        assert rewards(PROMPTS[:2], TEXTS[:2]).scores.shape == (2,)  # fewer rows than processes


def test_a_reward_model_stays_in_this_process_beside_workers() -> None:
    pids = []

    class Spy(RewardModel):
        def __call__(self, *args: Any, **kwargs: Any) -> list[float]:
            pids.append(os.getpid())
            return super().__call__(*args, **kwargs)

    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_labels=1,
    )

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [1 + len(word) % 8 for word in text.split()]}

    model = Spy(BertForSequenceClassification(config), tokenizer)
    with Rewards([functools.partial(model), length, bad_at(1, hang)], limits=SHORT) as rewards:
        batch = rewards(PROMPTS, TEXTS)
    assert pids == [os.getpid()]
    assert np.isfinite(batch.per_function["BertForSequenceClassification"]).all()
    assert [f.sample for f in batch.failures] == [1]
