"""Details 07 to 12: one distribution for the sampler, the old, the new and the reference policy.

Shapes: B sequences, N response tokens, V vocabulary. μ is the sampler's distribution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastppo import ops
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.ppo.trainer import PPOTrainer
from fastppo.rollout.engine import Sampling
from fastppo.rollout.packed import PackedEngine

MakeStep = Callable[..., PPOStep]
MakeBatch = Callable[..., PackedBatch]


def response_logits(model: Any, batch: PackedBatch) -> Tensor:
    """(N, V) logits that predict the response tokens, one ordinary forward per sequence."""
    found = []
    for i in range(batch.num_sequences):
        one = batch.select([i])
        logits = model(input_ids=one.input_ids.long()[None]).logits[0]
        found.append(logits[one.rows.long()].detach())
    return torch.cat(found)


def entropy_of(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def test_07_temperature(
    make_model: Callable[..., Any], make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """Old, new and reference log-probabilities and the entropy are at the sampling temperature."""
    plain, tau = make_model(), 0.5
    step = make_step(copy.deepcopy(plain), ref_seed=1, temperature=tau, value_std=0.3)
    batch = step.evaluate(make_batch())
    logits, targets = response_logits(plain, batch), batch.targets.long()[:, None]
    for name, model in (("old_logprobs", plain), ("ref_logprobs", make_model(seed=1))):
        expected = (response_logits(model, batch) / tau).log_softmax(-1).gather(1, targets)[:, 0]
        torch.testing.assert_close(getattr(batch, name), expected, atol=2e-5, rtol=0)
    metrics = step.update(step.advantages(batch, np.arange(5.0)))
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0  # new is at the temperature of old
    assert metrics["entropy"] == pytest.approx(entropy_of(logits / tau).mean().item(), abs=1e-5)
    assert abs(metrics["entropy"] - entropy_of(logits).mean().item()) > 0.1


def test_07_temperature_leaves_values_alone(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """Values do not depend on the temperature."""
    values = [
        make_step(value_std=0.3, temperature=tau).evaluate(make_batch()).values
        for tau in (1.0, 0.25)
    ]
    assert values[0].abs().max() > 0.1 and torch.equal(*values)


def test_07_temperature_of_the_sampler(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """The engine samples, and says so, at the temperature of the training log-probabilities."""
    step = make_step(temperature=0.6)
    prompts = [np.array([5, 6, 7]), np.array([8])]
    rollouts = PackedEngine(step.policy.actor).generate(
        prompts,
        Sampling(temperature=0.6, max_new_tokens=8, eos_token_ids=(), seed=1),
    )
    batch = step.evaluate(PackedBatch.pack(prompts, rollouts.responses))
    sampled = torch.from_numpy(np.concatenate(rollouts.logprobs))
    torch.testing.assert_close(batch.old_logprobs, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_08_filters_need_a_correction(option: dict[str, Any]) -> None:
    """top-p, top-k and min-p renormalise μ: refused unless importance weights correct it."""
    with pytest.raises(ValueError, match=f"{next(iter(option))} = .*is_correction"):
        PPOConfig(**option)
    assert PPOConfig(**option, is_correction="tis").is_correction == "tis"


def test_08_filtered_logprobs_are_renormalised(make_step: MakeStep) -> None:
    """With top-k on, the engine's log-probabilities are those of the kept tokens' distribution."""
    sampling = Sampling(temperature=1.0, top_k=2, max_new_tokens=1, eos_token_ids=(), seed=1)
    rollouts = PackedEngine(make_step().policy.actor).generate([np.array([3, 4])] * 100, sampling)
    pairs = zip(rollouts.responses, rollouts.logprobs, strict=True)
    kept = {int(ids[0]): float(logprobs[0]) for ids, logprobs in pairs}
    assert len(kept) == 2 and sum(map(math.exp, kept.values())) == pytest.approx(1.0)


def test_08_filtered_run_is_corrected(
    make_trainer: Callable[..., PPOTrainer],
    spy: Callable[[Any, str], list[tuple[Any, dict[str, float]]]],
) -> None:
    """A run with top-k trains on the full softmax with the weight π_old / μ, capped."""
    trainer = make_trainer(
        lambda completions: [1.0] * len(completions),
        top_k=2,
        is_correction="tis",
        num_iterations=1,
        learning_rate=1e-30,
    )
    updates = spy(trainer.step, "update")
    trainer.train()
    (batch,), metrics = updates[0]
    weight = (batch.old_logprobs - batch.rollout_logprobs).exp().clamp(max=2.0)
    assert metrics["is_weight"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert metrics["is_weight"] < 0.5  # two words of thirteen


def test_09_logprobs_are_fp32(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """From bf16 logits on everything is fp32: no log-probability is rounded to bf16."""
    step = make_step(precision="bf16", kl_coef=0.1)
    batch = step.evaluate(make_batch())
    with torch.no_grad(), step.policy.actor.autocast():
        hidden = step.policy.actor.hidden(batch)[batch.rows]
        logits = nn.functional.linear(hidden, step.policy.actor.head.weight)
    assert logits.dtype == torch.bfloat16
    exact = logits.double().log_softmax(-1).gather(1, batch.targets.long()[:, None])[:, 0]
    for logprobs in (batch.old_logprobs, batch.ref_logprobs):
        assert logprobs.dtype == torch.float32
        assert (logprobs - exact).abs().max() < 1e-5
    rounded = logits.log_softmax(-1).gather(1, batch.targets.long()[:, None])[:, 0]
    assert (rounded - exact).abs().max() > 1e-3


def test_10_impossible_tokens(
    make_model: Callable[..., Any], make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """−inf logits, as of a padded vocabulary: log-probabilities ≤ 0, no NaN in entropy or step."""
    model = make_model()
    head = nn.Linear(32, 40)
    with torch.no_grad():
        head.weight[:37] = model.lm_head.weight
        head.bias.zero_()[37:] = -torch.inf
    model.lm_head = head
    plain = copy.deepcopy(model)
    step = make_step(model, ent_coef=0.1, kl_coef=0.1)
    batch = step.evaluate(make_batch())
    logits = response_logits(plain, batch)[:, :37]
    assert (batch.old_logprobs <= 0).all()
    metrics = step.update(step.advantages(batch, np.arange(5.0)))
    assert metrics["entropy"] == pytest.approx(entropy_of(logits).mean().item(), abs=1e-5)
    assert metrics["nonfinite_steps"] == 0 and math.isfinite(metrics["actor_grad_norm"])
    assert step.evaluate(batch).old_logprobs.isfinite().all()


def test_10_peaked_and_strided_logits() -> None:
    """A certain token has log-probability 0, never more; strides and blocks change nothing."""
    model_logits = torch.randn(301, 997, generator=torch.Generator().manual_seed(0)) * 300
    targets = model_logits.argmax(1)
    strided = model_logits.t().contiguous().t()
    assert not strided.is_contiguous()
    result = ops.token_logprobs(strided, targets)
    assert (result.logprobs <= 0).all() and (result.entropy >= 0).all()
    exact = model_logits.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(result.logprobs.double(), exact, atol=1e-5, rtol=1e-5)
    for got, expected in zip(result, ops.token_logprobs(model_logits, targets), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("token_budget", [32, 512], ids=["many-bins", "one-bin"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_11_first_ratio_is_exactly_one(
    precision: str,
    token_budget: int,
    make_step: MakeStep,
    make_batch: MakeBatch,
    spy: Callable[[Any, str], list[tuple[Any, Any]]],
) -> None:
    """On policy, with one minibatch, the ratio is exactly 1, in bf16 too, whatever the bins."""
    step = make_step(precision=precision, token_budget=token_budget, ref_seed=1)
    forwards = spy(step.policy.actor, "hidden")
    batch = make_batch()
    # the sampler's log-probabilities are never taken for the old ones
    batch = batch.replace(rollout_logprobs=torch.full((batch.num_responses,), -9.0))
    metrics = step.update(step.advantages(step.evaluate(batch), np.arange(5.0)))
    assert metrics["ratio"] == metrics["ratio_max"] == metrics["ess"] == 1.0
    assert metrics["approx_kl"] == metrics["old_approx_kl"] == metrics["clipfrac"] == 0.0
    # exact at any size, because the update repeats the forward passes of the evaluation
    ids = [args[0].input_ids.tolist() for args, _ in forwards]
    assert len(ids) == (4 if token_budget == 32 else 2) and ids[: len(ids) // 2] * 2 == ids


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.4)])
def test_11_ratio_is_one_across_minibatches(
    precision: str, tolerance: float, make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """Unchanged weights in other minibatches and bins: ratio 1 to the rounding of the precision."""
    step = make_step(
        precision=precision,
        num_minibatches=3,
        learning_rate=1e-30,
        token_budget=32,
        update_epochs=2,
    )
    batch = step.advantages(step.evaluate(make_batch()), np.arange(5.0))
    metrics = step.update(batch)
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=tolerance)
    assert metrics["ratio"] == pytest.approx(1.0, abs=tolerance / 10)


def with_sampler(batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
    """The batch with μ apart from π_old by ln π_old − ln μ (N,), which is returned too."""
    gap = torch.linspace(-2.0, 2.0, batch.num_responses)
    return batch.replace(rollout_logprobs=batch.old_logprobs - gap), gap


@pytest.mark.parametrize("kind", ["none", "tis", "icepop"])
def test_12_three_logprobs(kind: str, make_step: MakeStep, make_batch: MakeBatch) -> None:
    """μ, π_old and π stay apart: μ enters the weight only, and its distance is always logged."""
    step = make_step(is_correction=kind, advantage="reinforce", max_grad_norm=0.0)
    batch, gap = with_sampler(step.evaluate(make_batch()))
    # No score is the mean of all: a token of advantage 0 would not be looked at.
    batch = step.advantages(batch, np.array([0.0, 1.0, 2.0, 3.0, 5.0]))
    metrics = step.update(batch)
    assert metrics["num_tokens"] == batch.num_responses
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0
    assert metrics["logprob_diff"] == pytest.approx(gap.abs().mean().item(), rel=1e-4)
    assert metrics["logprob_diff_max"] == pytest.approx(2.0, rel=1e-4)
    assert metrics["rollout_kl"] == pytest.approx((gap.expm1() - gap).mean().item(), rel=1e-4)
    weight, cut = torch.ones_like(gap), torch.zeros_like(gap)
    if kind == "tis":
        weight, cut = gap.exp().clamp(max=2.0), (gap.exp() > 2.0).float()
    if kind == "icepop":
        cut = ((gap.exp() < 0.5) | (gap.exp() > 5.0)).float()
        weight = gap.exp() * (1 - cut)
    assert metrics["is_weight"] == pytest.approx(weight.mean().item(), rel=1e-5)
    assert metrics["is_clipfrac"] == pytest.approx(cut.mean().item())
    expected = -(weight * batch.advantages).mean().item()
    assert metrics["policy_loss"] == pytest.approx(expected, rel=1e-4)


def test_12_correction_scales_the_gradient(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """A weight of 1.5 on every token makes the gradient 1.5 times as large; no μ, no correction."""
    norms = []
    for options in ({}, {"is_correction": "tis"}):
        step = make_step(advantage="reinforce", max_grad_norm=0.0, **options)
        batch = step.evaluate(make_batch())
        batch = batch.replace(rollout_logprobs=batch.old_logprobs - math.log(1.5))
        norms.append(step.update(step.advantages(batch, np.arange(5.0)))["actor_grad_norm"])
    assert norms[1] == pytest.approx(1.5 * norms[0], rel=1e-4)
    with pytest.raises(ValueError, match="rollout_logprobs: is_correction"):
        step.update(batch.replace(rollout_logprobs=None, **advantages_of(batch)))


def advantages_of(batch: PackedBatch) -> dict[str, Tensor]:
    return {
        "advantages": torch.ones(batch.num_responses),
        "loss_mask": torch.ones(batch.num_responses, dtype=torch.bool),
    }
