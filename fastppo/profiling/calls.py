"""The calls that the table adds up: kernels and copies of a GPU, or operators of a CPU.

A kernel belongs to the phase in which it was launched: its correlation id names the launch, the
launch's thread the phase. Its cost is that of the operator that launched it, found by the external
id. Where an operator launches several kernels, those of the name that took longest get all of it,
by their times: a product's reduction afterwards is not the product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastppo.profiling.costs import operator_cost, repeats_inner
from fastppo.profiling.meta import Cost, Meta
from fastppo.profiling.phases import PhaseMap, Thread, thread_of
from fastppo.profiling.timeline import own_times
from fastppo.profiling.trace import API_CALLS, ON_DEVICE, Span, Trace


@dataclass(frozen=True, slots=True)
class Recorded:
    """One call in a trace.

    Args:
        time_us: what it took by itself.
        cost: None where it is not known.
        in_memory: it works on the device's own memory; a copy to or from the host does not.
        args: of the trace.
    """

    phase: str
    name: str
    time_us: float
    cost: Cost | None
    in_memory: bool
    args: Mapping[str, Any]


def launches(trace: Trace) -> dict[int, Span]:
    """Calls of the CUDA API by correlation id; of a driver call within a runtime call the outer."""
    found: dict[int, Span] = {}
    for span in trace.spans:
        if span.category in API_CALLS and span.correlation is not None:
            found.setdefault(span.correlation, span)
    return found


def device_calls(trace: Trace, meta: Meta, phases: PhaseMap) -> list[Recorded]:
    """What ran on the GPU and was launched within the steps."""
    launched = launches(trace)
    costs = _launched_costs(trace, meta)
    calls = []
    for index, span in enumerate(trace.spans):
        if span.category not in ON_DEVICE:
            continue
        launch = launched.get(span.correlation or -1)
        when = launch.start if launch else span.start
        if phases.traced(when):
            phase = phases.phase(thread_of(launch or span), when)
            bus = span.name.startswith(("Memcpy HtoD", "Memcpy DtoH"))
            calls.append(
                Recorded(phase, span.name, span.duration, costs.get(index), not bus, span.args)
            )
    return calls


def operator_calls(trace: Trace, meta: Meta, phases: PhaseMap) -> list[Recorded]:
    """Operators that ran on the CPU within the steps, each without those it called."""
    by_thread: dict[Thread, list[Span]] = defaultdict(list)
    for span in trace.spans:
        if span.category == "cpu_op" and phases.traced(span.start):
            by_thread[thread_of(span)].append(span)
    calls = []
    for thread, spans in by_thread.items():
        costs = [meta.costs.get(s.name) or operator_cost(s, meta.list_dtype) for s in spans]
        _keep_innermost(spans, costs)
        for span, time, cost in zip(spans, own_times(spans), costs, strict=True):
            phase = phases.phase(thread, span.start)
            calls.append(Recorded(phase, span.name, time, cost, True, span.args))
    return calls


def _keep_innermost(spans: list[Span], costs: list[Cost | None]) -> None:
    """Drop the costs of operators that another one with a cost did the work of."""
    open_spans: list[int] = []
    for index, span in enumerate(spans):
        while open_spans and spans[open_spans[-1]].end <= span.start:
            open_spans.pop()
        if costs[index] is not None:
            for outer in open_spans:
                if repeats_inner(spans[outer].name):
                    costs[outer] = None
        open_spans.append(index)


def _launched_costs(trace: Trace, meta: Meta) -> dict[int, Cost]:
    """Costs of what ran on the device, by position in the trace."""
    operators = {
        span.external_id: span
        for span in trace.spans
        if span.category == "cpu_op" and span.external_id is not None
    }
    costs: dict[int, Cost] = {}
    started: dict[int, list[int]] = defaultdict(list)  # external id → positions of its kernels
    for index, span in enumerate(trace.spans):
        if span.category not in ON_DEVICE:
            continue
        known = next((c for name, c in meta.costs.items() if span.name.startswith(name)), None)
        if known is not None:
            costs[index] = known
        elif span.category != "kernel":
            costs[index] = _copied(span)
        elif span.external_id in operators:
            started[span.external_id or 0].append(index)
    for external, indices in started.items():
        operator = operators[external]
        cost = meta.costs.get(operator.name) or operator_cost(operator, meta.list_dtype)
        if cost is not None:
            costs.update(_shares(cost, {i: trace.spans[i] for i in indices}))
    return costs


def _copied(span: Span) -> Cost:
    moved = float(span.args.get("bytes", 0))
    return Cost(2 * moved if span.name.startswith("Memcpy DtoD") else moved, 0.0)


def _shares(cost: Cost, kernels: Mapping[int, Span]) -> Iterable[tuple[int, Cost]]:
    """An operator's cost, split by time among its kernels of the name that took longest."""
    times: dict[str, float] = defaultdict(float)
    for span in kernels.values():
        times[span.name] += span.duration
    name = max(times, key=lambda each: times[each])
    for index, span in kernels.items():
        if span.name == name and times[name] > 0:
            share = span.duration / times[name]
            yield index, replace(cost, bytes=cost.bytes * share, flops=cost.flops * share)
