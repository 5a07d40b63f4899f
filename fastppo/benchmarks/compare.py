"""Is one result slower than another, beyond noise?

What other processes take away only ever adds time, so the quick quarter of the samples is steadier
than their middle: times are compared by their first quartiles. A provider got slower only if three
things agree: the lower end of the ratio's 99 % bootstrap interval is above 1 + `MIN_EFFECT`; it
still is after division by how much longer the calibration took, a fixed piece of work sampled in
the same rounds, so that a slower machine is not taken for slower code; and so is the ratio of the
fastest samples. A real slowdown shows in all of them.

The smallest of the three is what a row claims. Rows that are not fastppo's run code that did not
change, so what they claim is noise: fastppo's claims must be larger than the largest of theirs.

Memory is compared too: more than a quarter, and more than `MIN_BYTES`, is a change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from numpy.typing import NDArray

from fastppo.benchmarks.results import BAD, Result, Row
from fastppo.benchmarks.run import CALIBRATION, COPY
from fastppo.benchmarks.tables import OURS, bytes_text, seconds_text, table

MIN_EFFECT = 0.10
MIN_BYTES = 32 << 20
RESAMPLES, CONFIDENCE = 2000, 0.99
QUARTER = 0.25
NOT_HARDWARE = ("driver", "cuda")  # software, named with the versions

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Change:
    """One provider of one case and size in two results.

    Args:
        before, after: seconds, the first quartiles of the samples.
        ratio: after over before; low, high: its bootstrap interval.
        verdict: "slower", "faster", "more memory", "no longer ok", or "" for no change.
        note: what changed, where it is not time.
    """

    key: tuple[str, str, str]
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str
    note: str = ""

    @property
    def worse(self) -> bool:
        """Whether it fails the comparison."""
        return self.verdict in ("slower", "more memory", "no longer ok")


def compare(before: Result, after: Result) -> list[Change]:
    """What changed for every provider that is timed in both results.

    Raises:
        ValueError: other hardware, other threads, or other cases and sizes: named.
    """
    _check_comparable(before, after)
    old = {row.key: row for row in before.rows}
    limit = max(1 + MIN_EFFECT, noise(before, after))
    changes = []
    for row in after.rows:
        earlier = old.get(row.key)
        if row.provider == COPY or earlier is None or earlier.status != "ok":
            continue
        if row.status == "ok":
            changes.append(_change(earlier, row, _cell_drift(before, after, row), limit))
        elif row.status in BAD or row.status == "out of memory":
            blank = (earlier.median, math.nan, math.nan, math.nan, math.nan)
            note = f"{row.status}: {row.note}"
            changes.append(Change(row.key, *blank, "no longer ok", note))
    return changes


def noise(before: Result, after: Result) -> float:
    """The largest slowdown that rows claim whose code did not change; 1 where there are none."""
    old = {row.key: row for row in before.rows if row.seconds}
    claims = [
        _claim(old[row.key], row, _cell_drift(before, after, row))
        for row in after.rows
        if row.seconds and row.key in old and not row.provider.startswith(OURS)
    ]
    return max(claims, default=1.0)


def _cell_drift(before: Result, after: Result, row: Row) -> float:
    cell = f"{row.case} {row.size}"
    return _drift(before.calibration.get(cell, ()), after.calibration.get(cell, ()))


def drift(before: Result, after: Result) -> float:
    """How much longer the calibration took: the median over cases."""
    shared = [cell for cell in before.calibration if after.calibration.get(cell)]
    ratios = [_drift(before.calibration[cell], after.calibration[cell]) for cell in shared]
    return median(ratios) if ratios else math.nan


def _drift(before: Sequence[float], after: Sequence[float]) -> float:
    """Of one case and size; 1 where it was not sampled."""
    if not before or not after:
        return 1.0
    return float(np.quantile(after, QUARTER) / np.quantile(before, QUARTER))


def report(before: Result, after: Result, changes: Sequence[Change]) -> str:
    """The comparison as text: what got worse first."""
    order = sorted(changes, key=lambda c: (not c.worse, c.verdict == "", -c.ratio))
    lines = [
        [
            " / ".join(c.key),
            seconds_text(c.before),
            "" if math.isnan(c.after) else seconds_text(c.after),
            "" if math.isnan(c.ratio) else f"{c.ratio:.2f}",
            "" if math.isnan(c.low) else f"{c.low:.2f}–{c.high:.2f}",
            c.verdict or "same",
        ]
        for c in order
    ]
    header = ("case / size / provider", "before", "after", "ratio", "99 % interval", "verdict")
    parts = [
        table(header, lines),
        f"{CALIBRATION}: {drift(before, after):.2f} times as long; noise, by the others' rows: "
        f"{noise(before, after):.2f}",
    ]
    changed = [
        f"{name} {before.versions.get(name, 'absent')} → {after.versions.get(name, 'absent')}"
        for name in sorted({*before.versions, *after.versions})
        if before.versions.get(name) != after.versions.get(name)
    ]
    if changed:
        parts.append("versions differ: " + ", ".join(changed))
    worse = [f"{' / '.join(c.key)}: {c.verdict}{_why(c)}" for c in order if c.worse]
    parts.append("\n".join(["worse:", *worse]) if worse else "nothing got worse beyond noise")
    return "\n\n".join(parts) + "\n"


def _why(change: Change) -> str:
    return f" ({change.note})" if change.note else f", {change.ratio:.2f} times as long"


def _check_comparable(before: Result, after: Result) -> None:
    for key in sorted({*before.machine, *after.machine} - set(NOT_HARDWARE)):
        a, b = before.machine.get(key), after.machine.get(key)
        if a != b:
            raise ValueError(
                f"{key}: the results are of different machines, {a!r} and {b!r}; run both on one"
            )
    cells = [{(row.case, row.size) for row in result.rows} for result in (before, after)]
    if cells[0] != cells[1]:
        other = sorted(" ".join(cell) for cell in cells[0] ^ cells[1])
        raise ValueError(
            f"sizes: only one of the results has {'; '.join(other)}; run the same cases and sizes"
        )


def _change(a: Row, b: Row, slower_machine: float, limit: float) -> Change:
    quick = tuple(float(np.quantile(row.seconds, QUARTER)) for row in (a, b))
    low, high = _interval(np.asarray(a.seconds), np.asarray(b.seconds))
    verdict = note = ""
    if _claim(a, b, slower_machine) > limit:
        verdict = "slower"
    elif _claim(b, a, 1 / slower_machine) > limit:
        verdict = "faster"
    old, new = a.peak_bytes or 0, b.peak_bytes or 0
    if verdict != "slower" and old and new > 1.25 * old and new > old + MIN_BYTES:
        verdict, note = "more memory", f"{bytes_text(old)} before, {bytes_text(new)} now"
    return Change(a.key, quick[0], quick[1], quick[1] / quick[0], low, high, verdict, note)


def _claim(a: Row, b: Row, slower_machine: float) -> float:
    """How many times as long b surely took."""
    before, after = np.asarray(a.seconds), np.asarray(b.seconds)
    low, _ = _interval(before, after)
    return min(low, low / slower_machine, float(after.min() / before.min()))


def _interval(before: Floats, after: Floats) -> tuple[float, float]:
    """Bootstrap interval of the ratio of first quartiles."""
    rng = np.random.default_rng(0)

    def quartiles(x: Floats) -> Floats:
        drawn = rng.choice(x, (RESAMPLES, len(x)))
        return np.asarray(np.quantile(drawn, QUARTER, axis=1), np.float64)

    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(quartiles(after) / quartiles(before), (tail, 1 - tail))
    return float(low), float(high)
