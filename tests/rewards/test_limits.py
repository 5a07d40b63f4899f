"""What a run accepts: the window of failures, its errors, limits and declarations."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.rewards import RewardBatch, RewardError, RewardLimits, Rewards, declare
from fastppo.rewards.failures import FailureWindow
from fastppo.rewards.limits import Declaration, declaration_of

SIZE = 10
PROMPTS = ["p"] * SIZE


def number(completions: list[str]) -> list[float]:
    return [float(text) for text in completions]  # ValueError for anything else


def run(rewards: Rewards, bad: int) -> RewardBatch:
    return rewards(PROMPTS, ["1"] * (SIZE - bad) + ["x"] * bad)


def limited(rate: float, workers: int = 0) -> RewardLimits:
    return RewardLimits(workers, max_failure_rate=rate)


# The window


def test_one_lost_batch_is_a_tenth_from_the_first_one_on() -> None:
    rewards = Rewards(number, limits=limited(0.1))
    assert run(rewards, SIZE).lost == SIZE  # 10 of 100
    for _ in range(8):
        assert run(rewards, 0).lost == 0
    with pytest.raises(RewardError):
        run(rewards, 1)  # 11 of the 10 batches
    assert run(rewards, 0).lost == 0
    assert run(rewards, SIZE).lost == SIZE  # the first batch is forgotten
    with pytest.raises(RewardError):
        run(Rewards(number, limits=limited(0.099)), SIZE)


def test_batches_of_different_sizes_count_by_their_samples() -> None:
    window = FailureWindow()
    assert window.with_batch(3, 4) == (3, 40)
    window.record(3, 4)
    assert window.with_batch(1, 100) == (4, 904)
    for size in range(9):
        window.record(1, size)
    assert window.with_batch(0, 5) == (9, 36 + 5)


def test_the_window_continues_from_its_state() -> None:
    rewards = Rewards(number, limits=limited(0.1))
    run(rewards, 6)
    state = json.loads(json.dumps(rewards.state_dict()))
    resumed = Rewards(number, limits=limited(0.1))
    resumed.load_state_dict(state)
    assert resumed.state_dict() == rewards.state_dict()
    for one in (rewards, resumed):
        with pytest.raises(RewardError):
            run(one, 5)
        assert run(one, 4).lost == 4


def test_the_error_names_function_count_share_sample_and_what_to_do() -> None:
    def other(completions: list[str]) -> list[float]:
        return [0.0, float("inf"), *[0.0] * (len(completions) - 2)]

    with pytest.raises(RewardError) as info:
        run(Rewards([other, number], limits=limited(0.03)), 5)
    assert (info.value.function, info.value.sample) == ("number", 5)
    text = str(info.value)
    for part in (
        "4 of the 100 samples of the last 10 batches (4.00%)",
        "max_failure_rate = 0.03",
        "most failed in 'number' (3)",
        "'number', sample 5: raised ValueError: could not convert string to float: 'x'",
        "completion: 'x'",
        "Mend the function, return None",
    ):
        assert part in text
    assert isinstance(info.value.__cause__, ValueError)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_search_ends_when_too_many_are_lost(workers: int) -> None:
    calls = 0

    def counted(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        try:
            return number(completions)
        except ValueError:
            raise ValueError(f"call {calls}") from None

    with (
        Rewards(counted, limits=limited(0.02, workers)) as rewards,
        pytest.raises(RewardError, match=r"3 of the 100 .* raised ValueError: call 1;"),
    ):
        run(rewards, SIZE)
    assert calls == (0 if workers else 6)  # two calls a sample


def test_a_sum_beyond_float32_is_lost() -> None:
    rewards = Rewards(number, [1e38], limits=limited(0.1))
    batch = rewards(PROMPTS, ["1"] * 9 + ["100"])
    assert [(f.sample, f.kind) for f in batch.failures] == [(9, "not_finite")]
    assert np.flatnonzero(np.isnan(batch.scores)).tolist() == [9] and batch.lost == 1


def test_none_is_no_failure() -> None:
    rewards = Rewards([lambda completions: [None] * SIZE, number], limits=limited(0.0))
    batch = run(rewards, 0)
    assert batch.scores.tolist() == [1.0] * SIZE and batch.failures == ()


# The search, where a function gives no hint at the sample


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 40), data=st.data())
def test_any_set_of_bad_samples_is_found(size: int, data: st.DataObject) -> None:
    bad = data.draw(st.sets(st.integers(0, size - 1), max_size=5))
    texts = ["x" if i in bad else str(i) for i in range(size)]
    calls = 0

    def hidden(completions: list[str]) -> list[float]:
        nonlocal calls
        calls += 1
        return number(list.copy(completions))  # read without a note of it

    batch = Rewards(hidden, limits=limited(1.0))(["p"] * size, texts)
    assert {f.sample for f in batch.failures} == bad
    expected = np.array([np.nan if i in bad else i for i in range(size)], np.float32)
    np.testing.assert_array_equal(batch.scores, expected)
    assert calls <= 1 + len(bad) * (2 + int(np.ceil(np.log2(size))))


# Limits and declarations


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"workers": -1}, "workers: .*got -1"),
        ({"timeout": 0.0}, "timeout: .*got 0.0"),
        ({"timeout": float("inf")}, "timeout: .*got inf"),
        ({"memory_gb": -1.0}, "memory_gb: .*got -1.0"),
        ({"max_failure_rate": 1.5}, r"max_failure_rate: .*got 1.5"),
        (
            {"max_failure_rate": float("nan")},
            r"max_failure_rate: .*got nan",
        ),
    ],
)
def test_bad_limits_are_refused(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardLimits(**limits)


def test_what_can_be_declared() -> None:
    class Judge:
        def method(self, completions: list[str]) -> list[float]:
            return [0.0]

        @declare(per_sample=True)
        def __call__(self, completions: list[str]) -> list[float]:
            return [0.0]

    twice = functools.partial(functools.partial(declare(idempotent=False)(number), x=1), y=2)
    try:
        assert declaration_of(number) == declaration_of(twice) == Declaration(idempotent=False)
    finally:
        del number.fastppo_declaration  # type: ignore[attr-defined]  # set above
    assert declaration_of(number) == Declaration()
    part = declare(idempotent=True, retries=5)(functools.partial(number))
    assert declaration_of(part) == Declaration(idempotent=True, retries=5)
    assert declaration_of(declare(idempotent=True)(Judge().method)).idempotent
    assert declaration_of(Judge().method).idempotent
    assert declaration_of(Judge()) == Declaration(per_sample=True)
    assert declare(idempotent=True)(number) is number
    del number.fastppo_declaration  # type: ignore[attr-defined]  # set above


def test_what_cannot_be_declared() -> None:
    with pytest.raises(ValueError, match="retries must be 0 or more, got -1"):
        declare(retries=-1)
    with pytest.raises(TypeError, match="takes no attributes; declare a function that calls it"):
        declare(idempotent=True)(len)
