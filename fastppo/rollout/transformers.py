"""Rollouts by transformers' own `generate`, with a KV cache, from the policy's own weights.

Prompts are padded on the left, with explicit mask and positions. The sampling distribution is made
here and not by the model's generation_config: a checkpoint that ships top_k = 50 or a repetition
penalty would otherwise sample from another distribution than the one that is trained.

Log-probabilities are gathered step by step from the logits that a token was drawn from, so that
only one (B, V) array is alive; keeping the scores of all steps would take B x steps x V x 4 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo.policy import Policy
from fastppo.rollout import Rollouts, Sampling

_new_config: Any = GenerationConfig  # transformers leaves its constructor untyped


class TransformersEngine:
    """The engine of `fastppo.rollout.Engine` that needs nothing but transformers.

    Args:
        policy: whose current weights sample; nothing is copied.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Rollouts:
        """One response to each prompt; the same seed and weights give the same responses.

        Args:
            prompts: B integer arrays of token ids, none of them empty.
            sampling: how to draw.

        Raises:
            ValueError: no prompts, an empty one, or one too long for the model's positions.
        """
        device = self.policy.device
        ids, mask = _left_padded(prompts, sampling.pad_token_id)
        self._check_positions(ids.shape[1], sampling.max_new_tokens)
        input_ids, attention_mask = torch.from_numpy(ids), torch.from_numpy(mask)
        recorder = _Recorder(sampling)
        with (
            torch.no_grad(),
            self.policy.unpacked() as model,
            _own_generation_config(model),
            self.policy.autocast(),
            _seeded(sampling.seed, device),
        ):
            sequences = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(device),
                generation_config=_generation_config(sampling),
                logits_processor=LogitsProcessorList([recorder]),
            )
        tokens = sequences[:, ids.shape[1] :]  # (B, steps)
        logprobs = recorder.logprobs(tokens).cpu().numpy()  # (B, steps)
        return _cut(tokens.cpu().numpy().astype(np.int32), logprobs, sampling)

    def _check_positions(self, longest: int, new: int) -> None:
        limit = getattr(self.policy.model.config, "max_position_embeddings", None)
        if limit is not None and longest + new > limit:
            raise ValueError(
                f"prompts: expected at most {limit - new} tokens, so that {new} new ones fit the "
                f"model's {limit} positions; the longest has {longest}. Shorten max_new_tokens or "
                "filter the prompts"
            )


class _Recorder(LogitsProcessor):
    """Makes the sampling distribution and gathers the log-probability of each token drawn.

    The token drawn from one step's scores is known at the next call, and the last ones afterwards.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.temperature = sampling.temperature or 1.0
        self.warpers: list[Any] = []
        if sampling.temperature > 0:
            if sampling.top_k > 0:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0.0:
                self.warpers.append(MinPLogitsWarper(sampling.min_p))
        self.scores: Tensor | None = None  # (B, V) fp32, of the latest step
        self.gathered: list[Tensor] = []  # (B,) fp32 of each step before it

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) of the next token → logits of the distribution to draw it from."""
        if self.scores is not None:
            self.gathered.append(_gather(self.scores, input_ids[:, -1]))
        self.scores = scores.float() / self.temperature
        for warper in self.warpers:
            self.scores = warper(input_ids, self.scores)
        return self.scores

    def logprobs(self, tokens: Tensor) -> Tensor:
        """Log-probabilities (B, steps) fp32 of the tokens (B, steps) that `generate` returned."""
        steps = tokens.shape[1]
        if self.scores is not None and len(self.gathered) < steps:
            self.gathered.append(_gather(self.scores, tokens[:, -1]))
            self.scores = None
        return torch.stack(self.gathered[:steps], 1)


def _gather(scores: Tensor, tokens: Tensor) -> Tensor:
    """log_softmax(scores)[tokens] (B,) of scores (B, V), without a second (B, V) array."""
    picked = scores.gather(1, tokens[:, None]).squeeze(1)
    return (picked - scores.logsumexp(1)).clamp(max=0.0)


def _generation_config(sampling: Sampling) -> GenerationConfig:
    """Everything off that would change the distribution; the recorder has made it already."""
    sampled = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampling.temperature > 0 else {}
    config: GenerationConfig = _new_config(
        **sampled,
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sampling.temperature > 0,
        num_beams=1,
        use_cache=True,
        eos_token_id=list(sampling.eos_token_ids) or None,
        pad_token_id=sampling.pad_token_id,
    )
    return config


@contextlib.contextmanager
def _own_generation_config(model: Any) -> Iterator[None]:
    """Hide the model's generation_config, from which `generate` fills in what is unset."""
    own = model.generation_config
    model.generation_config = _new_config()
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators that `generate` draws from, and put them back afterwards."""
    indices = [device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=indices):
        torch.default_generator.manual_seed(seed)
        for index in indices:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def _left_padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both (B, longest) int64, with the padding on the left."""
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts: expected token ids, got an empty prompts[{i}]")
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad, dtype=np.int64)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    return ids, mask


def _cut(tokens: np.ndarray, logprobs: np.ndarray, sampling: Sampling) -> Rollouts:
    """Cut each row after its first end-of-sequence token; what follows it is filler."""
    is_eos = np.isin(tokens, sampling.eos_token_ids)  # (B, steps)
    finished = np.asarray(is_eos.any(1))
    lengths = np.where(finished, is_eos.argmax(1) + 1, tokens.shape[1])
    assert finished.all() or tokens.shape[1] == sampling.max_new_tokens
    return Rollouts(
        responses=[row[:n].copy() for row, n in zip(tokens, lengths, strict=True)],
        logprobs=[row[:n].copy() for row, n in zip(logprobs, lengths, strict=True)],
        finished=finished,
        truncated=np.logical_not(finished),
    )
