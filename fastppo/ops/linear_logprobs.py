"""Log-probabilities and entropies straight from hidden states, never holding [N, V] logits.

Shapes: N rows, H hidden, V vocabulary. The maths is `token_logprobs` of

    logits = softcap·tanh((hidden · weightᵀ + bias) / softcap)

done for one chunk of rows at a time. The backward pass computes the logits again, turns them into
their gradient in place, and multiplies: 4 matrix passes in all (forward 1, backward 3), 2 of the 3
only where hidden and weight need gradients. It goes by tiles of the vocabulary where the weight
needs a gradient and there are fewer rows than tokens, see `_head_tiles`, else by chunks of rows.

    ∂L/∂hidden = ∂L/∂logits · weight,   ∂L/∂weight = ∂L/∂logitsᵀ · hidden,   ∂L/∂bias = Σ_rows
    ∂L/∂logits

Rounding. Products of the same shape give the same bits, so where all rows are one part in both
passes a probability is exactly the one that the forward pass summed. Products of other shapes may
round differently, on some processors and not on others. Then what holds, in either pass, is the
bound of a sum of H products and a bias: the logit z_j errs by at most

    r_j = (H + 1)·u·(Σ_i |hidden_i·weight_ji| + |bias_j|),     u = 2⁻²⁴ (float64: 2⁻⁵³)

(and by its own rounding where logits are kept in half precision), so p_j by the factor e^{±r_j/τ},
and log-probability and entropy as these say; in practice by a tenth of it. Plain torch keeps its
logits: theirs err as much, but cancel in p where one token has most of the probability.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastppo.ops._checks import check_num_live, check_targets
from fastppo.ops._head import (
    Gradients,
    Head,
    HeadGradients,
    chunks,
    fake_gradients,
    gradient_dtypes,
    head_operands,
    present,
    wanted,
)
from fastppo.ops._head_options import (
    OPTIONS_SCHEMA,
    HeadOptions,
    check_head,
    head_options,
    options_of,
)
from fastppo.ops._head_tiles import tiled_gradients
from fastppo.ops._precision import compute_dtype, without_autocast
from fastppo.ops._row_ops import row_ops
from fastppo.ops._rows import RowStats
from fastppo.ops.token_logprobs import LogProbs, token_logprobs_reference


def linear_logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
) -> LogProbs:
    """Full [N, V] logits, then `token_logprobs_reference`; differentiable by autograd."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return token_logprobs_reference(logits, targets, temperature=temperature, softcap=softcap)


def head_stats(
    x: Tensor,
    head: Head,
    targets: Tensor,
    options: HeadOptions,
    row_stats: Callable[..., RowStats],
) -> RowStats:
    """Statistics of every row, chunk by chunk."""
    dtype = compute_dtype(x)
    stats = RowStats(*(x.new_empty(x.shape[0], dtype=dtype) for _ in range(4)))
    for rows, part in chunks(x, head.weight.shape[0], options):
        logits = head.logits(x[rows], out=part.logits)
        tau = options.temperature_at(rows)
        parts = row_stats(logits, targets[rows], tau, options.softcap)
        for result, piece in zip(stats, parts, strict=True):
            result[rows] = piece
    return stats


def chunked_gradients(
    x: Tensor,
    head: Head,
    targets: Tensor,
    stats: RowStats,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    options: HeadOptions,
    dtypes: tuple[torch.dtype, ...],
    row_gradient: Callable[..., None],
) -> Gradients:
    """As `tiled_gradients`, by chunks of rows."""
    total = HeadGradients(x, head, options, dtypes)
    for rows, part in chunks(x, head.weight.shape[0], options, grad=True):
        row_gradient(
            head.logits(x[rows], out=part.logits),
            targets[rows],
            RowStats(*(each[rows] for each in stats)),
            logprob_grad[rows],
            None if entropy_grad is None else entropy_grad[rows],
            options.temperature_at(rows),
            options.softcap,
            out=part.grad,
        )
        total.add(rows, part.grad)
    return total.finish()


def rows_where(keep: Tensor, count: int | None) -> Tensor | None:
    """Where `keep` (N,) bool holds, int64 (count,); None where it holds everywhere. A count that is
    not given costs one host sync on a GPU."""
    if count is None:
        rows = keep.nonzero().squeeze(1)
    else:
        check_num_live(count, keep)
        rows = torch.nonzero_static(keep, size=count).squeeze(1)
    return rows if rows.shape[0] < keep.shape[0] else None


def scatter(x: Tensor, rows: Tensor | None, num_rows: int) -> Tensor:
    """(num_rows, …) with x at `rows` and 0 elsewhere."""
    return x if rows is None else x.new_zeros(num_rows, *x.shape[1:]).index_copy_(0, rows, x)


@custom_op(
    "fastppo::linear_logprobs",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? keep, "
    f"SymInt? num_live, {OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    keep: Tensor | None,
    num_live: int | None,
    *rest: Any,
) -> RowStats:
    options, device = HeadOptions(*rest), hidden.device
    rows = None if keep is None else rows_where(keep, num_live)
    if rows is not None:
        hidden, targets, options = hidden[rows], targets[rows], options.select(rows)
    check_targets(targets, weight.shape[0])
    with without_autocast(device):
        x, head = head_operands(hidden, weight, bias, options.dtype)
        stats = head_stats(x, head, targets, options, row_ops(device).stats)
    count = 0 if keep is None else keep.shape[0]
    return RowStats(*(scatter(each, rows, count) for each in stats))


