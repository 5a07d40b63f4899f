"""Run drives any trainer: here one without rewards or rollouts, of next tokens on packed text."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo.checkpoint import (
    Checkpoint,
    CheckpointError,
    RunInUseError,
    rehearse_model,
    save_model,
)
from fastppo.data.sequences import PackedSequences
from fastppo.models.config import ModelConfig
from fastppo.models.packed import PackedModel
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.training import interrupts
from fastppo.training.config import RunConfig, ScheduleConfig
from fastppo.training.errors import ForeignStateError, NonFiniteError
from fastppo.training.metrics import PhaseTimer
from fastppo.training.optim import apply_step, grad_norm, make_adamw
from fastppo.training.run import Run
from fastppo.training.seeding import batch_indices
from fastppo.training.trainer import Notice


@dataclass(frozen=True, kw_only=True)
class TextConfig(ModelConfig, ScheduleConfig):
    """What such a trainer needs, of classes that others have too."""


class TextTrainer:
    """Learns sequences of words by heart, four in each iteration."""

    def __init__(self, args: TextConfig, *, resume: bool = False, texts: int = 16) -> None:
        self.args, self.texts = args, texts
        self.run = Run(args, "text", resume=resume)
        with self.run.released_on_error():
            self.model = PackedModel(tiny_model(len(WORDS), seed=0))
            self.optimizer = make_adamw(self.model.trained(), args)
        self.device = self.model.device
        self.bad_at = 0

    def train(self) -> dict[str, Any]:
        return self.run.train(self, contextlib.nullcontext())

    def iterate(self, iteration: int, timer: PhaseTimer) -> tuple[dict[str, float], list[Any]]:
        timer.take()
        rows = batch_indices(self.texts, 4, self.args.seed, iteration - 1)
        texts = [[3 + (i + j) % 10 for j in range(5)] for i in rows.tolist()]
        with timer("update"):
            batch = PackedSequences.pack([t[:1] for t in texts], [t[1:] for t in texts])
            loss = -self.model.logprobs(batch, 1.0).logprobs.mean()
            if iteration == self.bad_at:
                raise NonFiniteError("1 step was not finite", iteration, loss.detach())
            loss.backward()
            apply_step([self.optimizer], [grad_norm(self.optimizer)], 1.0, skip=False)
        return {"iteration": iteration, "loss": float(loss.detach()), **timer.take()}, []

    def evaluate(self) -> dict[str, Any]:
        return {}

    def notices(self, row: dict[str, float]) -> Iterator[Notice]:
        if row["loss"] > 2.5:
            yield Notice(f"a loss of {row['loss']:.2f}", keep="loss")

    def next_iteration(self) -> None:
        """Nothing is kept of an iteration."""

    place = ""

    def identity(self) -> dict[str, Any]:
        return {"texts": self.texts}

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        weights = dict(self.model.model.state_dict())
        moments = {
            f"{i}/{key}": value
            for i, state in enumerate(self.optimizer.state.values())
            for key, value in state.items()
        }
        return {"policy": weights, "optimizer": moments, "iteration": {}}, {}

    def failed_step(self, error: NonFiniteError) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, state = self.state()
        return tensors | {"recorded": {"loss": error.recorded}}, state

    def load_state(self, checkpoint: Checkpoint) -> None:
        if (theirs := checkpoint.state["run"]["texts"]) != self.texts:
            raise ForeignStateError(f"the texts are {theirs} there and {self.texts} here")
        own, _ = self.state()
        for group in ("policy", "optimizer"):
            for name, value in checkpoint.tensors(group).items():
                own[group][name].copy_(value)

    def summary(self) -> dict[str, Any]:
        return {"texts": self.texts}

    def rehearse(self, folder: Path) -> int:
        return 0

    def save_model(self, folder: Path) -> Path:
        return save_model(folder, self.model, word_tokenizer())


def config(folder: Path, **options: Any) -> TextConfig:
    defaults = {"num_iterations": 8, "learning_rate": 1e-2, "save_interval": 2, "device": "cpu"}
    return TextConfig(output_dir=str(folder), **(defaults | options))


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if "seconds" not in k} for x in lines]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    folder = tmp_path_factory.mktemp("text") / "run"
    summary = TextTrainer(config(folder)).train()
    assert summary["texts"] == 16 and summary["iterations"] == 8
    return folder


def test_it_learns_and_leaves_what_every_run_leaves(whole: Path) -> None:
    losses = [row["loss"] for row in rows(whole)]
    assert losses[-1] < 0.7 * losses[0]
    names = {path.name for path in whole.iterdir()}
    assert {"config.json", "summary.json", "report.html", "checkpoints", "model"} <= names
    assert [path.name for path in (whole / "dumps").iterdir()] == ["iteration-000001-loss"]


def test_a_stopped_one_goes_on_exactly(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = TextTrainer(config(tmp_path / "run"))
    with monkeypatch.context() as patch, pytest.raises(interrupts.Interrupted):
        patch.setattr(interrupts, "_pending", None)

        def check() -> None:
            if trainer.run.iterations == 5:
                raise interrupts.Interrupted(15)

        patch.setattr(interrupts, "check", check)
        trainer.train()
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept[-1] == "iteration-000005"
    TextTrainer(config(tmp_path / "run"), resume=True).train()
    assert weights(tmp_path / "run") == weights(whole) and rows(tmp_path / "run") == rows(whole)


def test_a_step_that_is_not_finite_goes_back(whole: Path, tmp_path: Path) -> None:
    trainer = TextTrainer(config(tmp_path / "run", on_nonfinite="rollback"))
    trainer.bad_at = 6

    def load(checkpoint: Checkpoint) -> None:
        trainer.bad_at = 0
        TextTrainer.load_state(trainer, checkpoint)

    trainer.load_state = load  # type: ignore[method-assign]
    trainer.train()
    assert weights(tmp_path / "run") == weights(whole)
    assert (tmp_path / "run" / "dumps" / "iteration-000006-nonfinite").is_dir()


def test_another_trainers_checkpoint_is_refused_and_the_run_is_free_again(
    whole: Path, tmp_path: Path
) -> None:
    TextTrainer(config(tmp_path / "run", num_iterations=2, lr_schedule="constant")).train()
    longer = config(tmp_path / "run", num_iterations=4, lr_schedule="constant")
    with pytest.raises(CheckpointError, match="the texts are 16 there and 9 here"):
        TextTrainer(longer, resume=True, texts=9).train()
    with pytest.raises(ValueError, match="train_layers"):
        TextTrainer(config(tmp_path / "run", num_iterations=4, train_layers=9), resume=True)
    assert TextTrainer(longer, resume=True).train()["iterations"] == 4


def test_a_folder_that_another_run_had_meanwhile_is_left_alone(tmp_path: Path) -> None:
    first, second = (TextTrainer(config(tmp_path / "run")) for _ in range(2))
    first.train()
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"]
    before = {p: p.read_bytes() for p in files}
    with pytest.raises(RunInUseError, match="^output_dir: .* Continue the run in it with resume"):
        second.train()
    assert {p: p.read_bytes() for p in before} == before
    first.train()  # its own


@dataclass(frozen=True, kw_only=True)
class CountConfig(RunConfig):
    """A configuration without an optimiser."""


class Counter(TextTrainer):
    """A trainer that knows of nothing but counting."""

    def __init__(self, args: CountConfig, *, resume: bool = False) -> None:
        self.run = Run(args, "count", resume=resume)
        self.device, self.count = torch.device("cpu"), 0

    def iterate(self, iteration: int, timer: PhaseTimer) -> tuple[dict[str, float], list[Any]]:
        timer.take()
        with timer("count"):
            self.count += 1
        return {"iteration": iteration, "total": self.count, "odd": self.count % 2}, []

    def notices(self, row: dict[str, float]) -> Iterator[Notice]:
        yield Notice("counted", keep="count")

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        return {"count": {"count": torch.tensor(self.count)}}, {}

    def identity(self) -> dict[str, Any]:
        return {}

    def load_state(self, checkpoint: Checkpoint) -> None:
        self.count = int(checkpoint.tensors("count")["count"])

    def summary(self) -> dict[str, Any]:
        return {"count": self.count}

    def rehearse(self, folder: Path) -> int:
        return 0

    def save_model(self, folder: Path) -> Path:
        folder.mkdir()
        return folder


def test_the_least_trainer_is_shown_goes_on_and_keeps_what_it_has(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = CountConfig(output_dir=str(tmp_path / "run"), num_iterations=3)
    assert Counter(args).train()["count"] == 3
    assert "[3/3]  total 3.00  odd 1.00" in capfd.readouterr().out
    assert (tmp_path / "run" / "dumps" / "iteration-000002-count").is_dir()
    longer = dataclasses.replace(args, num_iterations=5, save_interval=1)
    assert Counter(longer, resume=True).train()["count"] == 5


def test_a_signal_stops_a_trainer_that_never_looks(tmp_path: Path) -> None:
    class Signalled(Counter):
        def iterate(self, iteration: int, timer: PhaseTimer) -> tuple[dict[str, float], list[Any]]:
            if iteration == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().iterate(iteration, timer)

    args = CountConfig(output_dir=str(tmp_path / "run"), num_iterations=9)
    with pytest.raises(interrupts.Interrupted):
        Signalled(args).train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000003"]
    assert Counter(args, resume=True).train()["count"] == 9


def test_what_the_end_would_refuse_is_refused_before_the_first_iteration(tmp_path: Path) -> None:
    class Refusing(Counter):
        def rehearse(self, folder: Path) -> int:
            rehearse_model(folder, lambda partial: (partial / "a").mkdir(), object())
            return 0

    args = CountConfig(output_dir=str(tmp_path / "run"), num_iterations=3)
    with pytest.raises(CheckpointError, match="after training .*save_pretrained"):
        Refusing(args).train()
    assert os.listdir(tmp_path / "run") == [".lock"]


def test_a_directory_that_is_moved_stops_the_run_and_goes_on_where_it_is(tmp_path: Path) -> None:
    class Moved(Counter):
        def next_iteration(self) -> None:
            super().next_iteration()
            if self.run.iterations == 2:
                self.run.store.wait()
                (tmp_path / "run").rename(tmp_path / "moved")

    args = CountConfig(output_dir=str(tmp_path / "run"), num_iterations=5, save_interval=1)
    with pytest.raises(RunInUseError, match="was moved or removed"):
        Moved(args).train()
    assert [path.name for path in tmp_path.iterdir()] == ["moved"]
    there = dataclasses.replace(args, output_dir=str(tmp_path / "moved"))
    assert Counter(there, resume=True).train()["count"] == 5
