"""GAE on packed sequences as one reverse scan of affine maps.

N tokens of B sequences back to back, offsets cu_seqlens (B+1,). The state is (A, E), E = γ·V' +
score: what the next valid token finds after it. From the end of a sequence, (0, γ·bootstrap +
score), backwards,

    valid token     A ← γλ·A + E + (r − kl_coef·kl − V),   E ← γ·V
    masked token    (A, E) unchanged (carry), or as valid with V = r = 0 (dense-zero), or as valid

Each token is a map A ← a·A + e·E + b, E ← p·E + q, five floats that compose associatively; a second
λ adds (c, f, d) for its own A. The last token of a sequence starts from a known state: its map is
constant (a = e = p = 0), which is all that separates sequences. Products with 0 are 0, whatever the
other factor: a NaN in one sequence never reaches another.

Two launches: `gae_blocks_kernel` writes the composition of each block of tokens, `gae_fwd_kernel`
composes the blocks to its right up to the next sequence end, scans its own and writes. One launch
where all tokens fit one block. No atomics: same input, same bits.

Bytes per token, fp32: r, V and mask read twice (18) + A, R written (8); kl adds 8. cu_seqlens is
searched once per token, in L1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MODES = {"carry": 0, "dense-zero": 1, "none": 2}


@dataclass(frozen=True)
class Launch:
    """Tokens per program, block maps composed at a time, warps. Not measured on a GPU yet."""

    block: int = 1024
    chunk: int = 128
    num_warps: int = 8


LAUNCH = Launch()


@triton.jit
def _times(x, y):
    """x·y with 0·y = 0 for every y, NaN and infinity included."""
    return tl.where(x == 0.0, 0.0, x * y)


@triton.jit
def _compose(ra, re, rb, rp, rq, la, le, lb, lp, lq):
    """The map of the tokens on the right, then that of the tokens on the left."""
    a = la * ra
    e = _times(la, re) + _times(le, rp)
    b = _times(la, rb) + _times(le, rq) + lb
    return a, e, b, lp * rp, _times(lp, rq) + lq


@triton.jit
def _compose_two(ra, re, rb, rp, rq, rc, rf, rd, la, le, lb, lp, lq, lc, lf, ld):
    """`_compose` with the map of a second A, (c, f, d), over the same E."""
    a = la * ra
    e = _times(la, re) + _times(le, rp)
    b = _times(la, rb) + _times(le, rq) + lb
    f = _times(lc, rf) + _times(lf, rp)
    d = _times(lc, rd) + _times(lf, rq) + ld
    return a, e, b, lp * rp, _times(lp, rq) + lq, lc * rc, f, d


@triton.jit
def _token_maps(
    offs,
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    kl_ptr,
    scores_ptr,
    discounts_ptr,
    num_tokens,
    num_sequences,
    num_search_steps,
    gamma,
    gae_lambda,
    returns_lambda,
    kl_coef,
    MODE: tl.constexpr,
    TWO: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The eight floats of each token, its value, and whether it is valid."""
    inside = offs < num_tokens
    # First s in [1, B] with cu_seqlens[s] > t: the end of the sequence that holds t.
    low = tl.zeros_like(offs).to(tl.int32) + 1
    high = tl.zeros_like(low) + num_sequences
    for _ in range(num_search_steps):
        middle = (low + high) // 2
        above = tl.load(cu_seqlens_ptr + middle, mask=inside, other=0).to(tl.int64) > offs
        high = tl.where(above, middle, high)
        low = tl.where(above | (low >= high), low, middle + 1)
    sequence = high - 1
    last = offs + 1 == tl.load(cu_seqlens_ptr + high, mask=inside, other=0).to(tl.int64)

    if discounts_ptr is not None:
        g = tl.load(discounts_ptr + sequence, mask=inside, other=0.0).to(DTYPE)
        row = sequence.to(tl.int64) + num_sequences
        lam = tl.load(discounts_ptr + row, mask=inside, other=0.0).to(DTYPE)
        if TWO:
            row += num_sequences
            lam2 = tl.load(discounts_ptr + row, mask=inside, other=0.0).to(DTYPE)
        else:
            lam2 = lam
    else:
        # A number may arrive as float64 (torch.compile): cast what it was added to.
        zeros = tl.zeros_like(offs).to(DTYPE)
        g = (zeros + gamma).to(DTYPE)
        lam = (zeros + gae_lambda).to(DTYPE)
        lam2 = (zeros + returns_lambda).to(DTYPE)

    valid = inside
    if mask_ptr is not None:
        valid = inside & (tl.load(mask_ptr + offs, mask=inside, other=0) != 0)
    counts = inside if MODE == 2 else valid
    v = tl.load(values_ptr + offs, mask=counts, other=0.0).to(DTYPE)
    r = tl.zeros_like(v)
    if rewards_ptr is not None:
        r = tl.load(rewards_ptr + offs, mask=counts, other=0.0).to(DTYPE)
    if kl_ptr is not None:
        r -= (kl_coef * tl.load(kl_ptr + offs, mask=valid, other=0.0).to(DTYPE)).to(DTYPE)
    end = tl.zeros_like(v)  # E after the last token of a sequence
    if bootstrap_ptr is not None:
        end = g * tl.load(bootstrap_ptr + sequence, mask=inside & last, other=0.0).to(DTYPE)
    if scores_ptr is not None:
        end += tl.load(scores_ptr + sequence, mask=inside & last, other=0.0).to(DTYPE)

    moves = valid if MODE == 0 else inside
    steps = moves & (~last)
    a = tl.where(moves, g * lam, 1.0)
    c = tl.where(moves, g * lam2, 1.0)
    e = tl.where(steps, 1.0, 0.0).to(DTYPE)
    b = tl.where(moves, r - v, 0.0)
    p = tl.where(moves, 0.0, 1.0).to(DTYPE)
    q = tl.where(moves, g * v, 0.0)
    a, c, p = tl.where(last, 0.0, a), tl.where(last, 0.0, c), tl.where(last, 0.0, p)
    b = tl.where(last & moves, b + end, b)
    q = tl.where(last & (~moves), end, q)
    return a, e, b, p, q, c, e, b, v, valid


