"""Intervals on a time axis: nested ranges cut into pieces, unions, overlaps. Pure functions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fastppo.profiling.trace import Span


class Piece(NamedTuple):
    """A stretch of time in which one range was the innermost."""

    start: float
    end: float
    name: str


Interval = tuple[float, float]


def innermost(ranges: Sequence[Span]) -> list[Piece]:
    """Cut nested ranges of one thread into pieces that do not overlap, in order.

    Args:
        ranges: sorted by start, the longest first, as in a Trace. A range that ends after the one
            around it is cut there.
    """
    pieces: list[Piece] = []
    open_ranges: list[tuple[float, str]] = []  # (end, name), the innermost last
    now = 0.0

    def advance(to: float) -> None:
        nonlocal now
        if open_ranges and to > now:
            pieces.append(Piece(now, to, open_ranges[-1][1]))
        now = to

    for span in ranges:
        while open_ranges and open_ranges[-1][0] <= span.start:
            advance(open_ranges[-1][0])
            open_ranges.pop()
        advance(span.start)
        end = min(span.end, open_ranges[-1][0]) if open_ranges else span.end
        open_ranges.append((end, span.name))
    while open_ranges:
        advance(open_ranges[-1][0])
        open_ranges.pop()
    return pieces


def at(pieces: Sequence[Piece], time: float) -> str | None:
    """The name of the piece that `time` falls into; None between pieces."""
    index = bisect_right(pieces, time, key=lambda piece: piece.start) - 1
    return pieces[index].name if index >= 0 and time < pieces[index].end else None


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same moments as intervals that do not overlap, in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def overlap(first: Sequence[Interval], second: Sequence[Interval]) -> float:
    """How long two unions have in common."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total


def own_times(spans: Sequence[Span]) -> list[float]:
    """What each span of one thread took without the spans directly inside it.

    Args:
        spans: sorted by start, the longest first.
    """
    times = [span.duration for span in spans]
    open_spans: list[int] = []
    for index, span in enumerate(spans):
        while open_spans and spans[open_spans[-1]].end <= span.start:
            open_spans.pop()
        if open_spans:
            outer = open_spans[-1]
            times[outer] -= min(span.end, spans[outer].end) - span.start
        open_spans.append(index)
    return [max(0.0, time) for time in times]
