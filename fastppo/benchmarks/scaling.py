"""Scaling cases: how time and memory grow with one number."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fastppo.benchmarks.results import Row
from fastppo.benchmarks.run import COPY

Points = list[tuple[float, float]]


def series(rows: Iterable[Row], what: str) -> dict[str, Points]:
    """Per provider, (number that grows, value) in ascending order, without the copy.

    Args:
        rows: of one scaling case.
        what: "seconds" (the median) or "bytes" (of memory, where it was measured).
    """
    found: dict[str, Points] = {}
    for row in rows:
        value = row.median if what == "seconds" else row.peak_bytes
        if row.status == "ok" and row.axis is not None and value and row.provider != COPY:
            found.setdefault(row.provider, []).append((row.axis, float(value)))
    return {name: sorted(points) for name, points in found.items()}


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Exponent p of the least-squares fit value = c·number^p; None for fewer than two points."""
    x = [math.log(number) for number, _ in points]
    y = [math.log(value) for _, value in points]
    if len(set(x)) < 2:
        return None
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def slope_text(points: Sequence[tuple[float, float]]) -> str:
    """The exponent with two digits; empty where there is none."""
    exponent = slope(points)
    return "" if exponent is None else f"{round(exponent, 2) + 0.0:.2f}"  # never -0.00


def growing_letter(rows: Sequence[Row]) -> tuple[str, str]:
    """The letter of the size that grows, and the text of what stays the same."""
    sizes = [row.size.split() for row in rows]
    numbers = [f"={row.axis:.0f}" for row in rows]
    named = [
        {p.partition("=")[0] for p in s if p.endswith(n)}
        for s, n in zip(sizes, numbers, strict=True)
    ]
    letters = set.intersection(*named)
    same = [part for part in sizes[0] if all(part in size for size in sizes)]
    grows = letters - {part.partition("=")[0] for part in same} or letters
    letter = min(grows, default="")
    return letter, " ".join(part for part in same if part.partition("=")[0] != letter)
