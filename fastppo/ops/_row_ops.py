"""The one place that chooses who works on rows of logits: torch (_rows.py) or Triton (_cuda.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from fastppo.ops._rows import RowStats, row_gradient, row_stats


class RowOps(NamedTuple):
    """What a device does with rows of logits: `row_stats` and `row_gradient`."""

    stats: Callable[..., RowStats]
    gradient: Callable[..., None]


def row_ops(device: torch.device) -> RowOps:
    """Those of a device."""
    if device.type == "cuda":
        from fastppo.ops import _cuda

        return RowOps(_cuda.row_stats, _cuda.row_gradient)
    return RowOps(row_stats, row_gradient)
