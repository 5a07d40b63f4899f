"""Liger 0.8.5: the GRPO loss from hidden states in chunks, and from logits in Triton.

Both take B sequences of T tokens with one advantage a sequence, and neither gives entropies.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = ("liger_kernel",)
NO_ENTROPY = "Liger does not compute it"


def chunked_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N,) in tiles of 2048 rows × 4096 vocabulary entries."""
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    found: Tensor = LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, targets[None])
    return found[0]


def chunked_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip: float,
) -> Tensor:
    """PPO's clipped loss, the mean over tokens, as Liger runs it by default: a sequence at a time,
    its elementwise part compiled.

    Args:
        hidden, weight: (N, H), (V, H).
        targets, old_logprobs: (N,), sequence after sequence.
        advantages: (B,), one a sequence; N is a multiple of B.
        clip: of the ratio, both ways.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = (advantages.shape[0], targets.shape[0] // advantages.shape[0])
    op = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=clip, epsilon_high=clip, loss_type="dapo"
    )
    loss: Tensor = op(
        hidden.view(*shape, -1),
        weight,
        targets.view(shape),
        torch.ones(shape, device=hidden.device),
        advantages,
        old_per_token_logps=old_logprobs.view(shape),
    )[0]
    return loss


def with_last_row(rows: Tensor, sequences: int) -> Tensor:
    """(N, X) → (B, T + 1, X): Liger's kernels want a row after each sequence, and skip it."""
    shape = (sequences, rows.shape[0] // sequences, rows.shape[1])
    return torch.nn.functional.pad(rows.view(shape), (0, 0, 0, 1))


def triton_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N,) from logits (1, N + 1, V), forward only."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    found: Tensor = fused_selective_log_softmax(logits, targets[None], temperature=1.0)
    return found[0]


def triton_ppo_loss(
    logits: Tensor, targets: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float
) -> Tensor:
    """As `chunked_ppo_loss`, from logits (B, T + 1, V), which the backward pass overwrites."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    shape = (advantages.shape[0], logits.shape[1] - 1)
    loss: Tensor = triton_grpo_loss(
        logits,
        old_logprobs.view(shape),
        None,
        targets.view(shape),
        advantages,
        temperature=1.0,
        beta=0.0,
        eps_low=clip,
        eps_high=clip,
        loss_type="dapo",
        reduce=True,
    )[0]
    return loss
