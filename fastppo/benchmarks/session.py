"""A whole run: every case at every size of a name, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone

import torch

from fastppo.benchmarks.machine import describe_machine, find_versions, source_state
from fastppo.benchmarks.registry import Case
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.run import Roof, run_case
from fastppo.benchmarks.tables import seconds_text
from fastppo.device import free_memory


def run_cases(
    cases: Sequence[Case],
    sizes: str,
    device: torch.device,
    *,
    command: str,
    budget: float,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> Iterator[Result]:
    """Measure; after each case and size, the result so far.

    Args:
        cases: in order.
        sizes: smoke, cpu or gpu; cases that have none of that name are left out.
        command: that was typed, for the record.
        budget: seconds of timed rounds for one case at one size.
        seed: of the inputs.
        say: where lines about progress go.
    """
    work = [(case, size) for case in cases for size in case.sizes.get(sizes, ())]
    if not work:
        return
    peers = [n.partition(".")[0] for c in cases for p in c.providers.values() for n in p.needs]
    commit, dirty = source_state()
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
    for case, size in work:
        say(f"{case.name}, {size.text}")
        try:
            rows, calibration = run_case(case, size, roof, budget, seed)
        except Exception as error:  # inputs or reference: the other cases go on
            text = f"{type(error).__name__}: {error}"
            failed = Row(
                case=case.name, size=size.text, provider="reference", status="failed", note=text
            )
            rows, calibration = [failed], []
        finally:
            free_memory(device)
        for row in rows:
            say(f"  {_line(row)}")
        result = replace(
            result,
            ceilings=roof.ceilings,
            rows=(*result.rows, *rows),
            calibration={**result.calibration, f"{case.name} {size.text}": calibration},
        )
        yield result


def _line(row: Row) -> str:
    if row.status != "ok":
        return f"{row.provider:28} {row.status}: {row.note}"
    share = "" if row.roofline is None else f"{row.roofline:7.1%} of the roofline"
    return f"{row.provider:28} {seconds_text(row.median):>10} {share}"
