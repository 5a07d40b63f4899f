"""From a trace to a table: a pure function, without torch.

What a step and a phase is stands in phases.py, what a call is and to which phase it belongs in
calls.py, what it costs in costs.py.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastppo.profiling.calls import Recorded, device_calls, launches, operator_calls
from fastppo.profiling.meta import Ceilings, Meta, Sync
from fastppo.profiling.phases import OTHER, PhaseMap, thread_of
from fastppo.profiling.roofline import floor_us
from fastppo.profiling.timeline import Interval, overlap, union
from fastppo.profiling.trace import ON_DEVICE, Trace


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase's part of the wall time, all that is not in a phase inside it.

    Args:
        name: without the prefix `fastppo::`; "other" is the time of a step outside every phase.
        seconds: a step, on average.
        share: of the wall time, 0..1.
        calls: a step, on average.
        busy: share of `seconds` in which the GPU ran something, or without one, an operator ran.
    """

    name: str
    seconds: float
    share: float
    calls: float
    busy: float


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


_LAUNCH = re.compile(r"cu(da)?(Graph)?Launch(?!HostFunc)")
_WAIT = re.compile(r"cu(da)?\w*Synchronize(_v\d+)?$|cudaMemcpy$|cuMemcpy(DtoH|HtoD)(_v\d+)?$")


def analyse(trace: Trace, meta: Meta) -> Analysis:
    """The whole analysis.

    Raises:
        ValueError: the trace has neither a step nor a phase.
    """
    phases = PhaseMap(trace)
    traced_us = sum(end - start for start, end in phases.steps)
    wall_us = sum(step.wall_us for step in meta.steps) or traced_us
    calls = (device_calls if meta.is_cuda else operator_calls)(trace, meta, phases)
    working = {"cpu_op"} if not meta.is_cuda else ON_DEVICE
    busy = union((span.start, span.end) for span in trace.spans if span.category in working)
    started = [span for span in launches(trace).values() if _LAUNCH.match(span.name)]
    return Analysis(
        meta=meta,
        steps=phases.num_steps,
        wall_us=wall_us,
        traced_us=traced_us,
        phases=_phases(phases, traced_us, busy),
        kernels=_kernels(calls, meta.ceilings),
        idle=1 - overlap(busy, phases.steps) / traced_us if meta.is_cuda and traced_us else None,
        launches=sum(phases.traced(s.start) for s in started) if meta.is_cuda else None,
        syncs=tuple(sorted(meta.syncs, key=lambda sync: (-sync.count, sync.file, sync.line))),
        waits=_waits(trace, phases),
    )


def _phases(phases: PhaseMap, traced_us: float, busy: Sequence[Interval]) -> tuple[Phase, ...]:
    rows = []
    for name, intervals in phases.intervals().items():
        spent = sum(end - start for start, end in intervals)
        rows.append(
            Phase(
                name=name,
                seconds=spent / phases.num_steps / 1e6,
                share=spent / traced_us if traced_us else 0.0,
                calls=phases.calls[name] / phases.num_steps if name != OTHER else 1.0,
                busy=overlap(busy, intervals) / spent if spent else 0.0,
            )
        )
    return tuple(rows)


def _kernels(calls: Sequence[Recorded], ceilings: Ceilings | None) -> tuple[Kernel, ...]:
    groups: dict[tuple[str, str], list[Recorded]] = defaultdict(list)
    for call in calls:
        groups[call.phase, call.name].append(call)
    everything = sum(call.time_us for call in calls)
    rows = [_kernel(group, everything, ceilings) for group in groups.values()]
    return tuple(sorted(rows, key=lambda row: (-row.total_us, row.phase, row.name)))


def _kernel(calls: Sequence[Recorded], everything: float, ceilings: Ceilings | None) -> Kernel:
    total = sum(call.time_us for call in calls)
    costed = [(call.time_us, call.cost) for call in calls if call.cost is not None]
    time = sum(us for us, _ in costed)
    moved, computed = (
        (sum(cost.bytes for _, cost in costed), sum(cost.flops for _, cost in costed))
        if costed
        else (None, None)
    )
    floor = None
    if ceilings is not None and costed and time and calls[0].in_memory:
        floor = sum(floor_us(cost, ceilings) for _, cost in costed) / time
    longest = max(calls, key=lambda call: call.time_us).args
    return Kernel(
        phase=calls[0].phase,
        name=calls[0].name,
        calls=len(calls),
        total_us=total,
        share=total / everything if everything else 0.0,
        bytes=moved,
        flops=computed,
        gb_s=moved / time / 1e3 if moved is not None and time else None,
        tflop_s=computed / time / 1e6 if computed and time else None,
        roofline=floor,
        registers=_integer(longest, "registers per thread"),
        occupancy=_occupancy(calls),
        blocks_per_sm=_number(longest, "blocks per SM"),
        grid=_shape(longest, "grid"),
        block=_shape(longest, "block"),
        shared_bytes=_integer(longest, "shared memory"),
    )


def _occupancy(calls: Sequence[Recorded]) -> float | None:
    """Mean over the time of the calls for which the trace has it."""
    key = "est. achieved occupancy %"
    known = [(call.time_us, _number(call.args, key)) for call in calls]
    time = sum(us for us, percent in known if percent is not None)
    return sum(us * percent for us, percent in known if percent) / time / 100 if time else None


def _number(args: Mapping[str, object], key: str) -> float | None:
    value = args.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _integer(args: Mapping[str, object], key: str) -> int | None:
    value = _number(args, key)
    return None if value is None else int(value)


def _shape(args: Mapping[str, object], key: str) -> tuple[int, ...] | None:
    value = args.get(key)
    return tuple(int(size) for size in value) if isinstance(value, list) else None


def _waits(trace: Trace, phases: PhaseMap) -> tuple[Wait, ...]:
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for span in launches(trace).values():
        if _WAIT.match(span.name) and phases.traced(span.start):
            times[span.name, phases.phase(thread_of(span), span.start)].append(span.duration)
    rows = [Wait(api, phase, len(us), sum(us)) for (api, phase), us in times.items()]
    return tuple(sorted(rows, key=lambda row: (-row.total_us, row.api, row.phase)))
