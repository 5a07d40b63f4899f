"""What configures every trainer: the run, and how its weights are optimised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fastppo.options import Options, option

Tracker = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class RunConfig(Options):
    """How long a run is, what it writes, and what it survives."""

    output_dir: str = option("", may_differ=True)
    """Folder of the run, new or empty. Not set: runs/<date>-<time>."""
    seed: int = option(1, "≥ 0")
    """Every random choice is derived from (seed, iteration, purpose)."""
    num_iterations: int = option(100, "≥ 1", may_differ=True)
    """Iterations of the run."""
    device: str = option("auto", may_differ=True)
    """cuda, cuda:1, cpu; auto: cuda where there is one."""
    eval_interval: int = option(0, "≥ 0", may_differ=True)
    """Iterations between greedy evaluations; 0: only before and after training."""
    sample_interval: int = option(5, "≥ 0", may_differ=True)
    """Iterations between printed tables of samples; 0 is off."""
    save_interval: int = option(10, "≥ 0", may_differ=True)
    """Iterations between checkpoints, for an exact `--resume`; 0: one at a signal only."""
    keep_checkpoints: int = option(2, "≥ 1", only_if="save_interval ≥ 1", may_differ=True)
    """Newest checkpoints that are kept."""
    keep_best: int = option(0, "≥ 0", only_if="save_interval ≥ 1", may_differ=True)
    """Checkpoints with the highest reward (the held-out one where measured) that are kept too."""
    report_to: tuple[Tracker, ...] = option((), may_differ=True)
    """Trackers besides metrics.jsonl."""
    max_nonfinite_steps: int = option(5, "≥ 1", may_differ=True)
    """Steps in a row with a non-finite loss or gradient, each skipped, before `on_nonfinite`."""
    on_nonfinite: Literal["stop", "rollback"] = option("stop", may_differ=True)
    """stop; or go back to the last checkpoint and sample anew, at most 3 times in a row."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Options):
    """AdamW, its learning rate, and the size of a forward pass."""

    learning_rate: float = option(1e-6, "> 0")
    """AdamW's learning rate for the policy."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Shape of the decay to 0 over the run, one step per iteration."""
    warmup_iterations: int = option(0, "≥ 0")
    """Iterations over which the learning rates rise from 0."""
    adam_betas: tuple[float, float] = option((0.9, 0.999), "[0, 1)")
    """AdamW's β₁ and β₂."""
    adam_eps: float = option(1e-5, "≥ 0")
    """AdamW's ε, 1e-5 as in the PPO references (https://arxiv.org/abs/2005.12729). 1e-30 at least
    is added, since a weight without a gradient would divide 0 by 0."""
    weight_decay: float = option(0.0, "≥ 0")
    """AdamW's weight decay on matrices; norms, biases and the value head have none."""
    max_grad_norm: float = option(1.0, "≥ 0")
    """Largest gradient norm, clipped separately for actor and critic; 0 is off."""
    token_budget: int = option(8192, "≥ 1", may_differ=True)
    """Most tokens (prompt and response) in one forward pass; does not change the gradient."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(OptimConfig, RunConfig):
    """The learning rate over the iterations of a run."""

    num_iterations: int = option(100, "≥ 1", may_differ='lr_schedule = "constant"')
    """Number of generate → score → update rounds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_iterations >= self.num_iterations and self.warmup_iterations > 0:
            raise ValueError(
                f"warmup_iterations = {self.warmup_iterations} with num_iterations = "
                f"{self.num_iterations}: the learning rate would never be reached"
            )

    def lr_factor(self, iteration: int) -> float:
        """Share of the learning rate in force at an iteration, counted from 0."""
        if iteration < self.warmup_iterations:
            return (iteration + 1) / (self.warmup_iterations + 1)
        span = max(1, self.num_iterations - self.warmup_iterations)
        done = min(1.0, (iteration - self.warmup_iterations) / span)
        if self.lr_schedule == "linear":
            return 1.0 - done
        return 0.5 * (1.0 + math.cos(math.pi * done)) if self.lr_schedule == "cosine" else 1.0
