"""What gets timed: right answers only, at speeds that can be."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fastppo.benchmarks.check import largest_error
from fastppo.benchmarks.clock import LONG_CALL, Timer, peak_memory, take_turns
from fastppo.benchmarks.registry import Benchmark, Provider, select_cases
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.run import COPY, Cell, Roof
from fastppo.profiling.case import Call, Count, Inputs, Size
from fastppo.profiling.meta import Ceilings

CPU = torch.device("cpu")
Measure = Callable[..., Result]


def with_provider(case: Benchmark, name: str, provider: Provider) -> Benchmark:
    return replace(case, providers={**case.providers, name: provider})


def row_of(result: Result, provider: str) -> Row:
    (row,) = (row for row in result.rows if row.provider == provider)
    return row


def test_honest_providers_are_timed(case: Benchmark, measure: Measure) -> None:
    result = measure(case)
    assert [row.provider for row in result.rows] == ["fastppo", "torch", COPY]
    assert not result.bad
    for row in result.rows:
        assert len(row.seconds) >= 3 and row.mode == "perf_counter"
        assert row.roofline is not None and 0 < row.roofline <= 1.05
    row = row_of(result, "fastppo")
    assert row.error is not None and row.allowed is not None and 0 < row.error <= row.allowed
    assert row.bytes == 400_000 and row.gb_s == pytest.approx(0.0004 / row.median)


def test_an_answer_off_by_one_is_refused_before_it_is_timed(
    case: Benchmark, measure: Measure
) -> None:
    calls = []

    def off_by_one(x: Inputs, size: Size) -> Call:
        def call() -> dict[str, torch.Tensor]:
            calls.append(1)
            y = x["x"].cumsum(0)
            return {"y": torch.cat([y[:1], y[:-1]])}

        return call

    result = measure(with_provider(case, "shifted", Provider(prepare=off_by_one)))
    row = row_of(result, "shifted")
    assert row.status == "wrong" and "y: error" in row.note and not row.seconds
    assert len(calls) == 1  # the check's; no warm-up, no sample
    assert result.bad == [row]
    assert row_of(result, "fastppo").status == "ok"


def test_one_wrong_number_is_seen(case: Benchmark, measure: Measure) -> None:
    def one_off(x: Inputs, size: Size) -> Call:
        def call() -> dict[str, torch.Tensor]:
            y = x["x"].cumsum(0)
            y[123] += 0.5
            return {"y": y}

        return call

    assert row_of(measure(with_provider(case, "one", Provider(prepare=one_off))), "one").status == (
        "wrong"
    )


def test_changing_the_inputs_is_noticed_after_timing(case: Benchmark, measure: Measure) -> None:
    def in_place(x: Inputs, size: Size) -> Call:
        def call() -> dict[str, torch.Tensor]:
            y = x["x"].cumsum(0)
            x["x"].mul_(0.99)
            return {"y": y}

        return call

    row = row_of(measure(with_provider(case, "greedy", Provider(prepare=in_place))), "greedy")
    assert row.status == "wrong" and row.note.startswith("after timing: y")


def test_a_pass_makes_inputs_and_calls_anew_and_checks_each(case: Benchmark, roof: Roof) -> None:
    made: list[str] = []

    def inputs(size: Size, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
        made.append("inputs")
        return dict(case.inputs(size, device, seed))

    def reference(x: Inputs, size: Size) -> dict[str, torch.Tensor]:
        made.append("reference")
        return dict(case.reference(x, size))

    def wrong_when_prepared_again(x: Inputs, size: Size) -> Call:
        made.append("prepared")
        error = 0.0 if made.count("prepared") == 1 else 1.0
        return lambda: {"y": x["x"].cumsum(0) + error}

    watched = replace(case, inputs=inputs, reference=reference)
    watched = with_provider(watched, "late", Provider(prepare=wrong_when_prepared_again))
    cell = Cell(watched, case.sizes["smoke"][0], roof)
    for number in range(3):
        cell.measure(0.05, last=number == 2)
        assert len(cell.calibration) == number + 1
        assert cell.finished == (number == 2)
    assert made == ["inputs", "reference", "prepared", "inputs", "prepared", "inputs"]
    rows = {row.provider: row for row in cell.rows}
    assert rows["late"].status == "wrong" and len(rows["late"].passes) == 1
    for name in ("fastppo", "torch", COPY):
        assert len(rows[name].passes) == 3 and sum(rows[name].passes) == len(rows[name].seconds)


def test_what_is_slow_is_measured_in_one_pass(
    case: Benchmark, roof: Roof, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastppo.benchmarks.run.LONG_ROUND", 0.2)

    def slow(x: Inputs, size: Size) -> Call:
        def call() -> dict[str, torch.Tensor]:
            time.sleep(0.2)
            return {"y": x["x"].cumsum(0)}

        return call

    cell = Cell(with_provider(case, "slow", Provider(prepare=slow)), case.sizes["smoke"][0], roof)
    cell.measure(0.05, last=False)
    assert cell.finished
    assert {row.provider: len(row.seconds) for row in cell.rows}["slow"] == 3


def test_missing_results_and_nan_never_pass() -> None:
    ones = {"y": torch.ones(3)}
    assert largest_error(ones, ones).size == 0
    assert largest_error({"y": torch.tensor([1.0, 2.0, 1.0])}, ones).size == pytest.approx(1)
    nan = largest_error({"y": torch.tensor([1.0, torch.nan, 1.0])}, ones)
    assert not nan.size <= 1e9
    for outputs, text in (({}, "'y' is missing"), ({"y": torch.ones(4)}, "expected shape")):
        with pytest.raises(Exception, match=text):
            largest_error(outputs, ones)


def test_a_peer_that_cannot_run_is_a_row(case: Benchmark, measure: Measure) -> None:
    def prepare(x: Inputs, size: Size) -> Call:
        raise AssertionError("never prepared")

    absent = Provider(prepare=prepare, needs=("no_such_module.kernels",))
    elsewhere = Provider(prepare=prepare, devices=("cuda",))
    spoilt = with_provider(with_provider(case, "peer", absent), "GPU peer", elsewhere)
    result = measure(spoilt)
    found = {name: row_of(result, name) for name in ("peer", "GPU peer")}
    assert {row.status for row in found.values()} == {"missing"}
    assert found["peer"].note == "no_such_module.kernels is not installed"
    assert found["GPU peer"].note == "runs on cuda only"
    assert not result.bad


def test_a_peer_that_raises_fails_and_the_others_go_on(case: Benchmark, measure: Measure) -> None:
    def prepare(x: Inputs, size: Size) -> Call:
        raise KeyError("layout")

    result = measure(with_provider(case, "broken", Provider(prepare=prepare)))
    assert row_of(result, "broken").note == "KeyError: 'layout'"
    assert [row.provider for row in result.bad] == ["broken"]
    assert row_of(result, "fastppo").status == "ok"


def test_a_call_that_works_only_once_fails_and_the_others_go_on(
    case: Benchmark, measure: Measure
) -> None:
    def once(x: Inputs, size: Size) -> Call:
        answers = [{"y": x["x"].cumsum(0)}]
        return lambda: answers.pop()

    result = measure(with_provider(case, "once", Provider(prepare=once)))
    row = row_of(result, "once")
    assert (row.status, row.note) == ("failed", "IndexError: pop from empty list")
    assert not row.seconds and len(row_of(result, "fastppo").seconds) >= 10


def test_faster_than_the_ceilings_is_a_mistake_in_the_accounting(
    case: Benchmark, measure: Measure, roof: Roof, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once they have been measured again: the first time the machine may have been busy."""
    again = []

    def measured(device: torch.device) -> Ceilings:
        again.append(device)
        return roof.ceilings

    monkeypatch.setattr("fastppo.benchmarks.run.measure_ceilings", measured)
    assert row_of(measure(case), "fastppo").status == "ok" and not again
    wrong = replace(case, flops=Count("N³", lambda s: float(s["N"]) ** 3))
    row = row_of(measure(wrong), "fastppo")
    assert row.status == "impossible" and "of the roofline" in row.note
    assert again == [CPU]


