"""`fastppo bench`, `bench list`, `bench compare`, `bench render`."""

from __future__ import annotations

import functools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.benchmarks.results import Result
from fastppo.cli.output import called, out, refused

RESULT, TABLES = "result.json", "tables.md"
BUDGET = {"smoke": 0.3, "cpu": 1.5, "gpu": 3.0}
"""Seconds of timed rounds for one case at one size."""
PASSES = {"smoke": 3, "cpu": 3, "gpu": 1}
"""How often everything is measured. One GPU does nothing else meanwhile."""

ResultPath = Annotated[Path, tyro.conf.Positional]


def run(
    cases: tuple[str, ...] = (),
    sizes: Literal["auto", "smoke", "cpu", "gpu"] = "auto",
    device: str = "auto",
    output_dir: str = "",
    seconds: float | None = None,
    seed: int = 0,
) -> int:
    """Time fastppo's ops and other ways of doing the same, after checking every answer.

    Args:
        cases: names, as `fastppo bench list` prints them. None: all.
        sizes: smoke, cpu or gpu; auto: gpu on CUDA, else cpu.
        device: cuda, cuda:1, cpu; auto: cuda where there is one.
        output_dir: folder of result, tables and plots, new or empty. Not set:
            bench-results/<date>-<time>.
        seconds: of timed rounds for one case at one size. Not set: 1.5, for smoke 0.3, for gpu 3.
        seed: of the inputs.

    Returns:
        Exit status: 1 where an answer was wrong, a provider failed, or a figure cannot be.
    """
    from fastppo.benchmarks.registry import select_cases
    from fastppo.benchmarks.session import run_cases
    from fastppo.checkpoint import new_run_dir
    from fastppo.training.device import resolve_device

    where = resolve_device(device)
    name = ("gpu" if where.type == "cuda" else "cpu") if sizes == "auto" else sizes
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds: expected a number > 0, got {seconds}")
    chosen = select_cases(cases)
    folder = new_run_dir(output_dir, "bench-results")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    command = shlex.join(["fastppo", *sys.argv[1:]])
    budget = BUDGET[name] if seconds is None else seconds
    result = None
    say = functools.partial(print, flush=True)
    for result in run_cases(
        chosen,
        name,
        where,
        command=command,
        budget=budget,
        passes=PASSES[name],
        seed=seed,
        say=say,
    ):
        result.save(folder / RESULT)  # as it goes: a run that is cut off leaves what it has
    if result is None:
        raise ValueError(f"sizes: {', '.join(c.name for c in chosen)} have no size {name!r}")
    render(folder / RESULT)
    print(f"{time.perf_counter() - start:.0f} s in all")
    for row in result.bad:
        print(f"{row.status}: {' / '.join(row.key)}: {row.note}", file=sys.stderr)
    return 1 if result.bad else 0


def list_cases() -> int:
    """Print every case: its sizes, and its providers with what they lack here."""
    import torch

    from fastppo.benchmarks.registry import all_cases
    from fastppo.training.device import resolve_device

    device: torch.device = resolve_device("auto")
    for case in all_cases().values():
        print(case.name)
        for name, sizes in case.sizes.items():
            print(f"  {name:6} {'; '.join(size.text for size in sizes)}")
        for name, provider in case.providers.items():
            reason = provider.missing(device)
            print(f"    {name}" + (f" ({reason})" if reason else ""))
    return 0


def compare_results(before: ResultPath, after: ResultPath) -> int:
    """Compare two results of the same machine, cases and sizes.

    Args:
        before: result.json, or the folder it is in.
        after: result.json, or the folder it is in.

    Returns:
        Exit status: 1 where something got worse beyond noise.
    """
    from fastppo.benchmarks.compare import compare, report

    old, new = (Result.load(_result_file(path)) for path in (before, after))
    changes = compare(old, new)
    print(report(old, new, changes), end="")
    return 1 if any(change.worse for change in changes) else 0


def render(result: ResultPath) -> int:
    """Write tables and plots beside a result and print the tables.

    Args:
        result: result.json, or the folder it is in.
    """
    from fastppo.benchmarks.plots import save_plots
    from fastppo.benchmarks.tables import markdown

    path = _result_file(result)
    loaded = Result.load(path)
    text = markdown(loaded)
    (path.parent / TABLES).write_text(text, encoding="utf-8")
    plots = save_plots(loaded, path.parent)
    print(text)
    for written in (path, path.parent / TABLES, *plots):
        out(f"  {written}")
    return 0


def _result_file(path: Path) -> Path:
    return path / RESULT if path.is_dir() else path


COMMANDS: dict[str, Callable[..., int]] = {
    "": run,
    "list": list_cases,
    "compare": compare_results,
    "render": render,
}


def main(argv: Sequence[str]) -> int:
    """Run `fastppo bench` with these arguments; returns the exit status."""
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    prog = f"fastppo bench {name}" if name else "fastppo bench [list | compare | render]"
    try:
        return called(COMMANDS[name], prog=prog, args=argv[1:] if name else argv)
    except (ValueError, ImportError, OSError) as error:
        return refused("bench", error)
