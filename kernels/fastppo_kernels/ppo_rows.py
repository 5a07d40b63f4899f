"""The PPO loss of rows of logits, and their gradient, in one launch.

Shapes: N rows, V vocabulary, b bytes per logit. For each row the kernel reads the logits once for
logprob and entropy, then knows the row's share of the loss

    L = w·( is·pg + kl_coef·kl − ent_coef·entropy ),   r = exp(clamp(logprob − old, ±20))
    pg = max(−A·r, −A·clip(r, low, high)), bounded by −A·dual_clip for A < 0

and with it g = ∂L/∂logprob and h = ∂L/∂entropy, reads the row again, backwards, the part read last
first, because it is still in the L2 cache, and writes

    ∂L/∂logit_j = (1/τ)·[ g·(1[j = y] − p_j) − h·p_j·(ln p_j + entropy) ]·(1 − (x_j/c)²)

over it, or into another array. Rows of weight 0 get a gradient of 0 and add nothing, whatever they
hold.

Every row also writes its entries of the loss and the metrics; summing (or maximising) them over the
rows is the second stage, so no sum depends on timing.

Bytes moved per row: V·b read from memory, V·b read again (from the L2 cache where it fits), V·b
written (of the other array's b); without gradients only the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import choose, launch
from fastppo_kernels.ppo_math import NUM_ENTRIES, ppo_terms
from fastppo_kernels.row_math import (
    LOG2_E,
    gradient_factors,
    row_statistics,
    write_gradient,
)
from fastppo_kernels.token_logprobs import STATISTICS_LAUNCHES, check_logits

ENTRIES = (
    "loss",
    "num_tokens",
    "policy_loss",
    "kl_loss",
    "clipfrac",
    "clipfrac_low",
    "clipfrac_high",
    "clipfrac_dual",
    "approx_kl",
    "old_approx_kl",
    "entropy",
    "ratio",
    "ratio_squared",
    "ref_kl",
    "logprob_diff",
    "rollout_kl",
    "is_weight",
    "is_clipfrac",
    "ratio_max",
    "logprob_diff_max",
)
"""What `ppo_rows` returns for each row, in this order."""


@dataclass(frozen=True, slots=True)
class PPOKnobs:
    """The numbers of the loss. `kl`: 1, 2, 3 for the estimators k1, k2, k3; `correction`: 0 none, 1
    TIS, 2 IcePop; dual_clip inf: no bound."""

    low: float
    high: float
    dual_clip: float
    kl_coef: float
    ent_coef: float
    is_cap: float
    is_low: float
    is_high: float
    kl: int
    correction: int


@triton.jit(do_not_specialize=["stride_entry"])  # the number of rows
def ppo_rows_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    temperatures_ptr,
    old_ptr,
    advantages_ptr,
    weights_ptr,
    ref_ptr,
    rollout_ptr,
    entries_ptr,
    vocab,
    stride_row,
    stride_col,
    stride_out_row,
    stride_out_col,
    stride_entry,
    temperature,
    softcap,
    low,
    high,
    dual_clip,
    kl_coef,
    ent_coef,
    is_cap,
    is_low,
    is_high,
    HAS_TEMPERATURES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_ROLLOUT: tl.constexpr,
    HAS_KL: tl.constexpr,
    KL: tl.constexpr,
    CORRECTION: tl.constexpr,
    HAS_ENTROPY_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    target = tl.load(targets_ptr + row)
    tau = temperature
    if HAS_TEMPERATURES:
        tau = tl.load(temperatures_ptr + row).to(tl.float32)
    logprob, entropy, m, log_sum = row_statistics(
        row_ptr, target, vocab, stride_col, tau, softcap, HAS_SOFTCAP, BLOCK, WIDTH
    )

    w = tl.load(weights_ptr + row).to(tl.float32)
    valid = w != 0
    ref = 0.0
    if HAS_REF:
        ref = tl.where(valid, tl.load(ref_ptr + row).to(tl.float32), 0.0)
    rollout = 0.0
    if HAS_ROLLOUT:
        rollout = tl.where(valid, tl.load(rollout_ptr + row).to(tl.float32), 0.0)
    terms = ppo_terms(
        tl.where(valid, logprob, 0.0),
        tl.where(valid, entropy, 0.0),
        tl.where(valid, tl.load(old_ptr + row).to(tl.float32), 0.0),
        tl.where(valid, tl.load(advantages_ptr + row).to(tl.float32), 0.0),
        w,
        ref,
        rollout,
        low,
        high,
        dual_clip,
        kl_coef,
        ent_coef,
        is_cap,
        is_low,
        is_high,
        HAS_REF,
        HAS_ROLLOUT,
        HAS_KL,
        KL,
        CORRECTION,
        HAS_ENTROPY_GRAD,
    )
    at = entries_ptr + row
    for i in tl.static_range(NUM_ENTRIES):
        tl.store(at + i * stride_entry, terms[2 + i])

    if out_ptr is not None:
        # Every thread has read the row, the target's logit included, before one writes to it.
        tl.debug_barrier()
        g, h = terms[0], terms[1]
        live = valid & ((g != 0) | (h != 0))
        at_target, constant, slope = gradient_factors(g, h, entropy, log_sum, tau)
        steps = tl.cdiv(vocab, BLOCK)
        for step in tl.range(0, steps):
            write_gradient(
                row_ptr,
                out_ptr + row * stride_out_row,
                (steps - 1 - step) * BLOCK,
                target,
                live,
                vocab,
                stride_col,
                stride_out_col,
                m,
                LOG2_E / tau,
                at_target,
                constant,
                slope,
                softcap,
                HAS_SOFTCAP,
                HAS_ENTROPY_GRAD,
                BLOCK,
            )


def ppo_rows(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    knobs: PPOKnobs,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Entries (len(ENTRIES), N) float32 of every row, and the gradient of the summed loss.

    The gradient (N, V) goes to `out`, which may be `logits` itself or have another dtype; None:
    nobody wants it.

    An entry that needs ref_logprobs or rollout_logprobs and has none is NaN. Arguments as in
    `token_logprobs_fwd`; the per-row inputs are (N,) floating and contiguous.
    """
    rows = temperature if isinstance(temperature, Tensor) else None
    inputs = (old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    check_logits(logits, targets, rows, *inputs)
    assert out is None or out.shape == logits.shape
    assert knobs.kl_coef == 0 or ref_logprobs is not None
    assert knobs.correction == 0 or rollout_logprobs is not None
    n, vocab = logits.shape
    entries = logits.new_empty((len(ENTRIES), n), dtype=torch.float32)
    if n == 0:
        return entries
    table = choose(STATISTICS_LAUNCHES, vocab)
    launch(
        ppo_rows_kernel,
        (n,),
        table,
        logits_ptr=logits,
        out_ptr=out,
        targets_ptr=targets,
        temperatures_ptr=rows,
        old_ptr=old_logprobs,
        advantages_ptr=advantages,
        weights_ptr=weights,
        ref_ptr=ref_logprobs,
        rollout_ptr=rollout_logprobs,
        entries_ptr=entries,
        vocab=vocab,
        stride_row=logits.stride(0),
        stride_col=logits.stride(1),
        stride_out_row=0 if out is None else out.stride(0),
        stride_out_col=0 if out is None else out.stride(1),
        stride_entry=n,
        temperature=1.0 if rows is not None else float(temperature),
        softcap=1.0 if softcap is None else float(softcap),
        low=float(knobs.low),
        high=float(knobs.high),
        dual_clip=float(knobs.dual_clip),
        kl_coef=float(knobs.kl_coef),
        ent_coef=float(knobs.ent_coef),
        is_cap=float(knobs.is_cap),
        is_low=float(knobs.is_low),
        is_high=float(knobs.is_high),
        HAS_TEMPERATURES=rows is not None,
        HAS_SOFTCAP=softcap is not None,
        HAS_REF=ref_logprobs is not None,
        HAS_ROLLOUT=rollout_logprobs is not None,
        HAS_KL=knobs.kl_coef != 0,
        KL=knobs.kl,
        CORRECTION=knobs.correction,
        HAS_ENTROPY_GRAD=knobs.ent_coef != 0,
        BLOCK=table.block,
        WIDTH=16 // logits.itemsize,
    )
    return entries
