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

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo_kernels.launch import choose, launch
from fastppo_kernels.ppo_entries import ENTRIES
from fastppo_kernels.ppo_math import FIRST_ENTRY, NUM_ENTRIES, PPOInputs, PPOKnobs, ppo_terms
from fastppo_kernels.row_math import (
    gradient_factors,
    matrix,
    row_of,
    row_statistics,
    write_gradient,
)
from fastppo_kernels.token_logprobs import STATISTICS_LAUNCHES, check_logits


@triton.jit(do_not_specialize=["stride_entry"])  # the number of rows
def ppo_rows_kernel(
    logits,  # Matrix
    out,  # Matrix, or None: no gradient
    targets_ptr,
    temperatures_ptr,
    inputs,  # PPOInputs
    entries_ptr,
    vocab,
    stride_entry,
    temperature,
    softcap,
    numbers,  # PPONumbers
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_logits = row_of(logits, row)
    target = tl.load(targets_ptr + row)
    tau = temperature
    if temperatures_ptr is not None:
        tau = tl.load(temperatures_ptr + row).to(tl.float32)
    logprob, entropy, m, log_sum = row_statistics(
        row_logits, target, vocab, tau, softcap, BLOCK, WIDTH
    )

    w = tl.load(inputs.weights + row).to(tl.float32)
    valid = w != 0
    ref, rollout = None, None
    if inputs.ref is not None:
        ref = tl.where(valid, tl.load(inputs.ref + row).to(tl.float32), 0.0)
    if inputs.rollout is not None:
        rollout = tl.where(valid, tl.load(inputs.rollout + row).to(tl.float32), 0.0)
    lp, ent = tl.where(valid, logprob, 0.0), tl.where(valid, entropy, 0.0)
    old = tl.where(valid, tl.load(inputs.old + row).to(tl.float32), 0.0)
    advantage = tl.where(valid, tl.load(inputs.advantages + row).to(tl.float32), 0.0)
    token = PPOInputs(old, advantage, w, ref, rollout)
    terms = ppo_terms(lp, ent, token, numbers, CHOICES)
    at = entries_ptr + row
    for i in tl.static_range(NUM_ENTRIES):
        tl.store(at + i * stride_entry, terms[FIRST_ENTRY + i])

    if out is not None:
        # Every thread has read the row, the target's logit included, before one writes to it.
        tl.debug_barrier()
        g, h = terms.logprob_grad, terms.entropy_grad
        live = valid & ((g != 0) | (h != 0))
        factors = gradient_factors(g, h, entropy, m, log_sum, tau)
        row_out = row_of(out, row)
        steps = tl.cdiv(vocab, BLOCK)
        for step in tl.range(0, steps):
            write_gradient(
                row_logits,
                row_out,
                (steps - 1 - step) * BLOCK,
                target,
                live,
                vocab,
                factors,
                softcap,
                CHOICES.entropy_grad,
                BLOCK,
            )


def ppo_rows(
    logits: Tensor,
    targets: Tensor,
    inputs: PPOInputs,
    knobs: PPOKnobs,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """Entries (len(ENTRIES), N) float32 of every row, and the gradient of the summed loss.

    The gradient (N, V) goes to `out`, which may be `logits` itself or have another dtype; None:
    nobody wants it.

    An entry that needs `inputs.ref` or `inputs.rollout` and has none is NaN. Arguments as in
    `token_logprobs_fwd`; the per-row inputs are (N,) floating and contiguous.
    """
    rows = temperature if isinstance(temperature, Tensor) else None
    check_logits(logits, targets, rows, *inputs)
    assert out is None or out.shape == logits.shape
    assert knobs.kl_coef == 0 or inputs.ref is not None
    assert knobs.correction == 0 or inputs.rollout is not None
    n, vocab = logits.shape
    entries = logits.new_empty((len(ENTRIES), n), dtype=torch.float32)
    if n == 0:
        return entries
    table = choose(STATISTICS_LAUNCHES, vocab)
    launch(
        ppo_rows_kernel,
        (n,),
        table,
        logits=matrix(logits),
        out=None if out is None else matrix(out),
        targets_ptr=targets,
        temperatures_ptr=rows,
        inputs=inputs,
        entries_ptr=entries,
        vocab=vocab,
        stride_entry=n,
        temperature=1.0 if rows is not None else float(temperature),
        softcap=None if softcap is None else float(softcap),
        numbers=knobs.numbers(),
        CHOICES=knobs.choices(),
        BLOCK=table.block,
        WIDTH=16 // logits.itemsize,
    )
    return entries
