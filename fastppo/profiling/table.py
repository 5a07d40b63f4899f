"""An analysis as tables in the terminal, and as JSON and CSV."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastppo.profiling.analysis import Analysis, Kernel
from fastppo.profiling.names import amount, duration, percent, short_name
from fastppo.reporting.formatting import format_number, visible

WIDE = 110


def print_table(analysis: Analysis, console: Console, top: int = 20) -> None:
    """Print a summary, the phases, the `top` kernels, the host syncs and what waited.

    A console of fewer than `WIDE` columns gets the kernels without calls, bytes and operations.
    """
    console.print(_safe(summary(analysis)))
    console.print(_phases(analysis))
    console.print(_kernels(analysis, top, console.width >= WIDE))
    rest = analysis.kernels[top:]
    if rest:
        share = percent(sum(kernel.share for kernel in rest))
        console.print(f"and {len(rest)} more, {share} of the time of all")
    if analysis.syncs:
        console.print(_syncs(analysis))
    for wait in analysis.waits:
        each = duration(wait.total_us / analysis.steps)
        console.print(_safe(f"{wait.api} in {wait.phase}: the host waits {each} a step"))


def summary(analysis: Analysis) -> str:
    """One line: time of a step, idle share, launches and syncs of a step."""
    steps = analysis.steps
    parts = [f"{duration(analysis.wall_us / steps)} a step"]
    if analysis.idle is not None:
        parts.append(f"GPU idle {percent(analysis.idle)}")
    if analysis.launches is not None:
        parts.append(f"{format_count(analysis.launches / steps)} launches")
    parts.append(f"{sum(sync.count for sync in analysis.syncs):,} host syncs")
    name = f"{analysis.meta.device}, {steps} step{'s' * (steps != 1)}"
    return f"{name}: " + ", ".join(parts)


def format_count(value: float) -> str:
    """A mean of counts, whole where it is whole."""
    return f"{value:,.0f}" if value == int(value) or value >= 100 else format_number(value)


def write_json(analysis: Analysis, path: str | Path) -> None:
    """Write everything; the fields are those of `Analysis`."""
    text = json.dumps(asdict(analysis), indent=1, allow_nan=False)
    Path(path).write_text(text + "\n", encoding="utf-8")


def write_csv(analysis: Analysis, path: str | Path) -> None:
    """Write the kernels, one row each, with the fields of `Kernel`; unknown ones are empty."""
    names = [field.name for field in fields(Kernel)]
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for kernel in analysis.kernels:
            writer.writerow(_cell(getattr(kernel, name)) for name in names)


def _cell(value: object) -> object:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _safe(text: str) -> str:
    return escape(visible(text))


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        first = index == 0
        justify: Literal["left", "right"] = "left" if first else "right"
        table.add_column(column, justify=justify, no_wrap=not first, overflow="fold")
    return table


def _phases(analysis: Analysis) -> Table:
    busy = "GPU busy" if analysis.meta.is_cuda else "in operators"
    table = _table("Phases", "phase", "a step", "share", busy)
    for phase in analysis.phases:
        table.add_row(
            _safe(phase.name),
            duration(1e6 * phase.seconds),
            percent(phase.share),
            percent(phase.busy),
        )
    return table


def _kernels(analysis: Analysis, top: int, wide: bool) -> Table:
    title = "Kernels" if analysis.meta.is_cuda else "Operators"
    columns = ["time", "share", "GB/s", "TFLOP/s", "roofline"]
    if wide:
        columns = ["calls", "time", "share", "bytes", "FLOP", "GB/s", "TFLOP/s", "roofline"]
        columns += ["registers", "occupancy"] if analysis.meta.is_cuda else []
    table = _table(title, "name", "phase", *columns)
    for kernel in analysis.kernels[:top]:
        cells = {
            "time": duration(kernel.total_us),
            "share": percent(kernel.share),
            "calls": f"{kernel.calls:,}",
            "bytes": "–" if kernel.bytes is None else amount(kernel.bytes, "B"),
            "FLOP": amount(kernel.flops, "") if kernel.flops else "–",
            "GB/s": format_number(kernel.gb_s),
            "TFLOP/s": format_number(kernel.tflop_s),
            "roofline": percent(kernel.roofline),
            "registers": "–" if kernel.registers is None else str(kernel.registers),
            "occupancy": percent(kernel.occupancy),
        }
        name, phase = _safe(short_name(kernel.name)), _safe(kernel.phase)
        table.add_row(name, phase, *(cells[column] for column in columns))
    return table


def _syncs(analysis: Analysis) -> Table:
    table = _table("Host syncs", "where", "phase", "what", "a step")
    for sync in analysis.syncs:
        table.add_row(
            _safe(f"{sync.file}:{sync.line} {sync.function}"),
            _safe(sync.phase),
            _safe(sync.api),
            f"{sync.count:,}",
        )
    return table
