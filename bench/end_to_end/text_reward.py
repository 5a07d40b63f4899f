"""A reward function in the form of the reward model that TRL's PPOTrainer wants."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from workload import Workload

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from rewards import exact_number  # the function that fastppo is given


class TextReward(nn.Module):
    """1 where the last number of the response is the answer to the prompt, else 0.

    TRL calls the module that `base_model_prefix` names, then `score` on its last hidden states, and
    takes what that says at the last token of the response.

    Args:
        work: with answers.
        tokenizer: turns tokens into text.
    """

    base_model_prefix = "texts"

    def __init__(self, work: Workload, tokenizer: Any) -> None:
        super().__init__()
        assert work.answers is not None
        self.answers = dict(zip(work.prompts, work.answers, strict=True))
        self.tokenizer = tokenizer
        self.latest = torch.zeros(0)
        """The rewards of the last batch."""
        self.score = nn.Identity()

    def texts(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> SimpleNamespace:
        """Each sequence's reward at every token: hidden states (B, L, 1)."""
        answers, responses = [], []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            text = self.tokenizer.decode(ids[mask])
            prompt = next(p for p in self.answers if text.startswith(p))
            response = self.tokenizer(text[len(prompt) :])["input_ids"]
            answers.append(self.answers[prompt])
            responses.append(self.tokenizer.decode(response, skip_special_tokens=True))
        self.latest = torch.tensor(exact_number(responses, answers))
        states = self.latest.to(input_ids.device)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[states])
