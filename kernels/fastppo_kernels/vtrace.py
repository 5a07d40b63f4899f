"""V-trace on packed sequences: the scan of `gae` with a weight and a decay for each token.

With ratio = exp(clamp(logprob − behaviour, ±limit)), ρ = min(ratio, rho_cap), c = min(ratio, c_cap)
and X = vs − V, backwards from X = 0 and E = γ·bootstrap,

    valid token     X ← γλc·X + ρ·(E + r − V),   E ← γ·V;      masked token   (X, E) unchanged

which is `gae`'s map with a times c, e and b times ρ. From the state (X', E') behind a token,

    advantage = ρ·(r − V + E' + γ·X'),   returns = V + X

Launches as in `gae`. Bytes per token, fp32: r, V, both log-probabilities and the mask read twice
(34) + both results written (8).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.gae import gae_maps
from fastppo_kernels.launch import check_device, launch
from fastppo_kernels.scan import (
    LAUNCH,
    ScanLaunch,
    block_maps,
    compose,
    extend,
    is_open,
    leaves_block,
    pointers,
    search_steps,
    state_from_maps,
    store_map,
    times,
)


@triton.jit
def _vtrace_maps(
    offs,
    rewards_ptr,
    values_ptr,
    logprobs_ptr,
    behaviour_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    discounts_ptr,
    num_tokens,
    num_sequences,
    num_search_steps,
    gamma,
    gae_lambda,
    rho_cap,
    c_cap,
    limit,
    DTYPE: tl.constexpr,
):
    """The five floats of each token, its value, whether it is valid, and γ."""
    a, e, b, p, q, v, valid, _, g = gae_maps(
        offs,
        0,
        rewards_ptr,
        values_ptr,
        cu_seqlens_ptr,
        mask_ptr,
        bootstrap_ptr,
        None,
        None,
        discounts_ptr,
        num_tokens,
        num_sequences,
        num_search_steps,
        gamma,
        gae_lambda,
        gae_lambda,
        0.0,
        0,
        DTYPE,
    )
    log_ratio = tl.load(logprobs_ptr + offs, mask=valid, other=0.0).to(DTYPE)
    log_ratio -= tl.load(behaviour_ptr + offs, mask=valid, other=0.0).to(DTYPE)
    over = tl.where(log_ratio > limit, limit, log_ratio)  # a NaN stays
    ratio = tl.exp(tl.where(over < -limit, -limit, over).to(DTYPE))
    rho = tl.where(valid, tl.where(ratio > rho_cap, rho_cap, ratio), 1.0).to(DTYPE)
    c = tl.where(valid, tl.where(ratio > c_cap, c_cap, ratio), 1.0).to(DTYPE)
    c = tl.where(c == c, c, 0.0)  # b is NaN already, and `compose` multiplies a by 0
    return a * c, times(e, rho), b * rho, p, q, v, valid, g


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_search_steps"])
def vtrace_blocks_kernel(
    maps_ptr,  # (1, blocks, 5)
    rewards_ptr,
    values_ptr,
    logprobs_ptr,
    behaviour_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    discounts_ptr,
    num_tokens,
    num_sequences,
    num_search_steps,
    gamma,
    gae_lambda,
    rho_cap,
    c_cap,
    limit,
    BLOCK: tl.constexpr,
):
    """The map of each block of tokens."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    a, e, b, p, q, _, _, _ = _vtrace_maps(
        block * BLOCK + lane,
        rewards_ptr,
        values_ptr,
        logprobs_ptr,
        behaviour_ptr,
        cu_seqlens_ptr,
        mask_ptr,
        bootstrap_ptr,
        discounts_ptr,
        num_tokens,
        num_sequences,
        num_search_steps,
        gamma,
        gae_lambda,
        rho_cap,
        c_cap,
        limit,
        maps_ptr.dtype.element_ty,
    )
    store_map(maps_ptr + block * 5, a, e, b, p, q, lane)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "num_search_steps"])
