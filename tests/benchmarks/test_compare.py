"""Two results: what counts as slower, and what cannot be compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastppo.benchmarks.compare import compare, drift, noise, report
from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.benchmarks.results import SCHEMA, Result
from fastppo.cli.main import main
from fastppo.profiling.case import Call, Inputs, Size

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


def slowed(case: Benchmark) -> Benchmark:
    return replace(case, providers={**case.providers, "fastppo": twice(case.providers["fastppo"])})


@pytest.fixture(scope="session")
def measured(case: Benchmark, measure: Measure) -> Result:
    return measure(case, budget=1.0, passes=3)


@pytest.mark.slow
def test_the_same_code_twice_is_not_slower(
    case: Benchmark, measure: Measure, measured: Result
) -> None:
    assert [len(row.passes) for row in measured.rows] == [3, 3, 3]
    changes = compare(measured, measure(case, budget=1.0, passes=3))
    assert [change.key[2] for change in changes] == ["fastppo", "torch"]
    assert not any(change.worse for change in changes)


@pytest.mark.slow
def test_twice_the_work_is_slower_and_is_named(
    case: Benchmark,
    measure: Measure,
    measured: Result,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    after = measure(slowed(case), budget=1.0, passes=3)
    changes = {change.key[2]: change for change in compare(measured, after)}
    assert changes["fastppo"].verdict == "slower" and changes["torch"].verdict != "slower"
    measured.save(tmp_path / "a.json")
    after.save(tmp_path / "b.json")
    assert main(["bench", "compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 1
    assert "sums / N=50000 fp32 / fastppo: slower" in capsys.readouterr().out
    assert main(["bench", "compare", str(tmp_path / "b.json"), str(tmp_path / "a.json")]) == 0
    assert "faster" in capsys.readouterr().out


PASSES, SAMPLES = 3, 20
CALIBRATION = "calibration"
CELL = "sums N=50000 fp32"


def noisy(
    measured: Result,
    seed: int = 0,
    *,
    times: Mapping[str, float] | None = None,
    bad: Mapping[int, float] | None = None,
    one_pass: bool = False,
) -> Result:
    """A run of known speed, with the noise that was seen in real ones.

    Samples of a pass share 2 % of noise, and a tenth of them is disturbed besides; more than that
    in rows of microseconds would be a bad pass.

    Args:
        times: how many times as long a provider takes; "" is everything, the calibration too.
        bad: a pass, and how many times as long everything in it but the calibration takes.
        one_pass: the samples are those of one pass.
    """
    rng = np.random.default_rng(seed)
    times, bad = times or {}, bad or {}

    def samples(name: str) -> list[list[float]]:
        found = []
        for number in range(PASSES):
            common = 1e-3 * times.get("", 1.0) * times.get(name, 1.0) * rng.normal(1, 0.02)
            common *= 1.0 if name == CALIBRATION else bad.get(number, 1.0)
            disturbed = 1 + 3 * (rng.random(SAMPLES) < 0.1)
            found.append(list(common * (1 + rng.exponential(0.02, SAMPLES)) * disturbed))
        return [[x for part in found for x in part]] if one_pass else found

    rows = []
    for row in measured.rows:
        parts = samples(row.provider)
        flat = [x for part in parts for x in part]
        rows.append(replace(row, seconds=flat, passes=[len(part) for part in parts]))
    return replace(measured, rows=tuple(rows), calibration={CELL: samples(CALIBRATION)})


def worse(before: Result, after: Result) -> list[str]:
    return [change.key[2] for change in compare(before, after) if change.worse]


SEEDS = range(10)


@pytest.mark.parametrize("one_pass", [False, True], ids=["passes", "parts of one pass"])
def test_noise_is_not_slower_and_a_slowdown_is(measured: Result, one_pass: bool) -> None:
    for seed in SEEDS:
        before = noisy(measured, seed, one_pass=one_pass)
        assert not worse(before, noisy(measured, seed + 100, one_pass=one_pass))
        for factor in (2.0, 1.3):
            slow = noisy(measured, seed + 100, times={"fastppo": factor}, one_pass=one_pass)
            assert worse(before, slow) == ["fastppo"]
            assert "faster" in {change.verdict for change in compare(slow, before)}
        assert not worse(before, noisy(measured, seed + 100, times={"fastppo": 1.05}))


def ours(result: Result, other: Result) -> Result:
    """A result whose rows are fastppo's of the one and everybody else's of the other."""
    rows = (
        a if a.provider == "fastppo" else b for a, b in zip(result.rows, other.rows, strict=True)
    )
    return replace(other, rows=tuple(rows))


@pytest.mark.parametrize("number", range(PASSES))
def test_one_bad_pass_changes_nothing(measured: Result, number: int) -> None:
    for seed in SEEDS:
        quiet = noisy(measured, seed)
        busy = ours(noisy(measured, seed + 100, bad={number: 3.0}), noisy(measured, seed + 100))
        assert not worse(quiet, busy)
        assert not worse(busy, quiet)
        slow = {"fastppo": 1.5}
        after = noisy(measured, seed + 200, times=slow)
        assert worse(busy, after) == ["fastppo"]  # it hides nothing either
        bad = noisy(measured, seed + 300, times=slow, bad={number: 3.0})
        assert worse(quiet, ours(bad, noisy(measured, seed + 300))) == ["fastppo"]


def test_two_bad_passes_are_not_slower_code(measured: Result) -> None:
    for seed in SEEDS:
        quiet = noisy(measured, seed)
        bad = noisy(measured, seed + 100, bad={0: 2.0, 2: 1.5})
        assert not worse(quiet, ours(bad, quiet))


@pytest.mark.parametrize("one_pass", [False, True], ids=["passes", "parts of one pass"])
def test_one_lucky_pass_does_not_make_the_others_slow(measured: Result, one_pass: bool) -> None:
    for seed in SEEDS:
        lucky = noisy(measured, seed, bad={1: 0.6}, one_pass=one_pass)
        quiet = noisy(measured, seed + 100)
        assert not worse(ours(lucky, quiet), quiet)


def test_a_slower_machine_is_not_slower_code(measured: Result) -> None:
    quiet, slow = noisy(measured), noisy(measured, 1, times={"": 1.5})
    assert drift(quiet, slow) == pytest.approx(1.5, rel=0.1)
    assert not any(change.worse for change in compare(quiet, slow))
    alone = ours(slow, quiet)  # nothing but the calibration says that it was the machine
    assert worse(quiet, alone) == ["fastppo"]
    assert not worse(quiet, replace(alone, calibration=slow.calibration))
    both = noisy(measured, 2, times={"": 1.5, "fastppo": 2.0})
    assert worse(quiet, both) == ["fastppo"]


def test_what_others_shift_by_is_noise(measured: Result) -> None:
    quiet = noisy(measured)
    busy = noisy(measured, 1, times={"fastppo": 1.5, "torch": 1.5})
    assert noise(quiet, busy) == pytest.approx(1.5, rel=0.1)
    assert not worse(quiet, busy)
    slower = noisy(measured, 1, times={"fastppo": 2.0, "torch": 1.5})
    assert worse(quiet, slower) == ["fastppo"]


def test_what_got_quicker_does_not_make_the_rest_slower(measured: Result) -> None:
    quicker = {CALIBRATION: 0.5, "torch": 0.5}
    assert not worse(noisy(measured), noisy(measured, 1, times=quicker))


@pytest.fixture(scope="session")
def result(measured: Result) -> Result:
    """For what is not about noise."""
    return noisy(measured)


def test_more_memory_and_new_errors_fail(result: Result) -> None:
    def with_rows(**changes: object) -> Result:
        return replace(result, rows=tuple(replace(r, **changes) for r in result.rows))

    before = with_rows(peak_bytes=100 << 20)
    grown = compare(before, with_rows(peak_bytes=140 << 20))
    assert {change.verdict for change in grown} == {"more memory"}
    assert not any(c.worse for c in compare(before, with_rows(peak_bytes=120 << 20)))
    broken = with_rows(status="wrong", note="y: error 1", seconds=(), passes=())
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
        (f'"schema": {SCHEMA}', '"schema": 99', "expected schema 2, got 99"),
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


def test_samples_are_positive_and_there(result: Result, tmp_path: Path) -> None:
    for seconds, passes, text in (
        ((), (), "is ok without samples"),
        ((1.0, 0.0), (), "not positive"),
        ((1.0, 2.0), (1, 2), "2 samples, but 3 in its passes"),
    ):
        rows = tuple(replace(r, seconds=seconds, passes=passes) for r in result.rows)
        replace(result, rows=rows).save(tmp_path / "result.json")
        with pytest.raises(ValueError, match=text):
            Result.load(tmp_path / "result.json")


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
