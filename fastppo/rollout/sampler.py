"""One token a step for each row, from uniforms that belong to the row.

    token = first v with  sum_{w <= v} p(w)  >=  u,      u in (0, 1]

`generate` of transformers draws by torch.multinomial from one stream of numbers, so that leaving
out or moving a row changes all that come after it. Here a row's uniforms are given, and what is
sampled does not depend on how a batch is split into passes.

B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fastppo import interrupts
from fastppo.rollout import Sampling


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


class Sampler(LogitsProcessor):
    """Makes the sampling distribution, draws from it, and has greedy decoding take what was drawn.

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
        self.gathered: list[Tensor] = []  # (B,) fp32 of each step so far

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) fp32 of the next token → scores whose argmax is the token drawn.

        The array given is overwritten. In a row with NaN or +inf the argmax is some token of the
        vocabulary and the log-probability gathered is NaN.

        Raises:
            Interrupted: a signal has come.
        """
        interrupts.check()
        if self.temperature > 0:
            scores = scores.div_(self.temperature)
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        peak = scores.amax(1, keepdim=True)  # NaN if there is one in the row
        norm = scores.logsumexp(1, keepdim=True)
        picked = peak
        if self.temperature > 0:
            step = len(self.gathered)
            tokens = draw(scores, peak, self.uniforms[:, step : step + 1])
            picked = scores.gather(1, tokens)
            scores.scatter_(1, tokens, torch.inf)
        logprobs = (picked - norm).clamp_(max=0.0)
        self.gathered.append(torch.where(peak.isfinite(), logprobs, torch.nan).squeeze(1))
        return scores

    def logprobs(self, steps: int) -> Tensor:
        """Log-probabilities (B, steps) fp32 of the tokens drawn, in nats."""
        return torch.stack(self.gathered[:steps], 1)
