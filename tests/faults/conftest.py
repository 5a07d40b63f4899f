"""Whole runs of PPOTrainer on a tiny model, in which something fails at a chosen place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo import PPOConfig, PPOTrainer
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.state import step_tensors

ROWS = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(10) for b in range(10)]


def graded(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """A score that differs from sample to sample."""
    return [
        float(t.split() == [a]) + 0.1 * len(t) for t, a in zip(completions, answer, strict=True)
    ]


class Runs:
    """Runs below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, rewards: Any = graded, **options: Any) -> PPOTrainer:
        """A trainer of four iterations of 16 prompts, two optimiser steps each."""
        own = ("eval_dataset", "train_dataset", "resume_from_checkpoint")
        arguments = {key: options.pop(key) for key in own if key in options}
        defaults: dict[str, Any] = {
            **{"num_iterations": 4, "prompts_per_iteration": 16, "num_minibatches": 2},
            **{"max_prompt_length": 8, "max_response_length": 4, "learning_rate": 1e-3},
            **{"precision": "fp32", "device": "cpu", "reward_workers": 0, "sample_interval": 0},
        }
        return PPOTrainer(
            tiny_model(len(WORDS), seed=0),
            rewards,
            arguments.pop("train_dataset", ROWS),
            PPOConfig(output_dir=str(self.folder / name), **{**defaults, **options}),
            processing_class=word_tokenizer(),
            **arguments,
        )

    def lines(self, name: str, file: str) -> list[dict[str, Any]]:
        """The JSON lines of a run's file; of metrics without the times."""
        rows = [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]
        times = ("seconds", "tokens_per_second")
        return [{k: v for k, v in row.items() if not k.startswith(times)} for row in rows]


@pytest.fixture(scope="session")
def runs_in() -> Callable[[Path], Runs]:
    return Runs


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def state_of(trainer: PPOTrainer) -> dict[str, Tensor]:
    """Copies of every trained parameter and of the state of both optimisers."""
    groups = step_tensors(trainer.step)
    return {
        f"{group}/{name}": value.detach().clone()
        for group, tensors in groups.items()
        for name, value in tensors.items()
    }


@pytest.fixture(name="state_of", scope="session")
def _state_of() -> Callable[[PPOTrainer], dict[str, Tensor]]:
    return state_of


@pytest.fixture(scope="session")
def same() -> Callable[[dict[str, Tensor], dict[str, Tensor]], bool]:
    """Whether two states are the same, bit by bit."""
    return lambda a, b: a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def finite() -> Callable[[PPOTrainer], bool]:
    """Whether every parameter of a trainer is finite."""
    return lambda trainer: all(
        math.isfinite(p.detach().abs().sum()) for p in trainer.policy.parameters()
    )
