"""`fastppo train`: one TOML file and flags become a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastppo.cli.options import at_most_one, parse_config, take
from fastppo.cli.output import crashed, quiet, refused, say
from fastppo.ppo.config import TrainConfig


class Invocation(NamedTuple):
    """What `fastppo train` takes besides the configuration of a run."""

    dry_run: bool
    resume: bool | str  # True: the newest checkpoint of the run in output_dir
    allow_changes: tuple[str, ...]


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, Invocation]:
    """The configuration of `fastppo train`, and what to do with it."""
    args = list(argv)
    dry_run = take(args, "--dry-run") is not None
    resume: bool | str = False
    if (values := take(args, "--resume")) is not None:
        resume = at_most_one("--resume", values) or True
    allowed = take(args, "--allow-changes") or []
    config = parse_config(
        TrainConfig,
        args,
        prog="fastppo train [--config FILE.toml] [--dry-run] [--resume [PATH]]",
        description=(
            "Train a language model with PPO. Flags override the file.\n"
            "--dry-run               print what the run would be, and do nothing\n"
            "--resume [PATH]         go on with the newest run, or with this run or checkpoint\n"
            "--allow-changes OPTION  options that may differ from the run that is resumed"
        ),
    )
    changes = tuple(name.replace("-", "_") for name in allowed)
    return config, Invocation(dry_run, resume, changes)


def train(argv: Sequence[str]) -> int:
    """Train, resume or show what would be; returns the exit status."""
    try:
        config, invocation = parse_train(argv)
    except (ValueError, TypeError, OSError) as error:
        return refused("train", error)
    from fastppo.checkpoint import CheckpointError, RunInUseError
    from fastppo.cli.dry_run import dry_run
    from fastppo.ppo.build import build_trainer
    from fastppo.training.memory import is_out_of_memory

    quiet()
    try:
        if invocation.dry_run:
            dry_run(config)
            return 0
        trainer = build_trainer(
            config, resume=invocation.resume, allow_changes=invocation.allow_changes
        )
    except (ValueError, TypeError, ImportError, OSError, CheckpointError) as error:
        return refused("train", error)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return refused("train", error if str(error) else "out of memory")
    from fastppo.training.errors import NonFiniteError, StartError, StopRunError
    from fastppo.training.interrupts import Interrupted

    try:
        trainer.train()
    except (
        StopRunError,
        NonFiniteError,
        StartError,
        CheckpointError,
        RunInUseError,
        OSError,
    ) as error:
        return refused("train", error)
    except Interrupted as interrupted:
        return say(
            "train", f"interrupted; the run is in {trainer.run_dir}", 128 + interrupted.signum
        )
    except Exception as error:
        if not is_out_of_memory(error):
            return crashed("train", error, trainer.run_dir)
        if str(error).startswith("out of memory while"):
            return refused("train", error)
        return refused(
            "train",
            f"out of memory, with the smallest pass that was possible: {error}. Shorten "
            "max_response_length, set train_layers or lora_rank, or free the device; --resume "
            "goes on from the last checkpoint",
        )
    return 0
