"""flash-attn 2: its Triton cross-entropy, the negative log-probability of a token from logits."""

from __future__ import annotations

from torch import Tensor

NEEDS = ("flash_attn",)


def logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N,) from logits (N, V)."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    losses: Tensor = cross_entropy_loss(logits, targets)[0]
    return -losses
