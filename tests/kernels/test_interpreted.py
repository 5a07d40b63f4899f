"""Runs `interpreted/` under Triton's interpreter, in a process of its own (see conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def test_kernels_under_the_interpreter(root):
    pytest.importorskip("triton")
    tests = [str(root / "tests" / "kernels" / name) for name in ("interpreted", "test_scans.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(
        [*command, "-m", "not gpu"],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout, run.stdout[-2000:]
