"""A recurrence over packed tokens as a reverse scan of affine maps.

N tokens of B sequences back to back, offsets cu_seqlens (B+1,). A token maps the state (A, E)
behind it to the state before it, A ← a·A + e·E + b, E ← p·E + q: five floats that compose
associatively. The last token of a sequence starts from a known state, so its map is constant
(a = e = p = 0): that is all that separates sequences. Products with 0 are 0, whatever the other
factor: a NaN in one sequence never reaches another.

What the kernels of `gae` are made of: the composition, the search for a token's sequence, and the
two plans by which a block of tokens learns the state behind it.

    one launch     each block composes the blocks of tokens on its right until the composition is
                   constant: as far as the sequence that leaves the block goes on
    two launches   the first writes the map of each block, the second composes those instead

Both end where the composition is constant, not at a given length: the plan changes the time, never
the result beyond rounding. No atomics and no waiting between blocks: same input, same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import Launch


@dataclass(frozen=True, slots=True)
class ScanLaunch(Launch):
    """Knobs of a scan; a program's columns are its block of tokens."""

    chunk: int
    """Block maps composed at a time."""
    one_launch: int
    """The longest sequence, in tokens, whose blocks compose the tokens on their right themselves;
    they read as many again."""


# Of one program a multiprocessor; others are not measured yet (docs/gpu.md). Left to itself, ptxas
# spills a few of some 90 registers.
LAUNCH = ScanLaunch(block=1024, num_warps=16, max_registers=128, chunk=128, one_launch=4096)


class Extent(NamedTuple):
    """How much there is, inside a kernel; its arguments stay apart, so that none is specialised."""

    num_tokens: Any
    num_sequences: Any
    num_search_steps: Any


@triton.jit
def times(x, y):
    """x·y with 0·y = 0 for every y, NaN and infinity included."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def compose(ra, re, rb, rp, rq, la, le, lb, lp, lq):
    """The map of the tokens on the right, then that of the tokens on the left."""
    a = la * ra
    e = times(la, re) + times(le, rp)
    b = times(la, rb) + times(le, rq) + lb
    return a, e, b, lp * rp, times(lp, rq) + lq


@triton.jit
def pick(x, lane, at):
    """Element `at` as a scalar."""
    return tl.sum(tl.where(lane == at, x, 0.0), axis=0)


@triton.jit
def extend(ta, te, tb, tp, tq, a, e, b, p, q, lane):
    """The composition so far, (ta, …), and that of the maps (a, …) on its right."""
    a, e, b, p, q = tl.associative_scan((a, e, b, p, q), 0, compose, reverse=True)
    a, e, b = pick(a, lane, 0), pick(e, lane, 0), pick(b, lane, 0)
    return compose(a, e, b, pick(p, lane, 0), pick(q, lane, 0), ta, te, tb, tp, tq)


@triton.jit
def is_open(a, e, p):
    """Whether a map is not constant: something to the right of it matters."""
    return (a != 0) | (e != 0) | (p != 0)


@triton.jit
def sequence_of(offs, cu_seqlens_ptr, extent):
    """The sequence of each token, and whether it is that sequence's last."""
    inside = offs < extent.num_tokens
    # First s in [1, B] with cu_seqlens[s] > t: the end of the sequence that holds t.
    low = tl.zeros_like(offs).to(tl.int32) + 1
    high = tl.zeros_like(low) + extent.num_sequences
    for _ in range(extent.num_search_steps):
        middle = (low + high) // 2
        above = tl.load(cu_seqlens_ptr + middle, mask=inside, other=0).to(tl.int64) > offs
        high = tl.where(above, middle, high)
        low = tl.where(above | (low >= high), low, middle + 1)
    last = offs + 1 == tl.load(cu_seqlens_ptr + high, mask=inside, other=0).to(tl.int64)
    return high - 1, last


@triton.jit
def leaves_block(stop, cu_seqlens_ptr, extent):
    """Whether a sequence goes on from token stop − 1 to token stop."""
    offs = tl.zeros([1], tl.int64) + stop
    _, last = sequence_of(offs - 1, cu_seqlens_ptr, extent)
    return tl.sum(((offs < extent.num_tokens) & (~last)).to(tl.int32), axis=0) > 0


@triton.jit
def store_map(map_ptr, a, e, b, p, q, lane):
    """Writes the composition of a block's maps, five floats."""
    a, e, b, p, q = tl.associative_scan((a, e, b, p, q), 0, compose, reverse=True)
    tl.store(map_ptr, pick(a, lane, 0))
    tl.store(map_ptr + 1, pick(e, lane, 0))
    tl.store(map_ptr + 2, pick(b, lane, 0))
    tl.store(map_ptr + 3, pick(p, lane, 0))
    tl.store(map_ptr + 4, pick(q, lane, 0))


@triton.jit
def state_from_maps(maps_ptr, right, num_blocks, needed, CHUNK: tl.constexpr):
    """A and E before block `right`, from the maps (blocks, 5) of that block and those behind it."""
    lane = tl.arange(0, CHUNK)
    zero = tl.sum(tl.zeros([CHUNK], maps_ptr.dtype.element_ty), axis=0)
    ta, te, tb, tp, tq = zero + 1, zero, zero, zero + 1, zero  # the identity
    while needed:
        there = right + lane < num_blocks
        m = maps_ptr + (right + lane) * 5
        a = tl.load(m, mask=there, other=1.0)
        e = tl.load(m + 1, mask=there, other=0.0)
        b = tl.load(m + 2, mask=there, other=0.0)
        p = tl.load(m + 3, mask=there, other=1.0)
        q = tl.load(m + 4, mask=there, other=0.0)
        ta, te, tb, tp, tq = extend(ta, te, tb, tp, tq, a, e, b, p, q, lane)
        right += CHUNK
        needed = is_open(ta, te, tp) & (right < num_blocks)
    return tb, tq


def search_steps(num_sequences: int) -> int:
    """Halvings that find one of so many sequences."""
    return num_sequences.bit_length()


def contiguous(x: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if x is None else x.contiguous()


def block_maps(
    values: Tensor, max_seqlen: int | None, passes: int, knobs: ScanLaunch
) -> Tensor | None:
    """Room for the maps of all blocks, (passes, blocks, 5); None where one launch does."""
    n = values.shape[0]
    if min(n, n if max_seqlen is None else max_seqlen) <= max(knobs.one_launch, knobs.block):
        return None
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    blocks = triton.cdiv(n, knobs.block)
    return torch.empty((passes, blocks, 5), dtype=dtype, device=values.device)
