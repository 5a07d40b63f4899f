"""Rollouts by transformers' own `generate`, with a KV cache, from the policy's own weights.

Prompts are padded on the left, with explicit mask and positions. The sampling distribution is made
here and not by the model's generation_config: a checkpoint that ships top_k = 50 or a repetition
penalty would otherwise sample from another distribution than the one that is trained.

Tokens are drawn by `Sampler`, from uniforms that belong to the row and are made once per call, so
that a batch may be split into passes that fit into memory. Log-probabilities are gathered step by
step from the logits that a token was drawn from, so that only one (B, V) array is alive; keeping
the scores of all steps would take B x steps x V x 4 bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from fastppo.device import free_memory, is_out_of_memory
from fastppo.policy import Policy
from fastppo.rollout import Rollouts, Sampling
from fastppo.rollout.sampler import Sampler, uniforms

_new_config: Any = GenerationConfig  # transformers leaves its constructor untyped


class TransformersEngine:
    """The engine of `fastppo.rollout.Engine` that needs nothing but transformers.

    A call that runs out of memory goes on with half as many rows in each pass, down to one, and the
    same uniforms: samples change through the rounding of the logits alone.

    Args:
        policy: whose current weights sample; nothing is copied.
        max_rows: most prompts in one pass of the model, at least 1; None is all of a call. Lowered
            where memory runs out, for the calls to come too.
    """

    def __init__(self, policy: Policy, max_rows: int | None = None) -> None:
        self.policy = policy
        self.max_rows = max_rows

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Rollouts:
        """One response to each prompt; the same seed and weights give the same responses.

        Args:
            prompts: B integer arrays of token ids, none of them empty.
            sampling: how to draw.

        Raises:
            ValueError: no prompts, an empty one, or one too long for the model's positions;
                `max_rows` below 1.
            Interrupted: a signal has come; the policy is as before.
        """
        _check_prompts(prompts)
        self._check_positions(max(len(prompt) for prompt in prompts), sampling.max_new_tokens)
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows: expected None or an integer ≥ 1, got {self.max_rows}")
        drawn = uniforms(len(prompts), sampling).to(self.policy.device)
        parts: list[Rollouts] = []
        done = 0
        while done < len(prompts):
            rows = slice(done, min(len(prompts), done + (self.max_rows or len(prompts))))
            count = rows.stop - rows.start
            try:
                part = self._pass(prompts[rows], drawn[rows], sampling)
            except Exception as error:
                if count == 1 or not is_out_of_memory(error):
                    raise
                part = None
            if part is None:  # the error, gone by now, kept the tensors of its pass alive
                free_memory(self.policy.device)
                self.max_rows = count // 2
            else:
                parts.append(part)
                done = rows.stop
        return _joined(parts)

    def _pass(self, prompts: Sequence[np.ndarray], drawn: Tensor, sampling: Sampling) -> Rollouts:
        """Responses to some prompts from their uniforms `drawn` (rows, max_new_tokens)."""
        device = self.policy.device
        ids, mask = _left_padded(prompts, sampling.pad_token_id)
        input_ids, attention_mask = torch.from_numpy(ids), torch.from_numpy(mask)
        sampler = Sampler(sampling, drawn)
        with (
            torch.no_grad(),
            self.policy.unpacked() as model,
            _own_generation_config(model),
            self.policy.autocast(),
        ):
            sequences = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0).to(device),
                generation_config=_generation_config(sampling),
                logits_processor=LogitsProcessorList([sampler]),
            )
        tokens = sequences[:, ids.shape[1] :]  # (rows, steps)
        logprobs = sampler.logprobs(tokens.shape[1]).cpu().numpy()  # (rows, steps)
        return _cut(tokens.cpu().numpy().astype(np.int32), logprobs, sampling)

    def _check_positions(self, longest: int, new: int) -> None:
        limit = getattr(self.policy.model.config, "max_position_embeddings", None)
        if limit is not None and longest + new > limit:
            raise ValueError(
                f"prompts: expected at most {limit - new} tokens, so that {new} new ones fit the "
                f"model's {limit} positions; the longest has {longest}. Shorten max_new_tokens or "
                "filter the prompts"
            )


def _generation_config(sampling: Sampling) -> GenerationConfig:
    """Greedy, with everything off that would change the scores; the sampler has drawn already."""
    config: GenerationConfig = _new_config(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,
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


def _check_prompts(prompts: Sequence[np.ndarray]) -> None:
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts: expected token ids, got an empty prompts[{i}]")


def _left_padded(prompts: Sequence[np.ndarray], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both (rows, longest) int64, with the padding on the left."""
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


def _joined(parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of several passes, in their order."""
    return Rollouts(
        responses=[row for part in parts for row in part.responses],
        logprobs=[row for part in parts for row in part.logprobs],
        finished=np.concatenate([part.finished for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
    )
