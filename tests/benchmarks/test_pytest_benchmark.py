"""bench/ under pytest-benchmark: groups, saved runs, comparisons that fail where work grew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
# Plug-ins: ceilings that need not be measured, and more work in one op.
CEILINGS = """
from fastppo.benchmarks import run
from fastppo.profiling.meta import Ceilings

run.measure_ceilings = lambda device: Ceilings(1e4, 1e3, 1e3)
"""
SLOWER = """
from fastppo import ops

whiten = ops.whiten
ops.whiten = lambda *args: [whiten(*args) for _ in range(10)][-1]
"""


def pytest_on(*args: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m pytest` in a process of its own, at the root of the source tree."""
    found = os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))
    # pytest-benchmark measures nothing where it takes itself for a worker of pytest-xdist
    own = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *args],
        cwd=ROOT,
        env={**own, "PYTHONPATH": found, "COLUMNS": "250"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_saved_run_is_compared_and_a_real_slowdown_fails(tmp_path: Path) -> None:
    cases = ("bench/bench_ops.py", "--sizes", "smoke", "--cases", "gae,whiten")
    storage = ("--benchmark-storage", str(tmp_path / "saved"))
    against = ("--benchmark-compare", "--benchmark-compare-fail=median:200%")

    first = pytest_on(*cases, *storage, "--benchmark-autosave")
    assert first.returncode == 0, first.stdout
    (saved,) = (tmp_path / "saved").rglob("*.json")
    kept = json.loads(saved.read_text(encoding="utf-8"))["benchmarks"]
    groups = {"gae, B=4 T=64 fp32", "whiten, N=1000 fp32"}
    assert {benchmark["group"] for benchmark in kept} == groups
    assert all(f"benchmark '{group}'" in first.stdout for group in groups)
    assert all(0 < benchmark["extra_info"]["percent_of_roofline"] <= 105 for benchmark in kept)

    (tmp_path / "ceilings.py").write_text(CEILINGS, encoding="utf-8")
    given = ("-p", "ceilings")
    again = pytest_on(*given, *cases, *storage, *against, path=tmp_path)
    assert again.returncode == 0, again.stdout
    assert f"whiten-N=1000 fp32-fastppo] ({saved.name[:4]}" in again.stdout
    assert "whiten-N=1000 fp32-fastppo] (NOW)" in again.stdout

    (tmp_path / "slower.py").write_text(SLOWER, encoding="utf-8")
    slower = pytest_on(*given, "-p", "slower", *cases, *storage, *against, path=tmp_path)
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stderr
    assert "whiten-N=1000 fp32-fastppo] (" in slower.stderr


def test_everything_is_collected_and_a_misspelt_case_is_named() -> None:
    from fastppo.benchmarks.registry import all_cases

    found = pytest_on("bench", "--sizes", "cpu", "--collect-only", "-q")
    assert found.returncode == 0, found.stdout + found.stderr
    for case in all_cases().values():
        for size in case.sizes.get("cpu", ()):
            for name in case.providers:
                assert f"test_op[{case.name}-{size.text}-{name}]" in found.stdout

    wrong = pytest_on("bench", "--cases", "whitten", "--collect-only", "-q")
    assert wrong.returncode == 4
    assert "cases: unknown case 'whitten'. Did you mean 'whiten'?" in wrong.stderr
    assert "Traceback" not in wrong.stdout + wrong.stderr
