"""What is taken to a GPU machine: every peer, at the versions that are tested here."""

from __future__ import annotations

import re
from pathlib import Path

from fastppo.benchmarks.registry import all_cases

ROOT = Path(__file__).resolve().parents[2]
WHEELS = [
    line
    for line in (ROOT / "bench" / "gpu-wheels.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]
ELSEWHERE = {"accelerate", "pandas", "scipy", "flash-attn"}  # of the machine, or for CPUs


def test_every_wheel_is_pinned() -> None:
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = re.findall(r"^([\w-]+)==[\d.]+(?:;.*)?$", constraints, re.MULTILINE)
    assert WHEELS and set(WHEELS) <= set(pinned)


def test_every_peer_travels() -> None:
    needs = {
        name.partition(".")[0].replace("_", "-")
        for case in all_cases().values()
        for provider in case.providers.values()
        for name in provider.needs
    }
    assert needs - ELSEWHERE <= set(WHEELS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (peers,) = re.findall(r"--no-deps (trl .*)$", makefile, re.MULTILINE)
    assert {"trl", "liger-kernel", "verl"} == set(peers.split()) <= needs
