"""Sums over the sequences of a packed (N,) tensor, deterministic on every device, without host
syncs."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_ids(cu_seqlens: Tensor, num_rows: int) -> Tensor:
    """(N,) int64: the sequence each row belongs to. Empty sequences own no row."""
    rows = torch.arange(num_rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.bucketize(rows, cu_seqlens[1:], right=True)


def segment_sum(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(B,): sums of x (N,) over each sequence, 0 for an empty one; x float32 or float64."""
    if x.numel() == 0:
        return x.new_zeros(cu_seqlens.numel() - 1)
    return torch.segment_reduce(x, "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0.0)
