"""Two results: what counts as slower, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastppo.benchmarks.compare import compare, drift, report
from fastppo.benchmarks.registry import Call, Case, Inputs, Provider, Size
from fastppo.benchmarks.results import SCHEMA, Result
from fastppo.cli import main

Measure = Callable[..., Result]


def twice(provider: Provider) -> Provider:
    """The same work two times."""

    def prepare(x: Inputs, size: Size) -> Call:
        call = provider.prepare(x, size)

        def both() -> dict[str, torch.Tensor]:
            call()
            return dict(call())

        return both

    return replace(provider, prepare=prepare)


def slowed(case: Case) -> Case:
    return replace(case, providers={**case.providers, "fastppo": twice(case.providers["fastppo"])})


@pytest.fixture(scope="session")
def measured(case: Case, measure: Measure) -> Result:
    return measure(case, budget=1.0)


@pytest.fixture(scope="session")
def result(measured: Result) -> Result:
    """The same with quiet samples, for what is not about noise."""
    samples = [1e-3 * (1 + 0.01 * (i % 4)) for i in range(12)]
    return replace(
        measured,
        rows=tuple(replace(row, seconds=samples) for row in measured.rows),
        calibration=dict.fromkeys(measured.calibration, samples),
    )


def test_the_same_code_twice_is_not_slower(case: Case, measure: Measure, measured: Result) -> None:
    changes = compare(measured, measure(case, budget=1.0))
    assert [change.key[2] for change in changes] == ["fastppo", "torch"]
    assert not any(change.worse for change in changes)


def test_twice_the_work_is_slower_and_is_named(
    case: Case,
    measure: Measure,
    measured: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = measure(slowed(case), budget=1.0)
    changes = {change.key[2]: change for change in compare(measured, after)}
    assert changes["fastppo"].verdict == "slower" and changes["torch"].verdict != "slower"
    measured.save(tmp_path / "a.json")
    after.save(tmp_path / "b.json")
    assert main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "sums / N=50000 fp32 / fastppo: slower" in capsys.readouterr().out
    assert main(["bench", "compare", str(tmp_path / "b.json"), str(tmp_path / "a.json")]) == 0
    assert "faster" in capsys.readouterr().out


def scaled(result: Result, rows: float, calibration: float = 1.0) -> Result:
    """As if everything had taken that many times as long."""
    return replace(
        result,
        rows=tuple(replace(r, seconds=[rows * s for s in r.seconds]) for r in result.rows),
        calibration={k: [calibration * s for s in v] for k, v in result.calibration.items()},
    )


def test_a_slower_machine_is_not_slower_code(result: Result) -> None:
    slow = scaled(result, 1.5, calibration=1.5)
    assert drift(result, slow) == pytest.approx(1.5)
    assert not any(change.worse for change in compare(result, slow))
    assert all(change.verdict == "slower" for change in compare(result, scaled(result, 1.5)))


def test_one_quiet_moment_shows_that_it_was_noise(result: Result) -> None:
    rows = tuple(replace(row, seconds=[2e-3] * 11 + [1e-3]) for row in result.rows)
    assert not any(change.worse for change in compare(result, replace(result, rows=rows)))


def test_small_effects_do_not_fail(result: Result) -> None:
    assert not any(change.worse for change in compare(result, scaled(result, 1.08)))


def test_more_memory_and_new_errors_fail(result: Result) -> None:
    def with_rows(**changes: object) -> Result:
        return replace(result, rows=tuple(replace(r, **changes) for r in result.rows))

    before = with_rows(peak_bytes=100 << 20)
    grown = compare(before, with_rows(peak_bytes=140 << 20))
    assert {change.verdict for change in grown} == {"more memory"}
    assert not any(c.worse for c in compare(before, with_rows(peak_bytes=120 << 20)))
    broken = with_rows(status="wrong", note="y: error 1", seconds=())
    changes = compare(result, broken)
    assert {change.verdict for change in changes} == {"no longer ok"}
    assert "sums / N=50000 fp32 / fastppo: no longer ok (wrong: y: error 1)" in report(
        result, broken, changes
    )


@pytest.mark.parametrize(
    ("machine", "text"),
    [({"threads": 2}, "threads: .* 1 and 2"), ({"cpu": "other"}, "cpu: .*None and 'other'")],
)
def test_other_hardware_is_refused(result: Result, machine: dict[str, int], text: str) -> None:
    other = replace(result, machine={**result.machine, **machine})
    with pytest.raises(ValueError, match=text):
        compare(result, other)


def test_other_sizes_are_refused(result: Result) -> None:
    other = replace(result, rows=tuple(replace(r, size="N=7 fp32") for r in result.rows))
    with pytest.raises(ValueError, match="sizes: .*N=50000 fp32; .*N=7 fp32"):
        compare(result, other)


def test_a_result_comes_back_from_json(result: Result, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    again = Result.load(path)
    assert again.rows[0].seconds == tuple(result.rows[0].seconds)
    again.save(tmp_path / "again.json")
    assert path.read_bytes() == (tmp_path / "again.json").read_bytes()
    assert not any(change.verdict for change in compare(result, again))


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (f'"schema": {SCHEMA}', '"schema": 99', "expected schema 1, got 99"),
        ('"schema"', '"scheme"', "found no schema"),
        ('"status": "ok"', '"status": "fine"', "unknown status 'fine'"),
        ('"rows"', '"lines"', "damaged result: 'rows'"),
        ('"dirty"', '"clean"', "damaged result"),
        ("{", "[", "expected JSON"),
    ],
)
def test_what_is_not_a_result_is_refused(
    result: Result, tmp_path: Path, old: str, new: str, text: str
) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=text):
        Result.load(path)


def test_the_command_line_refuses_in_one_line(
    result: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result.save(tmp_path / "a.json")
    replace(result, machine={"device": "cuda"}).save(tmp_path / "b.json")
    paths = [str(tmp_path / name) for name in ("a.json", "b.json")]
    assert main(["bench", "compare", *paths]) == 2
    assert "device: the results are of different machines" in capsys.readouterr().err
    assert main(["bench", "compare", paths[0], str(tmp_path / "none.json")]) == 2
    assert main(["bench", "--cases", "gea"]) == 2
    assert "Did you mean 'gae'?" in capsys.readouterr().err
