"""Collects a profile: real iterations of a PPOTrainer, driven from outside.

    collect(trainer, steps, folder)    trace.json.gz, meta.json; memory.pickle on CUDA
    report(folder)                     table.json, table.csv and profile.html of these

Three kinds of iteration follow each other: one as it is, in which everything is built that is built
once; one in which host syncs are counted and, on CUDA, allocations recorded; then those under
torch.profiler. Counting takes time and is therefore never done in a traced step. The phases are
ranges for Nsight Systems (NVTX) and for Proton as well, where these are installed.

The trainer's files are left alone: no checkpoint, metric, sample or report is written.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from fastppo.ppo.state import Iteration
from fastppo.profiling.analysis import Analysis, analyse
from fastppo.profiling.ceilings import measure_ceilings
from fastppo.profiling.meta import Meta, Step, Sync
from fastppo.profiling.page import write_page
from fastppo.profiling.phases import STEP
from fastppo.profiling.syncs import SyncCounter
from fastppo.profiling.table import write_csv, write_json
from fastppo.profiling.trace import Trace
from fastppo.training import interrupts
from fastppo.training.device import describe
from fastppo.training.metrics import PhaseTimer
from fastppo.training.resume import versions

if TYPE_CHECKING:
    from fastppo.ppo.config import TrainConfig
    from fastppo.ppo.trainer import PPOTrainer

TRACE, META, MEMORY = "trace.json.gz", "meta.json", "memory.pickle"
TABLE_JSON, TABLE_CSV, PAGE = "table.json", "table.csv", "profile.html"
ALLOCATIONS = 100_000
"""Most allocations in a memory snapshot; the latest are kept."""

Say = Callable[[str], object]


def profile_run(config: TrainConfig, steps: int, folder: Path, say: Say = print) -> None:
    """Build the trainer of a configuration and collect a profile of it.

    Args:
        config: of the run; nothing is written to its output_dir.
        steps: iterations to trace.
        folder: where the files go.
        say: takes a line about what is going on.

    Raises:
        ValueError, TypeError, ImportError, OSError: as `build_trainer`.
        RewardError, NonFiniteError, Interrupted: as `collect`.
    """
    from fastppo.ppo.build import build_trainer

    with TemporaryDirectory(prefix="fastppo-profile-") as scratch:
        elsewhere = replace(config, output_dir=str(Path(scratch) / "run"), report_to=())
        trainer = build_trainer(elsewhere)
        with trainer.rewards, interrupts.handled():
            collect(trainer, steps, folder, say)


def collect(trainer: PPOTrainer, steps: int, folder: Path, say: Say = print) -> None:
    """Trace iterations of a trainer; it is trained by them.

    Args:
        trainer: its rewards have been entered.
        steps: iterations to trace.
        folder: where the files go; made where it is missing.
        say: takes a line about what is going on.

    Raises:
        Interrupted: a signal came. What had been traced by then has been written.
        RewardError, NonFiniteError: an iteration failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device, marks = trainer.step.device, Marks(trainer.step.device)
    timer = PhaseTimer(synchronize=device.type == "cuda", mark=marks)
    counter = SyncCounter(device, lambda: marks.phase)
    numbers = itertools.count(trainer.run.iterations + 1)
    walls: list[float] = []

    def step() -> None:
        trainer.current = Iteration()
        trainer.iterate(next(numbers), timer)

    interrupted = None
    try:
        say("warm-up")
        step()
        with profiler(device, steps, folder / TRACE) as running:
            say("counting host syncs")
            with counter, memory_history(device, folder / MEMORY):
                step()
            running.step()
            for number in range(1, steps + 1):
                say(f"tracing step {number} of {steps}")
                with _timed(walls), torch.profiler.record_function(STEP):
                    step()
                running.step()
    except interrupts.Interrupted as error:
        if not walls:
            raise
        interrupted = error
    meta = describe_run(device, walls, counter.syncs)
    meta = replace(
        meta,
        model=trainer.name,
        ceilings=None if interrupted else measure_ceilings(device),
        memory_snapshot=MEMORY if (folder / MEMORY).exists() else None,
    )
    meta.save(folder / META)
    if interrupted is not None:
        raise interrupted


def report(folder: Path) -> Analysis:
    """Analyse what was collected in a folder, and write tables and page beside it."""
    analysis = analyse(Trace.load(folder / TRACE), Meta.load(folder / META))
    write_json(analysis, folder / TABLE_JSON)
    write_csv(analysis, folder / TABLE_CSV)
    write_page(analysis, folder / PAGE)
    return analysis


def describe_run(device: torch.device, walls: list[float], syncs: tuple[Sync, ...] = ()) -> Meta:
    """Meta with steps that took `walls` seconds, the device and the versions."""
    known = versions()
    if importlib.util.find_spec("triton") is not None:
        known["triton"] = version("triton")
    if torch.version.cuda:
        known["cuda"] = torch.version.cuda
    return Meta(
        steps=tuple(Step(1e6 * seconds) for seconds in walls),
        device=describe(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        is_cuda=device.type == "cuda",
        versions=known,
        syncs=syncs,
    )


def profiler(device: torch.device, steps: int, path: Path) -> torch.profiler.profile:
    """A profiler that drops its first step, in which it warms up, and traces `steps` into `path`.

    Left early, it writes what it has.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda ready: ready.export_chrome_trace(str(path)),
        record_shapes=True,
    )


class Marks:
    """Opens the ranges of a phase: `PhaseTimer(mark=Marks(device))`."""

    def __init__(self, device: torch.device) -> None:
        self._open: list[str] = []
        self._makers: list[Callable[[str], contextlib.AbstractContextManager[Any]]] = [
            torch.profiler.record_function
        ]
        if device.type == "cuda":
            self._makers.append(torch.cuda.nvtx.range)
            if importlib.util.find_spec("triton") is not None:
                from triton import profiler as proton

                self._makers.append(proton.scope)

    @property
    def phase(self) -> str:
        """The innermost phase that is open; "other" between phases."""
        return self._open[-1] if self._open else "other"

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with contextlib.ExitStack() as ranges:
            for make in self._makers:
                ranges.enter_context(make(phase))
            self._open.append(phase)
            try:
                yield
            finally:
                self._open.pop()


@contextlib.contextmanager
def memory_history(device: torch.device, path: Path) -> Iterator[None]:
    """On CUDA, record allocations inside and write a snapshot; elsewhere nothing happens."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
    try:
        yield
        torch.cuda.memory._dump_snapshot(str(path))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


@contextlib.contextmanager
def _timed(walls: list[float]) -> Iterator[None]:
    """Append the seconds inside, of what is cut short too."""
    start = time.perf_counter()
    try:
        yield
    finally:
        walls.append(time.perf_counter() - start)
