"""Kill −9 at every operation of the save path and at random moments: killer.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def killer(root: Path, *args: str | Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, root / "tests" / "checkpoint" / "killer.py", *args],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def every(root: Path) -> Iterator[dict[str, Any]]:
    """In memory where that is possible: a kill −9 loses nothing of what a disk has yet to write."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield killer(root, "every", folder)


# The number of operations at least: fewer would mean that not all are counted.
OPERATIONS = {
    "first": 23,
    "next": 20,
    "prune": 35,
    "replace": 27,
    "sweep": 12,
    "replace, unswept": 40,
    "write_json": 6,
}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", OPERATIONS)
def test_killed_at_every_operation(every: dict[str, Any], scenario: str) -> None:
    result = every[scenario]
    assert result["complaints"] == []
    assert result["status"] == 0 and result["operations"] >= OPERATIONS[scenario]
    assert result["kills"] == 2 * result["operations"]  # before it and halfway through it


@pytest.mark.slow
def test_every_scenario_is_looked_at(every: dict[str, Any]) -> None:
    assert every.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("count", [20, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_at_random_moments(root: Path, tmp_path: Path, count: int) -> None:
    result = killer(root, "random", tmp_path / "x", str(count))
    assert result["complaints"] == []
    # Many times as much on a machine with nothing else to do.
    assert result["saved"] > count / 4 and result["interrupted"] > count / 10
