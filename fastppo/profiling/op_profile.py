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

from fastppo.profiling.ceilings import measure_ceilings, synchronize
from fastppo.profiling.collect import META, TRACE, describe_run, profiler
from fastppo.profiling.meta import Ceilings, Cost
from fastppo.profiling.op_inputs import Call, Inputs, Size
from fastppo.profiling.ops import find_op, parse_size
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


class Case(NamedTuple):
    """An op with its inputs on a device."""

    name: str
    size: Size
    device: torch.device
    dtype: torch.dtype
    call: Call

    @property
    def text(self) -> str:
        """The size, as `parse_size` reads it."""
        return self.size.text(find_op(self.name).letters)


def make_case(name: str, size: str = "", device: str = "auto", precision: str = "auto") -> Case:
    """An op ready to run.

    Args:
        name: of the op.
        size: see `parse_size`; empty: what fits the device.
        device: as in a configuration.
        precision: of matrices; "auto" is bf16 where that is fast.

    Raises:
        ValueError: an unknown op or size, or no such device.
    """
    op, where = find_op(name), resolve_device(device)
    chosen = parse_size(size, name, "gpu" if where.type == "cuda" else "cpu")
    half = resolve_precision(precision, where) == "bf16"
    dtype = torch.bfloat16 if half else torch.float32
    return Case(name, chosen, where, dtype, op.make(Inputs(chosen, where, dtype)))


def profile_op(case: Case, folder: Path) -> list[Timing]:
    """Time an op, then trace a few calls of it into `folder`, for `collect.report`.

    Returns:
        Forward, and backward where there is one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    timings = time_op(case)
    walls = []
    with profiler(case.device, TRACED, folder / TRACE) as running:
        for _ in range(1 + TRACED):  # the profiler drops the first
            start = time.perf_counter()
            with record_function(STEP):
                _run(case.call, record_function)
                synchronize(case.device)
            walls.append(time.perf_counter() - start)
            running.step()
    meta = describe_run(case.device, walls[1:])
    ceilings = measure_ceilings(case.device)
    replace(meta, model=f"{case.name} {case.text}", ceilings=ceilings).save(folder / META)
    return timings


def time_op(case: Case) -> list[Timing]:
    """The time of forward and backward: of many calls in a row, so that a GPU is kept busy."""
    forward, backward = find_op(case.name).costs(case.size, case.dtype)
    alone = _time(case.call.forward, case.device)
    timings = [Timing("forward", 1e6 * alone, forward)]
    if backward is not None:
        both = _time(lambda: _run(case.call), case.device)
        timings.append(Timing("backward", 1e6 * max(0.0, both - alone), backward))
    return timings


def run_under_ncu(case: Case, folder: Path) -> Path:
    """Run one call of an op under Nsight Compute.

    Returns:
        Its report.

    Raises:
        ValueError: there is no ncu, or it failed; the message has the command.
    """
    report = folder / f"{case.name}.ncu-rep"
    precision = "bf16" if case.dtype == torch.bfloat16 else "fp32"
    arguments = [case.name, case.text, str(case.device), precision]
    command = [
        *("ncu", "--set", "full", "--nvtx", "--nvtx-include", f"{NCU_RANGE}/"),
        *("--force-overwrite", "--export", str(report)),
        *(sys.executable, "-m", __name__, *arguments),
    ]
    if shutil.which("ncu") is None:
        raise ValueError(
            "--ncu: expected Nsight Compute, found no program ncu on the PATH. Install it "
            f"(https://developer.nvidia.com/nsight-compute); this would be run:\n"
            f"{shlex.join(command)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    status = subprocess.run(command, check=False).returncode
    if status:
        raise ValueError(f"--ncu: ended with status {status}:\n{shlex.join(command)}")
    return report


def _run(
    call: Call,
    mark: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> None:
    """Forward, and backward where there is one, in ranges made by `mark`."""
    with mark("fastppo::forward"):
        outputs = call.forward()
    if call.leaves:
        with mark("fastppo::backward"):
            call.backward(outputs)


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the mean over as many as fit into `ENOUGH_SECONDS`."""

    def seconds(calls: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        return (time.perf_counter() - start) / calls

    seconds(WARM_UP)
    once = seconds(1)
    return seconds(max(1, min(MOST_CALLS, int(ENOUGH_SECONDS / once))))


@contextlib.contextmanager
def _ncu_range(device: torch.device) -> Iterator[None]:
    with torch.cuda.nvtx.range(NCU_RANGE) if device.type == "cuda" else contextlib.nullcontext():
        yield


def main(arguments: Sequence[str]) -> None:
    """What runs under ncu: warm-up, then one call in the range that it looks at."""
    case = make_case(*arguments)
    for _ in range(WARM_UP):
        _run(case.call)
    synchronize(case.device)
    with _ncu_range(case.device):
        _run(case.call)
        synchronize(case.device)


if __name__ == "__main__":
    main(sys.argv[1:])