def vtrace_fwd_kernel(
    advantages_ptr,
    returns_ptr,
    maps_ptr,  # (1, blocks, 5), or None: compose the tokens on the right
    rewards_ptr,
    values_ptr,
    logprobs_ptr,
    behaviour_ptr,
    cu_seqlens_ptr,
    mask_ptr,
    bootstrap_ptr,
    discounts_ptr,
    num_tokens,
    num_sequences,
    num_search_steps,
    gamma,
    gae_lambda,
    rho_cap,
    c_cap,
    limit,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The state behind the block, then behind each of its tokens."""
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty  # noqa: N806
    block = tl.program_id(0).to(tl.int64)
    num_blocks = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    right = block + 1
    needed = leaves_block(
        right * BLOCK, cu_seqlens_ptr, num_tokens, num_sequences, num_search_steps
    )
    if maps_ptr is None:
        zero = tl.sum(tl.zeros([BLOCK], DTYPE), axis=0)
        ta, te, tb, tp, tq = zero + 1, zero, zero, zero + 1, zero
        while needed:
            ra, re, rb, rp, rq, _, _, _ = _vtrace_maps(
                right * BLOCK + lane,
                rewards_ptr,
                values_ptr,
                logprobs_ptr,
                behaviour_ptr,
                cu_seqlens_ptr,
                mask_ptr,
                bootstrap_ptr,
                discounts_ptr,
                num_tokens,
                num_sequences,
                num_search_steps,
                gamma,
                gae_lambda,
                rho_cap,
                c_cap,
                limit,
                DTYPE,
            )
            ta, te, tb, tp, tq = extend(ta, te, tb, tp, tq, ra, re, rb, rp, rq, lane)
            right += 1
            needed = is_open(ta, te, tp) & (right < num_blocks)
    else:
        tb, tq = state_from_maps(maps_ptr, right, num_blocks, needed, CHUNK)

    offs = block * BLOCK + lane
    a, e, b, p, q, v, valid, g = _vtrace_maps(
        offs,
        rewards_ptr,
        values_ptr,
        logprobs_ptr,
        behaviour_ptr,
        cu_seqlens_ptr,
        mask_ptr,
        bootstrap_ptr,
        discounts_ptr,
        num_tokens,
        num_sequences,
        num_search_steps,
        gamma,
        gae_lambda,
        rho_cap,
        c_cap,
        limit,
        DTYPE,
    )
    sa, se, sb, sp, sq = tl.associative_scan((a, e, b, p, q), 0, compose, reverse=True)
    x = times(sa, tb) + times(se, tq) + sb
    following = times(sp, tq) + sq
    behind = (lane + 1) % BLOCK
    x_behind = tl.where(behind > 0, tl.gather(x, behind, 0), tb)
    e_behind = tl.where(behind > 0, tl.gather(following, behind, 0), tq)
    advantage = times(e, e_behind + g * x_behind) + b  # e is ρ, or 0 at a last token
    inside = offs < num_tokens
    tl.store(advantages_ptr + offs, tl.where(valid, advantage, 0.0), mask=inside)
    tl.store(returns_ptr + offs, tl.where(valid, v + x, 0.0), mask=inside)


def vtrace_fwd(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
    rho_cap: float,
    c_cap: float,
    limit: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    max_seqlen: int | None = None,
    knobs: ScanLaunch = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), float64 for float64 values, else float32.

    Args:
        rewards, values, logprobs, behaviour_logprobs: (N,) floating of any dtype.
        cu_seqlens: (B+1,) int32 or int64, from 0 to N, non-decreasing (not checked).
        limit: log-ratios are clamped to ± this, in nats.
        mask: (N,) bool; bootstrap: (B,).
        max_seqlen: the longest sequence in tokens, known to the host; it chooses the plan.
    """
    check_device("values", values)
    n, num_sequences = values.shape[0], cu_seqlens.shape[0] - 1
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    advantages = torch.empty(n, dtype=dtype, device=values.device)
    returns = torch.empty_like(advantages)
    if n == 0:
        return advantages, returns
    discounts = None
    if dtype == torch.float64:  # a kernel's number is float32
        rows = [values.new_full((num_sequences,), x) for x in (gamma, gae_lambda)]
        discounts = torch.stack(rows)
    shared = pointers(
        rewards=rewards,
        values=values,
        logprobs=logprobs,
        behaviour=behaviour_logprobs,
        cu_seqlens=cu_seqlens,
        mask=mask,
        bootstrap=bootstrap,
        discounts=discounts,
    ) | {
        "num_tokens": n,
        "num_sequences": num_sequences,
        "num_search_steps": search_steps(num_sequences),
        "gamma": float(gamma),
        "gae_lambda": float(gae_lambda),
        "rho_cap": float(rho_cap),
        "c_cap": float(c_cap),
        "limit": float(limit),
        "BLOCK": knobs.block,
    }
    grid = (triton.cdiv(n, knobs.block),)
    maps = block_maps(values, max_seqlen, 1, knobs)
    if maps is not None:
        launch(vtrace_blocks_kernel, grid, knobs, maps_ptr=maps, **shared)
    outputs = {"advantages_ptr": advantages, "returns_ptr": returns, "maps_ptr": maps}
    launch(vtrace_fwd_kernel, grid, knobs, **outputs, **shared, CHUNK=knobs.chunk)
    return advantages, returns
