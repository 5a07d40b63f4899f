"""The analysis against numbers worked out by hand, and on a recorded trace."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastppo.profiling.analysis import Analysis, Kernel, Phase, Wait, analyse
from fastppo.profiling.meta import Ceilings, Cost, Meta, Step
from fastppo.profiling.trace import Trace

HERE = Path(__file__).parent
NVJET = "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT"
HOST, DEVICE = {"pid": 1, "tid": 1}, {"pid": 0, "tid": 7}


def span(category: str, name: str, ts: float, dur: float, **values: Any) -> dict[str, Any]:
    where = DEVICE if category in ("kernel", "gpu_memcpy") else HOST
    args = {key.replace("_", " "): value for key, value in values.pop("args", {}).items()}
    return {"ph": "X", "cat": category, "name": name, "ts": ts, "dur": dur, **where, **values} | {
        "args": args
    }


def annotation(name: str, ts: float, dur: float, **values: Any) -> dict[str, Any]:
    return span("user_annotation", name, ts, dur, **values)


def analysed(*events: dict[str, Any], is_cuda: bool = False, **meta: Any) -> Analysis:
    return analyse(
        Trace.parse(list(events)), Meta(steps=(), device="test", is_cuda=is_cuda, **meta)
    )


@pytest.fixture(scope="module")
def gpu() -> Analysis:
    trace, meta = Trace.load(HERE / "gpu_trace.json"), Meta.load(HERE / "gpu_meta.json")
    return analyse(trace, meta)


@pytest.fixture(scope="module")
def cpu() -> Analysis:
    trace, meta = Trace.load(HERE / "cpu_trace.json.gz"), Meta.load(HERE / "cpu_meta.json")
    return analyse(trace, meta)


# The trace written by hand: two steps, 1000-2000 and 2000-3000 µs; ceilings 4000 GB/s = 4e6 B/µs,
# bf16 800 TFLOP/s = 8e8 /µs, fp32 50 TFLOP/s = 5e7 /µs.


def test_time_of_steps_and_phases(gpu: Analysis) -> None:
    assert gpu.steps == 2
    assert gpu.wall_us == 1010 + 1000  # the host's clock
    assert gpu.traced_us == 2000
    expected = [
        # rollout 1050-1450, one of two steps; the GPU runs 1080-1130, 1160-1220 and 1290-1292
        Phase("rollout", 400 / 2 / 1e6, 400 / 2000, 0.5, (50 + 60 + 2) / 400),
        # update 1500-1950 without the optimiser's 1800-1900, and 2100-2600; the GPU runs 1520-1522,
        # 1600-1650, 1694-1800, 1900-1950 and 2170-2230
        Phase("update", 850 / 2 / 1e6, 850 / 2000, 1.0, (2 + 50 + 106 + 50 + 60) / 850),
        # one kernel, 1694-1950, covers all of it
        Phase("optimiser", 100 / 2 / 1e6, 100 / 2000, 0.5, 1.0),
        # the rest: the GPU runs 1000-1020, 1950-1990 and 2980-3000
        Phase("other", 650 / 2 / 1e6, 650 / 2000, 1.0, (20 + 40 + 20) / 650),
    ]
    assert [phase.name for phase in gpu.phases] == [phase.name for phase in expected]
    for phase, want in zip(gpu.phases, expected, strict=True):
        assert phase.seconds == pytest.approx(want.seconds), phase.name
        assert phase.share == pytest.approx(want.share), phase.name
        assert (phase.calls, phase.busy) == (want.calls, pytest.approx(want.busy)), phase.name


def test_idle_time_is_what_no_stream_works_in(gpu: Analysis) -> None:
    # 1000-1020 (of a kernel from before the step), 1080-1130, 1160-1220 (two streams overlap),
    # 1290-1292, 1520-1522, 1600-1650, 1694-1990, 2170-2230, 2980-3000 (cut at the end)
    busy = 20 + 50 + 60 + 2 + 2 + 50 + 296 + 60 + 20
    assert gpu.idle == pytest.approx(1 - busy / 2000)


def test_every_kernel_of_the_table(gpu: Analysis) -> None:
    # all that was launched within the steps; the kernel at 990 was not
    everything = 40 + 10 + 40 + 40 + 2 + 2 + 110 + 256 + 60 + 40
    product = 2 * 1024 * 2048 * 4096
    product_bytes = 2 * (1024 * 2048 + 2048 * 4096 + 1024 * 4096)
    logits = 4096 * 50_000
    # logits read and written in bf16, targets (int64), three statistics and a gradient (fp32)
    logits_bytes = 2 * 2 * logits + 4096 * (8 + 4 * 4)
    added = 1024 * 4096
    adam = 1_000_000 + 500_000  # parameters
    expected = {
        ("update", "token_logprobs_bwd_kernel"): Kernel(
            *("update", "", 1, 256.0, 256 / everything),
            *(logits_bytes, 15 * logits, logits_bytes / 256 / 1e3, 15 * logits / 256 / 1e6),
            roofline=logits_bytes / 4e6 / 256,  # 204.8 µs to move, 61.4 µs to compute
            **{"registers": 40, "occupancy": 0.75, "blocks_per_sm": 403.393951},
            **{"grid": (13, 4096, 1), "block": (256, 1, 1), "shared_bytes": 64},
        ),
        # one launched by the backward thread (50 µs, 12 %), one in the other step (60 µs, 23 %)
        ("update", NVJET): Kernel(
            *("update", "", 2, 110.0, 110 / everything),
            *(2 * product_bytes, 2 * product),
            *(2 * product_bytes / 110 / 1e3, 2 * product / 110 / 1e6),
            roofline=2 * (product / 8e8) / 110,  # 21.5 µs each to compute, 7.3 µs to move
            **{"registers": 168, "occupancy": (50 * 0.12 + 60 * 0.23) / 110},
            **{"blocks_per_sm": 0.969697, "grid": (2, 64, 1), "block": (384, 1, 1)},
            shared_bytes=213248,
        ),
        ("update", "FillFunctor"): Kernel(
            *("update", "", 1, 60.0, 60 / everything),
            *(4 * 15_000_000, 0.0, 4 * 15_000_000 / 60 / 1e3, None),
            roofline=15 / 60,  # 60 MB at 4e6 B/µs
            **{"registers": 18, "occupancy": 1.0, "blocks_per_sm": 221.954544},
            **{"grid": (29298, 1, 1), "block": (128, 1, 1), "shared_bytes": 0},
        ),
        # one operator, two launches; runs after the phase that launched it
        ("optimiser", "multi_tensor_apply_kernel"): Kernel(
            *("optimiser", "", 2, 40.0, 40 / everything),
            *(4 * 7 * adam, 15 * adam, 4 * 7 * adam / 40 / 1e3, 15 * adam / 40 / 1e6),
            roofline=(4 * 7 * adam) / 4e6 / 40,
            **{"registers": 60, "occupancy": (30 * 0.04 + 10 * 0.02) / 40},
            **{"blocks_per_sm": 0.174242, "grid": (23, 1, 1), "block": (512, 1, 1)},
            shared_bytes=0,
        ),
        # over the bus: no roofline of the device's memory
        ("rollout", "Memcpy HtoD"): Kernel(
            "rollout", "", 1, 40.0, 40 / everything, 1e6, 0.0, 1e6 / 40 / 1e3
        ),
        ("rollout", NVJET): Kernel(
            *("rollout", "", 1, 40.0, 40 / everything),
            *(product_bytes, product, product_bytes / 40 / 1e3, product / 40 / 1e6),
            roofline=product / 8e8 / 40,
            **{"registers": 168, "occupancy": 0.18, "blocks_per_sm": 0.969697},
            **{"grid": (2, 64, 1), "block": (384, 1, 1), "shared_bytes": 213248},
        ),
        ("rollout", "CUDAFunctor_add"): Kernel(
            *("rollout", "", 1, 40.0, 40 / everything),
            *(3 * 2 * added, added, 3 * 2 * added / 40 / 1e3, added / 40 / 1e6),
            roofline=3 * 2 * added / 4e6 / 40,
            **{"registers": 30, "occupancy": 0.75, "blocks_per_sm": 31.030304},
            **{"grid": (4096, 1, 1), "block": (128, 1, 1), "shared_bytes": 0},
        ),
        # launched by the same operator as the product, which has the cost
        ("rollout", "splitKreduce_kernel"): Kernel(
            *("rollout", "", 1, 10.0, 10 / everything),
            **{"registers": 32, "occupancy": 1.0, "blocks_per_sm": 7.757576},
            **{"grid": (1024, 1, 1), "block": (512, 1, 1), "shared_bytes": 0},
        ),
        ("rollout", "Memcpy DtoH"): Kernel(
            "rollout", "", 1, 2.0, 2 / everything, 4.0, 0.0, 4 / 2 / 1e3
        ),
        ("update", "Memset"): Kernel(
            *("update", "", 1, 2.0, 2 / everything, 2e6, 0.0, 2e6 / 2 / 1e3),
            roofline=0.5 / 2,  # 2 MB at 4e6 B/µs
        ),
    }
    assert everything == 600
    assert len(gpu.kernels) == len(expected)
    totals = [kernel.total_us for kernel in gpu.kernels]
    assert totals == sorted(totals, reverse=True)
    for kernel in gpu.kernels:
        ((_, want),) = [
            (key, value)
            for key, value in expected.items()
            if key[0] == kernel.phase and key[1] in kernel.name
        ]
        for field in Kernel.__dataclass_fields__:
            if field != "name":
                value = getattr(want, field)
                wanted = pytest.approx(value) if isinstance(value, (int, float)) else value
                assert getattr(kernel, field) == wanted, (kernel.name, field)


def test_launches_and_waits(gpu: Analysis) -> None:
    # 501, 502, 504, 601, 602, 603, 604, 701, 702; the driver's call inside 603 is the same launch,
    # copies and the memset are none
    assert gpu.launches == 9
    assert gpu.waits == (  # the cudaDeviceSynchronize at 3100 is after the steps
        Wait("cudaStreamSynchronize", "rollout", 1, 60.0),
        Wait("cudaDeviceSynchronize", "update", 1, 25.0),
    )
    assert [(sync.file, sync.count) for sync in gpu.syncs] == [
        ("rewards.py", 4),
        ("fastppo/training/optim.py", 2),
    ]


# The recorded trace


def test_phases_of_a_recorded_iteration_add_up_to_its_wall_time(cpu: Analysis) -> None:
    names = [phase.name for phase in cpu.phases]
    assert names == [
        *("rollout", "reward", "pack", "evaluate", "old_logprobs", "ref", "values"),
        *("advantages", "update", "optimiser", "other"),
    ]
    assert sum(phase.share for phase in cpu.phases) == pytest.approx(1)
    # the phases are the trace's, the wall time is a clock's
    assert sum(phase.seconds for phase in cpu.phases) == pytest.approx(cpu.wall_us / 1e6, rel=0.03)
    assert cpu.phases[-1].share < 0.03
    assert all(0 < phase.busy < 1 for phase in cpu.phases[:-1])


def test_operators_of_a_recorded_iteration(cpu: Analysis) -> None:
    assert (cpu.idle, cpu.launches, cpu.waits) == (None, None, ())
    kernels = {(kernel.phase, kernel.name): kernel for kernel in cpu.kernels}
    assert sum(kernel.share for kernel in cpu.kernels) == pytest.approx(1)
    assert sum(kernel.total_us for kernel in cpu.kernels) < cpu.traced_us
    # The reference pass: tokens of 2 prompts of 3 ids and 1 response each, 64 units, 128 in the
    # MLP, 4 query heads and 2 of keys of 16, 13 words at the 2 rows that are scored. One layer's
    # seven products and the head's; the trace's own rows have the count.
    tokens, rows = 8, 2
    flops = 2 * tokens * 64 * (64 + 2 * 32 + 64 + 3 * 128) + 2 * rows * 64 * 13
    product = kernels["ref", "aten::mm"]
    assert (product.calls, product.flops) == (8, flops)
    update = kernels["update", "aten::mm"]  # forward and both gradients
    assert update.flops == pytest.approx(3 * flops, rel=0.01)
    assert ("update", "aten::linear") in kernels  # around a product, without its cost
    assert kernels["update", "aten::linear"].flops is None
    assert kernels["optimiser", "aten::_fused_adamw_"].bytes is not None


# Small traces


def test_nested_phases_count_for_the_innermost_and_threads_for_themselves() -> None:
    result = analysed(
        annotation("advantages", 0, 100),
        annotation("fastppo::advantages", 10, 80),  # the same phase, entered once
        annotation("fastppo::ref", 20, 30),
        annotation("mine", 55, 10),  # not a phase
        annotation("rollout", 100, 50),
        annotation("reward", 110, 20, tid=2),  # beside the main thread
        span("cpu_op", "aten::x", 112, 4, tid=2),
        span("cpu_op", "aten::y", 112, 4, tid=3),
    )
    assert [(p.name, round(1e6 * p.seconds), p.calls) for p in result.phases] == [
        ("advantages", 70, 1),
        ("ref", 30, 1),
        ("rollout", 50, 1),
        ("other", 0, 1),
    ]
    assert result.steps == 1 and result.wall_us == result.traced_us == 150
    assert {(k.phase, k.name) for k in result.kernels} == {
        ("reward", "aten::x"),
        ("rollout", "aten::y"),
    }


def test_the_programs_own_steps_go_before_the_profilers() -> None:
    result = analysed(
        annotation("ProfilerStep#1", 0, 100),
        annotation("fastppo::step", 10, 50),
        annotation("update", 5, 60),
    )
    assert (result.steps, result.traced_us) == (1, 50)
    assert [(p.name, p.share) for p in result.phases] == [("update", 1.0), ("other", 0.0)]


def test_operators_are_counted_without_those_they_call() -> None:
    shapes = {"Input Dims": [[8, 4], [4, 2]], "Input type": ["float", "float"]}
    result = analysed(
        annotation("update", 0, 100),
        span("cpu_op", "aten::matmul", 10, 50),
        span("cpu_op", "aten::mm", 20, 30, args=shapes),
        span("cpu_op", "aten::empty", 25, 5),
        ceilings=Ceilings(copy_gb_s=1.0, bf16_tflops=1.0, fp32_tflops=0.1),
    )
    assert {k.name: (k.total_us, k.flops) for k in result.kernels} == {
        "aten::matmul": (20, None),
        "aten::mm": (25, 2 * 8 * 4 * 2),
        "aten::empty": (5, None),
    }
    product = next(k for k in result.kernels if k.name == "aten::mm")
    # 224 bytes at 1000 a µs; 128 operations at 1e5 a µs take less
    assert product.roofline == pytest.approx(0.224 / 25)
    assert result.phases[0].busy == pytest.approx(0.5)


def test_work_is_counted_where_it_is_done() -> None:
    pair = {"Input Dims": [[10], [10]], "Input type": ["float", "float"]}
    product = {"Input Dims": [[5], [2, 3], [3, 5]], "Input type": ["float"] * 3}
    result = analysed(
        annotation("update", 0, 100),
        span("cpu_op", "aten::mul_", 0, 10, args=pair),
        span("cpu_op", "aten::mul", 1, 8, args=pair),  # does the outer one's work
        span("cpu_op", "aten::addmm", 20, 20, args=product),
        span("cpu_op", "aten::copy_", 21, 2, args=pair),  # on the way to the product
    )
    flops = {k.name: k.flops for k in result.kernels}
    assert flops == {"aten::mul_": None, "aten::mul": 10, "aten::addmm": 60, "aten::copy_": 0}


def test_rates_are_those_of_the_calls_whose_cost_is_known() -> None:
    shapes = {"Input Dims": [[1000], [1000]], "Input type": ["float", "float"]}
    result = analysed(
        annotation("update", 0, 100),
        span("cpu_op", "aten::add", 0, 10, args=shapes),
        span("cpu_op", "aten::add", 20, 30),  # recorded without shapes
        ceilings=Ceilings(copy_gb_s=2.0, bf16_tflops=1.0, fp32_tflops=1.0),
    )
    (row,) = result.kernels
    assert (row.calls, row.total_us, row.bytes, row.flops) == (2, 40, 12_000, 1000)
    assert row.gb_s == pytest.approx(1.2) and row.tflop_s == pytest.approx(1e-4)
    assert row.roofline == pytest.approx(6 / 10)  # 12 kB at 2000 B a µs


def test_only_launches_within_the_steps_count() -> None:
    calls = ("cudaLaunchKernel", "cudaGraphLaunch", "cudaLaunchHostFunc", "cudaMemcpyAsync")
    result = analysed(
        annotation("update", 0, 100),
        *(
            span("cuda_runtime", name, 10 * i, 1, args={"correlation": 1 + i})
            for i, name in enumerate(calls)
        ),
        span("cuda_runtime", "cudaLaunchKernel", 200, 1, args={"correlation": 9}),
        is_cuda=True,
    )
    assert result.launches == 2
    assert (result.idle, result.kernels) == (1.0, ())


def test_a_copy_within_the_device_reads_and_writes() -> None:
    copy = span("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 5, 10, args={"bytes": 1000})
    ceilings = Ceilings(copy_gb_s=1.0, bf16_tflops=1.0, fp32_tflops=1.0)
    result = analysed(annotation("update", 0, 100), copy, is_cuda=True, ceilings=ceilings)
    (row,) = result.kernels
    assert (row.bytes, row.gb_s, row.roofline) == (2000, 0.2, pytest.approx(0.2))


def test_costs_from_outside_the_trace_are_used_first() -> None:
    launch = span("cuda_driver", "cuLaunchKernel", 1, 1, args={"correlation": 1})
    kernel = span("kernel", "gae_fwd_kernel", 5, 10, args={"correlation": 1})
    result = analysed(
        annotation("advantages", 0, 4),
        launch,
        kernel,
        is_cuda=True,
        costs={"gae_fwd": Cost(2e6, 3e6)},
    )
    (row,) = result.kernels
    assert (row.phase, row.bytes, row.flops) == ("advantages", 2e6, 3e6)
    assert (row.gb_s, row.tflop_s, row.roofline) == (200.0, 0.3, None)  # no ceilings, no roofline


def test_a_trace_without_steps_or_phases_is_refused_with_what_it_has() -> None:
    with pytest.raises(ValueError, match=r"expected phases .*among its ranges, got \['mine'\]"):
        analysed(annotation("mine", 0, 1))


def test_the_analysis_is_the_same_whatever_the_clock_started_at(gpu: Analysis) -> None:
    trace = Trace.load(HERE / "gpu_trace.json")
    late = Trace(tuple(replace(each, start=each.start + 4096.0**3) for each in trace.spans))
    moved = analyse(late, gpu.meta)
    assert moved == gpu


def test_wall_time_comes_from_the_host_where_it_is_known(gpu: Analysis) -> None:
    trace = Trace.load(HERE / "gpu_trace.json")
    assert analyse(trace, replace(gpu.meta, steps=())).wall_us == 2000
    assert analyse(trace, replace(gpu.meta, steps=(Step(7.0),))).wall_us == 7


def test_the_analysis_needs_no_torch() -> None:
    program = (
        "import sys, fastppo.profiling.analysis, fastppo.profiling.page, fastppo.profiling.table\n"
        "print(sorted({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
