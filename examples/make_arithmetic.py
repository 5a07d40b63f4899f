"""Writes arithmetic_train.jsonl (65 prompts) and arithmetic_eval.jsonl (16): single-digit sums.

    python examples/make_arithmetic.py [FOLDER]

The same files every time: the 81 ordered pairs of 1..9 are sorted by a hash of their text, the
first 16 are held out. No prompt is in both; "3 + 4" may be in one and "4 + 3" in the other.

The system message keeps the prompt at 33 tokens: without one, SmolLM2's chat template adds its
own, which makes it 45.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

EVAL_SIZE = 16


def record(a: int, b: int) -> dict[str, object]:
    """One example: the prompt as chat messages, and the column `answer` for the reward function."""
    question = f"What is {a} + {b}? Reply with just the number."
    prompt = [
        {"role": "system", "content": "You add numbers."},
        {"role": "user", "content": question},
    ]
    return {"prompt": prompt, "answer": a + b}


def split() -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """All records: (train, eval), disjoint."""
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    pairs.sort(key=lambda pair: hashlib.sha256(f"{pair[0]} + {pair[1]}".encode()).digest())
    records = [record(a, b) for a, b in pairs]
    return records[EVAL_SIZE:], records[:EVAL_SIZE]


def main(folder: Path) -> None:
    for name, records in zip(("train", "eval"), split(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in records)
        (folder / f"arithmetic_{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
