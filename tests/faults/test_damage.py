"""Damaged folders, files and configurations: each refused on one line, or legitimately not."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

GENERATOR = Path(__file__).with_name("damage.py")


def run(*arguments: str) -> int:
    """How many cases there were, none of which was wrong."""
    done = subprocess.run([sys.executable, GENERATOR, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    print(done.stdout)
    found = re.search(r"(\d+) cases, 0 wrong", done.stdout)
    assert found is not None, done.stdout
    return int(found[1])


def test_a_sample_of_all_damage() -> None:
    assert run("100") >= 15
