"""PPOTrainer: generate → score → pack → evaluate → advantages → update, until done.

The lesson is `iterate`, top to bottom. Everything it needs is an object with one job: an `Engine`
that samples, `Rewards` that score, a `PPOStep` that learns. What makes a run survive (resume,
checkpoints, signals, steps that are not finite) and what a person sees of it is `Run`, in
training/run.py, which drives this trainer like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastppo.checkpoint import Checkpoint, CheckpointError, rehearse_model, save_model
from fastppo.data.prompts import PromptBatch
from fastppo.data.text import decode
from fastppo.models.loading import load_config, load_tokenizer
from fastppo.models.setup import check_model
from fastppo.options import check_kind, shown
from fastppo.ppo.alarms import Alarms
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.identity import check_identity
from fastppo.ppo.inputs import end_tokens, make_inputs
from fastppo.ppo.models import companion_configs, load_models
from fastppo.ppo.rollout_metrics import check_scored, evaluation, sample_rows, score_metrics
from fastppo.ppo.start import check_models, check_reference
from fastppo.ppo.state import Iteration, frozen_digest, load_trainer_state, place, trainer_state
from fastppo.ppo.step import PPOStep
from fastppo.rewards import RewardBatch
from fastppo.rollout.engine import Engine, Rollouts, Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.training.device import describe
from fastppo.training.errors import NonFiniteError, StopRunError
from fastppo.training.memory import retried
from fastppo.training.metrics import PhaseTimer
from fastppo.training.run import Run
from fastppo.training.seeding import batch_indices, derive_seed
from fastppo.training.trainer import Notice, Row, Sample, State

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVAL_BATCH = 64


class PPOTrainer:
    """Train a causal language model with PPO.

    Args:
        model: a model, or the name of one (see `fastppo.models.find_model`).
            Trained in place.
        reward_funcs: one or several reward functions `f(prompts, completions, **columns)`, each
            returning a list of scores (None: cannot score this one). May be async. Or the name of
            one: "file.py:function", "module:function", the folder of a reward model.
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
        engine: what samples the responses; by default `PackedEngine`. One with a `max_rows`
            attribute has it kept in checkpoints.
        resume_from_checkpoint: continue a run exactly where its newest valid checkpoint is: True
            (the run in `args.output_dir`), a run directory, or one checkpoint. Everything else
            must be what the run was started with.
        allow_changes: fields of `args` that may differ from the run that is resumed, and of what
            it was given: "model", "dataset", "reward", "reward_weights".

    Raises:
        ValueError: anything in the arguments that cannot work, before training starts; the run is
            in use by another process.
        CheckpointError: nothing valid to resume from.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path,
        reward_funcs: Callable[..., Any] | str | Sequence[Callable[..., Any] | str],
        train_dataset: Any,
        args: PPOConfig | None = None,
        *,
        eval_dataset: Any = None,
        ref_model: PreTrainedModel | str | Path | None = None,
        value_model: PreTrainedModel | str | Path | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        reward_weights: Sequence[float] | None = None,
        engine: Engine | None = None,
        resume_from_checkpoint: bool | str | Path = False,
        allow_changes: Sequence[str] = (),
    ) -> None:
        self.args = args = PPOConfig() if args is None else args
        check_kind("args", args, PPOConfig)
        if engine is not None and not callable(getattr(engine, "generate", None)):
            raise ValueError(f"engine: expected an object with generate, got {shown(engine)}")
        model = str(model) if isinstance(model, Path) else model
        if not isinstance(model, str):
            check_model(model, "model")
        self.name = model if isinstance(model, str) else str(model.config.name_or_path)
        if processing_class is None and not self.name:
            raise ValueError(
                "processing_class: expected a tokenizer, got None, and the model has no name "
                "(config.name_or_path) to find its own by"
            )
        self.tokenizer = processing_class or load_tokenizer(self.name)
        self.train_data, self.eval_data, self.rewards = make_inputs(
            args,
            load_config(model) if isinstance(model, str) else model.config,
            self.tokenizer,
            train_dataset,
            eval_dataset,
            reward_funcs,
            reward_weights,
            companion_configs(ref_model=ref_model, value_model=value_model),
        )
        self.run = Run(args, self.name, resume=resume_from_checkpoint, allow_changes=allow_changes)
        if self.train_data.num_filtered:
            left_out = f"{self.train_data.num_filtered} prompts over the limit left out"
            self.run.opened.notes.append(left_out)
        with self.run.released_on_error():
            self.rewards.load_models()
            loaded, others = load_models(
                args.seed,
                model,
                ref_model=ref_model,
                value_model=value_model,
                peft_config=peft_config,
            )
            resumed = self.run.opened.checkpoint
            self.eos_token_ids, notes = end_tokens(
                loaded, self.tokenizer, self.train_data, resumed.state if resumed else None
            )
            self.run.opened.notes.extend(notes)
            self.step = PPOStep(loaded, args, **others)
            self.rewards.check_apart(self.step.trained())
        if reference := self.step.policy.reference_is:
            self.run.opened.notes.append(f"reference: {reference}")
        self.policy, self.device = self.step.policy, self.step.device
        self.run_dir = self.run.run_dir
        self.engine = engine or PackedEngine(self.policy.actor)
        self.alarms = Alarms(args)
        self.token_budget_shown = self.step.token_budget
        self.current = Iteration()
        """What the iteration under way has so far."""
        self.unscored = 0
        """Iterations in a row, of this process, in which nothing was scored."""
        self._frozen = ""
        self._allowed = tuple(allow_changes)

    def train(self) -> dict[str, Any]:
        """Run all iterations, save the model and write the report.

        However it ends, the models are ordinary ones afterwards: `trainer.model.generate` works.

        Returns:
            The summary that is also written to summary.json: greedy evaluation before and after,
            reward of the first and the last iterations, seconds, where everything is.

        Raises:
            Interrupted: SIGTERM, SIGINT or SIGHUP came; a checkpoint has been saved.
            RewardError: rewards lost more samples than `reward_max_failure_rate`; likewise.
            StopRunError: the saved model, loaded again, is not what was trained; likewise.
            StartError: no room on the disk, weights that are not finite, or a reference that is
                not the model at the start; nothing has been trained.
            NonFiniteError: see `on_nonfinite`; the step is kept in dumps/.
            CheckpointError: a checkpoint could not be saved, or is not one of this model.
        """
        self._frozen = frozen_digest(self.step)
        try:
            with self.policy.lent():
                return self.run.train(self, self.rewards)
        finally:
            self.policy.restore()

    @property
    def model(self) -> Any:
        """The model that is trained, with its adapter."""
        return self.policy.actor.model

    # The loop

    def iterate(self, iteration: int, timer: PhaseTimer) -> tuple[Row, list[Sample]]:
        """One round of PPO, which writes nothing; `Run` calls it, and so may a profiler.

        What `current` has already is not redone. Rewards must have been entered.

        Args:
            iteration: counts from 1.
            timer: times the phases.

        Returns:
            The metrics, and the samples for a person to read.
        """
        step, now = self.step, self.current
        timer.take()
        if iteration == 1:
            check_models(step)
        drawn = self._draw(iteration)
        if now.rollouts is None:
            with timer("rollout"), self._all_or_nothing():
                now.rollouts = self.engine.generate(drawn.ids, self._sampling(iteration))
        with timer("reward"):
            completions = self._decoded(now.rollouts)
            if now.scored is None:
                with self._all_or_nothing():
                    scored = self._score(drawn, now.rollouts, completions)
                    none = np.isnan(scored.scores).all()
                    self.unscored = self.unscored + 1 if none else 0
                    check_scored(scored, self.run.rewards, self.unscored)
                now.scored = scored
        if now.batch is None:
            with timer("pack"):
                batch = self._packed(drawn, now.rollouts)
            with timer("evaluate"):
                batch = step.evaluate(batch)
                if iteration == 1:
                    check_reference(step, batch)
            with timer("advantages"):
                group_ids = np.arange(len(drawn.ids)) // self.args.n_samples
                now.batch = step.advantages(batch, now.scored.scores, group_ids)
        if now.row is None:
            scores = score_metrics(now.scored, now.rollouts)
            with timer("update"):
                learned = step.update(now.batch)
            total = timer.elapsed
            now.row = {
                "iteration": iteration,
                **scores,
                **learned,
                "tokens_per_second": now.batch.num_tokens / total,
                **timer.take(),
                "seconds_total": total,
            }
        return now.row, sample_rows(iteration, drawn.prompts, completions, now.scored, now.rollouts)

    def evaluate(self) -> dict[str, float | int]:
        """Greedy responses to every held-out prompt.

        Returns:
            Mean `reward`, `response_length`, `truncated` share, number of `prompts`, and `accuracy`
            where every score is 0 or 1. Empty where there is no eval_dataset.
        """
        data = self.eval_data
        if data is None:
            return {}
        scored, rollouts = [], []
        failures = self.rewards.state_dict()
        with self._all_or_nothing(), self.policy.lent():
            for start in range(0, len(data), EVAL_BATCH):
                drawn = data.select(np.arange(start, min(start + EVAL_BATCH, len(data))))
                rollouts.append(self.engine.generate(drawn.ids, self._sampling(0, greedy=True)))
                scored.append(self._score(drawn, rollouts[-1], self._decoded(rollouts[-1])))
        self.rewards.load_state_dict(failures)  # the failure rate is that of the iterations
        return evaluation(scored, rollouts)

    def _draw(self, iteration: int) -> PromptBatch:
        args, data = self.args, self.train_data
        drawn = batch_indices(len(data), args.prompts_per_iteration, args.seed, iteration - 1)
        return data.select(np.repeat(drawn, args.n_samples))

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
        plain = not self.train_data.conversational
        return [decode(self.tokenizer, ids, continues=plain) for ids in rollouts.responses]

    def _score(self, drawn: PromptBatch, rollouts: Rollouts, completions: list[str]) -> RewardBatch:
        ids = [ids.tolist() for ids in rollouts.responses]
        return self.rewards(drawn.prompts, completions, drawn.columns, ids)

    @retried
    def _packed(self, drawn: PromptBatch, rollouts: Rollouts) -> PackedBatch:
        return PackedBatch.pack(
            drawn.ids,
            rollouts.responses,
            rollout_logprobs=rollouts.logprobs,
            truncated=rollouts.truncated,
            device=self.device,
        )

    # What a run asks for

    def notices(self, row: Row) -> Iterator[Notice]:
        """Lost samples, lack of memory, a policy that runs away, nothing to learn from."""
        failures = self.current.scored.failures if self.current.scored else ()
        for failure in failures[:3]:
            yield Notice(str(failure))
        if more := failures[3:]:
            yield Notice(f"{len(more)} more samples lost by reward functions")
        if self.step.token_budget < self.token_budget_shown:
            self.token_budget_shown = self.step.token_budget
            yield Notice(f"out of memory: token_budget is {self.token_budget_shown} from now on")
        scores = None if self.current.scored is None else self.current.scored.scores
        yield from self.alarms.check(row, scores)

    def next_iteration(self) -> None:
        """Forget the iteration that is done."""
        self.current = Iteration()

    @property
    def place(self) -> str:
        """Where in an iteration; empty between two."""
        return place(self.current, self.step.progress)

    def identity(self) -> dict[str, Any]:
        """What a continuation must have in common with this run."""
        return {
            "precision": self.step.precision,
            "prompts": self.train_data.identity,
            "reward_names": self.rewards.names,
            "reward_weights": self.rewards.weights,
            "frozen": self._frozen,
        }

    def state(self) -> State:
        """All that an exact continuation needs; see ppo/state.py."""
        tensors, state = trainer_state(self.step, self.current)
        return tensors, state | {
            "max_rows": getattr(self.engine, "max_rows", None),
            "eos_token_ids": list(self.eos_token_ids),
            "reward_failures": self.rewards.state_dict(),
            "alarms": self.alarms.raised,
            "alarm_streaks": self.alarms.streaks,
        }

    def failed_step(self, error: NonFiniteError) -> State:
        """The state before the step, and what the step came to."""
        self.step.progress = error.progress
        tensors, state = self.state()
        self.step.progress = None
        recorded = error.recorded._asdict()
        del recorded["skipped"]
        return tensors | {"recorded": recorded}, state

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go where a checkpoint is.

        Raises:
            ForeignStateError: it is of another model, other prompts or other rewards.
        """
        state = checkpoint.state
        notes = check_identity(
            state["run"],
            self.identity(),
            self.train_data,
            read=self.rewards.reads,
            allowed=self._allowed,
        )
        self.current = load_trainer_state(checkpoint, self.step)
        if notes and self.current.row is None:  # what it has so far is of the others
            self.current, self.step.progress = Iteration(), None
        self.run.opened.notes.extend(notes)
        if state["config"]["token_budget"] != self.args.token_budget:
            self.step.token_budget = self.args.token_budget
        self.token_budget_shown = self.step.token_budget
        if state["max_rows"] is not None:
            self.engine.max_rows = state["max_rows"]  # type: ignore[attr-defined]  # had it
        self.rewards.load_state_dict(state["reward_failures"])
        self.alarms.raised = list(state["alarms"])
        self.alarms.streaks = dict(state.get("alarm_streaks", {}))  # older ones have none

    def summary(self) -> dict[str, Any]:
        """What was trained, and where."""
        return {
            "hardware": describe(self.device),
            "precision": self.step.precision,
            "parameters": self.policy.num_parameters(),
            "model_name": self.name,
        }

    def rehearse(self, folder: Path) -> int:
        """Fail as `save_model` would; returns the bytes of its fp32 weights."""
        rehearse_model(folder, self.policy.rehearse, self.tokenizer)
        return 4 * self.policy.num_parameters()["total"]

    def save_model(self, folder: str | Path) -> Path:
        """Save the policy, its critic and the tokenizer in a new folder.

        Raises:
            StopRunError: loaded again, it is not what was trained; nothing is left of it.
            CheckpointError: it could not be written; likewise.
        """
        try:
            return save_model(Path(folder), self.policy, self.tokenizer)
        except CheckpointError as error:
            if isinstance(error.__cause__, ValueError):
                raise StopRunError(str(error)) from error
            raise

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A phase that starts again from its beginning if something stops it.

        What engine and rewards then know of it (memory that ran out, samples lost) is put back to
        what it was, so that the repetition is the same as without the stop.
        """
        rewards, rows = self.rewards.state_dict(), getattr(self.engine, "max_rows", None)
        try:
            yield
        except BaseException:
            self.rewards.load_state_dict(rewards)
            if hasattr(self.engine, "max_rows"):
                self.engine.max_rows = rows
            raise
