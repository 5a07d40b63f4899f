"""Checkpoints and dumps of a trainer: what is saved of it, and how it is put back."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.checkpoint import Checkpoint, CheckpointError, CheckpointStore
from fastppo.ppo.state import (
    ForeignStateError,
    Iteration,
    Tensors,
    checkpoint_name,
    load_run,
    run_state,
)
from fastppo.ppo.step import NonFiniteError
from fastppo.ppo.update_metrics import StepStats
from fastppo.training.metrics import strict
from fastppo.training.resume import config_digest, plain_config, versions

if TYPE_CHECKING:
    from fastppo.ppo.trainer import PPOTrainer

MAX_ROLLBACKS = 3


def save_checkpoint(
    trainer: PPOTrainer, *, score: float | None = None, extra: bool = False
) -> Path:
    """Save all that an exact continuation needs, in the middle of an iteration too.

    Args:
        trainer: while it trains.
        score: what `keep_best` goes by.
        extra: besides those of `save_interval`; return when it is on disk. Otherwise that happens
            while the run goes on.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: the previous checkpoint could not be saved, or with `extra` this one.
    """
    name = checkpoint_name(trainer.run, trainer.current, trainer.step.progress)
    tensors, state = _state(trainer)
    trainer.metrics.sync()
    trainer.store.save(name, tensors, state, score=score, extra=extra, wait=extra)
    return trainer.store.folder / name


def restore(trainer: PPOTrainer, checkpoint: Checkpoint) -> None:
    """Put a trainer where a checkpoint is.

    Raises:
        CheckpointError: it is of another model, other prompts or other rewards.
    """
    state = checkpoint.state
    try:
        trainer.run, trainer.current = load_run(checkpoint, trainer.run, trainer.step)
    except ForeignStateError as error:
        raise CheckpointError(
            f"{checkpoint.path}: expected a checkpoint of this run, but {error}. Resume with the "
            "model, the data and the options that the run was started with"
        ) from error
    if state["config"]["token_budget"] != trainer.args.token_budget:
        trainer.step.token_budget = trainer.args.token_budget
    trainer.token_budget_shown = trainer.step.token_budget
    if state["max_rows"] is not None:
        trainer.engine.max_rows = state["max_rows"]  # type: ignore[attr-defined]  # had it
    trainer.rewards.load_state_dict(state["reward_failures"])
    trainer.alarms.raised = list(state["alarms"])


def set_aside(run_dir: Path, checkpoint: Checkpoint) -> Path | None:
    """Move checkpoints that are newer than the one to continue from out of the run's way.

    They and copies of metrics and samples go to run_dir/abandoned-N, because the run is about to
    take another course from there.

    Returns:
        That folder, None where there is nothing newer.
    """
    folder = checkpoint.path.parent
    newer = [path for path in folder.glob("[!.]*") if path.name > checkpoint.path.name]
    if not newer:
        return None
    count = len(list(run_dir.glob("abandoned-*"))) + 1
    aside = run_dir / f"abandoned-{count}"
    (aside / folder.name).mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, aside / name)
    for path in sorted(newer, reverse=True):  # a crash in between leaves none newer than the rest
        path.rename(aside / folder.name / path.name)
    return aside


@contextlib.contextmanager
def all_or_nothing(trainer: PPOTrainer) -> Iterator[None]:
    """A phase that starts again from its beginning if something stops it.

    What engine and rewards then know of it (memory that ran out, samples lost) is put back to what
    it was, so that the repetition is the same as without the stop.
    """
    rewards, rows = trainer.rewards.state_dict(), getattr(trainer.engine, "max_rows", None)
    try:
        yield
    except BaseException:
        trainer.rewards.load_state_dict(rewards)
        if hasattr(trainer.engine, "max_rows"):
            trainer.engine.max_rows = rows
        raise


def dump(
    trainer: PPOTrainer,
    kind: str,
    *,
    samples: Sequence[dict[str, Any]] = (),
    recorded: StepStats | None = None,
) -> Path:
    """Keep the batch of the iteration under way for a person, or a step of it for a replay.

    Args:
        trainer: in the middle of an iteration, or just after its update.
        kind: why; part of the name.
        samples: what a person reads.
        recorded: what the step at which `step.progress` stands came to; with it everything that a
            replay needs is kept.
    """
    name = f"iteration-{trainer.run.iterations + 1:06d}-{kind}"
    tensors, state = _state(trainer)
    if recorded is None:
        tensors = {"iteration": tensors["iteration"]}
    else:
        tensors["recorded"] = recorded._asdict()
        del tensors["recorded"]["skipped"]
    folder = trainer.run_dir / "dumps"
    with contextlib.closing(CheckpointStore(folder, keep_last=None)) as dumps:
        dumps.save(name, tensors, state | {"samples": strict(list(samples))}, wait=True)
    return folder / name


def roll_back(trainer: PPOTrainer, error: NonFiniteError) -> None:
    """Keep the step for a replay, and go back to the last checkpoint if that is configured.

    Raises:
        NonFiniteError: `on_nonfinite` is "stop", there is no checkpoint, or going back did not help
            `MAX_ROLLBACKS` times.
    """
    trainer.step.progress = error.progress
    kept = dump(trainer, "nonfinite", recorded=error.recorded)
    trainer.step.progress = None
    trainer.store.wait()
    # An extra one may have the very samples, and a run without a signal would not have it.
    here = checkpoint_name(trainer.run, Iteration(), None)
    checkpoint, _ = trainer.store.newest(regular_until=here)
    seconds, rollbacks = trainer.run.seconds, trainer.run.rollbacks + 1
    if trainer.args.on_nonfinite == "stop" or not checkpoint or rollbacks > MAX_ROLLBACKS:
        back = ""
        if trainer.args.on_nonfinite == "rollback" and checkpoint is None:
            back = "There is no checkpoint to go back to. "
        elif trainer.args.on_nonfinite == "rollback":
            back = f"Going back to a checkpoint {MAX_ROLLBACKS} times did not help. "
        message = f"{error}. {back}The step is kept: fastppo replay {kept}"
        raise NonFiniteError(message, error.progress, error.recorded) from error
    restore(trainer, checkpoint)
    trainer.run.seconds, trainer.run.rollbacks = seconds, rollbacks
    trainer.metrics.rewind(trainer.run.iterations)
    trainer.display.restore(trainer.metrics.rows())
    trainer.display.message(
        f"{error}. The step is kept in {kept}; back to {checkpoint.path.name} "
        f"({rollbacks} of {MAX_ROLLBACKS})"
    )


def _state(trainer: PPOTrainer) -> tuple[dict[str, Tensors], dict[str, Any]]:
    seconds = trainer.run.seconds + time.perf_counter() - trainer.started
    run = dataclasses.replace(trainer.run, seconds=seconds)
    tensors, state = run_state(run, trainer.step, trainer.current)
    config = plain_config(trainer.args)
    return tensors, state | {
        "max_rows": getattr(trainer.engine, "max_rows", None),
        "reward_failures": trainer.rewards.state_dict(),
        "alarms": trainer.alarms.raised,
        "config": config,
        "config_sha256": config_digest(config),
        "versions": versions(),
    }
