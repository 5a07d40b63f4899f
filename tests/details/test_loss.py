"""Details 13 to 16 and 24: the ratio's arithmetic, the KL terms and the normaliser of the loss."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep

MakeStep = Callable[..., PPOStep]
MakeBatch = Callable[..., PackedBatch]


def gradients(step: PPOStep, batch: PackedBatch) -> dict[str, Tensor]:
    """Gradients of one minibatch, by parameter; a value head's too."""
    step.accumulate_gradients(batch)
    found = {n: p.grad.clone() for n, p in step.policy.named_parameters() if p.grad is not None}
    step.drop_gradients()
    return found


@pytest.mark.parametrize(
    ("advantage", "ratio", "options", "loss", "cut"),
    [
        (1.0, 1.25, {}, -1.2, True),
        (1.0, 1.25, {"clip_coef_high": 0.28}, -1.25, False),
        (1.0, 0.5, {}, -0.5, False),
        (-1.0, 0.5, {}, 0.8, True),
        (-1.0, 0.5, {"clip_coef": 0.6}, 0.5, False),
        (-1.0, 5.0, {}, 5.0, False),
        (-1.0, 5.0, {"dual_clip": 3.0}, 3.0, True),
        (1.0, math.exp(50), {}, -1.2, True),
        (-1.0, math.exp(50), {}, math.exp(20), True),
        (-1.0, math.exp(-50), {}, 0.8, True),
    ],
)
def test_13_ratio_arithmetic(
    advantage: float,
    ratio: float,
    options: dict[str, Any],
    loss: float,
    cut: bool,
    make_step: MakeStep,
    make_batch: MakeBatch,
) -> None:
    """max(−rA, −clip(r)A), the log-ratio held to ±20; what a clip cuts has exactly no gradient."""
    step = make_step(advantage="reinforce", **options)
    batch = step.evaluate(make_batch())
    count = batch.num_responses
    batch = batch.replace(
        old_logprobs=batch.old_logprobs - math.log(ratio),
        advantages=torch.full((count,), advantage),
        loss_mask=torch.ones(count, dtype=torch.bool),
    )
    metrics = step.update(batch)
    held = min(20.0, max(-20.0, math.log(ratio)))
    assert metrics["policy_loss"] == pytest.approx(loss, rel=1e-4)
    assert (metrics["actor_grad_norm"] == 0.0) == cut
    assert metrics["ratio_max"] == pytest.approx(math.exp(held), rel=1e-4)