@_forward.register_fake
def _(hidden: Tensor, *rest: Any) -> RowStats:
    dtype = compute_dtype(torch.empty((), dtype=options_of(rest).dtype, device="meta"))
    return RowStats(*(hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(4)))


@custom_op(
    "fastppo::linear_logprobs_backward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? keep, "
    "SymInt? num_live, Tensor entropy, Tensor max, Tensor log_sum, Tensor g, Tensor? h, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    keep: Tensor | None,
    num_live: int | None,
    entropy: Tensor,
    max: Tensor,
    log_sum: Tensor,
    g: Tensor,
    h: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    options, num_rows, device = HeadOptions(*rest), hidden.shape[0], hidden.device
    if keep is None:
        keep = g != 0 if h is None else (g != 0) | (h != 0)
    rows = rows_where(keep, num_live)
    stats = RowStats(entropy, entropy, max, log_sum)  # logprobs themselves are not used
    dtypes = gradient_dtypes(hidden, weight, bias)
    if rows is not None:
        hidden, targets, options = hidden[rows], targets[rows], options.select(rows)
        stats, g = RowStats(*(each[rows] for each in stats)), g[rows]
        h = None if h is None else h[rows]
    with without_autocast(device):
        x, head = head_operands(hidden, weight, bias, options.dtype)
        # Tiles sum (N, H) where chunks of rows sum (V, H).
        tiled = options.needs_weight and x.shape[0] < weight.shape[0]
        gradients = tiled_gradients if tiled else chunked_gradients
        rows_of = (targets, stats, g, h, options, dtypes, row_ops(device).gradient)
        dx, *others = gradients(x, head, *rows_of)
        return present((None if dx is None else scatter(dx, rows, num_rows), *others), weight)


@_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(hidden, weight, bias, options_of(rest).needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, keep, ctx.num_live, *_ = inputs
    options = options_of(inputs)
    _, entropy, max, log_sum = output
    taus, ctx.options = options.temperatures, options._replace(temperatures=None)
    ctx.save_for_backward(hidden, weight, bias, targets, keep, taus, entropy, max, log_sum)
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(max, log_sum)
    ctx.set_materialize_grads(False)


def _run_backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: None) -> tuple[Any, ...]:
    hidden, weight, bias, targets, keep, taus, *stats = ctx.saved_tensors
    at = (targets, keep, ctx.num_live, *stats, torch.zeros_like(stats[0]) if g is None else g, h)
    options = ctx.options._replace(temperatures=taus)
    grads = _backward(hidden, weight, bias, *at, *options)
    return (*wanted(grads, options.needs), *[None] * (ctx.num_inputs - 3))


_forward.register_autograd(_run_backward, setup_context=_setup_context)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    low_memory: bool = False,
    fp32_logits: bool = False,
) -> LogProbs:
    """Log-probabilities of `targets` and entropies under softmax of the head's logits.

    Args:
        hidden: (N, H) floating, the state before each target.
        weight: (V, H), the head's matrix; bias: (V,) or None. One dtype with `hidden`, except under
            autocast, which casts all three.
        targets: (N,) int32 or int64 token ids.
        temperature: a number, or (N,) floating; divides the (soft-capped) logits, also for entropy.
        softcap: None or c > 0: logits become c·tanh(logits / c).
        chunk_bytes: bytes of one part of the logits; None picks a default for the device. Changes
            speed and memory, and results only by rounding.
        low_memory: smaller parts by default (256 MiB instead of 2 GiB on a GPU).
        fp32_logits: keep the logits of half-precision operands in float32 (MiniMax-M1, arXiv
            2506.13585): 4 bytes a logit, and 2 for its gradient. On a CPU their product then runs
            in float32.

    Returns:
        LogProbs(logprobs, entropy), (N,) float32 in nats. Gradients reach hidden, weight and bias
        where they require them, each in its own dtype, summed in float32. The backward pass skips
        rows whose incoming gradients are 0, whose list costs one host sync on a GPU. Its memory,
        besides the gradients: one part of the logits, and where weight needs a gradient and N < V
        (N, H) of float32, twice on a GPU.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or option; on CPU, ids outside [0, V).
    """
    check_head(hidden, weight, targets, bias, temperature, softcap, chunk_bytes)
    head = (temperature, softcap, chunk_bytes, low_memory, fp32_logits)
    options = head_options(hidden, weight, bias, *head)
    return masked_logprobs(hidden, weight, bias, targets, None, None, options)


def masked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    keep: Tensor | None,
    num_live: int | None,
    options: HeadOptions,
) -> LogProbs:
    """`linear_logprobs` of the rows where `keep` (N,) bool holds, `num_live` of them; the others
    are 0 and never reach the head, and their incoming gradients are ignored."""
    logprobs, entropy, _, _ = _forward(
        hidden, weight, bias, targets.long(), keep, num_live, *options
    )
    return LogProbs(logprobs, entropy)
