"""What the cases of the language-model head share: plain torch, and float64 by parts.

Shapes: N rows (tokens) in B sequences of equal length, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.profiling.case import Inputs, Outputs, Prepare

_PART_BYTES = 1 << 30  # of one float64 [rows, V] array of the reference


def logprobs_of(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N,) as trainers without a kernel compute them."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    with torch.no_grad():
        entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def linear_logprobs_of(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same of hidden · weightᵀ; the logits are kept for the backward pass."""
    return logprobs_of(torch.nn.functional.linear(hidden, weight), targets)


def part_slices(rows: int, vocab: int) -> list[slice]:
    """Parts of so few rows that float64 [rows, V] arrays fit."""
    step = max(1, _PART_BYTES // (8 * vocab))
    return [slice(start, start + step) for start in range(0, rows, step)]


def by_parts(
    function: Callable[[Inputs], Outputs],
    x: Inputs,
    vocab: int,
    *,
    per_row: Sequence[str],
    leaves: Sequence[str] = (),
    upstream: Callable[[Outputs, Inputs], Tensor] | None = None,
) -> Outputs:
    """A function of rows by autograd, for some rows at a time, so that float64 fits anywhere.

    Args:
        function: results by name: (rows,), or () where they add up over rows.
        x: float64 inputs.
        vocab: width of what the function makes of a row.
        per_row: inputs that have a row per token; the others are used whole.
        leaves: inputs that get a gradient, returned as "grad NAME".
        upstream: what is differentiated, a number; None: nothing is.
    """
    whole = dict(x) | {name: x[name].detach().requires_grad_() for name in leaves}
    found: list[Outputs] = []
    for rows in part_slices(x["targets"].shape[0], vocab):
        part = {name: t[rows] if name in per_row else t for name, t in whole.items()}
        outputs = function(part)
        if upstream is not None:
            upstream(outputs, part).backward()
        found.append({name: out.detach() for name, out in outputs.items()})
    results = {}
    for name, first in found[0].items():
        parts = [outputs[name] for outputs in found]
        results[name] = torch.cat(parts) if first.ndim else torch.stack(parts).sum()
    for name in leaves:
        gradient = whole[name].grad
        assert gradient is not None
        results[f"grad {name}"] = gradient
    return results


def compiled(prepare: Callable[[Any], Prepare], scorer: Callable[..., Any]) -> Prepare:
    """`prepare(scorer)` with the scorer compiled for one size, when it is prepared."""
    return lambda x, size: prepare(torch.compile(scorer, dynamic=False))(x, size)