def test_14_kl_in_the_reward(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """k1 per token in the reward, of either sign, masked before it is summed, and reported."""
    step = make_step(ref_seed=1)
    keep = torch.ones(29, dtype=torch.bool)
    keep[[3, 9, 28]] = False
    batch = step.evaluate(make_batch().replace(loss_mask=keep))
    unseen = torch.where(keep, batch.ref_logprobs, torch.nan)  # must never be read there
    batch = step.advantages(batch.replace(ref_logprobs=unseen), [0.0] * 5)
    k1 = (batch.old_logprobs - batch.ref_logprobs)[keep]
    torch.testing.assert_close(batch.rewards[keep], -0.1 * k1)
    assert (k1 > 0).any() and (k1 < 0).any() and not batch.rewards[~keep].any()
    metrics = step.update(batch)
    assert metrics["kl"] == pytest.approx(k1.mean().item(), rel=1e-5)
    assert metrics["kl_sequence"] == pytest.approx(k1.sum().item() / 5, rel=1e-5)


def test_14_kl_in_the_loss(
    make_model: Callable[..., Any], make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """k3 in the loss: never negative, its gradient through the policy alone; k1 is refused."""
    plain = make_model()
    step = make_step(
        copy.deepcopy(plain),
        ref_seed=1,
        kl_in="loss",
        kl_estimator="k3",
        kl_coef=0.3,
        advantage="reinforce",
    )
    batch = step.advantages(step.evaluate(make_batch()), [0.0] * 5)
    assert not batch.rewards.any() and not batch.advantages.any()
    logprobs = []
    for i in range(batch.num_sequences):
        one = batch.select([i])
        logits = plain(input_ids=one.input_ids.long()[None]).logits[0][one.rows.long()]
        logprobs.append(logits.log_softmax(-1).gather(1, one.targets.long()[:, None])[:, 0])
    d = batch.ref_logprobs - torch.cat(logprobs)
    loss = 0.3 * (d.exp() - 1 - d).mean()
    loss.backward()
    found = gradients(step, batch)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[f"model.{name}"], p.grad, atol=1e-5, rtol=1e-4)
    assert step.update(batch)["kl_loss"] == pytest.approx(loss.item(), rel=1e-4) and loss > 0
    with pytest.raises(ValueError, match="gradient is zero in expectation"):
        PPOConfig(kl_in="loss", kl_estimator="k1")


@pytest.mark.parametrize("share", [0.5, 0.9, 1.1, 3.0], ids=lambda s: f"kl={s}target")
def test_15_adaptive_kl(share: float, make_step: MakeStep, make_batch: MakeBatch) -> None:
    """β moves by clip(KL/target − 1, ±0.2)·n/horizon, with the KL summed per sequence."""
    probe = make_step(ref_seed=1)
    batch = probe.evaluate(make_batch())
    ref = batch.old_logprobs - torch.linspace(0.1, 0.5, batch.num_responses)
    batch = batch.replace(ref_logprobs=ref)
    kl = (batch.old_logprobs - ref).sum().item() / 5  # 5 sequences of 29 tokens
    step = make_step(ref_seed=1, kl_target=kl / share, kl_horizon=50)
    metrics = step.update(step.advantages(batch, np.arange(5.0)))
    assert metrics["kl_sequence"] == pytest.approx(kl, rel=1e-5) and metrics["kl_coef"] == 0.1
    expected = 0.1 * (1 + min(0.2, max(-0.2, share - 1)) * 5 / 50)
    assert step.kl_coef == pytest.approx(expected, rel=1e-4) and expected != 0.1
    # the next rewards have the new β
    rewards = step.advantages(batch, [0.0] * 5).rewards
    torch.testing.assert_close(rewards, -step.kl_coef * (batch.old_logprobs - ref))


def test_15_adaptive_kl_in_the_loss(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """β in the loss moves too."""
    options: dict[str, Any] = {"kl_in": "loss", "kl_estimator": "k3", "kl_target": 1e-3}
    step = make_step(ref_seed=1, kl_horizon=5, **options)
    batch = step.evaluate(make_batch())
    batch = step.advantages(batch.replace(ref_logprobs=batch.old_logprobs - 0.5), [0.0] * 5)
    step.update(batch)
    assert step.kl_coef == pytest.approx(0.12)
    batch = step.evaluate(batch).replace(ref_logprobs=batch.ref_logprobs)
    gap = batch.ref_logprobs - batch.old_logprobs
    k3 = (gap.exp() - 1 - gap).mean().item()
    assert step.update(batch)["kl_loss"] == pytest.approx(0.12 * k3, rel=1e-3)


def test_15_kl_coef_stays_positive() -> None:
    """A horizon so short that one iteration could turn β to 0 or below is refused."""
    with pytest.raises(ValueError, match=r"kl_horizon = 6 with 32 sequences"):
        PPOConfig(kl_target=6.0, kl_horizon=6)
    assert PPOConfig(kl_target=6.0, kl_horizon=7).kl_horizon == 7


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "reinforce", "gamma": 0.9},
        {"advantage": "reinforce", "gae_lambda": 0.5},
        {"advantage": "reinforce", "clip_vloss": 0.2},
        {"advantage": "reinforce", "vf_coef": 0.5},
        {"advantage": "reinforce", "whiten_rewards": True},
        {"advantage": "reinforce", "bootstrap_truncated": True},
        {"advantage": "reinforce", "critic": "shared"},
        {"kl_coef": 0.0, "kl_target": 1.0},
        {"kl_coef": 0.0, "kl_in": "loss"},
        {"reference": "none"},
        {"kl_horizon": 5},
        {"is_cap": 3.0},
        {"is_correction": "tis", "is_low": 0.1},
        {"target_kl": 0.1},
        {"vf_coef": 0.0},
        {"critic": "none"},
        {"advantage": "grpo"},
        {"missing_eos_penalty": 1.0, "missing_eos_score": 0.0},
    ],
    ids=str,
)
def test_16_inert_options_are_refused(options: dict[str, Any]) -> None:
    """An option that would have no effect is an error that names it."""
    name = "n_samples" if options == {"advantage": "grpo"} else list(options)[-1]
    with pytest.raises(ValueError, match=name):
        PPOConfig(**options)


