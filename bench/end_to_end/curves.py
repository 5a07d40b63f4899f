"""Reward curves of TRL 1.12.0's PPOTrainer and fastppo on one verifiable task, single-digit sums.

    make bench-trl-curves
    python bench/end_to_end/curves.py --peer-python .venv-trl/bin/python

Both start from the same weights, with the same prompts, reward function and hyperparameters, a
separate critic and the last layers trained, and stop at `iterations` or after `seconds`, one after
the other. Written to the output folder: curves.json and curves.png, reward against seconds of
training and against episodes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from compare import HERE
from forms import Form
from prepare import write_models
from report import TRL
from workload import Workload

EXAMPLES = HERE.parents[1] / "examples"
MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long and how."""

    peer_python: str = ".venv-trl/bin/python"
    """Python of the environment that TRL is in."""
    seconds: float = 240.0
    """Of training, at most, for each side."""
    iterations: int = 30
    """At most, for each side."""
    episodes: int = 32
    """Of an iteration."""
    precision: str = "fp32"
    """fp32 or bf16."""
    device: str = "cpu"
    """cpu or cuda."""
    output: str = "bench-results/end-to-end"
    """Folder of the results."""


def arithmetic(folder: Path, options: Options) -> Workload:
    """The task of examples/arithmetic.toml, its prompts as text."""
    tokenizer, policy = write_models(folder, MODEL)
    lines = (EXAMPLES / "arithmetic_train.jsonl").read_text().splitlines()
    records = list({json.dumps(row["prompt"]): row for row in map(json.loads, lines)}.values())
    prompts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for row in records
    ]
    work = Workload(
        prompts=prompts,
        prompt_lengths=[len(tokenizer(text)["input_ids"]) for text in prompts],
        response_lengths=[10],
        trunk_parameters=policy.base_model.num_parameters(exclude_embeddings=True),
        head_parameters=policy.get_output_embeddings().weight.numel(),
        answers=[row["answer"] for row in records],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        stop="eos",
        batch=options.episodes,
        epochs=1,
        minibatches=4,
        learning_rate=5e-5,
        kl_coef=0.02,
        missing_eos_penalty=0.5,
        train_layers=6,
        precision=options.precision,
        device=options.device,
    )
    work.save(folder)
    return work


def train(form: Form, work: Workload, options: Options) -> list[dict[str, float]]:
    """Reward of each iteration, and seconds and episodes up to its end."""
    form.read()
    points: list[dict[str, float]] = []
    seconds = 0.0
    while len(points) < options.iterations and seconds < options.seconds:
        sample = form.iterate()
        seconds += sum(wall for wall, _ in sample["seconds"].values())
        episodes = work.episodes * (len(points) + 1)
        points.append({"seconds": seconds, "episodes": episodes, "reward": sample["reward"]})
        print(f"{form.name}: {seconds:.0f} s, {episodes} episodes: reward {sample['reward']:.2f}")
    form.close()
    return points


def plot(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Reward against seconds and against episodes; lines are means of three iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes: Any = figure.subplots(1, 2, sharey=True)
    for ax, x, label in zip(
        axes, ("seconds", "episodes"), ("seconds of training", "episodes"), strict=True
    ):
        for (name, points), colour in zip(curves.items(), ("tab:blue", "tab:orange"), strict=False):
            xs, rewards = (np.array([p[key] for p in points]) for key in (x, "reward"))
            smooth = [rewards[max(0, i - 2) : i + 1].mean() for i in range(len(rewards))]
            ax.plot(xs, rewards, ".", color=colour, alpha=0.35)
            ax.plot(xs, smooth, color=colour, label=name)
        ax.set(xlabel=label, ylim=(0, 1.02), xlim=(0, None))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share of right answers")
    axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=150)


def main(options: Options) -> None:
    """Train both, plot."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastppo-curves-") as name:
        scratch = Path(name)
        work = arithmetic(scratch, options)
        runs: dict[str, list[str | Path]] = {
            "fastppo": [sys.executable, HERE / "fastppo_worker.py", scratch, "separate"],
            TRL: [options.peer_python, HERE / "trl_worker.py", scratch],
        }
        curves = {
            side: train(Form(side, run, scratch / f"{side}.log"), work, options)
            for side, run in runs.items()
        }
    record = {"precision": options.precision, "model": MODEL, "curves": curves}
    (folder / "curves.json").write_text(json.dumps(record, indent=1))
    plot(curves, folder / "curves.png")
    print(f"written to {folder / 'curves.png'}")


if __name__ == "__main__":
    main(tyro.cli(Options))
