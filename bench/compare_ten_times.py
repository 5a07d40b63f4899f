"""Is `fastppo bench compare` to be trusted on this machine?

    python bench/compare_ten_times.py [--cases vtrace packing] [--sizes cpu] [--pairs 10]

Measures the same code twice, `pairs` times: no pair may differ. Then measures with one provider
that does its work twice: the comparison must fail and name it, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import tyro

from fastppo.benchmarks.compare import compare, drift
from fastppo.benchmarks.registry import Call, Case, Inputs, Outputs, Provider, Size, select_cases
from fastppo.benchmarks.results import Result
from fastppo.benchmarks.session import run_cases
from fastppo.device import resolve_device


def measure(cases: Sequence[Case], sizes: str, device: torch.device, budget: float) -> Result:
    """One run without its progress lines."""
    (*_, result) = run_cases(
        cases, sizes, device, command="compare_ten_times", budget=budget, say=lambda line: None
    )
    return result


def twice(provider: Provider) -> Provider:
    """The same work two times."""

    def prepare(x: Inputs, size: Size) -> Call:
        call = provider.prepare(x, size)

        def both() -> Outputs:
            call()
            return call()

        return both

    return replace(provider, prepare=prepare)


def main(
    cases: tuple[str, ...] = ("gae_classic", "vtrace", "whiten", "packing"),
    sizes: Literal["smoke", "cpu", "gpu"] = "cpu",
    pairs: int = 10,
    seconds: float = 2.0,
    slow: str = "vtrace",
) -> None:
    """Measure and print; exit status 1 where a verdict is wrong.

    Args:
        cases: that are measured.
        sizes: of them.
        pairs: of runs of the same code.
        seconds: of timed rounds for each case and size.
        slow: the case whose fastppo does its work twice in the end.
    """
    chosen, device = select_cases(cases), resolve_device("auto")
    wrong = 0
    for pair in range(pairs):
        before, after = (measure(chosen, sizes, device, seconds) for _ in range(2))
        changes = compare(before, after)
        worse = [" / ".join(change.key) for change in changes if change.worse]
        wrong += bool(worse)
        apart = max(max(c.ratio, 1 / c.ratio) for c in changes)
        print(
            f"pair {pair + 1}: {len(changes)} rows, quartiles up to {apart:.2f} apart, calibration "
            f"{drift(before, after):.2f}, slower: {', '.join(worse) or 'none'}",
            flush=True,
        )
    spoilt = [
        replace(c, providers={**c.providers, "fastppo": twice(c.providers["fastppo"])})
        if c.name == slow
        else c
        for c in chosen
    ]
    changes = compare(
        measure(chosen, sizes, device, seconds), measure(spoilt, sizes, device, seconds)
    )
    found = {change.key for change in changes if change.worse}
    print("twice the work, found slower: " + ("; ".join(map(" / ".join, sorted(found))) or "none"))
    expected = {c.key for c in changes if c.key[0] == slow and c.key[2] == "fastppo"}
    print(f"{pairs - wrong} of {pairs} pairs of the same code pass")
    sys.exit(1 if wrong or found != expected else 0)


if __name__ == "__main__":
    tyro.cli(main)
