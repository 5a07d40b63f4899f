"""NaN in logits, gradients and rewards: the run goes on without the sample or the step it is in."""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastppo import PPOTrainer
from fastppo.cli.main import main
from fastppo.models.packed import PackedModel
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.state import step_tensors
from fastppo.ppo.step import PPOStep
from fastppo.training import interrupts
from fastppo.training.errors import NonFiniteError

NAN = float("nan")
BAD = 5  # of the 16 samples of iteration 2
Act = Callable[[PPOTrainer], None]
Runs = Any  # see conftest.py


class Scores:
    """Differ from sample to sample; in iteration 2 that of sample `BAD` is another value."""

    __name__ = "scores"

    def __init__(self, *other: float | None) -> None:
        self.other, self.calls = other, 0
        self.completions: list[list[str]] = []

    def __call__(self, completions: list[str], answer: list[str]) -> list[float | None]:
        self.calls += 1
        self.completions.append(list(completions))
        scores: list[float | None] = [
            float(text.split() == [a]) + 0.1 * len(text)
            for text, a in zip(completions, answer, strict=True)
        ]
        if self.calls == 2 and self.other:
            scores[BAD] = self.other[0]
        return scores


# One sample


def nothing(trainer: PPOTrainer) -> None:
    """No fault."""


def in_generation(trainer: PPOTrainer) -> None:
    """NaN logits of the first token of one row."""
    next_logits = trainer.policy.actor.next_logits

    def spoiled(ids: Tensor, cache: Any, **boundaries: Any) -> Tensor:
        logits = next_logits(ids, cache, **boundaries)
        if trainer.run.iterations == 1 and not cache.decoding:
            logits[BAD] = NAN
        return logits

    trainer.policy.actor.next_logits = spoiled


def in_evaluate(trainer: PPOTrainer) -> None:
    """NaN in what the first layer makes of the first token of one sequence."""

    def spoil(_: Any, args: Any, kwargs: Any, hidden: Tensor) -> Tensor | None:
        if "kv_cache" in kwargs or torch.is_grad_enabled() or trainer.run.iterations != 1:
            return None
        cu = kwargs["cu_seqlens_host"]
        hidden = hidden.clone()
        hidden[0, cu[BAD]] = NAN
        return hidden

    trainer.policy.actor.model.model.layers[0].register_forward_hook(spoil, with_kwargs=True)


@pytest.mark.parametrize(
    ("act", "scores", "twin_act"),
    [(in_generation, (), in_generation), (in_evaluate, (), nothing), (nothing, (NAN,), nothing)],
    ids=["generation", "evaluate", "reward"],
)
def test_a_sample_with_nan_is_left_out(
    act: Act,
    scores: tuple[float, ...],
    twin_act: Act,
    runs: Runs,
    state_of: Callable[..., Any],
    same: Callable[..., bool],
    finite: Callable[..., bool],
) -> None:
    """The weights are those of a run whose reward says None of that sample."""
    states = {}
    for name, fault, other in (
        ("hurt", act, scores),
        ("twin", twin_act, (None,)),
        ("clean", nothing, ()),
    ):
        trainer = runs(name, Scores(*other))
        fault(trainer)
        trainer.train()
        states[name] = state_of(trainer)
        assert finite(trainer)
    assert same(states["hurt"], states["twin"])
    assert not same(states["hurt"], states["clean"])

    rows, clean = runs.lines("hurt", "metrics.jsonl"), runs.lines("clean", "metrics.jsonl")
    assert [row["dropped"] for row in rows] == pytest.approx([0, 1 / 16, 0, 0], abs=1e-7)
    assert [row["nonfinite_steps"] for row in rows] == [0, 0, 0, 0]
    assert [row["reward_failures"] for row in rows] == [0, len(scores), 0, 0]
    assert [row["unscored"] for row in rows] == [0, len(scores) / 16, 0, 0]
    assert rows[0] == clean[0] and rows[1] != clean[1]


# One step


def in_a_forward(trainer: PPOTrainer) -> None:
    """NaN in the second step of the update of iteration 2."""

    def spoil(_: Any, args: Any, kwargs: Any, hidden: Tensor) -> Tensor | None:
        if not (torch.is_grad_enabled() and at_the_bad_step(trainer)):
            return None
        return hidden * torch.where(torch.arange(hidden.shape[1]) == 2, NAN, 1.0)[:, None]

    trainer.policy.actor.model.model.layers[0].register_forward_hook(spoil, with_kwargs=True)


def in_the_actors_gradient(trainer: PPOTrainer) -> None:
    parameter = trainer.policy.actor.model.model.layers[1].mlp.up_proj.weight
    parameter.register_hook(lambda grad: grad * NAN if at_the_bad_step(trainer) else grad)


def in_the_critics_gradient(trainer: PPOTrainer) -> None:
    parameter = trainer.policy.value_head.weight
    parameter.register_hook(lambda grad: grad * math.inf if at_the_bad_step(trainer) else grad)


