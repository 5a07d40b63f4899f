"""One op by itself: what a call takes, what it could take, and a trace of it.

    python -m fastppo.profiling.op_profile NAME SIZE DEVICE PRECISION

runs it a few times and nothing else, which is what Nsight Compute is started on.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import record_function

from fastppo.profiling.case import Case, Passes, Size, passes
from fastppo.profiling.ceilings import measure_ceilings, synchronize
from fastppo.profiling.collect import META, TRACE, describe_run, profiler
from fastppo.profiling.meta import Ceilings, Cost
from fastppo.profiling.op_cases import find_case
from fastppo.profiling.phases import STEP
from fastppo.profiling.roofline import floor_us
from fastppo.training.device import resolve_device, resolve_precision

WARM_UP, ENOUGH_SECONDS, MOST_CALLS = 3, 0.3, 1000
TRACED = 3
NCU_RANGE = "profiled"


class Timing(NamedTuple):
    """A pass of an op: what it took, µs a call, and what it has to do."""

    name: str
    us: float
    cost: Cost

    def roofline(self, ceilings: Ceilings) -> float:
        """Share of what the device could do at best, 0..1."""
        return floor_us(self.cost, ceilings) / self.us


class Ready(NamedTuple):
    """A case with its inputs on a device."""

    case: Case
    size: Size
    device: torch.device
    passes: Passes

    @property
    def text(self) -> str:
        """Such as "gae B=64 T=4096 fp32"."""
        return f"{self.case.name} {self.size.text}"


def make_ready(name: str, size: str = "", device: str = "auto", precision: str = "auto") -> Ready:
    """A case ready to run.

    Args:
        name: of the case.
        size: see `Case.size`; empty: what fits the device.
        device: as in a configuration.
        precision: of matrices; "auto" is bf16 where that is fast.

    Raises:
        ValueError: an unknown case or size, or no such device.
    """
    case, where = find_case(name), resolve_device(device)
    half = resolve_precision(precision, where) == "bf16" and case.has_matrices
    dtype = torch.bfloat16 if half else torch.float32
    chosen = case.size(size, "gpu" if where.type == "cuda" else "cpu", dtype)
    inputs = case.inputs(chosen, where, 0)
    made = passes(case.prepare, case.leaves, case.upstream, inputs, chosen)
    return Ready(case, chosen, where, made)


def profile_op(ready: Ready, folder: Path) -> list[Timing]:
    """Time an op, then trace a few calls of it into `folder`, for `collect.report`.

    Returns:
        Forward, and backward where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timings = time_op(ready)
    walls = []
    with profiler(ready.device, TRACED, folder / TRACE) as running:
        for _ in range(1 + TRACED):  # the profiler drops the first
            start = time.perf_counter()
            with record_function(STEP):
                _run(ready.passes, record_function)
                synchronize(ready.device)
            walls.append(time.perf_counter() - start)
            running.step()
    meta = describe_run(ready.device, walls[1:])
    ceilings = measure_ceilings(ready.device)
    replace(meta, model=ready.text, ceilings=ceilings).save(folder / META)
    return timings


def time_op(ready: Ready) -> list[Timing]:
    """The time of forward and backward: of many calls in a row, so that a GPU is kept busy."""
    work, size = ready.case.work, ready.size
    alone = _time(ready.passes.forward, ready.device)
    timings = [Timing("forward", 1e6 * alone, size.cost(work.forward))]
    if work.backward is not None:
        both = _time(lambda: _run(ready.passes), ready.device)
        rest = 1e6 * max(0.0, both - alone)
        timings.append(Timing("backward", rest, size.cost(work.backward)))
    return timings


def run_under_ncu(ready: Ready, folder: Path) -> Path:
    """Run one call of an op under Nsight Compute.

    Returns:
        Its report.

    Raises:
        ValueError: there is no ncu, or it failed; the message has the command.
    """
    report = folder / f"{ready.case.name}.ncu-rep"
    precision = "bf16" if ready.size.dtype == torch.bfloat16 else "fp32"
    arguments = [ready.case.name, ready.size.argument, str(ready.device), precision]
    command = [
        *("ncu", "--set", "full", "--nvtx", "--nvtx-include", f"{NCU_RANGE}/"),
        *("--force-overwrite", "--export", str(report)),
        *(sys.executable, "-m", __name__, *arguments),
    ]
    if shutil.which("ncu") is None:
        raise ValueError(
            "--ncu: expected Nsight Compute, found no program ncu on the PATH. Install it "
            f"(https://developer.nvidia.com/nsight-compute); this would be run: "
            f"{shlex.join(command)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"--ncu: ended with status {status}: {shlex.join(command)}")
    return report


def _run(
    made: Passes,
    mark: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Forward, and backward where there is one, in ranges made by `mark`."""
    with mark("fastppo::forward"):
        outputs = made.forward()
    if made.backward is not None:
        with mark("fastppo::backward"):
            made.backward(outputs)


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the mean over as many as fit into `ENOUGH_SECONDS`."""

    def seconds(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    if seconds(1) < ENOUGH_SECONDS:  # a long call is warm after one
        seconds(WARM_UP - 1)
    once = seconds(1)
    calls = min(MOST_CALLS, int(ENOUGH_SECONDS / once))
    return seconds(calls) if calls > 1 else once


@contextlib.contextmanager
def _ncu_range(device: torch.device) -> Iterator[None]:
    with torch.cuda.nvtx.range(NCU_RANGE) if device.type == "cuda" else contextlib.nullcontext():
        yield


def main(arguments: Sequence[str]) -> None:
    """What runs under ncu: warm-up, then one call in the range that it looks at."""
    ready = make_ready(*arguments)
    for _ in range(WARM_UP):
        _run(ready.passes)
    synchronize(ready.device)
    with _ncu_range(ready.device):
        _run(ready.passes)
        synchronize(ready.device)


if __name__ == "__main__":
    main(sys.argv[1:])
