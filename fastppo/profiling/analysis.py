"""From a trace to a table: a pure function, without torch.

Steps are the ranges ProfilerStep#N that torch.profiler's schedule makes (or `fastppo::step`); without
any, everything from the first phase to the end of the last is one step. Phases are the ranges named
as the trainer's phases, and those that begin with `fastppo::`; nested ones count for the innermost.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastppo.profiling.meta import Meta, Sync
from fastppo.profiling.trace import Trace


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase's part of the wall time, all that is not in a phase inside it.

    Args:
        name: without the prefix `fastppo::`; "other" is the time of a step outside every phase.
        seconds: a step, on average.
        share: of the wall time, 0..1.
        calls: a step, on average.
        busy: share of `seconds` in which the GPU ran something; None without a GPU.
    """

    name: str
    seconds: float
    share: float
    calls: float
    busy: float | None


@dataclass(frozen=True, slots=True)
class Kernel:
    """All calls of one kernel in one phase, in all traced steps. None: not known.

    Args:
        phase, name: `name` is the whole name; for the CPU an operator's.
        calls: how many.
        total_us: µs, all calls together; an operator without the operators it calls.
        share: of the time of all kernels, 0..1.
        bytes, flops: of the calls whose cost is known, together.
        gb_s, tflop_s: reached by those calls.
        roofline: share of what the device could do at best, 0..1.
        registers: per thread.
        occupancy: estimated share of the warps a multiprocessor can hold, 0..1, mean over the time.
        blocks_per_sm: of the longest call.
        grid, block: of the longest call.
        shared_bytes: shared memory of a block of the longest call.
    """

    phase: str
    name: str
    calls: int
    total_us: float
    share: float
    bytes: float | None = None
    flops: float | None = None
    gb_s: float | None = None
    tflop_s: float | None = None
    roofline: float | None = None
    registers: int | None = None
    occupancy: float | None = None
    blocks_per_sm: float | None = None
    grid: tuple[int, ...] | None = None
    block: tuple[int, ...] | None = None
    shared_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Wait:
    """Time the host spent in a call of the CUDA API that waits for the device.

    Args:
        api: such as "cudaStreamSynchronize".
        phase: the innermost phase around it.
        calls, total_us: in all traced steps.
    """

    api: str
    phase: str
    calls: int
    total_us: float


@dataclass(frozen=True, slots=True)
class Analysis:
    """Where the time went.

    Args:
        meta: of the run.
        steps: traced.
        wall_us: of all steps, on the host's clock (meta), or of the trace where meta has none.
        traced_us: the same steps in the trace; the phases add up to it.
        phases: in the order they first ran, "other" last.
        kernels: the longest first.
        idle: share of the steps in which the GPU ran nothing, 0..1; None without a GPU.
        launches: kernels and graphs launched by all steps; None without a GPU.
        syncs: host syncs with their lines, the most frequent first.
        waits: the longest first.
    """

    meta: Meta
    steps: int
    wall_us: float
    traced_us: float
    phases: tuple[Phase, ...]
    kernels: tuple[Kernel, ...]
    idle: float | None
    launches: int | None
    syncs: tuple[Sync, ...]
    waits: tuple[Wait, ...]


def analyse(trace: Trace, meta: Meta) -> Analysis:
    """The whole analysis.

    Raises:
        ValueError: the trace has neither a step nor a phase.
    """
    raise NotImplementedError