def test_the_roof_is_the_higher_one(roof: Roof) -> None:
    row = Row(case="c", size="s", provider="p", status="ok", bytes=1e9, flops=1.0)
    large = 1e9 / (roof.ceilings.copy_gb_s * 1e9)
    assert roof.floor(row, False, copy_seconds=2 * large) == pytest.approx(large)
    assert roof.floor(row, False, copy_seconds=large / 2) == pytest.approx(large / 2)
    busy = replace(row, flops=1e15)
    assert roof.floor(busy, False, 1.0) == pytest.approx(1e3 / roof.ceilings.fp32_tflops)
    best = max(roof.ceilings.fp32_tflops, roof.ceilings.bf16_tflops)  # bf16 may be upcast
    assert roof.floor(busy, True, 1.0) == pytest.approx(1e3 / best)


def test_the_clock_is_right_about_work_of_a_known_length() -> None:
    def wait(seconds: float) -> Callable[[], None]:
        def work() -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return work

    timers = {
        "short": Timer([wait(0.0001)], CPU),
        "two sets": Timer([wait(0.0004), wait(0.0)], CPU),  # a sample is a mean over both
    }
    samples = take_turns(timers, budget=0.5)
    assert min(map(len, samples.values())) >= 3
    for name, seconds in (("short", 0.0001), ("two sets", 0.0002)):  # others only ever add time
        assert 0.999 * seconds <= min(samples[name]) <= 1.3 * seconds


