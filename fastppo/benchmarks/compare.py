"""Is one result slower than another, beyond noise?

Samples of one moment are disturbed together: what counts is how the passes of a run differ, not the
samples within one. What other processes take away only ever adds time, so a pass is as quick as the
quickest tenth of its samples. A provider surely takes r times as long if the *best* pass of `after`
takes r times as long as the *middle* pass of `before`, both in seconds and in units of the
calibration, a fixed piece of work sampled in the same rounds, so that a slower machine is not taken
for slower code. One bad pass in either result changes nothing; a real slowdown is in all of them.

Rows that are not fastppo's run code that did not change, so what they surely take longer is noise:
a provider of fastppo got slower if it surely takes longer than the largest of theirs, and than
1 + `MIN_EFFECT`. Of a row that was measured in one pass, the parts in time are taken for passes.

Memory is compared too: more than a quarter, and more than `MIN_BYTES`, is a change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastppo.benchmarks.results import BAD, Result, Row
from fastppo.benchmarks.run import CALIBRATION, COPY
from fastppo.benchmarks.tables import OURS, bytes_text, seconds_text, table

MIN_EFFECT = 0.10
MIN_BYTES = 32 << 20
QUICK, PARTS = 0.1, 3
NOT_HARDWARE = ("driver", "cuda")  # software, named with the versions

Samples = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Change:
    """One provider of one case and size in two results.

    Args:
        before, after: seconds, of the quickest tenth of all samples; ratio: of them.
        surely: how many times as long it surely takes.
        verdict: "slower", "faster", "more memory", "no longer ok", or "" for no change.
        note: what changed, where it is not time.
    """

    key: tuple[str, str, str]
    before: float
    after: float
    ratio: float
    surely: float
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
            changes.append(_change(_times(before, earlier), _times(after, row), limit))
        elif row.status in BAD or row.status == "out of memory":
            blank = (_times(before, earlier).quick, math.nan, math.nan, math.nan)
            note = f"{row.status}: {row.note}"
            changes.append(Change(row.key, *blank, "no longer ok", note))
    return changes


def noise(before: Result, after: Result) -> float:
    """The largest slowdown of rows whose code did not change; 1 where there are none."""
    old = {row.key: _times(before, row) for row in before.rows if row.seconds}
    claims = [
        _surely(old[row.key], _times(after, row))
        for row in after.rows
        if row.seconds and row.key in old and not row.provider.startswith(OURS)
    ]
    return max(claims, default=1.0)


def drift(before: Result, after: Result) -> float:
    """How much longer the calibration took: the median over cases; NaN where it was not sampled."""
    ratios = [
        _quick(np.concatenate(samples)) / _quick(np.concatenate(before.calibration[cell]))
        for cell, samples in after.calibration.items()
        if samples and before.calibration.get(cell)
    ]
    return median(ratios) if ratios else math.nan


def report(before: Result, after: Result, changes: Sequence[Change]) -> str:
    """The comparison as text: what got worse first."""
    order = sorted(changes, key=lambda c: (not c.worse, c.verdict == "", -c.ratio))
    lines = [
        [
            " / ".join(c.key),
            seconds_text(c.before),
            "" if math.isnan(c.after) else seconds_text(c.after),
            "" if math.isnan(c.ratio) else f"{c.ratio:.2f}",
            "" if math.isnan(c.surely) else f"{c.surely:.2f}",
            c.verdict or "same",
        ]
        for c in order
    ]
    header = ("case / size / provider", "before", "after", "ratio", "surely", "verdict")
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


class _Times(NamedTuple):
    """How quick a row is: by all its samples, and pass by pass in two units."""

    row: Row
    quick: float
    seconds: Sequence[float]
    calibrated: Sequence[float]


def _times(result: Result, row: Row) -> _Times:
    passes = np.split(np.asarray(row.seconds), np.cumsum(row.passes[:-1]))
    units = list(map(np.asarray, result.calibration.get(f"{row.case} {row.size}", ())))
    if len(passes) == 1:
        passes, units = _parts(passes), _parts(units)
    seconds = [_quick(samples) for samples in passes]
    calibrated = seconds
    if len(units) == len(seconds):
        calibrated = [s / _quick(unit) for s, unit in zip(seconds, units, strict=True)]
    return _Times(row, _quick(np.asarray(row.seconds)), seconds, calibrated)


def _parts(passes: list[Samples]) -> list[Samples]:
    """One pass in parts, in order of time."""
    return [part for samples in passes for part in np.array_split(samples, PARTS) if len(part)]


def _quick(samples: Samples) -> float:
    return float(np.quantile(samples, QUICK))


def _surely(a: _Times, b: _Times) -> float:
    """How many times as long b surely takes."""
    return min(
        min(b.seconds) / median(a.seconds),
        min(b.calibrated) / median(a.calibrated),
    )


def _change(a: _Times, b: _Times, limit: float) -> Change:
    surely = _surely(a, b)
    verdict = note = ""
    if surely > limit:
        verdict = "slower"
    elif _surely(b, a) > limit:
        verdict = "faster"
    old, new = a.row.peak_bytes or 0, b.row.peak_bytes or 0
    if verdict != "slower" and old and new > 1.25 * old and new > old + MIN_BYTES:
        verdict, note = "more memory", f"{bytes_text(old)} before, {bytes_text(new)} now"
    return Change(a.row.key, a.quick, b.quick, b.quick / a.quick, surely, verdict, note)
