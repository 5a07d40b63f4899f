"""Runs `interpreted/` under Triton's interpreter, in processes of their own (see conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = {*HERE.glob("interpreted/test_*.py"), HERE / "test_scans.py"}
QUICK = {HERE / "interpreted" / f"test_{name}.py" for name in ("last_block", "value_loss")}


@pytest.mark.parametrize(
    ("files", "marks"),
    [
        pytest.param(QUICK, "not slow", id="quick"),
        pytest.param(FILES - QUICK, "not slow", id="others", marks=pytest.mark.slow),
        pytest.param(FILES, "slow", id="longest", marks=pytest.mark.slow),
    ],
)
def test_kernels_under_the_interpreter(root, files, marks):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *sorted(files)]
    run = subprocess.run(
        [*command, "-m", f"{marks} and not gpu"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, run.stdout[-2000:]