def noting(order: list[str], name: str, seconds: float) -> Callable[[], None]:
    def work() -> None:
        order.append(name)
        time.sleep(seconds)

    return work


def test_timers_take_turns_and_a_long_call_is_a_sample_at_once() -> None:
    order: list[str] = []
    timers = {name: Timer([noting(order, name, 2 * LONG_CALL)], CPU) for name in "ab"}
    assert not order
    samples = take_turns(timers, budget=0.01)
    assert order == list("ababab")
    assert [len(found) for found in samples.values()] == [3, 3]


def test_quick_rounds_are_at_least_ten() -> None:
    samples = take_turns({"q": Timer([noting([], "q", 0.004)], CPU)}, budget=1e-3)
    assert len(samples["q"]) == 10


def test_the_quick_take_several_samples_beside_the_slow() -> None:
    order: list[str] = []
    timers = {
        "q": Timer([noting(order, "q", 0.004)], CPU),
        "s": Timer([noting(order, "s", 0.35)], CPU),
    }
    samples = take_turns(timers, budget=0.01)
    turns = "".join(order).split("s")[1:3]
    assert len(samples["s"]) == 3 and len(samples["q"]) == 1 + sum(map(len, turns))
    assert len(set(turns)) == 1 and 2 <= len(turns[0]) <= 8  # together at most 0.035 s


def test_peak_memory_sees_what_a_call_keeps() -> None:
    n, v = 64, 50_000
    size = 4 * n * v  # 12.8 MB of logits

    def keeps_two() -> torch.Tensor:
        logits = torch.randn(n, v)
        return logits.exp().sum()  # both are there at once

    def in_chunks() -> torch.Tensor:
        return torch.stack([torch.randn(4, v).exp_().sum() for _ in range(n // 4)]).sum()

    for _ in range(2):  # memory that was freed before counts again
        assert 2 * size <= peak_memory(keeps_two, CPU) <= 2 * size + 100
    assert size / 16 <= peak_memory(in_chunks, CPU) <= size / 16 + 100
    kept = torch.randn(n, v)
    assert peak_memory(lambda: kept.mul(2).sum(), CPU) <= size + 100  # not what was there before


def test_the_head_holds_no_logits_and_plain_torch_does() -> None:
    (case,) = select_cases(["head_by_vocabulary"])
    size = Size(N=256, B=4, H=16, V=32_000)
    inputs = case.inputs(size, CPU, 0)
    logits = 4 * size["N"] * size["V"]
    peak = {}
    for name, provider in case.providers.items():
        peak[name] = peak_memory(provider.prepare(inputs, size), CPU)
    assert peak["torch"] >= 2 * logits  # the softmax, and the gradient of the logits
    assert peak["fastppo"] <= peak["torch"] - logits


def test_unknown_cases_are_named() -> None:
    with pytest.raises(ValueError, match="unknown case 'gea'. Did you mean 'gae'"):
        select_cases(["gea"])


@pytest.mark.parametrize("case_", select_cases([]), ids=lambda case: case.name)
def test_every_case_is_whole(case_: Benchmark) -> None:
    assert "fastppo" in case_.providers and "smoke" in case_.sizes
    for sizes in case_.sizes.values():
        assert len({size.text for size in sizes}) == len(sizes)
        for size in sizes:
            assert case_.bytes.of(size) > 0
            assert case_.axis is None or size[case_.axis] > 0


UNCOMPILED = [  # a compilation takes many seconds
    case for case in select_cases([]) if not any("compile" in name for name in case.providers)
]


@pytest.mark.parametrize("case_", UNCOMPILED, ids=lambda case: case.name)
def test_every_provider_is_right(case_: Benchmark, roof: Roof) -> None:
    """At the smallest size, and on other inputs than the benchmark's."""
    from fastppo.benchmarks.check import Judge

    size = case_.sizes["smoke"][0]
    inputs = case_.inputs(size, CPU, 1)
    judge = Judge(case_, size, inputs)
    for name in dict.fromkeys((case_.baseline, *case_.providers)):
        provider = case_.providers[name]
        if provider.missing(CPU) is None:
            judge.check(name, provider.prepare(inputs, size)())
