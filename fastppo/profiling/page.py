"""One self-contained HTML page of an analysis."""

from __future__ import annotations

from pathlib import Path

from fastppo.profiling.analysis import Analysis


def write_page(analysis: Analysis, path: str | Path) -> None:
    """Write the page, replacing an older one."""
    raise NotImplementedError
