"""The PPO policy loss from log-probabilities: loss, gradients and metrics in one launch.

N tokens, formulas in `ppo_math`; token-level ratios. Every program writes the gradients of a block
of tokens and the sums and maxima of that block, and the last one to finish combines the blocks in
their order; see `last_block`. No float atomics: same input, same bits.

Bytes per token, fp32: logprob, old, A, w read, and entropy, ref and rollout where given (16 to 28);
gradient written, and that of the entropy where it has one (4 or 8).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.last_block import arrival_counter, four, is_last, load_valid
from fastppo_kernels.launch import Launch, check_device, launch
from fastppo_kernels.ppo_entries import ENTRIES
from fastppo_kernels.ppo_math import (
    FIRST_ENTRY,
    NUM_ENTRIES,
    NUM_SUMS,
    PPOInputs,
    PPOKnobs,
    ppo_terms,
)

# 128 programs at 65,536 tokens, one wave on an H200. Not measured on a GPU yet.
LAUNCH = Launch(block=512, num_warps=4)
# Blocks that the last program combines at a time.
CHUNK = 128
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
def _combine_blocks(loss_ptr, metrics_ptr, blocks_ptr, num_blocks, CHUNK: tl.constexpr):
    entry = tl.arange(0, 32)
    lane = tl.arange(0, CHUNK)
    sums = tl.zeros([32, CHUNK], tl.float32)
    maxima = sums
    for start in range(0, num_blocks, CHUNK):
        there = (entry < NUM_ENTRIES)[:, None] & (start + lane < num_blocks)[None, :]
        at = entry.to(tl.int64)[:, None] * num_blocks + (start + lane)[None, :]
        parts = tl.load(blocks_ptr + at, mask=there, other=0.0)
        sums += parts
        maxima = _larger(maxima, parts)
    total = tl.where(entry < NUM_SUMS, tl.sum(sums, axis=1), tl.reduce(maxima, 1, _larger))
    tl.store(loss_ptr + entry, total, mask=entry == 0)
    tl.store(metrics_ptr + entry - 1, total, mask=(entry > 0) & (entry < NUM_ENTRIES))


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def ppo_loss_kernel(
    loss_ptr,  # ()
    logprob_grad_ptr,
    entropy_grad_ptr,
    metrics_ptr,  # (NUM_ENTRIES − 1,)
    blocks_ptr,  # (NUM_ENTRIES, blocks)
    arrivals_ptr,
    logprobs_ptr,
    entropy_ptr,
    inputs,  # PPOInputs
    num_tokens,
    num_blocks,
    numbers,  # PPONumbers
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
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
    part_ptr = blocks_ptr + block
    sixteen, two = tl.arange(0, 16), tl.arange(0, 2)
    sums, more_sums = _sixteen(terms, FIRST_ENTRY), tl.join(terms.is_weight, terms.is_clipfrac)
    maxima = tl.reduce(tl.join(terms.ratio_max, terms.logprob_diff_max), 0, _larger)
    tl.store(part_ptr + sixteen * num_blocks, tl.sum(sums, axis=0))
    tl.store(part_ptr + (16 + two) * num_blocks, tl.sum(more_sums, axis=0))
    tl.store(part_ptr + (18 + two) * num_blocks, maxima)
    if is_last(arrivals_ptr, num_blocks):
        _combine_blocks(loss_ptr, metrics_ptr, blocks_ptr, num_blocks, CHUNK)


def ppo_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    inputs: PPOInputs,
    knobs: PPOKnobs,
    table: Launch = LAUNCH,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss (), ∂/∂logprobs (N,), ∂/∂entropy (N,) or (0,) where ent_coef is 0, and the metrics
    ENTRIES[1:], all float32, of (N,) inputs of any floating dtype; N > 0.

    A metric that needs an input which is None is NaN.
    """
    check_device("logprobs", logprobs)
    n, dtype = logprobs.shape[0], torch.float32
    blocks = triton.cdiv(n, table.block)
    assert blocks > 0
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
        (blocks,),
        table,
        loss_ptr=loss,
        logprob_grad_ptr=logprob_grad,
        entropy_grad_ptr=entropy_grad,
        metrics_ptr=metrics,
        blocks_ptr=logprobs.new_empty((len(ENTRIES), blocks), dtype=dtype),
        arrivals_ptr=arrival_counter(logprobs.device),
        logprobs_ptr=dense(logprobs),
        entropy_ptr=dense(entropy),
        inputs=PPOInputs(*(dense(x) for x in inputs)),
        num_tokens=n,
        num_blocks=blocks,
        numbers=knobs.numbers(),
        CHOICES=knobs.choices(),
        BLOCK=table.block,
        CHUNK=chunk,
    )
    return loss, logprob_grad, entropy_grad, metrics
