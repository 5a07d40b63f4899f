"""The recurrences of other trainers, written out from their formulas as loops over a padded batch:
`gae` gives their numbers, bit for bit where the arithmetic is exact.

Integers with γ and λ of 0 or 1, and halves over a few tokens in float64, leave nothing to round.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from fastppo.ops import gae, whiten

LENGTHS = [12, 1, 9]


class Numbers(NamedTuple):
    gamma: float
    gae_lambda: float
    dtype: torch.dtype
    exact: bool


NUMBERS = [
    Numbers(0.97, 0.9, torch.float64, False),
    Numbers(0.97, 0.9, torch.float32, False),
    Numbers(1.0, 1.0, torch.float32, True),
    Numbers(1.0, 0.0, torch.float32, True),
    Numbers(0.0, 1.0, torch.float32, True),
    Numbers(0.5, 0.5, torch.float64, True),
]
every_number = pytest.mark.parametrize("numbers", NUMBERS, ids=str)


def draw(numbers, rng):
    """Rewards, values, one number for each sequence, offsets; integers where exact."""
    n = sum(LENGTHS)
    x = torch.randn(2 * n + len(LENGTHS), generator=rng, dtype=numbers.dtype)
    if numbers.exact:
        x = (4 * x).round()
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    return x[:n], x[n : 2 * n], x[2 * n :], cu


def tool_mask(rng):
    """Spans masked inside, at the start and at the end of sequences; the short one stays."""
    mask = torch.rand(sum(LENGTHS), generator=rng) < 0.6
    mask[2:5] = mask[11] = mask[13] = False
    mask[12] = mask[14] = True
    return mask


def padded(x):
    return torch.nn.utils.rnn.pad_sequence(x.split(LENGTHS), batch_first=True)


def packed(x):
    return torch.cat([row[:length] for row, length in zip(x, LENGTHS, strict=True)])


def compare(ours, theirs, numbers):
    if numbers.exact:
        assert torch.equal(ours, theirs.to(ours.dtype))
    else:
        tolerance = 1e-12 if numbers.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def dense_loop(r, v, gamma, lam):
    """TRL's and OpenRLHF's: every slot of the padded batch is a step."""
    lastgaelam, reversed_advantages = 0, []
    gen_length = r.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = v[:, t + 1] if t < gen_length - 1 else 0.0
        delta = r[:, t] + gamma * nextvalues - v[:, t]
        lastgaelam = delta + gamma * lam * lastgaelam
        reversed_advantages.append(lastgaelam)
    return torch.stack(reversed_advantages[::-1], dim=1)


def carry_loop(r, v, m, gamma, lam, nextvalues):
    """verl's, NeMo-RL's and AReaL's: a masked slot leaves both running values as they are."""
    lastgaelam, reversed_advantages = 0, []
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * nextvalues - v[:, t]
        lastgaelam_ = delta + gamma * lam * lastgaelam
        nextvalues = v[:, t] * m[:, t] + (1 - m[:, t]) * nextvalues
        lastgaelam = lastgaelam_ * m[:, t] + (1 - m[:, t]) * lastgaelam
        reversed_advantages.append(lastgaelam)
    return torch.stack(reversed_advantages[::-1], dim=1)


@every_number
@pytest.mark.parametrize("truncated", [False, True])
def test_carry(numbers, truncated, rng):
    """verl and NeMo-RL start from 0, AReaL from the last value where no end-of-sequence came."""
    rewards, values, ends, cu = draw(numbers, rng)
    mask = tool_mask(rng)
    r, v, m = (padded(x.double()) for x in (rewards, values, mask))
    bootstrap = torch.where(torch.tensor([truncated, False, truncated]), ends, 0.0)
    advantages = carry_loop(r, v, m, numbers.gamma, numbers.gae_lambda, bootstrap.double())
    options = {"gamma": numbers.gamma, "gae_lambda": numbers.gae_lambda, "mask": mask}
    result = gae(rewards, values, cu, bootstrap=bootstrap if truncated else None, **options)
    compare(result.advantages[mask], packed(advantages)[mask], numbers)
    compare(result.returns[mask], packed(advantages + v)[mask], numbers)
    assert not torch.cat([x[~mask] for x in result]).any()


