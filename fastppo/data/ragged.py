"""Index arithmetic on ragged layouts: sequences back to back, told apart by their offsets.

Everything is numpy on the host: lengths are known there, so no device is ever waited for.
Letters as in sequences.py: B sequences, T tokens, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]


def offsets(lengths: Int32s) -> Int32s:
    """(B,) lengths → (B+1,) int32: 0 and the running sums.

    Raises:
        ValueError: the sum is past int32.
    """
    cu = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=cu[1:])
    if cu[-1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"lengths: expected a sum ≤ 2147483647 (int32 offsets), got {cu[-1]}; take fewer "
            "sequences at a time"
        )
    return cu.astype(np.int32)


def ragged_arange(starts: Int32s, lengths: Int32s) -> Int32s:
    """The numbers starts[b], starts[b] + 1, ... (lengths[b] of them), for each b back to back."""
    before = np.cumsum(lengths, dtype=np.int32) - lengths
    steps = np.arange(lengths.sum(), dtype=np.int32)
    return steps + np.repeat((starts - before).astype(np.int32), lengths)


def checked_indices(indices: Sequence[int] | NDArray[Any], size: int) -> Int32s:
    """`indices` as (B',) int32, each in 0..size-1.

    Raises:
        TypeError: they are not a 1-D sequence of integers.
        ValueError: one is outside.
    """
    chosen = np.asarray(indices)
    if chosen.shape == (0,):
        return np.zeros(0, np.int32)
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise TypeError(
            f"indices: expected a 1-D sequence of integers, got {chosen.dtype} of shape "
            f"{chosen.shape}"
        )
    outside = np.flatnonzero((chosen < 0) | (chosen >= size))
    if outside.size:
        raise ValueError(
            f"indices[{outside[0]}]: expected 0 ≤ index < {size}, the number of sequences, got "
            f"{chosen[outside[0]]}"
        )
    return chosen.astype(np.int32)


def select_layout(cu_seqlens: Int32s, cu_responses: Int32s, chosen: Int32s) -> dict[str, Int32s]:
    """Where the chosen sequences come from and how they lie when packed anew.

    Args:
        cu_seqlens: (B+1,) offsets of the sequences among the T tokens.
        cu_responses: (B+1,) offsets of the responses among the N response tokens.
        chosen: (B',) which sequences, in which order.

    Returns:
        `tokens` (T',), `responses` (N',), `sequences` (B',): what to gather from the old arrays;
        `position_ids` (T',), `cu_seqlens` (B'+1,), `rows` (N',), `cu_responses` (B'+1,): the
        layout fields of the new batch.
    """
    lengths = np.diff(cu_seqlens)[chosen]
    response_lengths = np.diff(cu_responses)[chosen]
    ends = offsets(lengths)
    return {
        "tokens": ragged_arange(cu_seqlens[chosen], lengths),
        "responses": ragged_arange(cu_responses[chosen], response_lengths),
        "sequences": chosen,
        "position_ids": ragged_arange(np.zeros_like(lengths), lengths),
        "cu_seqlens": ends,
        "rows": ragged_arange(ends[1:] - response_lengths - 1, response_lengths),
        "cu_responses": offsets(response_lengths),
    }
