"""Plots of a result: time, memory and share of the roofline per case; growth for scaling cases."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.run import COPY
from fastppo.benchmarks.scaling import growing_letter, series, slope_text
from fastppo.benchmarks.tables import OURS, bytes_text, scaling_cases, seconds_text

ACCENT, OTHER, FLOOR, INK = "#1f6feb", "#8c959f", "#d0d7de", "#1f2328"
LINES = ("#1f6feb", "#bc4c00", "#1a7f37", "#8250df", "#57606a", "#bf3989")


def save_plots(result: Result, folder: Path) -> list[Path]:
    """Write a PNG per case into `folder`.

    Returns:
        The files.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    style |= {"text.color": INK, "axes.edgecolor": OTHER}
    growing, written = scaling_cases(result), []
    with plt.rc_context(style):
        for case, group in groupby(result.rows, key=lambda row: row.case):
            rows = [row for row in group if row.status == "ok"]
            if not rows:
                continue
            figure = (
                growth_figure(plt, case, growing[case]) if case in growing else _bars(plt, rows)
            )
            figure.text(0.995, 0.005, _caption(result), ha="right", va="bottom", fontsize=7)
            path = folder / f"{re.sub(r'[^a-z0-9_-]', '_', case.lower())}.png"
            figure.savefig(path, dpi=140)
            plt.close(figure)
            written.append(path)
    return written


def _caption(result: Result) -> str:
    machine = result.machine
    hardware = machine.get("gpu") or f"{machine.get('cpu')}, threads: {machine.get('threads')}"
    return f"{hardware}; torch {result.versions.get('torch')}; {result.date}"


def _bars(plt: Any, rows: Sequence[Row]) -> Any:
    """A row of panels per size: time, memory, share of the roofline."""
    sizes = [(size, list(group)) for size, group in groupby(rows, key=lambda row: row.size)]
    heights = [0.75 + 0.27 * len(group) for _, group in sizes]
    figure, axes = plt.subplots(
        len(sizes),
        3,
        figsize=(12, 0.9 + sum(heights)),
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": heights},
    )
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    for line, (size, group) in zip(axes, sizes, strict=True):
        _panel(line[0], group, lambda row: row.median, seconds_text, log=True)
        _panel(line[1], group, lambda row: row.peak_bytes, bytes_text)
        _panel(line[2], group, lambda row: row.roofline, "{:.1%}".format)
        line[0].set_title(f"{group[0].case}, {size}", loc="left", fontweight="bold")
        for axis in line[1:]:
            axis.set_yticklabels([])
    names = ("time, median and quartiles", "peak memory", "share of the roofline")
    for axis, name in zip(axes[-1], names, strict=True):
        axis.set_xlabel(name)
    return figure


def _panel(
    axis: Any,
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    text: Callable[[float], str],
    log: bool = False,
) -> None:
    """Bars from the top down, each with its number; on a logarithmic axis these are times."""
    for place, row in enumerate(rows):
        v = value(row)
        if v is None:
            label, end = "" if row.provider == COPY else "not measured", 0.0
        else:
            axis.barh(place, v, color=_colour(row.provider), height=0.7)
            label, end = text(v), v
        if log:
            low, end = row.quartiles
            axis.plot((low, end), (place, place), color=INK, linewidth=1)
            end = max(end, row.median)
        axis.annotate(label, (end, place), (5, 0), textcoords="offset points", va="center")
    ends = [(row.quartiles[1] if log else value(row)) or 0.0 for row in rows]
    if log:
        axis.set_xscale("log")
        axis.set_xlim(min(row.median for row in rows) / 3, max(ends) * 8)
        axis.xaxis.set_minor_locator(NullLocator())
    elif any(ends):
        axis.set_xlim(0, 1.3 * max(ends))
        axis.locator_params(axis="x", nbins=4)
    else:  # nothing was measured
        axis.set_xlim(0, 1)
        axis.set_xticks([])
    axis.set_yticks(range(len(rows)), [row.provider for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(lambda v, _: text(v) if v else "0")


def _colour(provider: str) -> str:
    if provider.startswith(OURS):
        return ACCENT
    return FLOOR if provider == COPY else OTHER


def growth_figure(plt: Any, case: str, rows: Sequence[Row]) -> Any:
    """Time and memory on logarithmic axes, with the exponent of the fit in the legend."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    letter, same = growing_letter(rows)
    figure.suptitle(f"{case}: {same}", x=0.01, ha="left", fontweight="bold")
    names = list(dict.fromkeys(row.provider for row in rows))
    numbers = sorted({row.axis for row in rows if row.axis is not None})
    for axis, what, text in zip(
        axes, ("seconds", "bytes"), (seconds_text, bytes_text), strict=True
    ):
        axis.set(xscale="log", yscale="log", xlabel=letter)
        axis.set_title("time" if what == "seconds" else "peak memory", fontsize=10)
        drawn = series(rows, what)
        for name, points in drawn.items():
            colour = LINES[names.index(name) % len(LINES)]
            exponent = slope_text(points)
            label = f"{name}: slope {exponent}" if exponent else name
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
            for x, y in points:
                highest = y == max(dict(p).get(x, 0.0) for p in drawn.values())
                axis.annotate(
                    text(y),
                    (x, y),
                    (0, 7 if highest else -14),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                    fontsize=8,
                    bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "linewidth": 0},
                    zorder=2.5,  # over the grid and other lines, below the markers of later ones
                )
        axis.set_xticks(numbers, [f"{number:,.0f}" for number in numbers])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.1)
        _widen(axis, [y for points in drawn.values() for _, y in points])
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(lambda v, _, text=text: text(v))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(color=FLOOR, linewidth=0.5)
        if drawn:
            axis.legend(loc="upper left", framealpha=1, edgecolor="white")
    return figure


def _widen(axis: Any, values: Sequence[float]) -> None:
    """Room above for the legend; and a decade at least, so that what hardly grows looks flat."""
    if values:
        low, high = min(values), max(values)
        spare = max(1.0, 10 * low / high) ** 0.5
        low, high = low / spare, high * spare
        axis.set_ylim(low * (low / high) ** 0.12, high * (high / low) ** 0.3)
