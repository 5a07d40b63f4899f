"""The tables of a profile, in the terminal and as files, and how their numbers are written."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastppo.profiling.analysis import Analysis, analyse
from fastppo.profiling.meta import Meta
from fastppo.profiling.names import amount, duration, percent, short_name
from fastppo.profiling.table import print_table, write_csv, write_json
from fastppo.profiling.trace import Trace

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    meta = Meta.load(HERE / "gpu_meta.json")
    return analyse(Trace.load(HERE / "gpu_trace.json"), meta)


def printed(analysis: Analysis, top: int = 20, width: int = 160) -> list[str]:
    out = io.StringIO()
    print_table(analysis, Console(file=out, width=width, color_system=None), top)
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_the_terminal_shows_everything(analysis: Analysis) -> None:
    lines = printed(analysis)
    assert lines[0] == (
        "NVIDIA H200, 2 steps: 1.00 ms a step, GPU idle 72 %, 4.50 launches, 6 host syncs"
    )
    for line in (
        "rollout 200 µs 20 % 28 %",
        "token_logprobs_bwd_kernel update 1 256 µs 43 % 819 MB 3.07 G 3,200 12.0 80 % 40 75 %",
        "splitKreduce_kernel rollout 1 10.0 µs 1.7 % – – – – – 32 100 %",
        "rewards.py:8 score rollout aten::_local_scalar_dense 4",
        "cudaDeviceSynchronize in update: the host waits 12.5 µs a step",
    ):
        assert line in lines, line


def test_a_narrow_terminal_shows_names_rather_than_amounts(analysis: Analysis) -> None:
    lines = printed(analysis, width=80)
    for line in (
        "name phase time share GB/s TFLOP/s roofline",
        "token_logprobs_bwd_kernel update 256 µs 43 % 3,200 12.0 80 %",
        "rewards.py:8 score rollout aten::_local_scalar_dense 4",
    ):
        assert line in lines, line


def test_only_the_top_is_printed_and_the_rest_counted(analysis: Analysis) -> None:
    lines = printed(analysis, top=2)
    assert "and 8 more, 39 % of the time of all" in lines  # 234 of 600 µs
    assert not [line for line in lines if "FillFunctor" in line]


def test_names_are_no_markup_and_no_terminal_escapes(analysis: Analysis) -> None:
    kernel = replace(analysis.kernels[0], name="[red]k[/red]\x1b[31m", phase="[b]p")
    lines = printed(replace(analysis, kernels=(kernel,)))
    assert [line for line in lines if line.startswith(r"[red]k[/red]\x1b[31m [b]p")]


def test_csv_has_every_kernel_and_field(analysis: Analysis, tmp_path: Path) -> None:
    write_csv(analysis, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(analysis.kernels) == 10
    assert rows[0]["name"] == "token_logprobs_bwd_kernel"
    assert (rows[0]["grid"], rows[0]["registers"]) == ("13x4096x1", "40")
    assert float(rows[0]["roofline"]) == analysis.kernels[0].roofline
    unknown = next(row for row in rows if "splitK" in row["name"])
    assert (unknown["bytes"], unknown["roofline"]) == ("", "")


def test_json_is_the_analysis(analysis: Analysis, tmp_path: Path) -> None:
    write_json(analysis, tmp_path / "table.json")
    value = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert value["idle"] == analysis.idle and value["launches"] == 9
    assert value["kernels"][0]["name"] == analysis.kernels[0].name
    assert value["meta"]["ceilings"]["copy_gb_s"] == 4000


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("aten::_fused_adamw_", "_fused_adamw_"),
        ("fastppo::gae", "fastppo::gae"),
        ("Memcpy HtoD (Pinned -> Device)", "Memcpy HtoD (Pinned -> Device)"),
        ("nvjet_tst_128x256", "nvjet_tst_128x256"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "autograd: AddmmBackward0"),
        (
            "autograd::engine::evaluate_function: torch::autograd::AccumulateGrad",
            "autograd: AccumulateGrad",
        ),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
            "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>)",
            "vectorized_elementwise_kernel · FillFunctor",
        ),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::"
            "(anonymous namespace)::FusedOptimizerTensorListMetadata<4>, at::native::"
            "(anonymous namespace)::FusedAdamMathFunctor<float, 4> >(int)",
            "multi_tensor_apply_kernel · FusedAdamMathFunctor",
        ),
        (
            "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::"
            "MeanOps<float, float> > >(x)",
            "reduce_kernel · ReduceOp",
        ),
        ("void cublasLt::splitKreduce_kernel<32, 16, int>(p)", "splitKreduce_kernel"),
    ],
)
def test_short_names(name: str, short: str) -> None:
    assert short_name(name) == short


def test_numbers_as_people_read_them() -> None:
    times = [duration(us) for us in (0, 0.5, 999.4, 999.6, 1234, 999_400, 999_999, 65e6)]
    assert times == [
        "0 µs",
        "0.500 µs",
        "999 µs",
        "1.00 ms",
        "1.23 ms",
        "999 ms",
        "1.00 s",
        "65.0 s",
    ]
    amounts = [amount(value, "B") for value in (0, 4, 999, 1000, 999_600, 2.5e9, 3e20)]
    assert amounts == ["0 B", "4 B", "999 B", "1.00 kB", "1.00 MB", "2.50 GB", "300 EB"]
    assert [percent(share) for share in (None, 0, 0.0994, 0.0996, 1)] == [
        *("–", "0.0 %", "9.9 %", "10 %", "100 %")
    ]
