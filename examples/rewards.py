"""Reward functions for the examples, as a configuration names them: "rewards.py:exact_number".

Each is called with one batch: `completions` are strings for plain prompts and lists with one
assistant message for chat prompts; `answer` is a column of the dataset.
"""

from __future__ import annotations

import re
from typing import Any


def text_of(completion: Any) -> str:
    """The text of a completion, plain or chat."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def exact_number(completions: list[Any], answer: list[Any], **_: Any) -> list[float]:
    """1.0 where the last integer in the reply equals the `answer` column, else 0.0."""
    scores = []
    for completion, expected in zip(completions, answer, strict=True):
        # A minus sign counts only when it cannot be a subtraction or a hyphen: "5-3" ends in 3.
        numbers = re.findall(r"(?<![\w)])-?\d+|\d+", text_of(completion))
        scores.append(1.0 if numbers and int(numbers[-1]) == int(expected) else 0.0)
    return scores


def only_number(completions: list[Any], **_: Any) -> list[float]:
    """1.0 where the reply is an integer and nothing else, else 0.0."""
    return [
        1.0 if re.fullmatch(r"\s*-?\d+\s*", text_of(completion)) else 0.0
        for completion in completions
    ]
