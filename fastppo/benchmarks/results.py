"""A run's results: what was measured, on what, by which code. Kept as JSON, read back with checks.

The format is versioned by `SCHEMA`: what another version wrote is refused, not guessed at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Literal, get_args

from fastppo.profiling.meta import Ceilings

SCHEMA = 2

Status = Literal["ok", "missing", "out of memory", "failed", "wrong", "impossible"]
BAD: tuple[Status, ...] = ("failed", "wrong", "impossible")
"""What makes a run fail. A peer that is not installed or does not fit does not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One provider of one case at one size.

    Args:
        size: text of it, such as "N=8192 V=151936 bf16".
        axis: of a scaling case, the number that grows; None: it is not one.
        status: "ok": the answer was right and the samples mean something. "missing": not installed
            or another device. "impossible": faster than the ceilings allow, so the accounting is
            wrong.
        note: why it is not ok, or what else a reader should know.
        seconds: of one call, every sample.
        passes: how many of the samples were taken in each pass, in order; empty: all in one.
        mode: how they were taken: perf_counter, events, graph.
        error, allowed: of the answer against float64; None where it was not checked.
        bytes, flops: of one call at least; the formulas are those of the case.
        floor: seconds that these take at the ceilings.
        peak_bytes: of tensors, beyond what was there before; None: not measured.
    """

    case: str
    size: str
    provider: str
    status: Status
    note: str = ""
    axis: float | None = None
    seconds: Sequence[float] = ()
    passes: Sequence[int] = ()
    mode: str = ""
    error: float | None = None
    allowed: float | None = None
    bytes: float = 0.0
    bytes_formula: str = ""
    flops: float = 0.0
    flops_formula: str = ""
    floor: float | None = None
    peak_bytes: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What is the same thing in another run."""
        return self.case, self.size, self.provider

    @property
    def median(self) -> float:
        """Seconds; NaN without samples."""
        return median(self.seconds) if self.seconds else math.nan

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third, in seconds."""
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = quantiles(self.seconds, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """Interquartile range of the samples, in seconds."""
        low, high = self.quartiles
        return high - low

    @property
    def gb_s(self) -> float:
        """Bytes of the formula over the median, in 1e9 a second."""
        return self.bytes / self.median / 1e9

    @property
    def tflops(self) -> float:
        """Operations of the formula over the median, in 1e12 a second."""
        return self.flops / self.median / 1e12

    @property
    def roofline(self) -> float | None:
        """The floor over the median: 1 is as fast as the device allows."""
        return None if self.floor is None else self.floor / self.median


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A run.

    Args:
        commit: of the source tree; "" where there is none. dirty: it had changes.
        date: ISO 8601, UTC. command: that was run.
        machine: device, cpu, cores, threads, and on CUDA driver and cuda.
        versions: of python, fastppo, torch and whatever else was timed.
        ceilings: the best measured in the run.
        calibration: seconds of a fixed piece of work, (case, size) by (case, size) and pass by
            pass, sampled in turn with the providers: what `compare` tells a slower machine by.
    """

    commit: str
    dirty: bool
    date: str
    command: str
    machine: Mapping[str, str | int]
    versions: Mapping[str, str]
    ceilings: Ceilings
    rows: tuple[Row, ...]
    calibration: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    @property
    def bad(self) -> list[Row]:
        """Rows for which the run fails."""
        return [row for row in self.rows if row.status in BAD]

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        text = json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is not a result, of another schema, or damaged; says where.
        """
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        if not isinstance(value, dict) or "schema" not in value:
            raise ValueError(f"{path}: expected a result of fastppo bench, found no schema in it")
        schema = value.pop("schema")
        if schema != SCHEMA:
            raise ValueError(
                f"{path}: expected schema {SCHEMA}, got {schema!r}: run the benchmark again, or "
                "read it with the fastppo that wrote it"
            )
        try:
            rows = tuple(_row(row) for row in value.pop("rows"))
            return cls(ceilings=Ceilings(**value.pop("ceilings")), rows=rows, **value)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path}: damaged result: {error}") from error


def _row(value: dict[str, Any]) -> Row:
    seconds, passes = tuple(map(float, value["seconds"])), tuple(map(int, value["passes"]))
    row = Row(**{**value, "seconds": seconds, "passes": passes})
    name = "/".join(row.key)
    if row.status not in get_args(Status):
        raise ValueError(f"{name}: unknown status {row.status!r}")
    if row.status == "ok" and not row.seconds:
        raise ValueError(f"{name}: is ok without samples")
    if not all(0 < s < math.inf for s in row.seconds):
        raise ValueError(f"{name}: samples are not positive numbers")
    if passes and sum(passes) != len(seconds):
        raise ValueError(f"{name}: {len(seconds)} samples, but {sum(passes)} in its passes")
    return row
