"""Discounted rewards to go on packed sequences: returns without a critic (REINFORCE++, TD(1)).

Shapes: N response tokens of B sequences back to back, cu_seqlens (B+1,). Backwards in each
sequence from G' = bootstrap (0 where the sequence finished),

    G_t = r_t + γ·G',   G' ← G_t

It is `gae` with V = 0 and λ = 1, and runs as that. A masked token passes G' through unchanged, as
in `gae` with mask_mode "carry".
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastppo.ops._checks import check_tensor
from fastppo.ops._precision import compute_dtype
from fastppo.ops.gae import gae


def discounted_returns_reference(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> Tensor:
    """A Python loop over tokens."""
    out = torch.zeros(rewards.shape, dtype=torch.float64)
    offsets = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(offsets)):
        to_go = 0.0 if bootstrap is None else float(bootstrap[i])
        for t in reversed(range(start, stop)):
            if mask is None or bool(mask[t]):
                to_go = float(rewards[t]) + gamma * to_go
                out[t] = to_go
    return out.to(compute_dtype(rewards))


def discounted_returns(
    rewards: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float | Tensor,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Discounted sum of the rewards from each token on.

    Args:
        rewards: (N,) floating.
        cu_seqlens: (B+1,) int offsets of the sequences; empty sequences are fine.
        gamma: discount γ in [0, 1], a number or (B,).
        mask: (N,) bool, False for tokens to pass over, which may hold NaN; None: all count.
        bootstrap: (B,) return that follows the last token of a truncated sequence; None: all 0.
        max_seqlen: a length that no sequence exceeds, in tokens, as in `gae`; None: N.

    Returns:
        (N,) float32 without gradient, 0 at masked tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; on CPU, malformed cu_seqlens.
    """
    check_tensor("rewards", rewards, ("N",))
    zeros = torch.zeros(rewards.shape, dtype=compute_dtype(rewards), device=rewards.device)
    return gae(
        rewards,
        zeros,
        cu_seqlens,
        gamma=gamma,
        gae_lambda=1.0,
        mask=mask,
        bootstrap=bootstrap,
        max_seqlen=max_seqlen,
    ).returns
