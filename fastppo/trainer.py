"""PPOTrainer: generate → score → pack → evaluate → advantages → update, until done.

The loop is `_iterate`, top to bottom. Everything it needs is an object with one job: an `Engine`
that samples, `Rewards` that score, a `PPOStep` that learns, a `MetricsWriter` that records.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastppo.checkpoint import new_run_dir, save_model, write_json
from fastppo.config import PPOConfig
from fastppo.data import PromptDataset, batch_indices, decode
from fastppo.device import describe
from fastppo.metrics import MetricsWriter, PhaseTimer, check_report_to
from fastppo.models import (
    eos_token_ids,
    load_config,
    load_model,
    load_tokenizer,
    with_adapter,
)
from fastppo.packing import PackedBatch
from fastppo.reporting.display import Display
from fastppo.reporting.report import write_curve_png, write_report
from fastppo.rewards import RewardBatch, RewardError
from fastppo.rollout import Engine, Rollouts, Sampling
from fastppo.rollout.transformers import TransformersEngine
from fastppo.seeding import derive_seed
from fastppo.step import PPOStep
from fastppo.task import make_task

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EVAL_BATCH = 64


class PPOTrainer:
    """Train a causal language model with PPO.

    Args:
        model: a model, or the name of one (see `fastppo.models.find_model`). Trained in place.
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
        engine: what samples the responses; by default transformers' generation.

    Raises:
        ValueError: anything in the arguments that cannot work, before training starts.
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
        self.run_dir = new_run_dir(args.output_dir)
        self.rewards.load_models()
        loaded = _loaded(model)
        if peft_config is not None:
            loaded = with_adapter(loaded, peft_config, args.seed)
        self.step = PPOStep(
            loaded,
            args,
            ref_model=None if ref_model is None else _loaded(ref_model),
            value_model=None if value_model is None else _loaded(value_model),
        )
        self.policy = self.step.policy
        self.engine = engine or TransformersEngine(self.policy)
        self.eos_token_ids = eos_token_ids(loaded, self.tokenizer)

    # The loop

    def train(self) -> dict[str, Any]:
        """Run all iterations, save the model and write the report.

        Returns:
            The summary that is also written to summary.json: greedy evaluation before and after,
            reward of the first and the last iterations, seconds, where everything is.
        """
        args, started = self.args, time.perf_counter()
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_json(self.run_dir / "config.json", dataclasses.asdict(args))
        rewards: list[float] = []
        timer = PhaseTimer(synchronize=self.step.device.type == "cuda")
        with (
            MetricsWriter(
                self.run_dir, args.report_to, dataclasses.asdict(args), self.run_dir.name
            ) as metrics,
            Display(args.num_iterations, title=self.name) as display,
        ):
            if self.train_data.num_filtered:
                display.message(f"{self.train_data.num_filtered} prompts over the limit left out")
            before = self.evaluate()
            for iteration in range(1, args.num_iterations + 1):
                row, samples = self._iterate(iteration, timer)
                if args.eval_interval and iteration % args.eval_interval == 0:
                    row |= {f"eval_{name}": value for name, value in self.evaluate().items()}
                rewards.append(row["reward"])
                metrics.log(row)
                metrics.samples(iteration, samples)
                display.update(row)
                if args.sample_interval and (iteration - 1) % args.sample_interval == 0:
                    display.samples(iteration, samples[:4])
                if args.save_interval and iteration % args.save_interval == 0:
                    self.save_model(self.run_dir / "checkpoints" / f"iteration-{iteration:06d}")
            after = self.evaluate()
            summary = {
                "eval_before": before,
                "eval_after": after,
                "reward_first": float(np.mean(rewards[:3])),
                "reward_last": float(np.mean(rewards[-5:])),
                "rewards": rewards,
                "iterations": args.num_iterations,
                "seconds": time.perf_counter() - started,
                "hardware": describe(self.step.device),
                "precision": self.step.precision,
                "parameters": self.policy.num_parameters(),
                "model_name": self.name,
                "model": str(self.save_model(self.run_dir / "model")),
                "run_dir": str(self.run_dir),
            }
            write_json(self.run_dir / "summary.json", summary)
            summary["report"] = str(write_report(self.run_dir))
            summary["curve"] = str(write_curve_png(self.run_dir))
            display.finish(summary)
        return summary

    def _iterate(
        self, iteration: int, timer: PhaseTimer
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One round of PPO; `iteration` counts from 1."""
        args, data, step = self.args, self.train_data, self.step
        timer.take()
        drawn = batch_indices(len(data), args.prompts_per_iteration, args.seed, iteration - 1)
        indices = np.repeat(drawn, args.n_samples)
        group_ids = np.repeat(np.arange(len(drawn)), args.n_samples)
        prompts = [data.ids[i] for i in indices]
        with timer("rollout"):
            rollouts = self.engine.generate(prompts, self._sampling(iteration))
        with timer("reward"):
            completions, scored = self._score(data, indices, rollouts)
        with timer("pack"):
            batch = PackedBatch.pack(
                prompts,
                rollouts.responses,
                rollout_logprobs=rollouts.logprobs,
                truncated=rollouts.truncated,
                device=step.device,
            )
        with timer("evaluate"):
            batch = step.evaluate(batch)
        with timer("advantages"):
            batch = step.advantages(batch, scored.scores, group_ids)
        with timer("update"):
            learned = step.update(batch)
        total = timer.elapsed
        seconds = timer.take()
        row = {
            "iteration": iteration,
            **_score_metrics(scored, rollouts),
            **learned,
            "tokens_per_second": batch.num_tokens / total,
            **seconds,
            "seconds_total": total,
        }
        samples = [
            {
                "iteration": iteration,
                "prompt": data.prompts[i],
                "response": text,
                "reward": float(score),
                "truncated": bool(cut),
            }
            for i, text, score, cut in zip(
                indices, completions, scored.scores, rollouts.truncated, strict=True
            )
        ]
        return row, samples

    def _sampling(self, iteration: int, *, greedy: bool = False) -> Sampling:
        args = self.args
        return Sampling(
            temperature=0.0 if greedy else args.temperature,
            top_p=1.0 if greedy else args.top_p,
            top_k=0 if greedy else args.top_k,
            min_p=0.0 if greedy else args.min_p,
            max_new_tokens=args.max_response_length,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.eos_token_ids[0],
            seed=derive_seed(args.seed, iteration, "rollout"),
        )

    def _score(
        self, data: PromptDataset, indices: np.ndarray, rollouts: Rollouts
    ) -> tuple[list[str], RewardBatch]:
        texts = [decode(self.tokenizer, ids) for ids in rollouts.responses]
        scored = self.rewards(
            [data.prompts[i] for i in indices],
            texts,
            {name: [column[i] for i in indices] for name, column in data.columns.items()},
            [ids.tolist() for ids in rollouts.responses],
        )
        return texts, scored

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
        scores, lengths, truncated = [], [], []
        for start in range(0, len(data), EVAL_BATCH):
            indices = np.arange(start, min(start + EVAL_BATCH, len(data)))
            prompts = [data.ids[i] for i in indices]
            rollouts = self.engine.generate(prompts, self._sampling(0, greedy=True))
            scores.append(self._score(data, indices, rollouts)[1].scores)
            lengths += [len(ids) for ids in rollouts.responses]
            truncated.append(rollouts.truncated)
        score = np.concatenate(scores)
        result = {
            "reward": _mean(score),
            "response_length": float(np.mean(lengths)),
            "truncated": float(np.mean(np.concatenate(truncated))),
            "prompts": len(data),
        }
        if np.isin(score, (0.0, 1.0)).all():
            result["accuracy"] = result["reward"]
        return result

    def save_model(self, folder: Path) -> Path:
        """Save the policy, its critic and the tokenizer in a new folder."""
        return save_model(folder, self.policy, self.tokenizer)


def _name_of(model: PreTrainedModel | str) -> str:
    return model if isinstance(model, str) else str(model.config.name_or_path)


def _loaded(model: PreTrainedModel | str) -> Any:
    return load_model(model) if isinstance(model, str) else model


def _score_metrics(scored: RewardBatch, rollouts: Rollouts) -> dict[str, float]:
    lengths = [len(ids) for ids in rollouts.responses]
    unscored = np.isnan(scored.scores)
    if unscored.all():
        names = ", ".join(map(repr, scored.per_function))
        raise RewardError(
            f"reward function {names}: expected a score for at least one sample of the batch, "
            "got None for all",
            function=names,
        )
    return {
        "reward": _mean(scored.scores),
        "score_std": float(np.nanstd(scored.scores)),
        "unscored": float(unscored.mean()),
        **{f"reward/{name}": _mean(v) for name, v in scored.per_function.items()},
        "response_length": float(np.mean(lengths)),
        "truncated": float(rollouts.truncated.mean()),
        "eos_rate": float(rollouts.finished.mean()),
    }


def _mean(scores: np.ndarray) -> float:
    """The mean of what was scored; NaN, without numpy's warning, where nothing was."""
    scored = scores[~np.isnan(scores)]
    return float(scored.mean()) if scored.size else math.nan
