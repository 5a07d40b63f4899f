"""What profiling costs a PPO iteration: outside the traced steps, while counting, while tracing.

    python bench/bench_profile.py [--model MODEL] [--rounds 8]

One process, one trainer, the addition example with 8 prompts and a learning rate so small that
every iteration draws the same replies. First a whole profile is collected, so that anything it left
behind would show. Then iterations take turns (A B C D, B C D A, …):

    plain      as `fastppo train` runs it
    outside    as `fastppo profile` runs the steps that it does not trace, with its phase marks
    counted    with host syncs counted
    traced     under torch.profiler

The figures are medians of the rounds and of their ratios to the plain iteration of the same round.
The last line is the result as JSON.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import tyro

from fastppo import __version__
from fastppo.cli.options import parse_config
from fastppo.ppo.build import build_trainer
from fastppo.ppo.config import TrainConfig
from fastppo.ppo.state import Iteration
from fastppo.ppo.trainer import PPOTrainer
from fastppo.profiling.collect import Marks, collect
from fastppo.profiling.syncs import SyncCounter
from fastppo.training import interrupts
from fastppo.training.device import describe
from fastppo.training.metrics import PhaseTimer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "arithmetic.toml"


def main(model: str = "smollm2-135m-instruct", rounds: int = 8) -> None:
    """Measure and print.

    Args:
        model: folder or name.
        rounds: of four iterations.
    """
    flags = ["--config", str(EXAMPLE), "--model", model, "--prompts-per-iteration", "8"]
    config = parse_config(TrainConfig, flags, prog="bench_profile", description="")
    with TemporaryDirectory() as folder:
        elsewhere = replace(config, output_dir=f"{folder}/run", learning_rate=1e-12)
        trainer = build_trainer(replace(elsewhere, critic_learning_rate=1e-12))
        with trainer.rewards, interrupts.handled():
            collect(trainer, 1, Path(folder) / "profile")
            measured = [measure(trainer, first % 4) for first in range(rounds)]
    seconds = {name: statistics.median(row[name] for row in measured) for name in measured[0]}
    ratios = {
        name: statistics.median(row[name] / row["plain"] for row in measured) for name in seconds
    }
    for name in seconds:
        print(f"{name:8}  {seconds[name]:7.3f} s  {ratios[name]:.3f}")
    device = describe(trainer.step.device)
    versions = {"fastppo": __version__, "torch": torch.__version__, "device": device}
    print(json.dumps({"seconds": seconds, "ratios": ratios, "rounds": rounds, **versions}))


def measure(trainer: PPOTrainer, first: int) -> dict[str, float]:
    """Seconds of one iteration of each kind, beginning with the kind at `first`."""
    device = trainer.step.device
    cuda = device.type == "cuda"
    plain, marked = PhaseTimer(synchronize=cuda), PhaseTimer(synchronize=cuda, mark=Marks(device))
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    kinds: dict[str, tuple[PhaseTimer, contextlib.AbstractContextManager[object]]] = {
        "plain": (plain, contextlib.nullcontext()),
        "outside": (marked, contextlib.nullcontext()),
        "counted": (marked, SyncCounter(device)),
        "traced": (marked, torch.profiler.profile(activities=activities, record_shapes=True)),
    }
    seconds = dict.fromkeys(kinds, 0.0)
    for name in [*kinds][first:] + [*kinds][:first]:
        timer, context = kinds[name]
        with context:
            trainer.current = Iteration()
            start = time.perf_counter()
            trainer.iterate(1, timer)
            seconds[name] = time.perf_counter() - start
    return seconds


if __name__ == "__main__":
    tyro.cli(main)
