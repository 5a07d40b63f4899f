"""Is `fastppo bench compare` to be trusted on this machine?

    python bench/compare_ten_times.py [--cases gae packing] [--sizes cpu] [--pairs 10]

Measures the same code again and again, each time in a new process, as two runs of `fastppo bench`
are: no run may differ from the one before. Then each row of fastppo in each of these runs is
pretended to have taken longer, 2 and 1.3 times. Last, a run in which one provider really does its
work twice: the comparison must fail and name it, and nothing else.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import permutations
from typing import Literal

import tyro

from fastppo.benchmarks.compare import compare, drift, noise
from fastppo.benchmarks.registry import Benchmark, Provider, select_cases
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.session import run_cases
from fastppo.benchmarks.tables import OURS
from fastppo.cli.bench import BUDGET, PASSES
from fastppo.profiling.case import Call, Inputs, Outputs, Size
from fastppo.training.device import resolve_device

SMALL, LARGE = 1.3, 2.0


def measure(names: Sequence[str], sizes: str, slow: str) -> Result:
    """One run without its progress lines.

    Args:
        slow: the case whose fastppo does its work twice; "": none.
    """
    cases = [spoilt(case) if case.name == slow else case for case in select_cases(names)]
    (*_, result) = run_cases(
        cases,
        sizes,
        resolve_device("auto"),
        command="compare_ten_times",
        budget=BUDGET[sizes],
        passes=PASSES[sizes],
        say=lambda line: None,
    )
    return result


def measure_elsewhere(names: Sequence[str], sizes: str, slow: str = "") -> Result:
    """The same in a new process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, names, sizes, slow).result()


def spoilt(case: Benchmark) -> Benchmark:
    """Its fastppo does the same work two times."""

    def prepare(x: Inputs, size: Size) -> Call:
        call = ours.prepare(x, size)

        def both() -> Outputs:
            call()
            return call()

        return both

    ours: Provider = case.providers[OURS]
    return replace(case, providers={**case.providers, OURS: replace(ours, prepare=prepare)})


def worse(before: Result, after: Result) -> set[tuple[str, str, str]]:
    return {change.key for change in compare(before, after) if change.worse}


def pretend(result: Result, slow: Row, factor: float) -> Result:
    """As if a row had taken that many times as long."""
    rows = (
        replace(row, seconds=[factor * s for s in row.seconds]) if row is slow else row
        for row in result.rows
    )
    return replace(result, rows=tuple(rows))


def main(
    cases: tuple[str, ...] = ("gae_classic", "gae_carry", "whiten", "packing"),
    sizes: Literal["smoke", "cpu", "gpu"] = "cpu",
    pairs: int = 10,
    slow: str = "gae_carry",
) -> None:
    """Measure and print; exit status 1 where a verdict is wrong.

    Args:
        cases: that are measured.
        sizes: of them.
        pairs: of runs of the same code, one after the other.
        slow: the case whose fastppo does its work twice in the end.
    """
    runs = [measure_elsewhere(cases, sizes)]
    failed, missed = 0, dict[float, list[str]]({LARGE: [], SMALL: []})
    for number in range(1, pairs + 1):
        runs.append(measure_elsewhere(cases, sizes))
        before, after = runs[-2:]
        found = worse(before, after)
        failed += bool(found)
        ratios = [max(c.ratio, 1 / c.ratio) for c in compare(before, after)]
        for row in after.rows:
            if row.provider.startswith(OURS):
                for factor in missed:
                    if row.key not in worse(before, pretend(after, row, factor)):
                        missed[factor].append(f"{' / '.join(row.key)} of pair {number}")
        print(
            f"pair {number}: {len(ratios)} rows, quickest tenths up to {max(ratios):.2f} apart, "
            f"calibration {drift(before, after):.2f}, noise {noise(before, after):.2f}, "
            f"slower: {'; '.join(map(' / '.join, sorted(found))) or 'none'}",
            flush=True,
        )
    rows = pairs * sum(row.provider.startswith(OURS) for row in runs[0].rows)
    print(f"{pairs - failed} of {pairs} pairs of the same code pass")
    anyhow = [bool(worse(before, after)) for before, after in permutations(runs, 2)]
    print(f"{len(anyhow) - sum(anyhow)} of {len(anyhow)} do, of any two runs in any order")
    for factor, names in missed.items():
        count, but = rows - len(names), f", but {'; '.join(names)}" if names else ""
        print(f"{count} of {rows} rows are named, had they taken {factor:g} times as long{but}")
    doubled = measure_elsewhere(cases, sizes, slow)
    named = worse(runs[-1], doubled)
    print(f"twice the work, found slower: {'; '.join(map(' / '.join, sorted(named))) or 'none'}")
    expected = {row.key for row in doubled.rows if row.case == slow and row.provider == OURS}
    sys.exit(1 if failed or missed[LARGE] or named != expected else 0)


if __name__ == "__main__":
    tyro.cli(main)