def at_the_bad_step(trainer: PPOTrainer) -> bool:
    progress = trainer.step.progress
    return trainer.run.iterations == 1 and progress is not None and progress.minibatch == 1


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("act", [in_a_forward, in_the_actors_gradient, in_the_critics_gradient])
def test_a_step_with_nan_is_skipped_by_actor_and_critic(
    act: Act,
    critic: str,
    runs: Runs,
    state_of: Callable[..., Any],
    same: Callable[..., bool],
    finite: Callable[..., bool],
) -> None:
    """The run ends as one in which that step is done and undone."""
    hurt = runs("hurt", critic=critic)
    act(hurt)
    changed = []
    watch(hurt.step, lambda before, after: changed.append(not same(before, after)), state_of, hurt)
    hurt.train()
    assert changed == [True, True, True, False, True, True, True, True]
    assert finite(hurt)
    rows = runs.lines("hurt", "metrics.jsonl")
    assert [row["nonfinite_steps"] for row in rows] == [0, 1, 0, 0]
    assert [row["dropped"] for row in rows] == [0, 0, 0, 0]

    twin = runs("twin", critic=critic)
    count = 0

    def undo(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
        nonlocal count
        count += 1
        if count == 4:
            groups = step_groups(twin)
            with torch.no_grad():
                for name, value in groups.items():
                    value.copy_(before[name])

    watch(twin.step, undo, state_of, twin)
    twin.train()
    assert same(state_of(hurt), state_of(twin))
    assert runs.lines("hurt", "metrics.jsonl")[0] == runs.lines("twin", "metrics.jsonl")[0]
    assert runs.lines("hurt", "samples.jsonl") == runs.lines("twin", "samples.jsonl")


def watch(
    step: PPOStep, then: Callable[..., None], state_of: Callable[..., Any], trainer: PPOTrainer
) -> None:
    """Call `then(before, after)` with the state around every optimiser step."""
    original = step._train_minibatch

    def train_minibatch(batch: Any) -> Any:
        before = state_of(trainer)
        stats = original(batch)
        then(before, state_of(trainer))
        return stats

    step._train_minibatch = train_minibatch  # type: ignore[method-assign]


def step_groups(trainer: PPOTrainer) -> dict[str, Tensor]:
    """The tensors themselves, by the names that `state_of` gives their copies."""
    return {
        f"{group}/{name}": value
        for group, tensors in step_tensors(trainer.step).items()
        for name, value in tensors.items()
    }


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("act", [nothing, in_a_forward], ids=["clean", "nan"])
def test_skipping_reads_nothing_back(act: Act, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, the decision and the step; the ops look at their arguments where it costs nothing."""
    trainer = runs("run", num_iterations=2)
    act(trainer)
    step, reads, steps = trainer.step, HostReads(), []
    train_minibatch, accumulate_gradients = step._train_minibatch, step.accumulate_gradients

    def watched(batch: Any) -> Any:
        with reads:
            stats = train_minibatch(batch)
        steps.append(bool(stats.skipped))
        return stats

    def unwatched(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return accumulate_gradients(*args, **kwargs)

    monkeypatch.setattr(step, "_train_minibatch", watched)
    monkeypatch.setattr(step, "accumulate_gradients", unwatched)
    trainer.train()
    assert steps == [False, False, False, act is in_a_forward]
    assert reads.found == []
    with reads:
        assert torch.zeros(1).item() == 0.0
    assert reads.found == ["_local_scalar_dense"]  # it would have been seen


# Too many steps


class Fault:
    """NaN in every update of an iteration and of those after it, while `active` says so.

    `tries` counts the updates that met it.
    """

    def __init__(
        self, trainer: PPOTrainer, iteration: int, active: Callable[[], bool] = lambda: True
    ) -> None:
        self.trainer, self.iteration, self.active = trainer, iteration, active
        self.tries = 0
        trainer.policy.actor.model.model.layers[0].register_forward_hook(self.spoil)

    def spoil(self, _: Any, args: Any, hidden: Tensor) -> Tensor | None:
        run, progress = self.trainer.run, self.trainer.step.progress
        if run.iterations + 1 < self.iteration or not torch.is_grad_enabled() or not self.active():
            return None
        self.tries += progress is not None and not progress.minibatch
        return hidden * NAN


ROLLBACK = {"on_nonfinite": "rollback", "max_nonfinite_steps": 2, "save_interval": 2}


def test_a_run_goes_back_to_a_checkpoint_and_samples_anew(
    runs: Runs, finite: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    """NaN in iteration 4; back to 2, then 3 and 4 once more, with other samples."""
    scores = Scores()
    trainer = runs("run", scores, num_iterations=5, **ROLLBACK)
    fault = Fault(trainer, 4, lambda: not (trainer.run_dir / "dumps").exists())
    summary = trainer.train()
    assert fault.tries == 1 and finite(trainer)
    rows = runs.lines("run", "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["nonfinite_steps"] for row in rows] == [0] * 5
    assert summary["iterations"] == len(summary["rewards"]) == 5
    assert trainer.run.seconds == 0.0  # there was no earlier process: none is counted twice

    first, again = scores.completions[2:4], scores.completions[4:6]
    assert all(a != b for a, b in zip(first, again, strict=True))
    written = [row["response"] for row in runs.lines("run", "samples.jsonl")]
    kept = [*scores.completions[:2], *scores.completions[4:]]
    assert written == [text for batch in kept for text in batch]
    assert "back to iteration-000002 (1 of 3)" in capsys.readouterr().out.replace("\n", " ")
    assert trainer.run.display._panel.rows[-1]["iteration"] == 5
    assert len(trainer.run.display._panel.rows) == 5


def test_a_fault_that_stays_ends_the_run_after_three_roll_backs(runs: Runs) -> None:
    scores = Scores()
    trainer = runs("run", scores, **ROLLBACK)
    fault = Fault(trainer, 3)
    with pytest.raises(NonFiniteError, match="3 times did not help.* fastppo replay"):
        trainer.train()
    assert fault.tries == 4
    tries = scores.completions[2:]
    assert len(tries) == 4 and all(a != b for a, b in itertools.pairwise(tries))
    assert [row["iteration"] for row in runs.lines("run", "metrics.jsonl")] == [1, 2]
    assert [path.name for path in (runs.folder / "run" / "dumps").iterdir()] == [
        "iteration-000003-nonfinite"
    ]


def test_a_checkpoint_in_the_middle_of_an_iteration_does_not_keep_its_samples(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, finite: Callable[..., bool]
) -> None:
    """A signal in iteration 3, and after the resumption NaN: the newest checkpoint has samples."""
    first = runs("run", Scores(), **ROLLBACK)
    step, original = first.step, first.step._train_minibatch

    def interrupted(batch: Any) -> Any:
        if first.run.iterations == 2 and step.progress and step.progress.minibatch == 1:
            raise interrupts.Interrupted(15)
        return original(batch)

    monkeypatch.setattr(step, "_train_minibatch", interrupted)
    with pytest.raises(interrupts.Interrupted):
        first.train()
    scores = Scores()
    options = {**ROLLBACK, "max_nonfinite_steps": 1}
    trainer = runs("run", scores, resume_from_checkpoint=runs.folder / "run", **options)
    fault = Fault(trainer, 3, lambda: trainer.run.rollbacks == 0)
    summary = trainer.train()
    assert summary["iterations"] == 4 and fault.tries == 0  # it met the second step
    assert len(scores.completions) == 2 and finite(trainer)
    assert [row["iteration"] for row in runs.lines("run", "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(runs.lines("run", "samples.jsonl")) == 4 * 16


def test_without_a_checkpoint_there_is_no_way_back(runs: Runs) -> None:
    trainer = runs("run", **{**ROLLBACK, "save_interval": 3})
    fault = Fault(trainer, 2)
    with pytest.raises(NonFiniteError, match="no checkpoint to go back to"):
        trainer.train()
    assert fault.tries == 1


def test_the_command_stops_with_a_step_to_replay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, one line that names the command; the command shows the same bits."""
    tiny_model(len(WORDS), seed=0).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a} {b} >"} for a in range(5) for b in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(
        "def score(completions):\n    return [0.1 * len(text) for text in completions]\n"
    )
    capsys.readouterr()
    trunk = PackedModel.hidden

    def spoilt(self: PackedModel, batch: Any) -> Tensor:
        hidden = trunk(self, batch)
        overflow = torch.is_grad_enabled() and steps["done"] >= 5
        return hidden * (hidden.abs().sum() * math.inf) if overflow else hidden

    steps = {"done": 0}
    train_minibatch = PPOStep._train_minibatch

    def counted(self: PPOStep, batch: Any) -> Any:
        steps["done"] += 1
        return train_minibatch(self, batch)

    monkeypatch.setattr(PackedModel, "hidden", spoilt)
    monkeypatch.setattr(PPOStep, "_train_minibatch", counted)
    monkeypatch.chdir(tmp_path)
    status = main(
        [
            *("train", "--model", "model", "--dataset", "prompts.jsonl", "--output-dir", "run"),
            *("--reward", "rewards.py:score", "--num-iterations", "4", "--device", "cpu"),
            *("--prompts-per-iteration", "16", "--num-minibatches", "4", "--precision", "fp32"),
            *("--max-prompt-length", "8", "--max-response-length", "3", "--sample-interval", "0"),
            *("--max-nonfinite-steps", "3", "--learning-rate", "1e-3"),
        ]
    )
    captured = capsys.readouterr()
    assert status == 2
    (line,) = captured.err.splitlines()
    assert line.startswith("fastppo train: 3 optimiser steps in a row")
    command = re.search(r"fastppo (replay \S+)", line)
    assert command is not None
    status = main(shlex.split(command[1]))
    shown = capsys.readouterr().out
    # the fifth step, in iteration 2, was the first bad one; the dump has the third of them
    assert status == 0 and "iteration 2, epoch 1, minibatch 3: 4 sequences" in shown
    assert "as recorded, bit by bit" in shown and "gradients that are not finite" in shown
