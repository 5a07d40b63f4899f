"""Fixtures of the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is a broken test
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: less spinning on a busy machine

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that reading what nobody wrote shows."""
    torch.use_deterministic_algorithms(True)  # its fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT
