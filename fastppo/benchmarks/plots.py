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
from fastppo.benchmarks.scaling import series, slope
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
            figure = _growth(plt, case, growing[case]) if case in growing else _bars(plt, rows)
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
    else:
        axis.set_xlim(0, 1.3 * max(ends) or 1)
        axis.locator_params(axis="x", nbins=4)
    axis.set_yticks(range(len(rows)), [row.provider for row in rows])
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_formatter(lambda v, _: text(v) if v else "0")


def _colour(provider: str) -> str:
    if provider.startswith(OURS):
        return ACCENT
    return FLOOR if provider == COPY else OTHER


def _growth(plt: Any, case: str, rows: Sequence[Row]) -> Any:
    """Time and memory on logarithmic axes, with the exponent of the fit in the legend."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.04, 1, 0.96))
    figure.suptitle(case, x=0.01, ha="left", fontweight="bold")
    names = [name for name in dict.fromkeys(row.provider for row in rows) if name != COPY]
    numbers = sorted({row.axis for row in rows if row.axis is not None})
    for axis, what, text in zip(
        axes, ("seconds", "bytes"), (seconds_text, bytes_text), strict=True
    ):
        axis.set(xscale="log", yscale="log", title="time" if what == "seconds" else "peak memory")
        drawn = {name: p for name, p in series(rows, what).items() if name != COPY}
        highest = {x: max(dict(p).get(x, 0.0) for p in drawn.values()) for x in numbers}
        for name, points in drawn.items():
            exponent = slope(points)
            label = name if exponent is None else f"{name}: slope {exponent:.2f}"
            colour = LINES[names.index(name) % len(LINES)]
            axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label)
            for x, y in points:
                axis.annotate(
                    *(text(y), (x, y), (0, 6 if y == highest[x] else -13)),
                    textcoords="offset points",
                    ha="center",
                    color=colour,
                    fontsize=8,
                )
        axis.margins(0.12, 0.2)
        axis.set_xlabel(_axis_letter(rows))
        axis.set_xticks(numbers, [f"{number:g}" for number in numbers])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(lambda v, _, text=text: text(v))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.grid(color=FLOOR, linewidth=0.5)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
    return figure


def _axis_letter(rows: Sequence[Row]) -> str:
    """The letter of the size that grows."""
    varying = [
        {p.partition("=")[0] for p in row.size.split() if p.endswith(f"={row.axis:.0f}")}
        for row in rows
        if row.axis is not None
    ]
    return ", ".join(sorted(set.intersection(*varying))) if varying else ""
