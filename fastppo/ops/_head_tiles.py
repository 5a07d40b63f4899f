"""The gradients of the language-model head, one tile of the vocabulary at a time.

Shapes: N rows, H hidden, W columns of one tile. Given the statistics of every row, a tile of the
logits' gradient needs no other tile:

    logits = hidden · weight[tile]ᵀ  →  G = ∂L/∂logits, in place    (targets less tile's start)
    ∂L/∂hidden += G · weight[tile],     ∂L/∂weight[tile] = Gᵀ · hidden,    ∂L/∂bias[tile] = Σ_rows G

The weight's gradient is one product over all rows and is written once, in the dtype wanted; what
is summed is (N, H), where chunks of rows sum (V, H). Memory: a tile and (N, H) of float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.ops._head import Gradients, Head, part_buffer, part_size, product
from fastppo.ops._head_options import HeadOptions
from fastppo.ops._precision import compute_dtype
from fastppo.ops._rows import RowStats


def tiled_gradients(
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
    """Gradients of (hidden, weight, bias), in `dtypes`, from those of N rows' log-probabilities
    and entropies.

    Args:
        x: (N, H), and `head`, in the dtype of the products.
        stats: of the rows over the whole vocabulary, by the device's `row_stats`.
        row_gradient: the device's; a target outside a tile must match none of its columns.
    """
    (n, _), (vocab, _) = x.shape, head.weight.shape
    width = part_size(options, x.device, vocab, max(n, 1))
    sum_dtype = dtypes[0] if width >= vocab else compute_dtype(x)
    hidden = x.new_zeros(x.shape, dtype=sum_dtype) if options.needs_hidden else None
    make = x.new_empty if n else x.new_zeros
    weight = make(head.weight.shape, dtype=dtypes[1]) if options.needs_weight else None
    bias = x.new_zeros(vocab, dtype=dtypes[2]) if options.needs_bias else None
    buffer = part_buffer(x, n, width, options, grad=True)
    for start in range(0, vocab if n else 0, width):
        columns = slice(start, min(start + width, vocab))
        part = buffer.first_columns(columns.stop - start)
        head.logits(x, part.logits, columns)
        row_gradient(
            part.logits,
            targets - start,
            stats,
            logprob_grad,
            entropy_grad,
            options.temperature_at(slice(None)),
            options.softcap,
            out=part.grad,
        )
        if hidden is not None:
            product(part.grad, head.weight[columns], hidden, add=start > 0)
        if weight is not None:
            product(part.grad.t(), x, weight[columns])
        if bias is not None:
            bias[columns] = part.grad.sum(dim=0, dtype=compute_dtype(x))
    return None if hidden is None else hidden.to(dtypes[0]), weight, bias
