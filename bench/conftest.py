"""Options of `pytest bench`."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: less spinning on a busy machine

import argparse

import pytest

from fastppo.benchmarks.registry import Benchmark, select_cases


def chosen(names: str) -> list[Benchmark]:
    """Cases from names separated by commas."""
    try:
        return select_cases([name for name in names.split(",") if name])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastppo")
    group.addoption(
        "--sizes",
        choices=("smoke", "cpu", "gpu"),
        help="of bench_ops.py; gpu on a machine with CUDA, else cpu",
    )
    group.addoption(
        "--cases", type=chosen, default="", help="names, separated by commas; all of them"
    )
