"""The PPO policy loss from log-probabilities: loss, gradients and metrics in one launch.

N tokens, formulas in `ppo_math`; token-level ratios. Every program writes the gradients of some
blocks of tokens and their sums and maxima, and the last one to finish combines the programs' parts
in their order; see `last_block`. No float atomics: same input, same bits.

Bytes per token, fp32: logprob, old, A, w read, and entropy, ref and rollout where given (16 to 28);
gradient written, and that of the entropy where it has one (4 or 8).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.last_block import arrival_counter, four, is_last, load_valid
from fastppo_kernels.launch import ReductionLaunch, check_device, launch
from fastppo_kernels.ppo_entries import ENTRIES
from fastppo_kernels.ppo_math import (
    FIRST_ENTRY,
    PPOInputs,
    PPOKnobs,
    ppo_terms,
)

# Two programs for each of an H200's multiprocessors. Not measured on a GPU yet (docs/gpu.md).
LAUNCH = ReductionLaunch(block=512, num_warps=8, programs=264)
ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def _larger(a, b):
    """The larger one, or NaN where one is NaN."""
    return tl.maximum(a, b, propagate_nan=ALL)


@triton.jit
def _sixteen(terms, FIRST: tl.constexpr):
    """terms[FIRST : FIRST + 16], each (BLOCK,), as (BLOCK, 16): one reduction for all of them."""
    a = four(terms[FIRST], terms[FIRST + 4], terms[FIRST + 8], terms[FIRST + 12])
    b = four(terms[FIRST + 1], terms[FIRST + 5], terms[FIRST + 9], terms[FIRST + 13])
    c = four(terms[FIRST + 2], terms[FIRST + 6], terms[FIRST + 10], terms[FIRST + 14])
    d = four(terms[FIRST + 3], terms[FIRST + 7], terms[FIRST + 11], terms[FIRST + 15])
    return four(a, b, c, d).reshape(a.shape[0], 16)


@triton.jit
def _combine(loss_ptr, metrics_ptr, parts_ptr, num_programs, PARTS: tl.constexpr):
    sixteen, two = tl.arange(0, 16), tl.arange(0, 2)
    lane = tl.arange(0, PARTS)[None, :]
    there = lane < num_programs
    sums_ptr = parts_ptr + lane + sixteen[:, None] * num_programs
    more_ptr = parts_ptr + lane + (16 + two)[:, None] * num_programs
    sums = tl.load(sums_ptr, mask=there, other=0.0)
    more_sums = tl.load(more_ptr, mask=there, other=0.0)
    maxima = tl.load(more_ptr + 2 * num_programs, mask=there, other=0.0)
    totals = tl.sum(sums, axis=1)
    tl.store(loss_ptr + sixteen, totals, mask=sixteen == 0)
    tl.store(metrics_ptr + sixteen - 1, totals, mask=sixteen > 0)
    tl.store(metrics_ptr + 15 + two, tl.sum(more_sums, axis=1))
    tl.store(metrics_ptr + 17 + two, tl.reduce(maxima, 1, _larger))


@triton.jit(do_not_specialize=["num_tokens"])
def ppo_loss_kernel(
    loss_ptr,  # ()
    logprob_grad_ptr,
    entropy_grad_ptr,
    metrics_ptr,  # (entries − 1,)
    parts_ptr,  # (entries, programs)
    arrivals_ptr,
    logprobs_ptr,
    entropy_ptr,
    inputs,  # PPOInputs
    num_tokens,
    numbers,  # PPONumbers
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    FOLD: tl.constexpr,  # tokens of one thread, which it adds up by itself
    PARTS: tl.constexpr,
):
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    sums = tl.zeros([BLOCK // FOLD, 16], tl.float32)
    more_sums = tl.zeros([BLOCK // FOLD, 2], tl.float32)
    maxima = more_sums
    for step in range(0, (num_tokens - 1) // (BLOCK * num_programs) + 1):
        offs = (program + step * num_programs) * BLOCK + tl.arange(0, BLOCK)
        inside = offs < num_tokens
        w = tl.load(inputs.weights + offs, mask=inside, other=0.0).to(tl.float32)
        valid = w != 0
        ent, ref, rollout = tl.full([BLOCK], float("nan"), tl.float32), None, None
        if entropy_ptr is not None:
            ent = load_valid(entropy_ptr, offs, inside, valid)
        if inputs.ref is not None:
            ref = load_valid(inputs.ref, offs, inside, valid)
        if inputs.rollout is not None:
            rollout = load_valid(inputs.rollout, offs, inside, valid)
        lp = load_valid(logprobs_ptr, offs, inside, valid)
        old = load_valid(inputs.old, offs, inside, valid)
        advantages = load_valid(inputs.advantages, offs, inside, valid)
        token = PPOInputs(old, advantages, w, ref, rollout)
        terms = ppo_terms(lp, ent, token, numbers, CHOICES)
        tl.store(logprob_grad_ptr + offs, terms.logprob_grad, mask=inside)
        if CHOICES.entropy_grad:
            tl.store(entropy_grad_ptr + offs, terms.entropy_grad, mask=inside)
        sixteen = _sixteen(terms, FIRST_ENTRY).reshape(BLOCK // FOLD, FOLD, 16)
        two = tl.join(terms.is_weight, terms.is_clipfrac).reshape(BLOCK // FOLD, FOLD, 2)
        both = tl.join(terms.ratio_max, terms.logprob_diff_max).reshape(BLOCK // FOLD, FOLD, 2)
        sums += tl.sum(sixteen, axis=1)
        more_sums += tl.sum(two, axis=1)
        maxima = _larger(maxima, tl.reduce(both, 1, _larger))
    part_ptr = parts_ptr + program
    sixteen, two = tl.arange(0, 16), tl.arange(0, 2)
    tl.store(part_ptr + sixteen * num_programs, tl.sum(sums, axis=0))
    tl.store(part_ptr + (16 + two) * num_programs, tl.sum(more_sums, axis=0))
    tl.store(part_ptr + (18 + two) * num_programs, tl.reduce(maxima, 0, _larger))
    if is_last(arrivals_ptr, num_programs):
        _combine(loss_ptr, metrics_ptr, parts_ptr, num_programs, PARTS)


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    inputs: PPOInputs,
    knobs: PPOKnobs,
    table: ReductionLaunch = LAUNCH,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), ∂/∂logprobs (N,), ∂/∂entropy (N,) or (0,) where ent_coef is 0, and the metrics
    ENTRIES[1:], all float32, of (N,) inputs of any floating dtype; N > 0.

    A metric that needs an input which is None is NaN.
    """
    check_device("logprobs", logprobs)
    n, dtype = logprobs.shape[0], torch.float32
    programs = min(triton.cdiv(n, table.block), table.programs)
    assert programs > 0
    assert knobs.kl_coef == 0 or inputs.ref is not None
    assert knobs.correction == 0 or inputs.rollout is not None
    assert knobs.ent_coef == 0 or entropy is not None
    loss = logprobs.new_empty((), dtype=dtype)
    logprob_grad = logprobs.new_empty(n, dtype=dtype)
    entropy_grad = logprobs.new_empty(n if knobs.ent_coef != 0 else 0, dtype=dtype)
    metrics = logprobs.new_empty(len(ENTRIES) - 1, dtype=dtype)

    def dense(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    launch(
        ppo_loss_kernel,
        (programs,),
        table,
        loss_ptr=loss,
        logprob_grad_ptr=logprob_grad,
        entropy_grad_ptr=entropy_grad,
        metrics_ptr=metrics,
        parts_ptr=logprobs.new_empty((len(ENTRIES), programs), dtype=dtype),
        arrivals_ptr=arrival_counter(logprobs.device),
        logprobs_ptr=dense(logprobs),
        entropy_ptr=dense(entropy),
        inputs=PPOInputs(*(dense(x) for x in inputs)),
        num_tokens=n,
        numbers=knobs.numbers(),
        CHOICES=knobs.choices(),
        BLOCK=table.block,
        FOLD=max(1, table.block // (32 * table.num_warps)),
        PARTS=triton.next_power_of_2(table.programs),
    )
    return loss, logprob_grad, entropy_grad, metrics
