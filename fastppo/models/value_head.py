"""The value head: one linear layer from hidden states to values, fp32 in every precision.

It starts at zero (with rewards in [0, 1] a random head starts out wrong by more than the reward) or
at a reward model's score head, as in InstructGPT (https://arxiv.org/abs/2203.02155).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastppo.models.setup import unwrap


def score_head(critic: Any) -> nn.Linear | None:
    """The score head of a sequence classification model, None of any other model.

    Raises:
        ValueError: it scores more than one label.
    """
    score: nn.Linear | None = getattr(unwrap(critic, "value_model"), "score", None)
    if score is not None and score.out_features != 1:
        raise ValueError(
            "value_model: expected a sequence classification model with 1 label, got "
            f"{score.out_features}. A causal language model or a base model is fine too"
        )
    return score


class ValueHead(nn.Linear):
    """Values of hidden states.

    Args:
        critic: the model whose trunk it reads. A sequence classification model with one label
            gives it its score head, any other model a zero one.
        device: where it is.

    Raises:
        ValueError: `critic` scores more than one label.
    """

    def __init__(self, critic: Any, device: torch.device) -> None:
        model = unwrap(critic, "value_model")
        super().__init__(model.config.hidden_size, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        if (score := score_head(critic)) is None:
            return
        with torch.no_grad():
            self.weight.copy_(score.weight)
            if score.bias is not None:
                self.bias.copy_(score.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values (n,) fp32 of hidden states (n, H), computed in fp32."""
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.float()).squeeze(-1)
