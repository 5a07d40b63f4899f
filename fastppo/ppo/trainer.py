"""PPOTrainer: generate → score → pack → evaluate → advantages → update, until done.

The loop is `iterate`, top to bottom. Everything it needs is an object with one job: an `Engine`
that samples, `Rewards` that score, a `PPOStep` that learns, a `MetricsWriter` that records, a
`CheckpointStore` that keeps what it takes to go on after a crash.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastppo.checkpoint import delete, lock_run_dir, save_model, write_json
from fastppo.data.prompts import PromptDataset, decode
from fastppo.models.loading import (
    eos_token_ids,
    load_config,
    load_model,
    load_tokenizer,
    load_value_model,
    with_adapter,
)
from fastppo.ppo import recovery
from fastppo.ppo.alarms import Alarms
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.scores import check_scored, evaluation, mean, sample_rows, score_metrics
from fastppo.ppo.state import Iteration, Run, frozen_digest
from fastppo.ppo.step import NonFiniteError, PPOStep
from fastppo.ppo.task import make_task
from fastppo.reporting.display import Display
from fastppo.reporting.report import write_curve_png, write_report
from fastppo.rewards import RewardBatch, RewardError
from fastppo.rollout.engine import Engine, Rollouts, Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.training import interrupts
from fastppo.training.device import describe
from fastppo.training.memory import retried
from fastppo.training.metrics import MetricsWriter, PhaseTimer, check_report_to
from fastppo.training.resume import open_run, plain_config
from fastppo.training.seeding import batch_indices, derive_seed

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVAL_BATCH = 64


class PPOTrainer:
    """Train a causal language model with PPO.

    Args:
        model: a model, or the name of one (see `fastppo.models.find_model`).
            Trained in place.
        reward_funcs: one or several reward functions `f(prompts, completions, **columns)`, each
            returning a list of scores (None: cannot score this one). May be async.
        train_dataset: a path, a `datasets.Dataset` or a list of dicts, with a `prompt` column:
            plain text, or chat messages.
        args: the configuration.
        eval_dataset: held-out prompts, scored greedily before and after training and every
            `eval_interval` iterations.
        ref_model: the reference policy; by default the choice of `args.reference`.
        value_model: the model that a separate critic starts from.
        processing_class: the tokenizer; by default the model's own.
        peft_config: train this PEFT adapter instead of the weights.
        reward_weights: weight of each reward function; by default 1 each.
        engine: what samples the responses; by default transformers' generation. One with a
            `max_rows` attribute has it kept in checkpoints.
        resume_from_checkpoint: continue a run exactly where its newest valid checkpoint is: True
            (the run in `args.output_dir`), a run directory, or one checkpoint. Everything else
            must be what the run was started with.
        allow_changes: fields of `args` that may differ from the run that is resumed.

    Raises:
        ValueError: anything in the arguments that cannot work, before training starts; the run is
            in use by another process.
        CheckpointError: nothing valid to resume from.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        reward_funcs: Callable[..., Any] | Sequence[Callable[..., Any]],
        train_dataset: Any,
        args: PPOConfig | None = None,
        *,
        eval_dataset: Any = None,
        ref_model: PreTrainedModel | str | None = None,
        value_model: PreTrainedModel | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        reward_weights: Sequence[float] | None = None,
        engine: Engine | None = None,
        resume_from_checkpoint: bool | str | Path = False,
        allow_changes: Sequence[str] = (),
    ) -> None:
        self.args = args = args or PPOConfig()
        self.name = _name_of(model)
        if processing_class is None and not self.name:
            raise ValueError(
                "processing_class: expected a tokenizer, got None, and the model has no name "
                "(config.name_or_path) to find its own by"
            )
        self.tokenizer = processing_class or load_tokenizer(self.name)
        self.train_data, self.eval_data, self.rewards = make_task(
            args,
            load_config(model) if isinstance(model, str) else model.config,
            self.tokenizer,
            train_dataset,
            eval_dataset,
            reward_funcs,
            reward_weights,
        )
        check_report_to(args.report_to)
        with contextlib.ExitStack() as held:
            self._opened = open_run(args, resume_from_checkpoint, allow_changes, held)
            self.run_dir, self.store = self._opened.run_dir, self._opened.store
            self.rewards.load_models()
            loaded = load_model(model) if isinstance(model, str) else model
            if peft_config is not None:
                loaded = with_adapter(loaded, peft_config, derive_seed(args.seed, 0, "adapter"))
            self.step = PPOStep(
                loaded,
                args,
                ref_model=load_model(ref_model, "ref_model")
                if isinstance(ref_model, str)
                else ref_model,
                value_model=load_value_model(value_model)
                if isinstance(value_model, str)
                else value_model,
            )
            self._held = held.pop_all()
            """Until `train` is done: the lock of a run that is resumed."""
        self.policy = self.step.policy
        self.engine = engine or PackedEngine(self.policy.actor)
        self.eos_token_ids = eos_token_ids(loaded, self.tokenizer)
        self.run = Run(self.step.precision, self.train_data.digest, self.rewards.names)
        self.alarms = Alarms(args)
        self.token_budget_shown = self.step.token_budget
        self.current = Iteration()
        """What the iteration under way has so far."""

    # The loop

    def train(self) -> dict[str, Any]:
        """Run all iterations, save the model and write the report.

        Returns:
            The summary that is also written to summary.json: greedy evaluation before and after,
            reward of the first and the last iterations, seconds, where everything is.

        Raises:
            Interrupted: SIGTERM or SIGINT came; a checkpoint has been saved.
            RewardError: rewards lost more samples than `reward_max_failure_rate`; likewise.
            NonFiniteError: see `on_nonfinite`; the step is kept in dumps/.
            CheckpointError: a checkpoint could not be saved, or is not one of this model.
        """
        args = self.args
        config = plain_config(args)
        with contextlib.ExitStack() as stack:
            if not self._opened.found:
                stack.enter_context(lock_run_dir(self.run_dir))
            stack.enter_context(self._held)
            stack.enter_context(contextlib.closing(self.store))
            stack.enter_context(self.rewards)
            self.run.frozen = frozen_digest(self.step)
            if self._opened.checkpoint is not None:
                recovery.restore(self, self._opened.checkpoint)
                if aside := recovery.set_aside(self.run_dir, self._opened.checkpoint):
                    self._opened.notes.append(f"what came after it is kept in {aside}")
            write_json(self.run_dir / "config.json", config)
            self.metrics = stack.enter_context(
                MetricsWriter(
                    self.run_dir,
                    args.report_to,
                    config,
                    self.run_dir.name,
                    last_iteration=self.run.iterations,
                )
            )
            self.display = stack.enter_context(Display(args.num_iterations, title=self.name))
            stack.enter_context(interrupts.handled())
            try:
                summary = self._train()
            except (interrupts.Interrupted, RewardError) as error:
                self.display.message(f"{_reason(error)}: saving a checkpoint")
                saved = recovery.save_checkpoint(self, extra=True)
                self.display.message(f"saved {saved}; --resume goes on from there")
                raise
            self.store.wait()
        return summary

    def _train(self) -> dict[str, Any]:
        args, display = self.args, self.display
        self.started = time.perf_counter()
        timer = PhaseTimer(synchronize=self.step.device.type == "cuda")
        for note in self._opened.notes:
            display.message(note)
        if self._opened.checkpoint is not None:
            display.restore(self.metrics.rows())
            display.message(f"resumed from {self._opened.checkpoint.path}")
        if self.train_data.num_filtered:
            display.message(f"{self.train_data.num_filtered} prompts over the limit left out")
        if self.run.eval_before is None:
            self.run.eval_before = self.evaluate()
        while self.run.iterations < args.num_iterations:
            self.store.check()
            try:
                row, samples = self.iterate(self.run.iterations + 1, timer)
            except NonFiniteError as error:
                recovery.roll_back(self, error)
                continue
            self._record(row, samples)
        run, after = self.run, self.evaluate()
        summary = {
            "eval_before": run.eval_before,
            "eval_after": after,
            "reward_first": mean(run.rewards[:3]),
            "reward_last": mean(run.rewards[-5:]),
            "rewards": run.rewards,
            "iterations": run.iterations,
            "seconds": run.seconds + time.perf_counter() - self.started,
            "hardware": describe(self.step.device),
            "precision": self.step.precision,
            "parameters": self.policy.num_parameters(),
            "model_name": self.name,
            "model": str(self._save_final_model()),
            "run_dir": str(self.run_dir),
        }
        write_json(self.run_dir / "summary.json", summary)
        summary["report"] = str(write_report(self.run_dir))
        summary["curve"] = str(write_curve_png(self.run_dir))
        display.finish(summary)
        return summary

    def iterate(
        self, iteration: int, timer: PhaseTimer
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One round of PPO, which writes nothing; `train` calls it, and so may a profiler.

        What `current` has already is not redone. Rewards must have been entered.

        Args:
            iteration: counts from 1.
            timer: times the phases.

        Returns:
            The metrics, and the samples for a person to read.
        """
        args, data, step, current = self.args, self.train_data, self.step, self.current
        timer.take()
        drawn = batch_indices(len(data), args.prompts_per_iteration, args.seed, iteration - 1)
        indices = np.repeat(drawn, args.n_samples)
        group_ids = np.repeat(np.arange(len(drawn)), args.n_samples)
        prompts = [data.ids[i] for i in indices]
        if current.rollouts is None:
            with timer("rollout"), recovery.all_or_nothing(self):
                current.rollouts = self.engine.generate(prompts, self._sampling(iteration))
        rollouts = current.rollouts
        with timer("reward"):
            completions = self._decoded(rollouts)
            if current.scored is None:
                with recovery.all_or_nothing(self):
                    scored = self._score(data, indices, rollouts, completions)
                    check_scored(scored, self.run.rewards)
                current.scored = scored
        scored = current.scored
        if current.batch is None:
            with timer("pack"):
                batch = retried(lambda: _packed(prompts, rollouts, step.device), step.device)
            with timer("evaluate"):
                batch = step.evaluate(batch)
            with timer("advantages"):
                current.batch = step.advantages(batch, scored.scores, group_ids)
        if current.row is None:
            scores = score_metrics(scored, rollouts)
            with timer("update"):
                learned = step.update(current.batch)
            total = timer.elapsed
            current.row = {
                "iteration": iteration,
                **scores,
                **learned,
                "tokens_per_second": current.batch.num_tokens / total,
                **timer.take(),
                "seconds_total": total,
            }
        chosen = [data.prompts[i] for i in indices]
        return current.row, sample_rows(iteration, chosen, completions, scored, rollouts)

    def _record(self, row: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """What follows an update: evaluation, metrics, samples, warnings, checkpoint."""
        args, run, iteration = self.args, self.run, self.run.iterations + 1
        if args.eval_interval and iteration % args.eval_interval == 0:
            row = row | {f"eval_{name}": value for name, value in self.evaluate().items()}
        self._warn(row, samples)
        self.current = Iteration()
        run.iterations = iteration
        run.rewards.append(row["reward"])
        self.metrics.log(row)
        self.metrics.samples(iteration, samples)
        self.display.update(row)
        if args.sample_interval and (iteration - 1) % args.sample_interval == 0:
            self.display.samples(iteration, samples[:4])
        if args.save_interval and iteration % args.save_interval == 0:
            run.rollbacks = 0
            score = row.get("eval_reward", row["reward"])
            recovery.save_checkpoint(self, score=score if math.isfinite(score) else None)

    def _warn(self, row: dict[str, float], samples: list[dict[str, Any]]) -> None:
        """Tell a person about lost samples, lack of memory, and a policy that runs away."""
        show, iteration = self.display.message, int(row["iteration"])
        failures = self.current.scored.failures if self.current.scored else ()
        for failure in failures[:3]:
            show(f"iteration {iteration}: {failure}")
        if more := failures[3:]:
            show(f"iteration {iteration}: {len(more)} more samples lost by reward functions")
        if self.step.token_budget < self.token_budget_shown:
            self.token_budget_shown = self.step.token_budget
            show(f"out of memory: token_budget is {self.token_budget_shown} from now on")
        for alarm in self.alarms.check(row):
            kept = recovery.dump(self, alarm.name, samples=samples)
            show(f"iteration {iteration}: {alarm.message}. The batch is kept in {kept}")

    def _sampling(self, iteration: int, *, greedy: bool = False) -> Sampling:
        args, rollbacks = self.args, self.run.rollbacks
        # After a roll-back the same samples would lead to the same failure.
        purpose = f"rollout/{rollbacks}" if rollbacks and not greedy else "rollout"
        return Sampling(
            temperature=0.0 if greedy else args.temperature,
            top_p=1.0 if greedy else args.top_p,
            top_k=0 if greedy else args.top_k,
            min_p=0.0 if greedy else args.min_p,
            max_new_tokens=args.max_response_length,
            eos_token_ids=self.eos_token_ids,
            seed=derive_seed(args.seed, iteration, purpose),
        )

    def _decoded(self, rollouts: Rollouts) -> list[str]:
        return [decode(self.tokenizer, ids) for ids in rollouts.responses]

    def _score(
        self, data: PromptDataset, indices: np.ndarray, rollouts: Rollouts, texts: list[str]
    ) -> RewardBatch:
        return self.rewards(
            [data.prompts[i] for i in indices],
            texts,
            {name: [column[i] for i in indices] for name, column in data.columns.items()},
            [ids.tolist() for ids in rollouts.responses],
        )

    # Evaluation and saving

    def evaluate(self) -> dict[str, float | int]:
        """Greedy responses to every held-out prompt.

        Returns:
            Mean `reward`, `response_length`, `truncated` share, number of `prompts`, and `accuracy`
            where every score is 0 or 1. Empty where there is no eval_dataset.
        """
        data = self.eval_data
        if data is None:
            return {}
        scored, drawn = [], []
        failures = self.rewards.state_dict()
        with recovery.all_or_nothing(self):
            for start in range(0, len(data), EVAL_BATCH):
                indices = np.arange(start, min(start + EVAL_BATCH, len(data)))
                prompts = [data.ids[i] for i in indices]
                rollouts = self.engine.generate(prompts, self._sampling(0, greedy=True))
                scored.append(self._score(data, indices, rollouts, self._decoded(rollouts)))
                drawn.append(rollouts)
        self.rewards.load_state_dict(failures)  # the failure rate is that of the iterations
        return evaluation(scored, drawn)

    def _save_final_model(self) -> Path:
        folder = self.run_dir / "model"
        if folder.exists():  # of the same run, before it was continued
            delete(folder)
        return self.save_model(folder)

    def save_model(self, folder: Path) -> Path:
        """Save the policy, its critic and the tokenizer in a new folder."""
        return save_model(folder, self.policy, self.tokenizer)


def _packed(prompts: list[np.ndarray], rollouts: Rollouts, device: torch.device) -> PackedBatch:
    return PackedBatch.pack(
        prompts,
        rollouts.responses,
        rollout_logprobs=rollouts.logprobs,
        truncated=rollouts.truncated,
        device=device,
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, interrupts.Interrupted):
        return f"received {signal.Signals(error.signum).name}"
    return str(error)


def _name_of(model: PreTrainedModel | str) -> str:
    return model if isinstance(model, str) else str(model.config.name_or_path)
