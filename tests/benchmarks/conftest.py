"""A small honest case, and ways to spoil it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.benchmarks.results import Result
from fastppo.benchmarks.run import Cell, Roof
from fastppo.profiling.case import Call, Count, Inputs, Size
from fastppo.profiling.meta import Ceilings

CPU = torch.device("cpu")


def make_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    return {"x": torch.randn(size["N"], generator=rng, device=device)}


def honest(x: Inputs, size: Size) -> Call:
    return lambda: {"y": x["x"].cumsum(0)}


@pytest.fixture(scope="session")
def case() -> Benchmark:
    """Sums up to each element; two providers that are right."""
    return Benchmark(
        name="sums",
        sizes={"smoke": [Size(N=50_000)]},
        inputs=make_inputs,
        reference=lambda x, size: {"y": x["x"].cumsum(0)},
        providers={"fastppo": Provider(prepare=honest), "torch": Provider(prepare=honest)},
        baseline="torch",
        bytes=Count("8·N: x read, y written, fp32", lambda s: 8 * s["N"]),
        flops=Count("N", lambda s: s["N"]),
    )


@pytest.fixture(scope="module", autouse=True)
def _measured_once(ceilings_once: Callable[..., object]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppo.benchmarks.run.measure_ceilings", ceilings_once)
        yield


@pytest.fixture(scope="session")
def roof(ceilings_once: Callable[..., Ceilings]) -> Roof:
    """The ceilings of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppo.benchmarks.run.measure_ceilings", ceilings_once)
        return Roof(CPU)


Measure = Callable[..., Result]


@pytest.fixture(scope="session")
def measure(roof: Roof) -> Measure:
    """Runs the first smoke size of a case."""

    def run(case: Benchmark, budget: float = 0.2, passes: int = 1) -> Result:
        cell = Cell(case, case.sizes["smoke"][0], roof)
        for number in range(1, passes + 1):
            cell.measure(budget / passes, last=number == passes)
        return Result(
            commit="",
            dirty=False,
            date="2026-01-01T00:00:00Z",
            command="",
            machine={"device": "cpu", "threads": 1},
            versions={"torch": torch.__version__},
            ceilings=roof.ceilings,
            rows=tuple(cell.rows),
            calibration={cell.name: cell.calibration},
        )

    return run
