"""Every case of fastppo.benchmarks under pytest-benchmark: `fastppo bench` for those who know this.

    python -m pytest bench/bench_ops.py --sizes smoke --cases gae,whiten
    python -m pytest bench --benchmark-json=now.json --benchmark-compare

A group is a case at a size. Each benchmark checks its answer first. What pytest-benchmark does not
do, and `fastppo bench` does: taking turns, cold caches on CUDA, memory, tables and plots.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from fastppo.benchmarks.check import Judge
from fastppo.benchmarks.clock import Timer, steady_allocator
from fastppo.benchmarks.machine import find_versions
from fastppo.benchmarks.registry import Benchmark
from fastppo.benchmarks.results import Row
from fastppo.benchmarks.run import IMPOSSIBLE, Roof, copy_of_as_many_bytes
from fastppo.profiling.case import Inputs, Size
from fastppo.profiling.ceilings import synchronize
from fastppo.training.device import describe, resolve_device

SECONDS, MIN_ROUNDS, MAX_ROUNDS = 1.0, 3, 50


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    sizes = option("--sizes") or ("gpu" if torch.cuda.is_available() else "cpu")
    found = [
        pytest.param(case, size, name, id=f"{case.name}-{size.text}-{name}")
        for case in option("--cases")
        for size in case.sizes.get(sizes, ())
        for name in case.providers
    ]
    metafunc.parametrize(("case", "size", "name"), found)


@functools.cache
def device_and_roof() -> tuple[torch.device, Roof]:
    steady_allocator()
    device = resolve_device("auto")
    return device, Roof(device)


@functools.lru_cache(maxsize=1)  # benchmarks of a group follow each other
def inputs_and_judge(case: Benchmark, size: Size) -> tuple[Inputs, Judge, float]:
    """With seconds of a copy of as many bytes; the baseline has been judged."""
    device, _ = device_and_roof()
    inputs = case.inputs(size, device, 0)
    judge = Judge(case, size, inputs)
    baseline = case.providers[case.baseline]
    if baseline.missing(device) is None:
        judge.check(case.baseline, baseline.prepare(inputs, size)())
    copy = Timer([copy_of_as_many_bytes(int(case.bytes.of(size)), device)], device)
    return inputs, judge, min(copy.sample() for _ in range(20))


@pytest.mark.filterwarnings("ignore")  # torch.compile's own
def test_op(benchmark: Any, case: Benchmark, size: Size, name: str) -> None:
    device, roof = device_and_roof()
    provider = case.providers[name]
    if (reason := provider.missing(device)) is not None:
        pytest.skip(reason)
    inputs, judge, copy_seconds = inputs_and_judge(case, size)
    call = provider.prepare(inputs, size)
    error = judge.check(name, call())

    def run() -> None:
        call()
        synchronize(device)

    once = Timer([run], device).sample()
    iterations = max(1, int(1e-3 / once))
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(SECONDS / (once * iterations))))
    benchmark.group = f"{case.name}, {size.text}"
    benchmark.pedantic(run, rounds=rounds, iterations=iterations, warmup_rounds=1)

    half = size.half
    row = Row(
        case=case.name,
        size=size.text,
        provider=name,
        status="ok",
        seconds=tuple(benchmark.stats.stats.data),
        bytes=float(case.bytes.of(size)),
        flops=float(case.flops.of(size)),
    )
    share = roof.floor(row, half, copy_seconds) / row.median
    if share > IMPOSSIBLE:
        roof.measure_again()
        share = roof.floor(row, half, copy_seconds) / row.median
    benchmark.extra_info |= {
        "bytes": row.bytes,
        "bytes_formula": case.bytes.formula,
        "flops": row.flops,
        "flops_formula": case.flops.formula,
        "GB_per_s": row.gb_s,
        "TFLOP_per_s": row.tflops,
        "percent_of_roofline": 100 * share,
        "error": error,
        "device": describe(device),
        **find_versions(provider.needs),
    }
    assert share <= IMPOSSIBLE, f"{share:.0%} of the roofline: the accounting is wrong"
    judge.check(name, call())
