"""The call of every reward function on one made-up sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fastppo.rewards import RewardError, RewardLimits, Rewards, declare

CHAT = [{"role": "user", "content": "2 + 2"}]
IDS = np.array([1, 2])


def tried(function: Any, prompt: Any = "2 + 2", **limits: Any) -> list[str]:
    with Rewards(function, None, RewardLimits(**limits)) as rewards:
        return rewards.try_out(prompt, {"answer": "4"}, IDS)


def strips(completions: list[Any], **_: Any) -> list[float]:
    return [float(c.strip() == "4") for c in completions]


def test_text_functions_of_chats_are_told_what_completions_are() -> None:
    with pytest.raises(
        RewardError, match=r"'strips'.*because the prompts are chats.*\['content'\]"
    ):
        tried(strips, CHAT)
    assert tried(strips) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_is_refused(workers: int) -> None:
    def one_number(completions: list[str]) -> Any:
        return 1.0

    def too_many(completions: list[str]) -> Any:
        return [1.0, 2.0]

    def misspelt(completions: list[str]) -> Any:
        return [undefined for _ in completions]  # type: ignore[name-defined]  # noqa: F821

    for wrong, words in ((one_number, "float"), (too_many, "got 2"), (misspelt, "NameError")):
        with pytest.raises(RewardError, match=f"'{wrong.__name__}'.*{words}"):
            tried(wrong, workers=workers)


def test_what_may_be_the_samples_fault_is_a_note() -> None:
    def no_match(completions: list[str]) -> list[float]:
        return [None.group(1) for _ in completions]  # type: ignore[attr-defined]

    def hangs(completions: list[str]) -> list[float]:
        while True:
            pass

    (note,) = tried(no_match)
    assert "'no_match': raised AttributeError" in note
    (note,) = tried(hangs, timeout=0.2)
    assert "'hangs'" in note


def test_nothing_stays_and_what_is_not_idempotent_is_not_called() -> None:
    calls: list[int] = []

    async def counts(completions: list[str]) -> list[float]:
        calls.append(1)
        return [1.0]

    @declare(idempotent=False)
    def pays(completions: list[str]) -> Any:
        return "wrong"

    assert tried([counts, pays], workers=0) == [] and not calls
