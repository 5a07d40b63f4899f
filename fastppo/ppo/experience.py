"""A rollout batch as PPO sees it: packed sequences, and what is known of their response tokens.

Letters as in data/sequences.py: B sequences, T tokens, N response tokens. Entry i of an (N,) array
belongs to the i-th generated token: its log-probability given everything before it, and the value
of the state before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastppo.data.ragged import Int32s
from fastppo.data.sequences import (
    Bools,
    BoolSequences,
    Flat,
    FloatSequences,
    Ints,
    PackedSequences,
    TokenSequences,
    packed,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch(PackedSequences):
    """Packed sequences with PPO's experience. The optional fields are None until someone computes
    them: `PPOStep.evaluate`, then `PPOStep.advantages`.
    """

    truncated: Tensor = packed("sequences", "bool")
    """(B,) bool, the response hit the length limit: told, never inferred."""
    rollout_logprobs: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32 nats, the engine's, at its temperature."""
    old_logprobs: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32 nats, of the policy before the update."""
    entropy: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32 nats, of the policy before the update, at the sampling temperature."""
    ref_logprobs: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32 nats, of the reference policy."""
    values: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32, the critic's value of the state before each token."""
    rewards: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32, per token."""
    advantages: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32."""
    returns: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32, what the critic is trained towards."""
    weights: Tensor | None = packed("responses", "float", optional=True)
    """(N,) fp32, mask and normaliser of the loss."""
    bootstrap: Tensor | None = packed("sequences", "float", optional=True)
    """(B,) fp32, value after the last token, 0 where finished."""

    _known_lengths: ClassVar[tuple[str, ...]] = ("valid_lengths", "active_lengths")

    @classmethod
    def pack(  # type: ignore[override]  # with the engine's log-probabilities and flags
        cls,
        prompts: TokenSequences | Flat,
        responses: TokenSequences | Flat,
        *,
        prompt_lengths: Ints | None = None,
        response_lengths: Ints | None = None,
        rollout_logprobs: FloatSequences | Flat | None = None,
        loss_mask: BoolSequences | Flat | None = None,
        truncated: Bools | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """Pack B prompts and their responses, as `PackedSequences.pack`.

        Args:
            prompts: B sequences of ≥ 1 token ids; or all of them in one flat sequence.
            responses: B sequences of ≥ 0 token ids; or all of them in one flat sequence.
            prompt_lengths: (B,) for flat prompts, how many tokens each has.
            response_lengths: (B,) for flat responses; then rollout_logprobs and loss_mask are
                flat as well.
            rollout_logprobs: like responses, float32 or float64, in nats.
            loss_mask: like responses, bool.
            truncated: (B,) bool; None: no response was cut.
            device: where the batch goes, in one copy (from pinned memory for CUDA).

        Raises:
            TypeError: the element type of a sequence is wrong (floats for tokens, ...).
            ValueError: an empty prompt, a negative length or token id, sizes that do not match,
                or more than 2^31 - 1 tokens in all.
        """
        return super().pack(
            prompts,
            responses,
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            loss_mask=loss_mask,
            device=device,
            rollout_logprobs=rollout_logprobs,
            truncated=truncated,
        )

    @functools.cached_property
    def active_lengths(self) -> Int32s:
        """(B,) int32 on the host, tokens of `valid_lengths` whose advantage is not 0.

        Reading the advantages makes the host wait for a GPU, once, as for `valid_lengths`.
        """
        if self.advantages is None:
            return self.valid_lengths
        active = self.advantages != 0
        if self.loss_mask is not None:
            active = active & self.loss_mask
        return self._lengths_where(active)


def check_batch(batch: object) -> None:
    """Refuse what is no batch, or one without sequences."""
    if not isinstance(batch, PackedBatch):
        raise TypeError(
            f"batch: expected a PackedBatch, got {type(batch).__name__}. Make one with "
            "PackedBatch.pack or PackedBatch.from_padded"
        )
    if batch.num_sequences == 0:
        raise ValueError("batch: expected at least one sequence, got none. Leave this call out")


def need(batch: PackedBatch, name: str, maker: str) -> Tensor:
    """A field that an earlier stage must have filled in."""
    value: Tensor | None = getattr(batch, name)
    if value is None:
        raise ValueError(f"batch.{name}: expected a tensor, got None. Call {maker} first")
    return value
