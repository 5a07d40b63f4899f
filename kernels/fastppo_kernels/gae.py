"""GAE on packed sequences as a scan of affine maps (`fastppo_kernels.scan`).

The state is (A, E), E = γ·V' + score: what the next valid token finds after it. From the end of a
sequence, (0, γ·bootstrap + score), backwards,

    valid token     A ← γλ·A + E + (r − kl_coef·kl − V),   E ← γ·V
    masked token    (A, E) unchanged (carry), or as valid with V = r = 0 (dense-zero), or as valid

    returns = A + V

A second λ for the returns is a second pass over the same tokens, the second axis of the grid: the
first pass writes the advantages and the last one the returns. On request the first pass also
writes the moments of each block's advantages, from which `whiten` goes on.

Launches: one where the longest sequence is short or the batch is, else two. Bytes per token, fp32:
r, V and mask read twice (18) + A, R written (8); kl adds 8. cu_seqlens is searched once per token,
in L1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import check_device, launch
from fastppo_kernels.scan import (
    LAUNCH,
    Extent,
    ScanLaunch,
    block_maps,
    compose,
    contiguous,
    extend,
    is_open,
    leaves_block,
    search_steps,
    sequence_of,
    state_from_maps,
    store_map,
    times,
)
from fastppo_kernels.whiten import empty_moments, store_moments

MODES = {"carry": 0, "dense-zero": 1, "none": 2}


class Tokens(NamedTuple):
    """What the recurrence reads: of a launch tensors, in a kernel pointers; None: not given."""

    rewards: Any
    state_values: Any  # `values` is an attribute of every tuple in Triton
    cu_seqlens: Any
    mask: Any
    bootstrap: Any
    kl: Any
    scores: Any
    discounts: Any


class Numbers(NamedTuple):
    """The same for every token; the first three where `Tokens.discounts` is None."""

    gamma: float
    gae_lambda: float
    returns_lambda: float
    kl_coef: float


@triton.jit
def gae_maps(
    offs,
    critic,  # which λ: 0 the advantages', 1 the returns'
    tokens,
    extent,
    numbers,
    MODE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The five floats of each token, its value, and whether it is valid."""
    inside = offs < extent.num_tokens
    sequence, last = sequence_of(offs, tokens.cu_seqlens, extent)

    if tokens.discounts is not None:
        row = (1 + critic) * extent.num_sequences.to(tl.int64) + sequence
        g = tl.load(tokens.discounts + sequence, mask=inside, other=0.0).to(DTYPE)
        lam = tl.load(tokens.discounts + row, mask=inside, other=0.0).to(DTYPE)
    else:
        # A number may arrive as float64 (torch.compile): cast what it was added to.
        zeros = tl.zeros_like(offs).to(DTYPE)
        g = (zeros + numbers.gamma).to(DTYPE)
        lam = tl.where(critic == 0, zeros + numbers.gae_lambda, zeros + numbers.returns_lambda).to(
            DTYPE
        )

    valid = inside
    if tokens.mask is not None:
        valid = inside & (tl.load(tokens.mask + offs, mask=inside, other=0) != 0)
    counts = inside if MODE == 2 else valid
    v = tl.load(tokens.state_values + offs, mask=counts, other=0.0).to(DTYPE)
    r = tl.zeros_like(g)
    if tokens.rewards is not None:
        r = tl.load(tokens.rewards + offs, mask=counts, other=0.0).to(DTYPE)
    if tokens.kl is not None:
        r -= (numbers.kl_coef * tl.load(tokens.kl + offs, mask=valid, other=0.0).to(DTYPE)).to(
            DTYPE
        )
    end = tl.zeros_like(g)  # E after the last token of a sequence
    if tokens.bootstrap is not None:
        end = g * tl.load(tokens.bootstrap + sequence, mask=inside & last, other=0.0).to(DTYPE)
    if tokens.scores is not None:
        end += tl.load(tokens.scores + sequence, mask=inside & last, other=0.0).to(DTYPE)

    moves = valid if MODE == 0 else inside
    a = tl.where(moves, g * lam, 1.0)
    e = tl.where(moves & (~last), 1.0, 0.0).to(DTYPE)
    b = tl.where(moves, r - v, 0.0)
    p = tl.where(moves, 0.0, 1.0).to(DTYPE)
    q = tl.where(moves, g * v, 0.0)
    a, p = tl.where(last, 0.0, a), tl.where(last, 0.0, p)
    b = tl.where(last & moves, b + end, b)
    q = tl.where(last & (~moves), end, q)
    return a, e, b, p, q, v, valid


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_search_steps"])
def gae_blocks_kernel(
    maps_ptr,  # (passes, blocks, 5)
    tokens,
    num_tokens,
    num_sequences,
    num_search_steps,
    numbers,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The map of each block of tokens."""
    block, critic = tl.program_id(0).to(tl.int64), tl.program_id(1)
    extent = Extent(num_tokens, num_sequences, num_search_steps)
    lane = tl.arange(0, BLOCK)
    a, e, b, p, q, _, _ = gae_maps(
        block * BLOCK + lane,
        critic,
        tokens,
        extent,
        numbers,
        MODE,
        maps_ptr.dtype.element_ty,
    )
    at = critic * tl.num_programs(0).to(tl.int64) + block
    store_map(maps_ptr + at * 5, a, e, b, p, q, lane)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_search_steps"])
def gae_fwd_kernel(
    advantages_ptr,
    returns_ptr,
    moments_ptr,  # (blocks, 3), or None
    maps_ptr,  # (passes, blocks, 5), or None: compose the tokens on the right
    tokens,
    num_tokens,
    num_sequences,
    num_search_steps,
    numbers,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The state behind the block, then the block's scan."""
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty  # noqa: N806
    block, critic = tl.program_id(0).to(tl.int64), tl.program_id(1)
    extent = Extent(num_tokens, num_sequences, num_search_steps)
    num_blocks = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    right = block + 1
    needed = leaves_block(right * BLOCK, tokens.cu_seqlens, extent)
    if maps_ptr is None:
        zero = tl.sum(tl.zeros([BLOCK], DTYPE), axis=0)
        ta, te, tb, tp, tq = zero + 1, zero, zero, zero + 1, zero
        while needed:
            ra, re, rb, rp, rq, _, _ = gae_maps(
                right * BLOCK + lane,
                critic,
                tokens,
                extent,
                numbers,
                MODE,
                DTYPE,
            )
            ta, te, tb, tp, tq = extend(ta, te, tb, tp, tq, ra, re, rb, rp, rq, lane)
            right += 1
            needed = is_open(ta, te, tp) & (right < num_blocks)
    else:
        maps_ptr += critic * num_blocks.to(tl.int64) * 5
        tb, tq = state_from_maps(maps_ptr, right, num_blocks, needed, CHUNK)

    offs = block * BLOCK + lane
    a, e, b, p, q, v, valid = gae_maps(
        offs,
        critic,
        tokens,
        extent,
        numbers,
        MODE,
        DTYPE,
    )
    a, e, b, p, q = tl.associative_scan((a, e, b, p, q), 0, compose, reverse=True)
    advantage = tl.where(valid, times(a, tb) + times(e, tq) + b, 0.0)
    inside = offs < num_tokens
    if critic + 1 == tl.num_programs(1):
        tl.store(returns_ptr + offs, tl.where(valid, advantage + v, 0.0), mask=inside)
    if critic == 0:
        tl.store(advantages_ptr + offs, advantage, mask=inside)
        if moments_ptr is not None:
            store_moments(moments_ptr + block * 3, advantage, valid)


def gae_fwd(
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    returns_lambda: float | None = None,
    rewards: Tensor | None = None,
    mask: Tensor | None = None,
    mask_mode: str = "carry",
    bootstrap: Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    scores: Tensor | None = None,
    discounts: Tensor | None = None,
    max_seqlen: int | None = None,
    with_moments: bool = False,
    knobs: ScanLaunch = LAUNCH,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(advantages, returns, moments), float64 for float64 values, else float32.

    Args:
        values, rewards, kl: (N,) floating of any dtype; mask: (N,) bool.
        cu_seqlens: (B+1,) int32 or int64, from 0 to N, non-decreasing (not checked).
        bootstrap, scores: (B,). scores beside a mask need mask_mode "carry".
        discounts: (2 or 3, B) float64: γ, λ and the critic's λ; replaces the three numbers.
        max_seqlen: the longest sequence in tokens, known to the host; it chooses the plan.
        with_moments: whether to write the moments of the advantages, for `whiten`, else None.
    """
    check_device("values", values)
    n, num_sequences = values.shape[0], cu_seqlens.shape[0] - 1
    assert scores is None or mask is None or mask_mode == "carry"
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    advantages = torch.empty(n, dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    blocks = triton.cdiv(n, knobs.block)
    moments = empty_moments(blocks, values.device) if with_moments else None
    if n == 0:
        return advantages, returns, moments
    if dtype == torch.float64:  # a kernel's number is float32
        if discounts is None:
            lambdas = [gae_lambda] + ([] if returns_lambda is None else [returns_lambda])
            numbers = (gamma, *lambdas)
            discounts = torch.stack([values.new_full((num_sequences,), x) for x in numbers])
        if kl is not None:
            kl, kl_coef = kl.double() * kl_coef, 1.0
    if discounts is not None:
        discounts = discounts.to(dtype)  # read as float64 it costs a float32 kernel registers
    two = returns_lambda is not None if discounts is None else discounts.shape[0] == 3
    passes = 2 if two else 1
    given = (rewards, values, cu_seqlens, mask, bootstrap, kl, scores, discounts)
    critic_lambda = gae_lambda if returns_lambda is None else returns_lambda
    shared = {
        "tokens": Tokens(*(contiguous(x) for x in given)),
        "num_tokens": n,
        "num_sequences": num_sequences,
        "num_search_steps": search_steps(num_sequences),
        "numbers": Numbers(float(gamma), float(gae_lambda), float(critic_lambda), float(kl_coef)),
        "MODE": MODES[mask_mode] if mask is not None else MODES["none"],
        "BLOCK": knobs.block,
    }
    grid = (blocks, passes)
    maps = block_maps(values, max_seqlen, passes, knobs)
    if maps is not None:
        launch(gae_blocks_kernel, grid, knobs, maps_ptr=maps, **shared)
    outputs = {"advantages_ptr": advantages, "returns_ptr": returns, "moments_ptr": moments}
    launch(gae_fwd_kernel, grid, knobs, **outputs, maps_ptr=maps, **shared, CHUNK=knobs.chunk)
    return advantages, returns, moments
