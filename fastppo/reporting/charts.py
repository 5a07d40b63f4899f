"""Curves made of characters, and what every curve needs: ticks, averages, fewer points.

Pure functions on plain values; nothing here prints. A missing value (None, NaN, infinity) is a gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastppo.reporting.formatting import Value, finite, numbers

_BLOCKS = "▁▂▃▄▅▆▇█"
_BLOCKS_ASCII = "_.:-=+*#"


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round, evenly spaced ticks whose first and last enclose [low, high].

    Args:
        low, high: data range; equal values are widened by half their size (or by 0.5 around zero).
        count: ticks wanted; the result has about as many, at least two.

    Returns:
        Ascending ticks, multiples of 1, 2 or 5 times a power of ten.
    """
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= 0.7 * raw)
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, digits) for k in range(first, max(last, first + 1) + 1)]


def format_ticks(ticks: Sequence[float]) -> list[str]:
    """Labels for evenly spaced ticks, all with the decimals their step needs."""
    step = ticks[1] - ticks[0]
    if max(abs(t) for t in ticks) >= 1e7 or step < 1e-5:
        return [f"{t:.0e}".replace("e-0", "e-").replace("e+0", "e") if t else "0" for t in ticks]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{t:,.{digits}f}" for t in ticks]


def resample(values: Sequence[Value], width: int) -> list[float | None]:
    """At most `width` values: the mean of each of `width` equal slices (None where a slice has no
    number).
    """
    if len(values) <= width:
        return numbers(values)
    out: list[float | None] = []
    for i in range(width):
        part = finite(values[i * len(values) // width : (i + 1) * len(values) // width])
        out.append(sum(part) / len(part) if part else None)
    return out


def typical_range(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest of `values` (not empty), not counting those far from the rest.

    Far is six interquartile ranges beyond the quartiles: one explained variance of -195 in the
    first iteration must not flatten the curve of all others.
    """
    ordered = sorted(values)
    n = len(ordered)
    q1, q3 = ordered[n // 4], ordered[(3 * n) // 4]
    fence = 6 * (q3 - q1)
    if fence > 0 and n >= 4:
        ordered = [v for v in ordered if q1 - fence <= v <= q3 + fence]
    return ordered[0], ordered[-1]


def downsample(
    points: Sequence[tuple[int, float | None]], buckets: int
) -> list[tuple[int, float | None]]:
    """At most 2 · buckets + 2 of `points` through which a curve looks the same: each bucket's
    extremes.

    Keeps the first and last point, the smallest and largest of each bucket in their order, and a
    gap where a whole bucket is missing.
    """
    if len(points) <= 2 * buckets + 2:
        return list(points)
    kept = {0, len(points) - 1}
    for b in range(buckets):
        bucket = range(b * len(points) // buckets, (b + 1) * len(points) // buckets)
        known = [(y, i) for i in bucket if (y := points[i][1]) is not None]
        kept.update((min(known)[1], max(known)[1]) if known else (bucket[0],))
    return [points[i] for i in sorted(kept)]


def moving_average(values: Sequence[Value], window: int) -> list[float | None]:
    """Mean of the known values within window // 2 places on either side; None stays None."""
    known = [value is not None and math.isfinite(value) for value in values]
    sums, counts = [0.0], [0]
    for value, is_known in zip(values, known, strict=True):
        sums.append(sums[-1] + (float(value or 0) if is_known else 0.0))
        counts.append(counts[-1] + is_known)
    out: list[float | None] = []
    for i, is_known in enumerate(known):
        first, last = max(0, i - window // 2), min(len(values), i + window // 2 + 1)
        mean = (sums[last] - sums[first]) / max(1, counts[last] - counts[first])
        out.append(mean if is_known else None)
    return out


def sparkline(values: Sequence[Value], width: int, *, ascii_only: bool = False) -> str:
    """The history in at most `width` characters of eight heights; a constant is drawn at mid
    height.
    """
    blocks = _BLOCKS_ASCII if ascii_only else _BLOCKS
    points = resample(values, width)
    known = finite(points)
    if not known:
        return ""
    low, high = typical_range(known)
    span = high - low
    flat = span <= 1e-9 * max(abs(low), 1e-9)
    return "".join(
        " "
        if v is None
        else blocks[3]
        if flat
        else blocks[max(0, min(7, int((v - low) / span * 8)))]
        for v in points
    )


def plot(
    values: Sequence[Value],
    width: int,
    height: int,
    *,
    first: int = 1,
    span: int | None = None,
    braille: bool = False,
) -> str:
    """A curve with labelled axes, in plain ASCII.

    Args:
        values: one value an iteration.
        width, height: size of the whole plot in characters, labels included (at least 16 × 5).
        first: iteration number of values[0].
        span: iterations the x axis covers (at least len(values)); the curve grows into it.
        braille: draw with 2 × 4 braille dots a character and line-drawing axes.

    Returns:
        `height` lines without trailing spaces, none longer than `width`.
    """
    if width < 16 or height < 5:
        raise ValueError(f"width and height must be at least 16 and 5, got {width} and {height}")
    known = finite(values)
    rows = height - 2  # the axis and its labels take two
    ticks = _even_ticks(min(known), max(known), rows) if known else [0.0, 1.0]
    low, high = ticks[0], ticks[-1]
    labels = {
        round((high - t) / (high - low) * (rows - 1)): s
        for t, s in zip(ticks, format_ticks(ticks), strict=True)
    }
    margin = max(len(label) for label in labels.values()) + 2
    columns = width - margin
    span = max(len(values), span or 0, 1)
    per_cell, per_row = (2, 4) if braille else (1, 1)
    dots = _trace(values, span, columns * per_cell, rows * per_row, low, high)

    axis, corner, dash, tick = ("│", "└", "─", "┤") if braille else ("|", "+", "-", "+")
    lines = []
    for row in range(rows):
        if braille:
            cells = "".join(_cell(dots, column, row) for column in range(columns))
        else:
            cells = "".join("*" if (column, row) in dots else " " for column in range(columns))
        lines.append(
            f"{labels.get(row, ''):>{margin - 2}} {tick if row in labels else axis}{cells}".rstrip()
        )
    lines.append(" " * (margin - 1) + corner + dash * columns)
    left, right = str(first), str(first + span - 1)
    lines.append(" " * margin + left + ("" if span == 1 else right.rjust(columns - len(left))))
    return "\n".join(lines)


def _even_ticks(low: float, high: float, rows: int) -> list[float]:
    """The most ticks that fall on every second, third, ... of `rows` lines exactly; two always
    do.
    """
    for count in (6, 5, 4, 3, 2):
        ticks = nice_ticks(low, high, count)
        intervals = len(ticks) - 1
        if (rows - 1) % intervals == 0 and (rows - 1) // intervals >= 2:
            return ticks
    return [ticks[0], ticks[-1]]


def _trace(
    values: Sequence[Value], span: int, columns: int, rows: int, low: float, high: float
) -> set[tuple[int, int]]:
    """Dots (column, row) of the polyline through `values` on a columns × rows raster."""
    # The curve so far takes this much of the axis.
    used = max(1, round(columns * len(values) / span))
    points = resample(values, used)
    dots: set[tuple[int, int]] = set()
    previous: tuple[int, int] | None = None
    for i, value in enumerate(points):
        if value is None:
            previous = None
            continue
        x = round(i / max(1, len(points) - 1) * (used - 1))
        y = min(rows - 1, max(0, round((high - value) / (high - low) * (rows - 1))))
        if previous is None:
            dots.add((x, y))
        else:
            x0, y0 = previous
            steps = max(abs(x - x0), abs(y - y0), 1)
            dots.update(
                (x0 + round(s / steps * (x - x0)), y0 + round(s / steps * (y - y0)))
                for s in range(steps + 1)
            )
        previous = (x, y)
    return dots


# Unicode 2800: dot of (row, column)
_BRAILLE_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def _cell(dots: set[tuple[int, int]], column: int, row: int) -> str:
    bits = 0
    for dy, line in enumerate(_BRAILLE_BITS):
        for dx, bit in enumerate(line):
            if (2 * column + dx, 4 * row + dy) in dots:
                bits |= bit
    return chr(0x2800 + bits) if bits else " "
