"""Drawing by inversion: exact where it must be, and right to rounding elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo.rollout.engine import Sampling
from fastppo.rollout.sampler import Sampler, draw, uniforms

NAN, INF = float("nan"), float("inf")


def drawn(logits: Tensor, u: Tensor) -> Tensor:
    """Tokens (B,) for logits (B, V) or (V,) and uniforms (B,)."""
    logits = logits.expand(len(u), -1)
    return draw(logits, logits.amax(1, keepdim=True), u.double()[:, None]).squeeze(1)


def sampling(**options: Any) -> Sampling:
    defaults: dict[str, Any] = {"max_new_tokens": 4, "eos_token_ids": ()}
    return Sampling(**(defaults | {"seed": 1} | options))


# one token, a few, no multiple of a vector width, a large vocabulary
@pytest.mark.parametrize("vocab", [1, 2, 53, 1003, 150_001])
def test_draws_by_the_definition(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(40, vocab, generator=generator) * 4
    u = 1 - torch.rand(40, generator=generator, dtype=torch.float64)
    tokens = drawn(logits, u)
    p = logits.double().softmax(1)
    reached = p.cumsum(1).gather(1, tokens[:, None]).squeeze(1)
    before = reached - p.gather(1, tokens[:, None]).squeeze(1)
    assert (before - 1e-6 < u).all() and (u < reached + 1e-6).all()


def test_evenly_spaced_uniforms_give_every_token_its_share() -> None:
    """N uniforms in the middles of N equal intervals: each count is within one of N p."""
    logits = torch.randn(53, generator=torch.Generator().manual_seed(0)) * 3
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    counts = drawn(logits, u).bincount(minlength=53)
    assert (counts - 20_000 * logits.double().softmax(0)).abs().max() < 1.01


def test_masked_tokens_are_never_drawn_not_even_on_a_boundary() -> None:
    """Eight equal tokens between masked ones: u = j/8 is exactly where token j ends."""
    allowed = torch.tensor([2, 3, 7, 8, 9, 13, 17, 18])
    logits = torch.full((21,), -INF)
    logits[allowed] = -3.7
    ends = torch.arange(1, 9, dtype=torch.float64) / 8
    assert drawn(logits, ends).tolist() == allowed.tolist()
    assert drawn(logits, ends - 1e-10).tolist() == allowed.tolist()
    assert drawn(logits, ends[:-1] + 1e-10).tolist() == allowed[1:].tolist()
    assert drawn(logits, torch.tensor([2.0**-53])).tolist() == [2]


def test_the_last_token_is_the_last_with_any_weight() -> None:
    """The total is 31 more than 149993 x 2^40 and rounds up in float64: u = 1 must stay within."""
    logits = torch.zeros(150_001)
    logits[149_993] = np.log(31.5 / 2**40)
    logits[149_994:] = -INF
    assert drawn(logits, torch.ones(1)).tolist() == [149_993]


def test_a_token_of_one_in_a_billion_has_its_interval() -> None:
    """In fp32 the running sum would jump over it at one half."""
    logits = torch.tensor([0.5, 1e-9, 0.5]).log()
    u = torch.tensor([0.5 - 1e-9, 0.5, 0.5 + 1e-9], dtype=torch.float64)
    assert drawn(logits, u).tolist() == [0, 1, 2]


@pytest.mark.parametrize("shift", [-3e4, 0.0, 3e4])
def test_only_differences_of_logits_count(shift: float) -> None:
    logits = torch.randint(-8, 8, (53,), generator=torch.Generator().manual_seed(0)).float()
    u = uniforms(1, sampling(max_new_tokens=500))[0]
    assert torch.equal(drawn(logits + shift, u), drawn(logits, u))


def test_uniforms_are_a_function_of_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = uniforms(300, sampling(max_new_tokens=40))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, uniforms(300, sampling(max_new_tokens=40)))
    assert not torch.equal(first, uniforms(300, sampling(max_new_tokens=40, seed=2)))
    assert first.shape == (300, 40) and first.dtype == torch.float64
    assert 0 < first.min() < 0.001 and 0.999 < first.max() <= 1
    assert np.unique(first.numpy()).size == first.numel()


def test_every_row_and_step_has_its_uniform() -> None:
    chosen = sampling(max_new_tokens=9)
    u = uniforms(5, chosen)
    sampler = Sampler(chosen, u)
    expected = (u * 64).ceil().long() - 1
    for rows in ([0, 1, 2, 3, 4], [4, 1], [3]):  # all, some of them in another order, one
        for step in range(9):
            tokens, logprobs = sampler(torch.zeros(len(rows), 64), torch.tensor(rows), step)
            assert torch.equal(tokens, expected[rows, step])
            torch.testing.assert_close(logprobs, torch.full((len(rows),), -np.log(64.0)).float())


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_that_are_not_finite_are_told_apart(
    temperature: float, options: dict[str, float]
) -> None:
    """NaN or +inf anywhere in a row: NaN and a token; the same scores as alone elsewhere."""
    clean = torch.randn(7, 31, generator=torch.Generator().manual_seed(0))
    clean[6, :30] = -INF  # masked, and fine
    chosen = sampling(temperature=temperature, **options)
    u = uniforms(7, chosen)
    faulty = clean.clone()
    faulty[0] = NAN
    faulty[1, 30] = NAN
    faulty[2, 4] = INF
    faulty[3] = -INF
    sampler, rows = Sampler(chosen, u), torch.arange(7)
    expected, right = sampler(clean, rows, 2)
    tokens, logprobs = sampler(faulty, rows, 2)
    assert ((tokens >= 0) & (tokens < 31)).all()
    assert logprobs[:4].isnan().all()
    assert torch.equal(tokens[4:], expected[4:]) and tokens[6] == 30
    assert torch.equal(logprobs[4:], right[4:])
    assert right.isfinite().all()


@pytest.mark.gpu
def test_a_gpu_draws_by_the_definition_and_nothing_masked() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 150_001, generator=generator) * 4
    logits[torch.rand(64, 150_001, generator=generator) < 0.9] = -INF
    u = uniforms(64, sampling())[:, :1]
    peak = logits.amax(1, keepdim=True)
    tokens = draw(logits.cuda(), peak.cuda(), u.cuda()).cpu()
    assert logits.gather(1, tokens).isfinite().all()
    p = logits.double().softmax(1)
    reached = p.cumsum(1).gather(1, tokens)
    before = reached - p.gather(1, tokens)
    assert (before - 1e-6 < u).all() and (u < reached + 1e-6).all()
