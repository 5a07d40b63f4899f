"""Which step and which phase a moment of a trace belongs to.

Steps are the ranges `fastppo::step`, else the ranges ProfilerStep#N of torch.profiler's schedule;
without either, all from the start of the first phase to the end of the last is one step. Phases are
the ranges named as the trainer's phases, and those that begin with `fastppo::`. Where ranges are
nested the innermost counts, so that no moment is counted twice.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from fastppo.profiling.timeline import Interval, at, innermost, union
from fastppo.profiling.trace import Span, Trace
from fastppo.reporting.formatting import PHASES

PREFIX = "fastppo::"
STEP = "fastppo::step"
OTHER = "other"
"""Time of a step outside every phase."""

Thread = tuple[int | str, int | str]  # process, thread


def thread_of(span: Span) -> Thread:
    return span.process, span.thread


class PhaseMap:
    """Steps and phases of a trace.

    Args:
        trace: with at least one step or phase.

    Raises:
        ValueError: it has neither.
    """

    steps: list[Interval]
    """µs, in order."""

    def __init__(self, trace: Trace) -> None:
        ranges = [span for span in trace.spans if span.category == "user_annotation"]
        steps = [s for s in ranges if s.name == STEP]
        steps = steps or [s for s in ranges if s.name.startswith("ProfilerStep#")]
        by_thread: dict[Thread, list[Span]] = defaultdict(list)
        for span in ranges:
            if span.name != STEP and (span.name in PHASES or span.name.startswith(PREFIX)):
                phase = replace(span, name=span.name.removeprefix(PREFIX))
                by_thread[thread_of(span)].append(phase)
        if not steps and not by_thread:
            raise ValueError(
                "trace: expected phases (such as 'rollout' or 'fastppo::ref') or ProfilerStep#N "
                f"among its ranges, got {sorted({s.name for s in ranges})[:8]}"
            )
        self._pieces = {thread: innermost(spans) for thread, spans in by_thread.items()}
        self._main = thread_of(steps[0]) if steps else max(self._pieces, key=self._covered)
        spans = by_thread.get(self._main, [])
        self.steps = (
            union((step.start, step.end) for step in steps)
            if steps
            else [(spans[0].start, max(span.end for span in spans))]
        )
        self.num_steps = max(1, len(steps))
        self.calls = self._calls(spans)

    def phase(self, thread: Thread, time: float) -> str:
        """The innermost phase of the thread at `time`, else of the main thread, whose backward
        passes run on threads of their own.
        """
        own = at(self._pieces.get(thread, ()), time)
        return own or at(self._pieces.get(self._main, ()), time) or OTHER

    def traced(self, time: float) -> bool:
        """Whether `time` is within a step."""
        return any(start <= time <= end for start, end in self.steps)

    def intervals(self) -> dict[str, list[Interval]]:
        """When each phase was the innermost of the main thread, within the steps; in the order in
        which they first ran, `OTHER` last, which is there even if it took no time.
        """
        cut: dict[str, list[Interval]] = {}
        for piece in self._pieces.get(self._main, ()):
            for start, end in self.steps:
                low, high = max(start, piece.start), min(end, piece.end)
                if low < high:
                    cut.setdefault(piece.name, []).append((low, high))
        taken = union(interval for intervals in cut.values() for interval in intervals)
        cut[OTHER] = cut.pop(OTHER, []) + _gaps(self.steps, taken)
        return {name: union(intervals) for name, intervals in cut.items()}

    def _covered(self, thread: Thread) -> float:
        return sum(piece.end - piece.start for piece in self._pieces[thread])

    def _calls(self, spans: Sequence[Span]) -> Counter[str]:
        """How often each phase of the main thread was entered within the steps; again inside
        itself does not count.
        """
        calls: Counter[str] = Counter()
        ends: dict[str, float] = {}
        for span in spans:
            if span.start >= ends.get(span.name, span.start) and self.traced(span.start):
                calls[span.name] += 1
            ends[span.name] = max(span.end, ends.get(span.name, span.end))
        return calls


def _gaps(steps: Sequence[Interval], taken: Sequence[Interval]) -> list[Interval]:
    """What of `steps` is not in `taken`; both are unions."""
    gaps: list[Interval] = []
    for start, end in steps:
        now = start
        for low, high in taken:
            if high <= now or low >= end:
                continue
            if low > now:
                gaps.append((now, low))
            now = high
        if now < end:
            gaps.append((now, end))
    return gaps
