"""Growth: the exponent of a fit is right, and stands beside time and memory in table and plot."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from fastppo.benchmarks.cases.scaling_update import inputs, transformers_step
from fastppo.benchmarks.plots import growth_figure, save_plots
from fastppo.benchmarks.registry import in_float64, select_cases
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.run import COPY
from fastppo.benchmarks.scaling import growing_letter, series, slope, slope_text
from fastppo.benchmarks.tables import markdown
from fastppo.profiling.case import Size
from fastppo.profiling.meta import Ceilings

NUMBERS = (1024, 8192, 65_536)


def rows_of(provider: str, time: float, memory: float | None) -> list[Row]:
    """Rows whose time and memory grow with these powers of T; the point in the middle lies above,
    which does not change the fit."""
    above = {8192: 1.5}
    return [
        Row(
            case="update",
            size=f"T={t} S=1024 R=25 fp32",
            provider=provider,
            status="ok",
            axis=float(t),
            seconds=(1e-6 * above.get(t, 1.0) * t**time,) * 3,
            peak_bytes=None if memory is None else round(1000 * above.get(t, 1.0) * t**memory),
            floor=1e-7,
        )
        for t in NUMBERS
    ]


@pytest.fixture(scope="module")
def result() -> Result:
    return Result(
        commit="",
        dirty=False,
        date="2026-01-01T00:00:00Z",
        command="fastppo bench",
        machine={"device": "cpu", "cpu": "one", "threads": 1},
        versions={"torch": "2"},
        ceilings=Ceilings(copy_gb_s=1.0, bf16_tflops=1.0, fp32_tflops=1.0),
        rows=(
            *rows_of("fastppo", 1.25, 0.5),
            *rows_of("peer", 2.0, 1.0),
            *rows_of(COPY, 1.0, None),
        ),
    )


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 2.0])
def test_slope_of_a_power(power: float) -> None:
    points = [(float(t), 3.0 * t**power) for t in NUMBERS]
    assert slope(points) == pytest.approx(power, abs=1e-12)


def test_slope_is_a_least_squares_fit_and_needs_two_points() -> None:
    assert slope([(1.0, 1.0), (10.0, 10.0), (100.0, 10.0)]) == pytest.approx(0.5)
    assert slope([(5.0, 1.0)]) is None
    assert slope_text([(5.0, 1.0)]) == ""
    assert slope_text([(1.0, 1.001), (10.0, 1.0)]) == "0.00"  # not -0.00


def test_rows_without_a_figure_have_no_point(result: Result) -> None:
    wrong = replace(result.rows[0], status="wrong", seconds=())
    found = series([wrong, *result.rows[1:]], "seconds")
    assert [number for number, _ in found["fastppo"]] == [8192, 65_536]
    assert set(found) == {"fastppo", "peer"}  # the copy says nothing about growth
    assert set(series(result.rows, "bytes")) == {"fastppo", "peer"}


def test_the_letter_is_the_one_that_grows(result: Result) -> None:
    assert growing_letter(result.rows) == ("T", "S=1024 R=25 fp32")
    assert growing_letter(result.rows[1:2]) == ("T", "S=1024 R=25 fp32")
    assert growing_letter(result.rows[:2])[0] == "T"  # though the first T is also S


def test_the_table_has_both_ends_and_both_exponents(result: Result) -> None:
    text = markdown(result)
    growth = text[text.index("## update: growth with T at S=1024 R=25 fp32") :]
    for name, first, time, memory in (
        ("fastppo", "5.79 ms", "1.25", "0.50"),
        ("peer", "1.05 s", "2.00", "1.00"),
    ):
        (line,) = re.findall(rf"^\| {name} .*$", growth, re.MULTILINE)
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert [cells[i] for i in (1, 3, 6)] == [first, time, memory]
    assert COPY not in growth


def test_the_plot_has_memory_beside_time_with_exponents(result: Result, tmp_path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = growth_figure(plt, "update", result.rows)
    time, memory = ([t.get_text() for t in a.get_legend().get_texts()] for a in figure.axes)
    assert time == ["fastppo: slope 1.25", "peer: slope 2.00"]
    assert memory == ["fastppo: slope 0.50", "peer: slope 1.00"]
    plt.close(figure)
    (path,) = save_plots(result, tmp_path)
    assert path.stat().st_size > 10_000 and not plt.get_fignums()


def test_what_hardly_grows_looks_flat() -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    flat = [replace(row, peak_bytes=10**8 + i) for i, row in enumerate(rows_of("fastppo", 1, 1))]
    figure = growth_figure(plt, "update", flat)
    low, high = figure.axes[1].get_ylim()
    assert high / low > 10
    plt.close(figure)


def test_growth_covers_what_is_promised() -> None:
    cases = {c.name: c for c in select_cases([]) if c.axis}
    assert {c.axis for c in cases.values()} == {"T", "V", "S", "R"}
    for name in ("cpu", "gpu"):
        tokens = [size["T"] for size in cases["update_by_tokens"].sizes[name]]
        assert (min(tokens), max(tokens)) == (1024, 65_536)
        for size in cases["update_by_length"].sizes[name]:
            assert size["T"] == cases["update_by_length"].sizes[name][0]["T"]
            assert size["T"] % size["S"] == 0
    for case in cases.values():
        assert all(p.torch_memory for p in case.providers.values()) and len(case.providers) > 1
        assert all(len(case.sizes[name]) >= 3 for name in ("cpu", "gpu"))


@pytest.mark.parametrize("tokens", [16, 48, 1000])
def test_the_reference_in_parts_is_the_whole(tokens: int) -> None:
    size = Size(T=160, S=16, R=50, H=96, L=1, V=64)
    x = in_float64(inputs(size, torch.device("cpu"), 3))
    whole = transformers_step(x, size)()
    for name, out in transformers_step(x, size, tokens)().items():
        torch.testing.assert_close(out, whole[name], rtol=1e-10, atol=1e-13)
