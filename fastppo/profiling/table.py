"""An analysis as tables in the terminal, and as JSON and CSV."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fastppo.profiling.analysis import Analysis


def print_table(analysis: Analysis, console: Console, top: int = 20) -> None:
    """Print phases, the `top` kernels and the syncs."""
    raise NotImplementedError


def write_json(analysis: Analysis, path: str | Path) -> None:
    """Write everything."""
    raise NotImplementedError


def write_csv(analysis: Analysis, path: str | Path) -> None:
    """Write the kernels, one row each."""
    raise NotImplementedError
