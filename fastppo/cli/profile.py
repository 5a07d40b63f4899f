"""`fastppo profile`: where the time goes, of a training step, of one op, or by what was compiled.

fastppo profile --config run.toml --steps 3     iterations of a run
fastppo profile op gae --size gpu               one op
fastppo profile --aot                           kernels compiled without a GPU
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fastppo.cli.options import parse_config
from fastppo.cli.output import called, quiet, refused, say
from fastppo.options import option
from fastppo.ppo.config import TrainConfig
from fastppo.reporting.formatting import visible
from fastppo.reporting.terminal import stdout_console
from fastppo.rewards import RewardError
from fastppo.training.errors import NonFiniteError
from fastppo.training.interrupts import Interrupted

if TYPE_CHECKING:
    from fastppo.profiling.meta import Ceilings
    from fastppo.profiling.op_profile import Timing

COLUMNS = ("registers", "spills", "shared_bytes", "loads", "wide_loads", "wide_stores", "barriers")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(TrainConfig):
    """`fastppo profile`: the options of a run, and how much of it is traced."""

    output_dir: str = ""
    """Folder of the profile, new or empty. Not set: profiles/<date>-<time>."""
    steps: int = option(3, "≥ 1")
    """Iterations that are traced, after two that are not."""


def main(argv: Sequence[str]) -> int:
    """Run `fastppo profile` with these arguments; returns the exit status."""
    try:
        if argv[:1] == ["op"]:
            called(profile_op, prog="fastppo profile op", args=argv[1:])
        elif any(arg.partition("=")[0] in ("--aot", "--target") for arg in argv):
            called(print_aot, prog="fastppo profile", args=argv)
        else:
            config = parse_config(
                ProfileConfig,
                argv,
                prog="fastppo profile [op NAME | --aot] [--config FILE.toml]",
                description=(
                    "Trace iterations of a run, whose options are those of fastppo train: phases, "
                    "kernels, host syncs. `fastppo profile op NAME` does it for one op, `fastppo "
                    "profile --aot` prints what the kernels compile to; both have a --help."
                ),
                ignored="output_dir",
            )
            quiet()
            profile(config)
    except (ValueError, TypeError, ImportError, OSError, RewardError, NonFiniteError) as error:
        return refused("profile", error)
    except Interrupted as interrupted:
        return say("profile", "interrupted", 128 + interrupted.signum)
    return 0


def profile(config: ProfileConfig) -> None:
    """Trace iterations of a run and write trace, tables and page.

    Args:
        config: of the run. Only `output_dir` is written to.

    Raises:
        ValueError, TypeError, ImportError, OSError: what a person can mend, named.
        RewardError, NonFiniteError: an iteration failed.
        Interrupted: a signal came; what had been traced is in output_dir.
    """
    from fastppo.checkpoint import new_run_dir
    from fastppo.profiling.collect import META, profile_run

    console = stdout_console()
    folder = new_run_dir(config.output_dir, "profiles", take=False)
    _quiet_kineto()
    try:
        profile_run(config, config.steps, folder, console.print)
    except Interrupted:
        if (folder / META).exists():
            _report(folder, console)
        raise
    _report(folder, console)


def profile_op(
    name: Annotated[str, tyro.conf.Positional],
    size: str = "",
    device: str = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    output_dir: str = "",
    ncu: bool = False,
) -> None:
    """Time one op of fastppo.ops, forward and backward, and trace it.

    Args:
        name: such as gae or linear_ppo_loss; a wrong name lists them all.
        size: smoke, cpu or gpu, or numbers such as N=8192,V=32000 (N tokens, B sequences of T each,
            H hidden size, V vocabulary). Not set: gpu on CUDA, else cpu.
        device: cuda, cuda:1, cpu; auto: cuda where there is one.
        precision: of matrices. auto: bf16 where it is fast.
        output_dir: folder of the profile, new or empty. Not set: profiles/<date>-<time>.
        ncu: run one call under Nsight Compute instead, which writes NAME.ncu-rep.

    Raises:
        ValueError: an unknown op or size, no such device, or no Nsight Compute.
    """
    from fastppo.checkpoint import new_run_dir
    from fastppo.profiling import op_profile

    console = stdout_console()
    ready = op_profile.make_ready(name, size, device, precision)
    folder = new_run_dir(output_dir, "profiles", take=False)
    if ncu:
        console.print(f"written to {op_profile.run_under_ncu(ready, folder)}")
        return
    _quiet_kineto()
    timings = op_profile.profile_op(ready, folder)
    ceilings = _report(folder, console)
    console.print(_op_table(ready.text, timings, ceilings))


def print_aot(aot: bool = True, target: str = "") -> None:
    """Print the table of kernels compiled ahead of time for GPUs that need not be here.

    Args:
        aot: compile every kernel and launch-table entry; needs no GPU, about half a minute.
        target: one of sm_80, sm_90, sm_100, gfx942; empty: all four.
    """
    from fastppo_kernels.aot import TARGETS, report
    from fastppo_kernels.aot_cases import cases

    if not aot:
        raise ValueError("--target: expected --aot with it, got --no-aot")
    if target and target not in TARGETS:
        raise ValueError(f"--target: expected one of {', '.join(TARGETS)}, got {target!r}")
    table = Table("kernel, logits, vocabulary", "target", "warps", *COLUMNS)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, call in cases().items():
        for each in [target] if target else TARGETS:
            made = report(call, each)
            counts = (str(getattr(made, column)) for column in COLUMNS)
            table.add_row(name, each, str(made.num_warps), *counts)
    stdout_console().print(table)


def _quiet_kineto() -> None:
    """Kineto tells stderr when it starts and stops. With a GPU it may have more to say."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _report(folder: Path, console: Console) -> Ceilings | None:
    from fastppo.profiling.collect import report
    from fastppo.profiling.table import print_table

    analysis = report(folder)
    print_table(analysis, console)
    for path in sorted(folder.iterdir()):
        console.print(visible(f"  {path}"), highlight=False, soft_wrap=True)
    return analysis.meta.ceilings


def _op_table(title: str, timings: Sequence[Timing], ceilings: Ceilings | None) -> Table:
    table = Table("", "µs", "MB", "GFLOP", "GB/s", "TFLOP/s", "roofline", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for timing in timings:
        cost = timing.cost
        table.add_row(
            timing.name,
            f"{timing.us:.1f}",
            f"{cost.bytes / 1e6:.3g}",
            f"{cost.flops / 1e9:.3g}",
            f"{cost.bytes / timing.us / 1e3:.3g}",
            f"{cost.flops / timing.us / 1e6:.3g}",
            f"{timing.roofline(ceilings):.1%}" if ceilings else "",
        )
    return table
