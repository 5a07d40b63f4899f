"""One token a step for each row, from uniforms that belong to the row.

    token = first v with  sum_{w <= v} p(w)  >=  u,      u in (0, 1]

torch.multinomial draws from one stream of numbers, so that leaving out or moving a row changes all
that come after it. Here a row's uniforms are given, and what is sampled does not depend on how a
batch is split into passes, or on which rows are left.

B rows of a call, S of them still written, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo.rollout.engine import Sampling


def uniforms(rows: int, sampling: Sampling) -> Tensor:
    """(rows, max_new_tokens) float64 in (0, 1] on the CPU, a function of the shape and the seed."""
    generator = torch.Generator().manual_seed(sampling.seed)
    shape = (rows, sampling.max_new_tokens)
    return 1.0 - torch.rand(shape, generator=generator, dtype=torch.float64)


def draw(logits: Tensor, peak: Tensor, u: Tensor) -> Tensor:
    """Tokens by inversion of the cumulative distribution.

    The weights are whole numbers, exp(logit - peak) x 2^40 rounded down: a token loses less than
    1e-12 of the likeliest one's probability. Their running sum is exact in any order of summation,
    so that it never falls and a token without weight is never drawn. A floating-point scan on a GPU
    adds in an order of its own for each entry and promises neither.

    Args:
        logits: (B, V) fp32; -inf where a token must not be drawn.
        peak: (B, 1) fp32, the largest logit of each row.
        u: (B, 1) float64 in (0, 1].

    Returns:
        (B, 1) int64; some token of the vocabulary where `peak` is not finite.
    """
    sums = (logits - peak).exp_().mul_(2.0**40).to(torch.int64).cumsum_(1)  # (B, V)
    total = sums[:, -1:]
    # The product is rounded to 53 bits and may come out above the total. Up to the total the search
    # ends in the vocabulary, be the sums those of NaN.
    reach = (u * total).ceil_().to(torch.int64).minimum(total)
    return torch.searchsorted(sums, reach)


class Sampler:
    """Makes the sampling distribution and draws from it.

    Args:
        sampling: how to draw.
        uniforms: (B, max_new_tokens) float64 in (0, 1], on the device of the model.
    """

    def __init__(self, sampling: Sampling, uniforms: Tensor) -> None:
        self.temperature = sampling.temperature
        self.uniforms = uniforms
        self.warpers: list[Any] = []
        if sampling.temperature > 0:
            if sampling.top_k > 0:
                self.warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(sampling.top_p))
            if sampling.min_p > 0.0:
                self.warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One token for each of S rows.

        Args:
            logits: (S, V) fp32 of the next token; overwritten.
            rows: (S,) int64, whose uniforms they draw from.
            step: how many tokens they have drawn before.

        Returns:
            Tokens (S,) int64 and their log-probabilities (S,) fp32, in nats. In a row with NaN or
            +inf the token is some one of the vocabulary and its log-probability NaN.
        """
        if self.temperature > 0:
            logits = logits.div_(self.temperature)
        for warper in self.warpers:
            logits = warper(None, logits)
        peak = logits.amax(1, keepdim=True)  # NaN if there is one in the row
        norm = logits.logsumexp(1, keepdim=True)
        if self.temperature > 0:
            tokens = draw(logits, peak, self.uniforms[rows, step, None])
        else:
            tokens = logits.argmax(1, keepdim=True)
        logprobs = (logits.gather(1, tokens) - norm).clamp_(max=0.0)
        return tokens[:, 0], torch.where(peak.isfinite(), logprobs, torch.nan)[:, 0]
