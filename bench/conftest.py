"""Options of `pytest bench`."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: less spinning on a busy machine

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastppo")
    group.addoption(
        "--sizes",
        choices=("smoke", "cpu", "gpu"),
        help="of bench_ops.py; gpu on a machine with CUDA, else cpu",
    )
    group.addoption("--cases", default="", help="names, separated by commas; all of them")
