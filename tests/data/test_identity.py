"""Digests of data: equal for equal values in every process, and they say where two sets differ."""

from __future__ import annotations

import datetime
import decimal
import enum
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastppo.data.identity import digests, stable_text
from fastppo.data.prompts import PromptDataset
from fastppo.models.tiny import word_tokenizer

ROWS = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(10) for b in range(10)]


class Bare:
    """Its repr has an address."""


@dataclass
class Tagged:
    tags: set[str] = field(default_factory=lambda: {"one", "two", "three", "four"})
    inner: Bare = field(default_factory=Bare)


class Colour(enum.Enum):
    RED = 1


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


VALUES = [
    {"a", "b", "c", "d"},
    {1: "x", "two": "y", (0, 1): frozenset({"p", "q"})},
    Bare(),
    Tagged(),
    Colour.RED,
    nested,
    decimal.Decimal("1.10"),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
    10**5000,
    float("nan"),
    "half \ud83d",
    b"\xff\x00",
    nested(100_000),
]


def test_a_digest_is_the_same_in_every_process() -> None:
    """Two with other orders of sets and other addresses."""
    program = (
        "from tests.data.test_identity import VALUES\n"
        "from fastppo.data.identity import digests\n"
        "print(digests(VALUES), flush=True)\n"
        "import os; os._exit(0)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] == f"{digests(VALUES)}\n"
    assert len(set(digests(VALUES))) == len(VALUES)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2], np.array([1, 2])),
        ((1, 2), [1, 2]),
        ([1.5], torch.tensor([1.5])),
        (3, np.int64(3)),
        ("x", np.str_("x")),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (float("nan"), np.float64("nan")),
    ],
)
def test_what_is_equal_has_one_text(a: Any, b: Any) -> None:
    assert stable_text(a) == stable_text(b)


def test_what_differs_has_another_text() -> None:
    long = np.zeros(100_000)  # its repr has dots
    other = long.copy()
    other[5000] = 1
    values = [1, 1.0, "1", True, None, b"1", [1], {1}, {1: 1}, [], {}, set(), [[1], 2], [1, [2]]]
    texts = [stable_text(x) for x in [*values, long, other, Tagged(), Tagged({"one"})]]
    assert len(set(texts)) == len(texts)


def test_the_first_row_that_differs_is_named() -> None:
    def told(rows: list[Any], read: Any = lambda name: True) -> tuple[str, str]:
        return PromptDataset(rows, word_tokenizer()).changed(saved, read)

    few = ROWS[:64]
    saved: Any = PromptDataset(few, word_tokenizer()).identity
    assert told(few) == ("", "")
    other = [dict(row) for row in few]
    other[3]["answer"] = "7"
    assert told(other) == ("'answer' of row 3 differs", "")
    assert told(other, lambda name: name != "answer") == ("", "")  # no reward reads it
    other[40]["prompt"] = "7 >"
    assert told(other) == ("'prompt' of row 40 differs", "")
    assert told(few[:-1]) == ("there are 64 prompts there and 63 here", "")
    without = [{"prompt": row["prompt"]} for row in few]
    assert told(without) == ("the column 'answer' is only there", "")
    assert told([{**row, "more": 1} for row in few]) == ("the column 'more' is only here", "")
    saved = PromptDataset(ROWS, word_tokenizer()).identity
    last = [*ROWS[:-1], {"prompt": "7 >", "answer": "7"}]
    assert told(last) == ("'prompt' of rows 98 to 99 differs", "")


def test_another_tokenizer_is_another_training() -> None:
    saved = PromptDataset(ROWS, word_tokenizer()).identity
    more = word_tokenizer()
    more.add_tokens(["ten"])
    refused, _ = PromptDataset(ROWS, more).changed(saved, lambda name: True)
    assert refused == "the tokenizer has another vocabulary or chat template"
    chat = [{"prompt": [{"role": "user", "content": "1 2"}]}]
    one, other = word_tokenizer(), word_tokenizer()
    one.chat_template, other.chat_template = (
        "{{ messages[0].content }} >",
        "> {{ messages[0].content }}",
    )
    refused, _ = PromptDataset(chat, other).changed(PromptDataset(chat, one).identity, bool)
    assert refused == "the tokenizer has another vocabulary or chat template"
