"""TRL 1.16: `trl.kernels`, what its GRPO trainer scores tokens with.

The chunked form goes through tiles of 4096 rows × 32768 vocabulary entries and sums gradients in
float32; its backward pass imports TRL's trainers, which need more packages than its forward pass.
The other form is a Triton kernel on whole logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEEDS = ("trl",)
NEEDS_BACKWARD = (*NEEDS, "accelerate", "datasets", "pandas")
_VOCAB_TILE = 32768  # what the trainer passes


def chunked_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N,) from hidden (N, H) and weight (V, H)."""
    from trl.kernels import ChunkedLogProbFunction

    arguments = (hidden, weight, None, targets, 1.0, _VOCAB_TILE, None, 1.0, ("entropy",))
    logprobs, entropy, *_ = ChunkedLogProbFunction.apply(*arguments)
    return logprobs, entropy


def fused_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (N,) from logits (N, V)."""
    from trl.kernels import selective_log_softmax_and_entropy

    logprobs, entropy = selective_log_softmax_and_entropy(logits, targets)
    return logprobs, entropy


def fused_linear_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The same from hidden states: all logits are made and kept."""
    return fused_logprobs(torch.nn.functional.linear(hidden, weight), targets)


def torch_logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What TRL runs where it has no kernel, such as on a CPU: a loop over rows in torch."""
    from trl.trainer.utils import selective_log_softmax_and_entropy

    logprobs, entropy = selective_log_softmax_and_entropy(logits, targets)
    return logprobs, entropy