@triton.jit
def _first(x, offs):
    """Element 0 as a scalar."""
    return tl.sum(tl.where(offs == 0, x, 0.0), axis=0)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_search_steps"])
def gae_blocks_kernel(
    maps_ptr,  # (blocks, 8)
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    kl_ptr,
    scores_ptr,
    discounts_ptr,
    num_tokens,
    num_sequences,
    num_search_steps,
    gamma,
    gae_lambda,
    returns_lambda,
    kl_coef,
    MODE: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The map of each block of tokens."""
    DTYPE: tl.constexpr = maps_ptr.dtype.element_ty  # noqa: N806
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    a, e, b, p, q, c, f, d, _, _ = _token_maps(
        block * BLOCK + lane,
        rewards_ptr,
        values_ptr,
        cu_seqlens_ptr,
        mask_ptr,
        bootstrap_ptr,
        kl_ptr,
        scores_ptr,
        discounts_ptr,
        num_tokens,
        num_sequences,
        num_search_steps,
        gamma,
        gae_lambda,
        returns_lambda,
        kl_coef,
        MODE,
        TWO,
        DTYPE,
    )
    maps_ptr += block * 8
    if TWO:
        a, e, b, p, q, c, f, d = tl.associative_scan(
            (a, e, b, p, q, c, f, d), 0, _compose_two, reverse=True
        )
        tl.store(maps_ptr + 5, _first(c, lane))
        tl.store(maps_ptr + 6, _first(f, lane))
        tl.store(maps_ptr + 7, _first(d, lane))
    else:
        a, e, b, p, q = tl.associative_scan((a, e, b, p, q), 0, _compose, reverse=True)
    tl.store(maps_ptr, _first(a, lane))
    tl.store(maps_ptr + 1, _first(e, lane))
    tl.store(maps_ptr + 2, _first(b, lane))
    tl.store(maps_ptr + 3, _first(p, lane))
    tl.store(maps_ptr + 4, _first(q, lane))


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_search_steps", "num_blocks"])
def gae_fwd_kernel(
    advantages_ptr,
    returns_ptr,
    maps_ptr,  # (blocks, 8), not read where there is one block
    rewards_ptr,
    values_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    kl_ptr,
    scores_ptr,
    discounts_ptr,
    num_tokens,
    num_sequences,
    num_search_steps,
    num_blocks,
    gamma,
    gae_lambda,
    returns_lambda,
    kl_coef,
    MODE: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """State from the blocks to the right, then this block's scan."""
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty  # noqa: N806
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    a, e, b, p, q, c, f, d, v, valid = _token_maps(
        offs,
        rewards_ptr,
        values_ptr,
        cu_seqlens_ptr,
        mask_ptr,
        bootstrap_ptr,
        kl_ptr,
        scores_ptr,
        discounts_ptr,
        num_tokens,
        num_sequences,
        num_search_steps,
        gamma,
        gae_lambda,
        returns_lambda,
        kl_coef,
        MODE,
        TWO,
        DTYPE,
    )

    lane = tl.arange(0, CHUNK)
    zero = tl.sum(tl.zeros([CHUNK], DTYPE), axis=0)
    # The composition so far of the blocks to the right, starting as the identity.
    ta, te, tb, tp, tq, tc, tf, td = zero + 1, zero, zero, zero + 1, zero, zero + 1, zero, zero
    right = block + 1
    depends = right < num_blocks
    while depends:
        at = right + lane
        there = at < num_blocks
        m = maps_ptr + at * 8
        ca = tl.load(m, mask=there, other=1.0)
        ce = tl.load(m + 1, mask=there, other=0.0)
        cb = tl.load(m + 2, mask=there, other=0.0)
        cp = tl.load(m + 3, mask=there, other=1.0)
        cq = tl.load(m + 4, mask=there, other=0.0)
        if TWO:
            cc = tl.load(m + 5, mask=there, other=1.0)
            cf = tl.load(m + 6, mask=there, other=0.0)
            cd = tl.load(m + 7, mask=there, other=0.0)
            ca, ce, cb, cp, cq, cc, cf, cd = tl.associative_scan(
                (ca, ce, cb, cp, cq, cc, cf, cd), 0, _compose_two, reverse=True
            )
            ta, te, tb, tp, tq, tc, tf, td = _compose_two(
                _first(ca, lane),
                _first(ce, lane),
                _first(cb, lane),
                _first(cp, lane),
                _first(cq, lane),
                _first(cc, lane),
                _first(cf, lane),
                _first(cd, lane),
                ta,
                te,
                tb,
                tp,
                tq,
                tc,
                tf,
                td,
            )
            open_end = (ta != 0) | (te != 0) | (tp != 0) | (tc != 0) | (tf != 0)
        else:
            ca, ce, cb, cp, cq = tl.associative_scan(
                (ca, ce, cb, cp, cq), 0, _compose, reverse=True
            )
            ta, te, tb, tp, tq = _compose(
                _first(ca, lane),
                _first(ce, lane),
                _first(cb, lane),
                _first(cp, lane),
                _first(cq, lane),
                ta,
                te,
                tb,
                tp,
                tq,
            )
            open_end = (ta != 0) | (te != 0) | (tp != 0)
        right += CHUNK
        depends = open_end & (right < num_blocks)

    # tb and tq are A and E behind this block: every composition ends in a constant map.
    inside = offs < num_tokens
    if TWO:
        a, e, b, p, q, c, f, d = tl.associative_scan(
            (a, e, b, p, q, c, f, d), 0, _compose_two, reverse=True
        )
        critic = _times(c, td) + _times(f, tq) + d
        advantage = _times(a, tb) + _times(e, tq) + b
    else:
        a, e, b, p, q = tl.associative_scan((a, e, b, p, q), 0, _compose, reverse=True)
        advantage = _times(a, tb) + _times(e, tq) + b
        critic = advantage
    tl.store(advantages_ptr + offs, tl.where(valid, advantage, 0.0), mask=inside)
    tl.store(returns_ptr + offs, tl.where(valid, critic + v, 0.0), mask=inside)


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
    launch: Launch = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), float64 for float64 values, else float32.

    Args:
        values, rewards, kl: (N,) floating of any dtype; mask: (N,) bool.
        cu_seqlens: (B+1,) int32 or int64, from 0 to N, non-decreasing (not checked).
        bootstrap, scores: (B,). scores beside a mask need mask_mode "carry".
        discounts: (2 or 3, B) float64: γ, λ and the critic's λ; replaces the three numbers.
    """
    n, num_sequences = values.shape[0], cu_seqlens.shape[0] - 1
    assert scores is None or mask is None or mask_mode == "carry"
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    advantages = torch.empty(n, dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    if n == 0:
        return advantages, returns
    if discounts is None and dtype == torch.float64:  # a kernel's number is float32
        lambdas = [gae_lambda] + ([] if returns_lambda is None else [returns_lambda])
        rows = [values.new_full((num_sequences,), x) for x in (gamma, *lambdas)]
        discounts = torch.stack(rows)
    two = returns_lambda is not None if discounts is None else discounts.shape[0] == 3
    tensors = rewards, values, cu_seqlens, mask, bootstrap, kl, scores, discounts
    tokens = [None if x is None else x.contiguous() for x in tensors]
    numbers = (
        float(gamma),
        float(gae_lambda),
        float(gae_lambda if returns_lambda is None else returns_lambda),
        float(kl_coef),
    )
    steps = num_sequences.bit_length()
    mode = MODES[mask_mode] if mask is not None else MODES["none"]
    blocks = triton.cdiv(n, launch.block)
    maps = advantages
    if blocks > 1:
        maps = torch.empty((blocks, 8), dtype=dtype, device=values.device)
        gae_blocks_kernel[(blocks,)](
            maps,
            *tokens,
            n,
            num_sequences,
            steps,
            *numbers,
            MODE=mode,
            TWO=two,
            BLOCK=launch.block,
            num_warps=launch.num_warps,
            enable_fp_fusion=True,
        )
    gae_fwd_kernel[(blocks,)](
        advantages,
        returns,
        maps,
        *tokens,
        n,
        num_sequences,
        steps,
        blocks,
        *numbers,
        MODE=mode,
        TWO=two,
        BLOCK=launch.block,
        CHUNK=launch.chunk,
        num_warps=launch.num_warps,
        enable_fp_fusion=True,
    )
    return advantages, returns
