"""Per-token weights that turn any loss aggregation into Σ_t w_t·loss_t.

With m_t the mask and n_i the valid tokens of sequence i:

    aggregation          w_t                  total: the global count, over the whole optimiser step
    token-mean           m_t / total          valid tokens
    seq-mean-token-sum   m_t / total          sequences
    seq-mean-token-mean  m_t / (n_i·total)    sequences
    constant             m_t / total          the constant itself, e.g. sequences × longest response
                                              (Dr. GRPO, arXiv 2503.20783)

`total` counts every micro-batch and every rank of one optimiser step (times nothing else: a data-
parallel mean of gradients needs total divided by the number of ranks). Then splitting whole
sequences into micro-batches changes no gradient. For the two seq-means count the sequences with at
least one valid token; others have no token to weigh.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from fastppo.ops._checks import check_choice, check_cu_seqlens, check_tensor, check_total
from fastppo.ops._segments import segment_ids, segment_sum

Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant"]
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant")


def loss_weights_reference(
    cu_seqlens: Tensor, mask: Tensor, *, aggregation: Aggregation, total: float
) -> Tensor:
    """One sequence at a time."""
    w = torch.zeros(mask.shape, dtype=torch.float32)
    offsets = cu_seqlens.tolist()
    for start, stop in pairwise(offsets):
        m = mask[start:stop].float()
        per_token = max(float(m.sum()), 1.0) if aggregation == "seq-mean-token-mean" else 1.0
        w[start:stop] = m / (per_token * total) if total > 0 else 0.0
    return w


def loss_weights_torch(
    cu_seqlens: Tensor, mask: Tensor, aggregation: str, total: float | Tensor
) -> Tensor:
    """Without loops or host syncs."""
    w = mask.float()
    if aggregation == "seq-mean-token-mean":
        counts = segment_sum(w, cu_seqlens).clamp(min=1.0)
        w = w / counts[segment_ids(cu_seqlens, w.shape[0])]
    if not isinstance(total, Tensor):  # stays a number: copying it to a GPU would wait for it
        return w / total if total > 0 else torch.zeros_like(w)
    divisor = total.to(device=w.device, dtype=torch.float32)
    return torch.where(divisor > 0, w / divisor, 0.0)


def loss_weights(
    cu_seqlens: Tensor, mask: Tensor, *, aggregation: Aggregation, total: float | Tensor
) -> Tensor:
    """Weights for `ppo_loss`, `linear_ppo_loss` and `value_loss`.

    Args:
        cu_seqlens: (B+1,) int, offsets of the sequences among the N response tokens.
        mask: (N,) bool, False for tokens without loss.
        aggregation: see the module's table.
        total: the global normaliser of the table, >= 0: a number, or a () tensor on the mask's
            device (no host sync). 0 gives zero weights: nothing to learn from.

    Returns:
        (N,) float32, 0 at masked tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, aggregation or total.
    """
    check_tensor("mask", mask, ("N",), (torch.bool,))
    check_cu_seqlens(cu_seqlens, mask.shape[0], mask.device)
    check_choice("aggregation", aggregation, AGGREGATIONS)
    check_total(total)
    return loss_weights_torch(cu_seqlens, mask, aggregation, total)
