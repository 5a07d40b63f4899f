"""Rollouts by the model's own modules: packed prompts, a KV cache, rows that leave at their end.

The prompts go through the model once, packed as in training. Then each step is one packed row
again, of one token for every sequence that has not ended; those that have are dropped. So no token
is computed for padding or after an end (attention.py, kv_cache.py).

Tokens are drawn by `Sampler`, from uniforms that belong to the row and are made once per call, so
that a batch may be split into passes that fit into memory. Nothing is read from a checkpoint's
generation_config: a top_k = 50 or a repetition penalty shipped there would sample from another
distribution than the one that is trained. Log-probabilities are gathered step by step from the
logits that a token was drawn from, so that only one (S, V) array is alive.

B rows of a call or a pass, S of them that have not ended, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.models.kv_cache import KVCache
from fastppo.models.packed import PackedModel
from fastppo.rollout.engine import Rollouts, Sampling
from fastppo.rollout.sampler import Sampler, uniforms
from fastppo.training import interrupts
from fastppo.training.memory import free_memory, is_out_of_memory


class PackedEngine:
    """The engine of `fastppo.rollout.engine.Engine` that needs nothing but transformers.

    A call that runs out of memory goes on with half as many rows in each pass, down to one, and the
    same uniforms: samples change through the rounding of the logits alone.

    Args:
        model: whose current weights sample; nothing is copied.
        max_rows: most prompts in one pass of the model, at least 1; None is all of a call. Lowered
            where memory runs out, for the calls to come too.
    """

    def __init__(self, model: PackedModel, max_rows: int | None = None) -> None:
        self.model = model
        self.max_rows = max_rows

    def generate(self, prompts: Sequence[np.ndarray], sampling: Sampling) -> Rollouts:
        """One response to each prompt; the same seed and weights give the same responses.

        Args:
            prompts: B integer arrays of token ids, none of them empty.
            sampling: how to draw.

        Raises:
            ValueError: no prompts, an empty one, or one too long for the model's positions;
                `max_rows` below 1.
            Interrupted: a signal has come; the model is as before.
        """
        _check_prompts(prompts)
        self._check_positions(max(len(prompt) for prompt in prompts), sampling.max_new_tokens)
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows: expected None or an integer ≥ 1, got {self.max_rows}")
        drawn = uniforms(len(prompts), sampling).to(self.model.device)
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
                free_memory(self.model.device)
                self.max_rows = count // 2
            else:
                parts.append(part)
                done = rows.stop
        return _joined(parts)

    def _pass(self, prompts: Sequence[np.ndarray], drawn: Tensor, sampling: Sampling) -> Rollouts:
        """Responses to some prompts from their uniforms `drawn` (B, max_new_tokens)."""
        device, sampler = self.model.device, Sampler(sampling, drawn)
        lengths = np.array([len(prompt) for prompt in prompts])
        cache, boundaries = KVCache(lengths, device), self._boundaries(lengths)
        tokens = torch.from_numpy(np.concatenate(prompts).astype(np.int64)).to(device)  # (T,)
        written = np.zeros((len(prompts), sampling.max_new_tokens), np.int32)
        logprobs = torch.zeros(written.shape, device=device)
        counts, finished = np.zeros(len(prompts), np.int64), np.zeros(len(prompts), bool)
        alive = np.arange(len(prompts))  # (S,) the row of each sequence of the cache
        rows = torch.from_numpy(alive).to(device)  # the same
        with self.model.decoding():
            for step in range(sampling.max_new_tokens):
                interrupts.check()
                if step:
                    cache.advance()
                    boundaries = {}
                tokens, logprobs[rows, step] = sampler(
                    self.model.next_logits(tokens, cache, **boundaries), rows, step
                )
                written[alive, step] = tokens.cpu().numpy()  # the one wait of a step
                counts[alive] += 1
                ended = np.isin(written[alive, step], sampling.eos_token_ids)
                finished[alive[ended]] = True
                if ended.all():
                    break
                if ended.any():
                    order = cache.drop(ended)
                    kept = torch.from_numpy(order).to(device)
                    alive, rows, tokens = alive[order], rows[kept], tokens[kept]
        found = logprobs.cpu().numpy()
        return Rollouts(
            responses=[row[:n].copy() for row, n in zip(written, counts, strict=True)],
            logprobs=[row[:n].copy() for row, n in zip(found, counts, strict=True)],
            finished=finished,
            truncated=np.logical_not(finished),
        )

    def _boundaries(self, lengths: np.ndarray) -> dict[str, Any]:
        """What packed attention has to know of prompts of these lengths, back to back."""
        host = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
        return {
            "cu_seqlens": torch.from_numpy(host).to(self.model.device),
            "cu_seqlens_host": host,
            "max_seqlen": int(lengths.max()),
            "attention_kernel": self.model.attention_kernel,
        }

    def _check_positions(self, longest: int, new: int) -> None:
        limit = getattr(self.model.model.config, "max_position_embeddings", None)
        if limit is not None and longest + new > limit:
            raise ValueError(
                f"prompts: expected at most {limit - new} tokens, so that {new} new ones fit the "
                f"model's {limit} positions; the longest has {longest}. Shorten max_new_tokens or "
                "filter the prompts"
            )


def _check_prompts(prompts: Sequence[np.ndarray]) -> None:
    if len(prompts) == 0:
        raise ValueError("prompts: expected at least one, got none")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompts: expected token ids, got an empty prompts[{i}]")


def _joined(parts: Sequence[Rollouts]) -> Rollouts:
    """The rollouts of several passes, in their order."""
    return Rollouts(
        responses=[row for part in parts for row in part.responses],
        logprobs=[row for part in parts for row in part.logprobs],
        finished=np.concatenate([part.finished for part in parts]),
        truncated=np.concatenate([part.truncated for part in parts]),
    )