@every_number
def test_dense_zero(numbers, rng):
    """OpenRLHF multiplies values and rewards by the mask before the loop."""
    rewards, values, _, cu = draw(numbers, rng)
    mask = tool_mask(rng)
    r, v, m = (padded(x.double()) for x in (rewards, values, mask))
    advantages = dense_loop(m * r, m * v, numbers.gamma, numbers.gae_lambda)
    options = {"gamma": numbers.gamma, "gae_lambda": numbers.gae_lambda, "mask": mask}
    result = gae(rewards, values, cu, mask_mode="dense-zero", **options)
    compare(result.advantages[mask], packed(advantages)[mask], numbers)
    compare(result.returns[mask], packed(advantages + m * v)[mask], numbers)
    assert not torch.cat([x[~mask] for x in result]).any()


@every_number
def test_trl(numbers, rng):
    """TRL scores the slot after the response where the batch has one, and keeps its value: here a
    masked token at the end of the sequence, in mask_mode "none". Its padding further on is 0 in
    rewards and values, which changes nothing before it."""
    rewards, values, scores, cu = draw(numbers, rng)
    # The last slot of a row is padding, save in the longest, which fills the batch.
    lengths = torch.tensor(LENGTHS) - torch.tensor([0, 1, 1])
    rewards[cu[2] - 1] = rewards[cu[3] - 1] = 0.0  # kl of padding
    r, v = padded(rewards.double()), padded(values.double())
    actual_end = torch.where(lengths < r.shape[1], lengths, lengths - 1)
    r[torch.arange(3), actual_end] += scores.double()
    advantages = dense_loop(r, v, numbers.gamma, numbers.gae_lambda)
    returns = advantages + v
    mask = torch.ones(len(rewards), dtype=torch.bool)
    mask[cu[2] - 1] = mask[cu[3] - 1] = False
    placed = rewards.clone()
    placed[cu[1:] - 1] += scores
    options = {"gamma": numbers.gamma, "gae_lambda": numbers.gae_lambda}
    result = gae(placed, values, cu, mask=mask, mask_mode="none", **options)
    compare(result.advantages[mask], packed(advantages)[mask], numbers)
    compare(result.returns[mask], packed(returns)[mask], numbers)
    whitened = gae(placed, values, cu, mask=mask, mask_mode="none", norm_adv=True, **options)
    theirs = packed(advantages)[mask]  # masked_whiten with ~padding_mask, then masked_fill
    theirs = (theirs - theirs.mean()) * torch.rsqrt(theirs.var() + 1e-8)
    torch.testing.assert_close(whitened.advantages[mask].double(), theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(whitened.returns, result.returns)
    torch.testing.assert_close(whitened.advantages, whiten(result.advantages, mask))


@every_number
def test_the_score_of_a_response_without_an_extra_slot(numbers, rng):
    """Where responses fill the batch, TRL's score is on the last token, as `scores` puts it."""
    rewards, values, scores, cu = draw(numbers, rng)
    placed = rewards.clone()
    placed[cu[1:] - 1] += scores
    r, v = padded(placed.double()), padded(values.double())
    advantages = packed(dense_loop(r, v, numbers.gamma, numbers.gae_lambda))
    options = {"gamma": numbers.gamma, "gae_lambda": numbers.gae_lambda, "scores": scores}
    compare(gae(rewards, values, cu, **options).advantages, advantages, numbers)


@every_number
@pytest.mark.parametrize("masked", [False, True])
def test_reinforce_plus_plus(numbers, masked, rng):
    """Discounted rewards to go; masked slots are passed over, where verl starts its sum anew."""
    rewards, _, _, cu = draw(numbers, rng)
    mask = tool_mask(rng) if masked else torch.ones(len(rewards), dtype=torch.bool)
    r, m = padded(rewards.double()), padded(mask.double())
    returns, running = torch.zeros_like(r), 0
    for t in reversed(range(r.shape[1])):
        running = (r[:, t] + numbers.gamma * running) * m[:, t] + running * (1 - m[:, t])
        returns[:, t] = running * m[:, t]
    options = {"gamma": numbers.gamma, "gae_lambda": 1.0, "mask": mask if masked else None}
    result = gae(rewards, torch.zeros_like(rewards), cu, **options)
    compare(result.returns, packed(returns), numbers)
