"""A whole run: every case at every size of a name, one after the other, and that again.

Samples of one moment are disturbed together, so each case and size is measured in passes, with all
the others in between. What is slow is measured once (`Cell`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch

from fastppo.benchmarks.clock import steady_allocator
from fastppo.benchmarks.machine import describe_machine, find_versions, source_state
from fastppo.benchmarks.registry import Benchmark
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.run import Cell, Roof
from fastppo.benchmarks.tables import seconds_text
from fastppo.training.memory import free_memory


def run_cases(
    cases: Sequence[Benchmark],
    sizes: str,
    device: torch.device,
    *,
    command: str,
    budget: float,
    passes: int,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> Iterator[Result]:
    """Measure; after each pass of a case and size, the result so far.

    Args:
        cases: in order.
        sizes: smoke, cpu or gpu; cases that have none of that name are left out.
        command: that was typed, for the record.
        budget: seconds of timed rounds for one case at one size, all passes together.
        passes: how often everything is measured.
        seed: of the inputs.
        say: where lines about progress go.
    """
    work = [(case, size) for case in cases for size in case.sizes.get(sizes, ())]
    if not work:
        return
    peers = [n.partition(".")[0] for c in cases for p in c.providers.values() for n in p.needs]
    commit, dirty = source_state()
    steady_allocator()
    roof = Roof(device)
    result = Result(
        commit=commit,
        dirty=dirty,
        date=f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%SZ}",
        command=command,
        machine=describe_machine(device),
        versions=find_versions(peers),
        ceilings=roof.ceilings,
        rows=(),
        calibration={},
    )
    cells = [Cell(case, size, roof, seed) for case, size in work]
    rows: dict[str, list[Row]] = {}
    for number in range(1, passes + 1):
        for cell in cells:
            say(cell.name + (f", pass {number} of {passes}" if number > 1 else ""))
            try:
                cell.measure(budget / passes, last=number == passes)
            except Exception as error:  # inputs or reference: the other cases go on
                cell.fail(error)
            finally:
                free_memory(device)
            if cell.finished or number == 1:
                for row in cell.rows:
                    say(f"  {_line(row)}")
            rows[cell.name] = cell.rows
            result = replace(
                result,
                ceilings=roof.ceilings,
                rows=tuple(row for found in rows.values() for row in found),
                calibration={**result.calibration, cell.name: cell.calibration},
            )
            yield result
        cells = [cell for cell in cells if not cell.finished]


def _line(row: Row) -> str:
    if row.status != "ok":
        return f"{row.provider:28} {row.status}: {row.note}"
    share = "" if row.roofline is None else f"{row.roofline:7.1%} of the roofline"
    return f"{row.provider:28} {seconds_text(row.median):>10} {share}"
