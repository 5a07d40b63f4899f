"""A run that survives: what drives any trainer, and what becomes of it when something goes wrong.

    self.run = Run(args, title)                 # a new run, or one to continue; nothing is read yet
    ...
    summary = self.run.train(self, self.rewards)   # iterate until done; what is entered meanwhile

A `Trainer` (trainer.py) knows what an iteration is and how to put its state into tensors and JSON.
Everything around that is here: the lock of the run directory, checkpoints and resume, signals,
metrics, the display, steps whose numbers are not finite, the summary and the report. Rules:
docs/runs.md.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastppo.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    delete,
    lock_run_dir,
    write_json,
)
from fastppo.checkpoint.lock import LOCK, check_in_place
from fastppo.reporting.display import Display
from fastppo.reporting.report import write_curve_png, write_report
from fastppo.training import interrupts
from fastppo.training.config import RunConfig
from fastppo.training.errors import ForeignStateError, NonFiniteError, StopRunError
from fastppo.training.finite import check_finite, check_learned
from fastppo.training.memory import named
from fastppo.training.metrics import (
    MetricsWriter,
    PhaseTimer,
    check_report_to,
    from_json,
    mean,
    strict,
    to_json,
    whole,
)
from fastppo.training.resume import archive, open_run, plain_config, versions
from fastppo.training.room import check_room
from fastppo.training.trainer import Row, Sample, State, Trainer

MAX_ROLLBACKS = 3


class Run:
    """One run directory and what is in it, from the first check to the report.

    Args:
        args: the whole configuration; of its fields only RunConfig's are read here.
        title: shown by the display.
        resume: see `find_run`; False for a new run.
        allow_changes: fields of `args` that may differ from the run that is resumed.

    Raises:
        ValueError: a directory that is in use or cannot be used, a tracker that is not installed,
            another configuration than the run was started with.
        CheckpointError: nothing valid to resume from.
    """

    def __init__(
        self,
        args: RunConfig,
        title: str,
        *,
        resume: bool | str | Path = False,
        allow_changes: Sequence[str] = (),
    ) -> None:
        check_report_to(args.report_to)
        self.args = args
        self.title = title
        self._held = contextlib.ExitStack()
        """Until `train` is done: the lock of a run that is resumed."""
        self._begun = False
        with contextlib.ExitStack() as held:
            self.opened = open_run(args, resume, allow_changes, held)
            self._held = held.pop_all()
        self.run_dir, self.store = self.opened.run_dir, self.opened.store
        # in checkpoints
        self.iterations = 0
        """Finished ones."""
        self.rewards: list[float] = []
        """Mean score of each iteration; NaN where nothing was scored."""
        self.eval_before: dict[str, Any] | None = None
        self.seconds = 0.0
        """Spent by the processes before this one."""
        self.rollbacks = 0
        """Since the last checkpoint."""

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Give the directory back if what is done inside fails."""
        try:
            yield
        except BaseException:
            self._held.close()
            if not self.args.output_dir and not self.opened.found:
                with contextlib.suppress(OSError):  # something is in it
                    self.run_dir.rmdir()
            raise

    # The loop

    def train(
        self, trainer: Trainer, resources: contextlib.AbstractContextManager[Any]
    ) -> dict[str, Any]:
        """Run all iterations, save the model and write the report.

        Args:
            trainer: what is driven.
            resources: of the trainer, entered while it trains.

        Returns:
            The summary that is also written to summary.json.

        Raises:
            Interrupted: SIGTERM, SIGINT or SIGHUP came; a checkpoint has been saved.
            StopRunError: the trainer cannot go on; likewise.
            StartError: the disk has no room for the model and one checkpoint.
            NonFiniteError: see `on_nonfinite`; the step is kept in dumps/.
            CheckpointError: a checkpoint could not be saved, or is not one of this model.
            RunInUseError: another run has the directory, or had it since this one was prepared; or
                it was moved or removed meanwhile.
        """
        config = plain_config(self.args)
        with contextlib.ExitStack() as stack:
            if not self.opened.found:
                stack.enter_context(lock_run_dir(self.run_dir, new=not self._begun))
            self._begun = True
            stack.enter_context(self._held)
            self._lock = os.lstat(self.run_dir / LOCK)
            stack.enter_context(contextlib.closing(self.store))
            stack.enter_context(resources)
            if self.opened.checkpoint is not None:
                self._restore(trainer, self.opened.checkpoint)
                if archived := archive(self.run_dir, self.opened.checkpoint):
                    self.opened.notes.append(f"what came after it is kept in {archived}")
            model = trainer.rehearse(self.run_dir / "model")
            groups = trainer.state()[0].values()
            checkpoint = sum(x.nbytes for group in groups for x in group.values())
            room = check_room(self.run_dir, self.args, model, checkpoint, self.iterations)
            self.opened.notes.extend(room)
            write_json(self.run_dir / "config.json", config)
            self.metrics = stack.enter_context(
                MetricsWriter(
                    self.run_dir,
                    self.args.report_to,
                    config,
                    self.run_dir.name,
                    last_iteration=self.iterations,
                )
            )
            self.display = stack.enter_context(Display(self.args.num_iterations, title=self.title))
            stack.enter_context(interrupts.handled())
            try:
                self._iterate(trainer)
                summary = self._finish(trainer)
            except (interrupts.Interrupted, StopRunError) as error:
                self.display.message(f"{error}: saving a checkpoint")
                saved = self.save_checkpoint(trainer, extra=True)
                self.display.message(f"saved {saved}; --resume goes on from there")
                raise
            self.store.wait()
        return summary

    def _iterate(self, trainer: Trainer) -> None:
        self.started = time.perf_counter()
        timer = PhaseTimer(synchronize=trainer.device.type == "cuda")
        for note in self.opened.notes:
            self.display.message(note)
        if self.opened.checkpoint is not None:
            self.display.restore(self.metrics.rows())
            self.display.message(f"resumed from {self.opened.checkpoint.path}")
        if self.eval_before is None:
            self.eval_before = trainer.evaluate()
        while self.iterations < self.args.num_iterations:
            interrupts.check()
            check_in_place(self.run_dir, self._lock)
            self.store.check()
            try:
                row, samples = trainer.iterate(self.iterations + 1, timer)
            except NonFiniteError as error:
                self._roll_back(trainer, error)
                continue
            self._record(trainer, row, samples)

    def _record(self, trainer: Trainer, row: Row, samples: list[Sample]) -> None:
        """What follows an iteration: evaluation, warnings, metrics, samples, checkpoint."""
        args, iteration = self.args, self.iterations + 1
        if args.eval_interval and iteration % args.eval_interval == 0:
            row = row | {f"eval_{name}": value for name, value in trainer.evaluate().items()}
        for notice in trainer.notices(row):
            kept = ""
            if notice.keep:
                tensors, state = self._state(trainer)
                only = {"iteration": tensors.get("iteration", {})}
                kept = f". The batch is kept in {self._dump(notice.keep, only, state, samples)}"
            self.display.message(f"iteration {iteration}: {notice.text}{kept}")
        trainer.next_iteration()
        self.iterations = iteration
        self.rewards.append(row.get("reward", math.nan))
        self.metrics.log(row)
        self.metrics.samples(iteration, samples)
        self.display.update(row)
        if args.sample_interval and (iteration - 1) % args.sample_interval == 0:
            self.display.samples(iteration, samples[:4])
        if args.save_interval and iteration % args.save_interval == 0:
            self.rollbacks = 0
            score = row.get("eval_reward", self.rewards[-1])
            self.save_checkpoint(trainer, score=score if math.isfinite(score) else None)

    def _finish(self, trainer: Trainer) -> dict[str, Any]:
        tensors, _ = trainer.state()
        check_learned(tensors.get("optimizer", {}), self.iterations)
        _check_finite(tensors, "model")
        after = trainer.evaluate()
        check_in_place(self.run_dir, self._lock)
        folder = self.run_dir / "model"
        if os.path.lexists(folder):  # of the same run, before it was continued
            delete(folder)
        summary = {
            "eval_before": self.eval_before,
            "eval_after": after,
            "reward_first": mean(self.rewards[:3]),
            "reward_last": mean(self.rewards[-5:]),
            "rewards": self.rewards,
            "iterations": self.iterations,
            "seconds": self.seconds + time.perf_counter() - self.started,
            **trainer.summary(),
            "model": str(trainer.save_model(folder)),
            "run_dir": str(self.run_dir),
        }
        write_json(self.run_dir / "summary.json", summary)
        summary["report"] = str(write_report(self.run_dir))
        summary["curve"] = str(write_curve_png(self.run_dir))
        self.display.finish(summary)
        return summary

    # Checkpoints and dumps

    def save_checkpoint(
        self, trainer: Trainer, *, score: float | None = None, extra: bool = False
    ) -> Path:
        """Save all that an exact continuation needs, in the middle of an iteration too.

        Args:
            trainer: while it trains.
            score: what `keep_best` goes by.
            extra: besides those of `save_interval`; return when it is on disk. Otherwise that
                happens while the run goes on.

        Returns:
            The checkpoint's folder.

        Raises:
            CheckpointError: the previous checkpoint could not be saved, or with `extra` this one;
                the weights are not finite.
        """
        name = f"iteration-{self.iterations:06d}{trainer.place}"
        check_in_place(self.run_dir, self._lock)
        tensors, state = self._state(trainer)
        _check_finite(tensors, f"checkpoint {name}")
        self.metrics.sync()
        remedy = "Set train_layers or lora_rank, or save_interval = 0"
        with named("copying the weights for a checkpoint", remedy):
            self.store.save(name, tensors, state, score=score, extra=extra, wait=extra)
        return self.store.folder / name

    def _state(self, trainer: Trainer, of_trainer: State | None = None) -> State:
        tensors, state = of_trainer or trainer.state()
        own = {
            "iterations": self.iterations,
            "rewards": to_json(self.rewards),
            "eval_before": to_json(self.eval_before),
            "seconds": self.seconds + time.perf_counter() - self.started,
            "rollbacks": self.rollbacks,
        }
        return tensors, state | {
            "run": trainer.identity() | own,
            "config": plain_config(self.args),
            "versions": versions(),
        }

    def _restore(self, trainer: Trainer, checkpoint: Checkpoint) -> None:
        """Put run and trainer where a checkpoint is."""
        try:
            with checkpoint.understood():
                trainer.load_state(checkpoint)
                saved = checkpoint.state["run"]
                iterations, rollbacks = (whole(saved, name) for name in ("iterations", "rollbacks"))
                seconds, rewards = float(saved["seconds"]), [float(v) for v in saved["rewards"]]
                eval_before = saved["eval_before"] and from_json(saved["eval_before"])
        except ForeignStateError as error:
            raise CheckpointError(
                f"{checkpoint.path}: expected a checkpoint of this run, but {error}. Resume with "
                "the model, the data and the options that the run was started with"
            ) from error
        self.iterations, self.rollbacks = iterations, rollbacks
        self.seconds, self.rewards, self.eval_before = seconds, rewards, eval_before

    def _dump(
        self,
        kind: str,
        tensors: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        samples: Sequence[Sample] = (),
    ) -> Path:
        """Keep something of the iteration under way in dumps/: for a person, or for a replay."""
        name = f"iteration-{self.iterations + 1:06d}-{kind}"
        folder = self.run_dir / "dumps"
        with contextlib.closing(CheckpointStore(folder, keep_last=None)) as dumps:
            dumps.save(name, tensors, state | {"samples": strict(list(samples))}, wait=True)
        return folder / name

    def _roll_back(self, trainer: Trainer, error: NonFiniteError) -> None:
        """Keep the step for a replay, and go back to the last checkpoint if that is configured.

        Raises:
            NonFiniteError: `on_nonfinite` is "stop", there is no checkpoint, or going back did not
                help `MAX_ROLLBACKS` times.
        """
        tensors, state = self._state(trainer, trainer.failed_step(error))
        kept = self._dump("nonfinite", tensors, state)
        self.store.wait()
        # An extra one may have the very samples, and a run without a signal would not have it.
        checkpoint, _ = self.store.newest(regular_until=f"iteration-{self.iterations:06d}")
        seconds, rollbacks = self.seconds, self.rollbacks + 1
        if self.args.on_nonfinite == "stop" or checkpoint is None or rollbacks > MAX_ROLLBACKS:
            back = ""
            if self.args.on_nonfinite == "rollback" and checkpoint is None:
                back = "There is no checkpoint to go back to. "
            elif self.args.on_nonfinite == "rollback":
                back = f"Going back to a checkpoint {MAX_ROLLBACKS} times did not help. "
            message = f"{error}. {back}The step is kept: fastppo replay {kept}"
            raise NonFiniteError(message, error.progress, error.recorded) from error
        self._restore(trainer, checkpoint)
        self.seconds, self.rollbacks = seconds, rollbacks
        self.metrics.rewind(self.iterations)
        self.display.restore(self.metrics.rows())
        self.display.message(
            f"{error}. The step is kept in {kept}; back to {checkpoint.path.name} "
            f"({rollbacks} of {MAX_ROLLBACKS})"
        )


def _check_finite(tensors: dict[str, dict[str, Tensor]], what: str) -> None:
    """`check_finite` of weights and optimisers; the batch under way may hold anything."""
    for group, by_name in tensors.items():
        if group != "iteration":
            check_finite(by_name, what)
