"""Markdown tables of a result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.run import COPY
from fastppo.benchmarks.scaling import growing_letter, series, slope_text
from fastppo.profiling.roofline import peak_tflops

OURS = "fastppo"


def markdown(result: Result) -> str:
    """Everything a reader needs: machine, ceilings, a table per case and size."""
    parts = ["# Benchmarks", _machine(result)]
    for (case, size), group in groupby(result.rows, key=lambda row: (row.case, row.size)):
        rows = list(group)
        parts.append(f"## {case}, {size}\n\n{_counts(rows[0])}\n\n{_providers(rows, result)}")
    parts += [_scaling(name, rows) for name, rows in scaling_cases(result).items()]
    if result.bad:
        lines = [f"- {' / '.join(row.key)}: {row.status}: {row.note}" for row in result.bad]
        parts.append("## Refused\n\n" + "\n".join(lines))
    return "\n\n".join(parts) + "\n"


def scaling_cases(result: Result) -> dict[str, list[Row]]:
    """Rows of the cases whose sizes lie on an axis, by case."""
    found: dict[str, list[Row]] = {}
    for row in result.rows:
        if row.axis is not None:
            found.setdefault(row.case, []).append(row)
    return found


def seconds_text(seconds: float) -> str:
    """Such as "12.3 µs"; three digits."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def bytes_text(count: float) -> str:
    """Such as "12.3 MB"; three digits."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{_digits(count / factor)} {unit}"
    return f"{_digits(count / 1e3)} kB"


def speed_text(row: Row, result: Result) -> str:
    """GB/s, or TFLOP/s where operations take longer than bytes at the ceilings."""
    peak = peak_tflops(result.ceilings, row.size.endswith("bf16")) * 1e12
    if row.flops / peak > row.bytes / (result.ceilings.copy_gb_s * 1e9):
        return f"{_digits(row.tflops)} TFLOP/s"
    return f"{_digits(row.gb_s)} GB/s"


def _digits(value: float) -> str:
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column left, the others right, padded for reading as text."""
    cells = [list(header), *[[cell.replace("|", "\\|") for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        first = row[0].ljust(widths[0])
        others = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|".join(["", "-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:]), ""])
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def _machine(result: Result) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in result.machine.items())
    versions = ", ".join(f"{key} {value}" for key, value in result.versions.items())
    ceilings = result.ceilings
    commit = result.commit[:12] + (" with changes" if result.dirty else "")
    lines = (
        f"Machine: {machine}.",
        f"Versions: {versions}; commit {commit or 'unknown'}; {result.date}.",
        f"Ceilings, measured in this run: copy {ceilings.copy_gb_s:.1f} GB/s, products "
        f"{ceilings.fp32_tflops:.3g} TFLOP/s in fp32 and {ceilings.bf16_tflops:.3g} in bf16.",
        f"Command: `{result.command}`",
    )
    return "  \n".join(lines)


def _counts(row: Row) -> str:
    return (
        f"Bytes: {row.bytes_formula} = {bytes_text(row.bytes)}. "
        f"Operations: {row.flops_formula} = {row.flops:.3g}."
    )


def _providers(rows: Sequence[Row], result: Result) -> str:
    ours = next((row.median for row in rows if row.provider == OURS and row.seconds), math.nan)
    header = ("provider", "median", "IQR", "n", "× fastppo", "speed", "roofline", "memory", "error")
    lines = []
    for row in rows:
        if row.status != "ok":
            lines.append([row.provider, row.status, *[""] * 7])
            continue
        lines.append(
            [
                row.provider,
                seconds_text(row.median),
                seconds_text(row.spread),
                str(len(row.seconds)),
                "" if math.isnan(ours) else f"{row.median / ours:.2f}",
                speed_text(row, result),
                "" if row.roofline is None else f"{row.roofline:.1%}",
                "" if row.peak_bytes is None else bytes_text(row.peak_bytes),
                "" if row.error is None else f"{row.error:.1e}",
            ]
        )
    notes = [f"- {row.provider}: {row.note}" for row in rows if row.note]
    return "\n\n".join(filter(None, (table(header, lines), "\n".join(notes))))


def _scaling(case: str, rows: Sequence[Row]) -> str:
    """A line per provider: time and memory at both ends, and the exponents between them."""
    letter, same = growing_letter(rows)
    numbers = sorted({row.axis for row in rows if row.axis is not None})
    ends = dict.fromkeys((numbers[0], numbers[-1]))
    header = ["provider"]
    lines = {row.provider: [row.provider] for row in rows if row.provider != COPY}
    for what, title, text in (("seconds", "time", seconds_text), ("bytes", "memory", bytes_text)):
        header += [*(f"{title}, {letter}={number:.0f}" for number in ends), f"slope of {title}"]
        found = series(rows, what)
        for name, cells in lines.items():
            points = found.get(name, [])
            cells += [text(dict(points)[end]) if end in dict(points) else "" for end in ends]
            cells.append(slope_text(points))
    return f"## {case}: growth with {letter} at {same}\n\n{table(header, list(lines.values()))}"
