"""Rollouts: from prompts in token ids to responses in token ids.

An engine gets ids and gives ids; nothing between sampling and training decodes text and encodes it
again, because the same text can have other ids. Whether a response ended by itself or was cut is
said by flags, for what comes after not to guess it from the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How responses are drawn.

    Raises:
        ValueError: a field outside its range.
    """

    max_new_tokens: int
    """Longest response, in tokens, the end-of-sequence token included."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a response; none: every response has `max_new_tokens` tokens."""
    seed: int
    """Seed of this call; the global generators are neither used nor moved."""
    temperature: float = 1.0
    """What the logits are divided by; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this probability; 1 is off."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 is off."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest; 0 is off."""

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("temperature", self.temperature >= 0.0, "a number ≥ 0"),
            ("max_new_tokens", self.max_new_tokens >= 1, "an integer ≥ 1"),
            ("eos_token_ids", all(i >= 0 for i in self.eos_token_ids), "token ids ≥ 0"),
            ("seed", 0 <= self.seed < 2**63, "an integer in [0, 2^63)"),
            ("top_p", 0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            ("top_k", self.top_k >= 0, "an integer ≥ 0"),
            ("min_p", 0.0 <= self.min_p < 1.0, "a number in [0, 1)"),
        ):
            if not valid:
                raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Rollouts:
    """Responses of one call, in the order of its prompts."""

    responses: list[np.ndarray]
    """B arrays int32: generated tokens, the end-of-sequence token included if it was generated."""
    logprobs: list[np.ndarray]
    """B arrays float32, in nats: log-probability of each token under the distribution it was drawn
    from, that is at the sampling temperature and renormalised over what top-p, top-k and min-p
    kept; at temperature 1 where the temperature is 0. NaN where the model's logits were not finite
    numbers."""
    finished: np.ndarray
    """(B,) bool: an end-of-sequence token was generated."""
    truncated: np.ndarray
    """(B,) bool: `max_new_tokens` were generated and none of them ended the response."""

    @property
    def finite(self) -> np.ndarray:
        """(B,) bool: all log-probabilities are finite; a row where they are not is not a sample."""
        return np.array([bool(np.isfinite(row).all()) for row in self.logprobs], dtype=bool)


class Engine(Protocol):
    """What samples responses from the current policy."""

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Rollouts:
        """One response to each prompt.

        Args:
            prompts: B integer arrays of token ids, none of them empty.
            sampling: how to draw.
        """
        ...
