"""Details 04, 17, 18, 19: scores and advantages, and the critic that learns from them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification

from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.ppo.trainer import PPOTrainer

MakeStep = Callable[..., PPOStep]
MakeBatch = Callable[..., PackedBatch]


@pytest.mark.parametrize(
    ("options", "truncated_score"),
    [({}, 1.0), ({"missing_eos_penalty": 3.0}, -2.0), ({"missing_eos_score": -1.0}, -1.0)],
    ids=["off", "penalty", "score"],
)
def test_04_eos_trick(
    options: dict[str, float],
    truncated_score: float,
    make_trainer: Callable[..., PPOTrainer],
    spy: Callable[[Any, str], list[tuple[Any, Any]]],
) -> None:
    """A response without an end token is paid less, or a fixed score; how many are is logged."""
    trainer = make_trainer(
        lambda completions: [1.0] * len(completions), kl_coef=0.0, num_iterations=1, **options
    )
    generated, trained = spy(trainer.engine, "generate"), spy(trainer.step, "update")
    rows = spy(trainer, "iterate")
    trainer.train()
    rollouts, ((batch,), _), (row, _) = generated[0][1], trained[0], rows[0][1]
    ended = np.array([1 in ids for ids in rollouts.responses])  # 1 is the end token
    assert 0 < ended.sum() < len(ended)
    paid = [sum(rewards.tolist()) for rewards in batch.unpack(batch.rewards)]
    assert paid == np.where(ended, 1.0, truncated_score).tolist()
    assert row["eos_rate"] == ended.mean() and row["truncated"] == 1 - ended.mean()
    assert row["reward"] == 1.0  # what the reward function said


def test_17_whitening(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """Advantages: mean 0 and variance 1 of the tokens that count of the whole rollout batch."""
    keep = torch.ones(29, dtype=torch.bool)
    keep[[3, 9, 28]] = False
    found = {}
    for norm_adv in (True, False):
        step = make_step(value_std=0.3, norm_adv=norm_adv, num_minibatches=3, gae_lambda=0.9)
        batch = step.evaluate(make_batch().replace(loss_mask=keep))
        found[norm_adv] = step.advantages(batch, [10.0, -3.0, 2.0, 0.0, 7.0])
    raw, white = found[False].advantages[keep], found[True].advantages[keep]
    torch.testing.assert_close(white, (raw - raw.mean()) / raw.std())
    assert not found[True].advantages[~keep].any()
    # the critic's targets come from the advantages before that
    assert torch.equal(found[True].returns, found[False].returns)
    torch.testing.assert_close(found[True].returns[keep], (raw + batch.values[keep]))


def test_17_whitened_rewards_keep_their_mean(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """Rewards are scaled, not shifted: their mean, and with it their sign, stays."""
    found = {}
    for whiten in (True, False):
        step = make_step(ref_seed=1, whiten_rewards=whiten)
        found[whiten] = step.advantages(step.evaluate(make_batch()), [5.0] * 5).rewards
    assert found[True].mean().item() == pytest.approx(found[False].mean().item(), rel=1e-5)
    assert found[True].std().item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("scores", [[1.0], [math.nan]], ids=["one-token", "none"])
def test_17_whitening_without_variance(scores: list[float], make_step: MakeStep) -> None:
    """One token, none, or equal advantages: 0, and never NaN."""
    step = make_step(whiten_rewards=True)
    batch = step.advantages(step.evaluate(PackedBatch.pack([[5, 6]], [[7]])), scores)
    assert batch.advantages.tolist() == [0.0]
    metrics = step.update(batch)
    assert metrics["nonfinite_steps"] == 0 and math.isfinite(metrics["value_loss"])


@pytest.mark.parametrize(
    ("clip", "target", "loss", "frozen"),
    # the critic says 1 more than at rollout time; targets are relative to what it said then
    [
        (0.0, 2.0, 0.5, False),
        (0.2, 2.0, 1.62, True),  # 0.5·(2 − 0.2)², above 0.5·(2 − 1)²
        (0.2, -1.0, 2.0, False),  # 0.5·(1 + 1)², above 0.5·(0.2 + 1)²
    ],
    ids=["off", "clipped-larger", "clipped-smaller"],
)
def test_18_value_clipping(
    clip: float,
    target: float,
    loss: float,
    frozen: bool,
    make_step: MakeStep,
    make_batch: MakeBatch,
) -> None:
    """0.5·max((v − R)², (clip(v, v_old ± ε) − R)²); what the clip cuts learns nothing."""
    assert PPOConfig().clip_vloss == 0.0  # off: a critic that starts badly could not recover
    step = make_step(value_std=0.3, clip_vloss=clip, gae_lambda=1.0)
    batch = step.advantages(step.evaluate(make_batch()), [1.0] * 5)
    old = batch.values - 1.0
    metrics = step.update(batch.replace(values=old, returns=old + target))
    assert metrics["value_loss"] == pytest.approx(loss, rel=1e-4)
    assert (metrics["critic_grad_norm"] == 0.0) == frozen


@pytest.mark.parametrize("score", [0.0, 1.0, -300.0])
def test_18_explained_variance_of_a_solved_task(
    score: float, make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """Where all returns are equal but for rounding, explained variance is 0, not a huge number."""
    step = make_step(value_std=0.3, gae_lambda=1.0)
    batch = step.advantages(step.evaluate(make_batch()), [score] * 5)
    torch.testing.assert_close(batch.returns, torch.full((29,), score), atol=1e-4, rtol=1e-5)
    assert step.update(batch)["explained_variance"] == 0.0


def test_18_explained_variance(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """1 − Var(R − V) / Var(R) over the tokens that count, with the values of rollout time."""
    keep = torch.arange(29) % 4 != 0
    step = make_step(value_std=0.3)
    batch = step.evaluate(make_batch().replace(loss_mask=keep))
    batch = step.advantages(batch, np.arange(5.0))
    r, v = batch.returns[keep], batch.values[keep]
    expected = (1 - (r - v).var() / r.var()).item()
    assert step.update(batch)["explained_variance"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_19_value_head_starts_at_zero(
    critic: str, make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """Before training every value is 0, and the value head learns from there."""
    step = make_step(critic=critic, critic_learning_rate=1e-2, gae_lambda=1.0)
    batch = step.evaluate(make_batch(truncated=[True] * 5))
    assert not batch.values.any() and not batch.bootstrap.any()
    losses = [step.update(step.advantages(batch, [1.0] * 5))["value_loss"] for _ in range(20)]
    assert losses[0] == pytest.approx(0.5) and losses[-1] < 0.05


def test_19_value_head_from_a_reward_model(
    make_model: Callable[..., Any], make_batch: MakeBatch
) -> None:
    """A reward model given as value_model starts the critic at its score."""
    model = make_model()
    config = type(model.config)(**model.config.to_dict() | {"num_labels": 1})
    scorer = LlamaForSequenceClassification(config).eval()
    torch.nn.init.normal_(scorer.score.weight, std=0.3)
    args = PPOConfig(critic="separate", kl_coef=0.0, device="cpu", precision="fp32")
    step = PPOStep(model, args, value_model=copy.deepcopy(scorer))
    batch = step.evaluate(make_batch((3,), (4,)))
    with torch.no_grad():
        hidden = scorer.model(batch.input_ids.long()[None])[0][0]
        expected = scorer.score(hidden)[batch.rows.long(), 0]
    torch.testing.assert_close(batch.values, expected, atol=1e-5, rtol=0)
    assert batch.values.abs().max() > 0.1


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_19_critic_warmup(critic: str, make_step: MakeStep, make_batch: MakeBatch) -> None:
    """In the first critic_warmup iterations only the critic learns; then the policy as well."""
    step = make_step(critic=critic, critic_warmup=1, num_iterations=3)
    for moves in (False, True):
        before = [p.detach().clone() for p in step.policy.actor_parameters()]
        head = step.policy.value_head.weight.detach().clone()
        step.update(step.advantages(step.evaluate(make_batch()), np.arange(5.0)))
        changed = [
            not torch.equal(a, b)
            for a, b in zip(before, step.policy.actor_parameters(), strict=True)
        ]
        assert any(changed) == moves
        assert not torch.equal(head, step.policy.value_head.weight)


def test_19_critic_lambda(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """critic_lambda = 1 makes the returns plain sums of rewards, whatever the policy's λ."""
    step = make_step(value_std=0.3, gae_lambda=0.5, critic_lambda=1.0, norm_adv=False)
    batch = step.advantages(step.evaluate(make_batch((2, 3), (3, 2))), [1.0, -2.0])
    torch.testing.assert_close(batch.returns, torch.tensor([1.0] * 3 + [-2.0] * 2))
    advantage = -2.0 - batch.values[4]
    expected = batch.values[4] - batch.values[3] + 0.5 * advantage
    torch.testing.assert_close(batch.advantages[3:], torch.stack([expected, advantage]))
