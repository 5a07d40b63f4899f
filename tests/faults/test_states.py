"""States of the data that are no fault: an update takes them, and a run goes on and is resumed."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastppo import PackedBatch, PPOConfig, PPOStep
from fastppo.models.tiny import WORDS, tiny_model
from fastppo.training.errors import NonFiniteError

NAN = math.nan
KINDS = ("gae", "grpo", "dr_grpo", "rloo", "reinforce")
STATES: dict[str, tuple[list[int], list[float]]] = {
    "nothing scored": ([3, 1, 5, 2], [NAN] * 4),
    "equal scores": ([3, 1, 5, 2], [1.0] * 4),
    "a group of equal scores": ([3, 1, 5, 2], [1.0, 1.0, 0.0, 2.0]),
    "one sequence left": ([3, 1, 5, 2], [NAN, NAN, 1.0, NAN]),
    "one token each": ([1, 1, 1, 1], [0.0, 1.0, 2.0, 3.0]),
    "one token left": ([3, 1, 5, 2], [NAN, 1.0, NAN, NAN]),
    "some empty": ([0, 2, 0, 3], [1.0, 0.0, 1.0, 0.5]),
    "all empty": ([0, 0, 0, 0], [1.0, 0.0, 1.0, 0.5]),
    "one sequence": ([3], [1.0]),
}


def step_of(advantage: str, **options: Any) -> PPOStep:
    defaults: dict[str, Any] = {
        **{"prompts_per_iteration": 2, "n_samples": 2, "num_minibatches": 2, "update_epochs": 2},
        **{"max_prompt_length": 8, "max_response_length": 8, "token_budget": 16},
        **{"precision": "fp32", "device": "cpu", "advantage": advantage},
    }
    return PPOStep(tiny_model(len(WORDS), seed=0), PPOConfig(**{**defaults, **options}))


def batch_of(lengths: list[int]) -> PackedBatch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, len(WORDS), 3) for _ in lengths]
    return PackedBatch.pack(
        prompts,
        [rng.integers(2, len(WORDS), n) for n in lengths],
        truncated=[True] * len(lengths),
    )


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("advantage", KINDS)
def test_an_update_takes_it(advantage: str, state: str) -> None:
    lengths, scores = STATES[state]
    step = step_of(advantage, **({"whiten_rewards": True} if advantage == "gae" else {}))
    for _ in range(2):
        batch = step.evaluate(batch_of(lengths))
        groups = np.arange(len(lengths)) // 2
        metrics = step.update(step.advantages(batch, np.array(scores, np.float32), groups))
        assert metrics["nonfinite_steps"] == 0
    assert all(p.isfinite().all() for p in step.policy.parameters())
    left = sum(n > 0 and not math.isnan(s) for n, s in zip(lengths, scores, strict=True))
    assert metrics["dropped"] == pytest.approx(1 - left / len(lengths))


def test_a_run_passes_over_any_of_it_and_resumes(runs: Any) -> None:
    """Each iteration is another state; a stop after each of them, in a process anew."""
    cases = itertools.cycle([[None] * 16, [1.0] * 16, [None] * 15 + [1.0], [0.5, 1.0] * 8])

    def scored(completions: list[str], **_: Any) -> list[float | None]:
        return next(cases)[: len(completions)]

    options: dict[str, Any] = {"save_interval": 1, "lr_schedule": "constant", "eval_dataset": None}
    for done in range(1, 7):
        resume = done > 1
        runs(
            "run", scored, num_iterations=done + 1, resume_from_checkpoint=resume, **options
        ).train()
    rows = runs.lines("run", "metrics.jsonl")
    assert [row["unscored"] for row in rows] == [1, 0, 15 / 16, 0, 1, 0, 15 / 16]
    assert [row["nonfinite_steps"] for row in rows] == [0] * 7


def test_an_evaluation_in_which_nothing_is_scored(runs: Any) -> None:
    rows = [{"prompt": f"{a} 9 >", "answer": "held out"} for a in range(4)]

    def scored(answer: list[str], **_: Any) -> list[float | None]:
        return [None if a == "held out" else float(i) for i, a in enumerate(answer)]

    summary = runs("run", scored, eval_dataset=rows, eval_interval=1, keep_best=1).train()
    assert math.isnan(summary["eval_after"]["reward"])
    rows = runs.lines("run", "metrics.jsonl")
    assert [row["eval_reward"] for row in rows] == [None] * 4


# What is a fault: nothing finite


def spoilt(step: PPOStep) -> None:
    with torch.no_grad():
        step.policy.actor.model.get_output_embeddings().weight[5] = NAN


@pytest.mark.parametrize("advantage", KINDS)
def test_a_batch_without_a_finite_sample_is_not_finite(advantage: str) -> None:
    step = step_of(advantage, max_nonfinite_steps=5)
    spoilt(step)
    groups = np.array([0, 0, 1, 1])
    batch = step.evaluate(batch_of([3, 1, 5, 2]))
    metrics = step.update(step.advantages(batch, np.array([1.0, 0, 1, NAN]), groups))
    assert metrics["dropped"] == 1 and metrics["nonfinite_steps"] == 4
    with pytest.raises(NonFiniteError, match="5 optimiser steps .* nothing but samples that are"):
        step.update(step.advantages(batch, np.array([1.0, 0, 1, NAN]), groups))


def test_a_run_of_such_batches_stops(runs: Any) -> None:
    def spoils(completions: list[str], **_: Any) -> list[float]:
        spoilt(trainer.step)  # what is NaN from the start is refused there
        return [float(len(text)) for text in completions]

    trainer = runs("run", spoils, num_iterations=9)
    with pytest.raises(NonFiniteError, match="NaN in the model's weights"):
        trainer.train()
    assert [row["dropped"] for row in runs.lines("run", "metrics.jsonl")] == [1, 1]
    dump = runs.folder / "run" / "dumps" / "iteration-000001-dropped" / "state.json"
    assert len(json.loads(dump.read_text())["samples"]) == 16


def test_weights_that_are_not_finite_are_not_saved(runs: Any, finite: Callable[..., bool]) -> None:
    """The checkpoint before them stays, and a run goes on from it."""
    trainer = runs("run", save_interval=1, lr_schedule="constant")
    record, spoil = trainer.run.save_checkpoint, trainer.policy.value_head.weight

    def save(trainer: Any, **options: Any) -> Any:
        if trainer.run.iterations == 3:
            with torch.no_grad():
                spoil[0, 1] = -math.inf
        return record(trainer, **options)

    trainer.run.save_checkpoint = save
    words = "checkpoint iteration-000003: expected finite numbers, .* in value_head.weight"
    with pytest.raises(Exception, match=words):
        trainer.train()
    names = sorted(path.name for path in (runs.folder / "run" / "checkpoints").iterdir())
    assert names == ["iteration-000001", "iteration-000002"]
    again = runs("run", save_interval=1, lr_schedule="constant", resume_from_checkpoint=True)
    assert again.train()["iterations"] == 4 and finite(again)


def test_a_model_that_is_not_finite_is_not_saved(runs: Any) -> None:
    trainer = runs("run", save_interval=0)
    iterate = trainer.run._iterate

    def then_spoil(given: Any) -> None:
        iterate(given)
        spoilt(given.step)

    trainer.run._iterate = then_spoil
    with pytest.raises(Exception, match="^model: expected finite numbers"):
        trainer.train()
    assert not (runs.folder / "run" / "model").exists()