def test_16_kl_coef_acts(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """There is a KL by default, and its weight reaches rewards and gradient."""
    assert PPOConfig().kl_coef > 0 and PPOConfig().kl_in == "reward"
    assert make_step(kl_coef=0.1).evaluate(make_batch()).ref_logprobs is not None
    found = []
    for coef in (0.1, 0.4):
        step = make_step(ref_seed=1, kl_coef=coef, norm_adv=False)
        batch = step.advantages(step.evaluate(make_batch()), [0.0] * 5)
        found.append((batch.rewards, gradients(step, batch)["model.lm_head.weight"]))
    torch.testing.assert_close(found[1][0], 4 * found[0][0])
    torch.testing.assert_close(found[1][1], 4 * found[0][1])
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize("limit", [0.01, 1e6, 0.0], ids=["clipped", "below", "off"])
def test_16_max_grad_norm_clips(limit: float, make_step: MakeStep, make_batch: MakeBatch) -> None:
    """max_grad_norm bounds the gradient that the optimiser sees; the norm logged is the raw one."""
    step = make_step(max_grad_norm=limit)
    metrics = step.update(step.advantages(step.evaluate(make_batch()), np.arange(5.0)))
    states = step.actor_optimizer.state.values()
    used = torch.stack([s["exp_avg"].norm() for s in states]).norm().item() / (1 - 0.9)
    raw = metrics["actor_grad_norm"]
    assert raw > 0.1
    assert used == pytest.approx(min(raw, limit) if limit else raw, rel=1e-4)


AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "constant")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_24_global_normaliser(aggregation: str, make_step: MakeStep, make_batch: MakeBatch) -> None:
    """Loss and gradient do not depend on token_budget, packing order or number of micro-batches."""
    keep = torch.ones(29, dtype=torch.bool)
    keep[[3, 5, 9, 28]] = False  # the second response has no token that counts
    options: dict[str, Any] = {
        "loss_aggregation": aggregation,
        "ref_seed": 1,
        "kl_in": "loss",
        "kl_estimator": "k3",
        "ent_coef": 0.01,
        "clip_vloss": 0.2,
        "value_std": 0.3,
        "max_response_length": 12,
    }
    step = make_step(**options)
    batch = step.evaluate(make_batch().replace(loss_mask=keep))
    batch = step.advantages(batch, np.arange(5.0))
    drift = 0.1 * torch.randn(29, generator=torch.Generator().manual_seed(0))
    batch = batch.replace(old_logprobs=batch.old_logprobs + drift)
    results = []
    for token_budget in (512, 28, 20):
        for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
            step = make_step(**(options | {"token_budget": token_budget, "max_prompt_length": 8}))
            chosen = batch.select(order)
            policy_metrics, value_loss = step.accumulate_gradients(chosen)
            grads = {n: p.grad for n, p in step.policy.named_parameters() if p.grad is not None}
            results.append((len(chosen.bins(token_budget)), policy_metrics, value_loss, grads))
    assert [r[0] for r in results] == [1, 1, 2, 2, 3, 3]
    _, policy_metrics, value_loss, grads = results[0]
    assert grads["model.lm_head.weight"].abs().max() > 1e-3 and value_loss > 0
    for _, other_metrics, other_value_loss, other_grads in results[1:]:
        torch.testing.assert_close(
            other_metrics, policy_metrics, atol=1e-5, rtol=1e-5, equal_nan=True
        )
        torch.testing.assert_close(other_value_loss, value_loss, atol=1e-5, rtol=1e-5)
        for name, grad in grads.items():
            torch.testing.assert_close(other_grads[name], grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    # two responses of 2 and 6 tokens, the second with 4 that count, losses −A of 1 and 3 each
    [
        ("token-mean", (2 * 1 + 4 * 3) / 6),
        ("seq-mean-token-sum", (2 * 1 + 4 * 3) / 2),
        ("seq-mean-token-mean", (1 + 3) / 2),
        ("constant", (2 * 1 + 4 * 3) / (2 * 10)),
    ],
)
def test_24_normaliser_by_hand(
    aggregation: str, expected: float, make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """Each aggregation divides by what it names, over the whole minibatch."""
    step = make_step(
        loss_aggregation=aggregation, advantage="reinforce", max_response_length=10, token_budget=26
    )
    keep = torch.tensor([True] * 2 + [True, False, True, True, False, True])
    batch = step.evaluate(make_batch((8, 16), (2, 6)))
    advantages = torch.tensor([-1.0] * 2 + [-3.0] * 6)
    metrics = step.update(batch.replace(loss_mask=keep, advantages=advantages))
    assert metrics["policy_loss"] == pytest.approx(expected, rel=1e-6)
