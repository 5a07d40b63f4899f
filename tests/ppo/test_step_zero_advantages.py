"""Tokens of advantage 0 that cannot change the update are left out, and nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo import PackedBatch, PPOConfig, PPOStep, ops
from fastppo.models.tiny import WORDS, tiny_model

BASE: dict[str, Any] = {
    "prompts_per_iteration": 3,
    "n_samples": 2,
    "advantage": "grpo",
    "max_prompt_length": 8,
    "max_response_length": 8,
    "kl_coef": 0.0,
    "num_minibatches": 1,
    "token_budget": 16,
    "precision": "fp32",
    "device": "cpu",
}
SCORES = np.array([1.0, 0.0, 0.5, 0.5, 0.25, 0.75], dtype=np.float32)  # the middle group is even
LENGTHS = (4, 1, 7, 3, 8, 2)


def make(scores: np.ndarray = SCORES, **options: Any) -> tuple[PPOStep, PackedBatch]:
    step = PPOStep(tiny_model(len(WORDS), seed=0), PPOConfig(**{**BASE, **options}))
    rng = np.random.default_rng(7)
    prompts = [rng.integers(2, len(WORDS), 4) for _ in LENGTHS]
    responses = [rng.integers(2, len(WORDS), n) for n in LENGTHS]
    batch = PackedBatch.pack(prompts, responses, truncated=[False] * len(LENGTHS))
    groups = None if step.policy.value_head is not None else np.repeat(np.arange(3), 2)
    return step, step.advantages(step.evaluate(batch), scores, groups)


def gradients(step: PPOStep, batch: PackedBatch) -> tuple[dict[str, Tensor], Tensor]:
    step.drop_gradients()
    metrics, _ = step.accumulate_gradients(batch)
    found = {n: p.grad.clone() for n, p in step.policy.named_parameters() if p.grad is not None}
    return found, metrics


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Rows that the trunk returned and rows that the head multiplied, in all passes."""
    from fastppo.models.packed import PackedModel
    from fastppo.ops import _head

    seen = {"trunk": 0, "head": 0}
    trunk, logits = PackedModel.hidden, _head.Head.logits

    def counted_trunk(self: PackedModel, batch: PackedBatch) -> Tensor:
        seen["trunk"] += batch.num_responses
        return trunk(self, batch)

    def counted_logits(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen["head"] += hidden.shape[0]
        return logits(self, hidden, *args, **kwargs)

    monkeypatch.setattr(PackedModel, "hidden", counted_trunk)
    monkeypatch.setattr(_head.Head, "logits", counted_logits)
    return seen


@pytest.mark.parametrize("options", [{}, {"ent_coef": 1e-30}, {"ratio_level": "sequence"}], ids=str)
def test_only_rows_that_matter_reach_trunk_and_head(
    options: dict[str, Any], products: dict[str, int]
) -> None:
    """An entropy bonus that is lost in rounding keeps every row: the same gradients."""
    step, batch = make(**options)
    products.update(trunk=0, head=0)
    found, metrics = gradients(step, batch)
    if options.get("ratio_level") == "sequence":  # a forward and a backward pass
        products["head"] //= 2
    rows = sum(LENGTHS) if options else sum(LENGTHS) - LENGTHS[2] - LENGTHS[3]
    assert products == {"trunk": rows, "head": rows}
    assert float(metrics[ops.PPO_METRIC_NAMES.index("num_tokens")]) == rows
    if options.get("ratio_level") != "sequence":
        whole, _ = gradients(*make(ent_coef=1e-30))
        assert found.keys() == whole.keys()
        assert max(g.abs().max() for g in whole.values()) > 1e-4
        for name, grad in found.items():
            torch.testing.assert_close(grad, whole[name], rtol=1e-5, atol=1e-7)


def test_with_a_critic_only_the_head_has_fewer_rows(products: dict[str, int]) -> None:
    step, batch = make(advantage="gae", norm_adv=False, n_samples=1, prompts_per_iteration=6)
    zero = torch.arange(batch.num_responses) % 3 == 0
    zero[: LENGTHS[0]] = True  # a whole response, of whose values the critic learns
    batch = batch.replace(advantages=torch.where(zero, 0.0, 1.0))
    products.update(trunk=0, head=0)
    gradients(step, batch)
    assert products == {"trunk": sum(LENGTHS), "head": sum(LENGTHS) - int(zero.sum())}


def test_nothing_to_learn_is_a_step_all_the_same() -> None:
    """Adam's momentum and weight decay act; means over no tokens are not measured, but the entropy
    of all of them has been, before.
    """
    step, batch = make(learning_rate=1e-2, weight_decay=0.5)
    before = step.policy.actor.head.weight.detach().clone()
    even = step.advantages(batch, np.ones(6, dtype=np.float32), np.repeat(np.arange(3), 2))
    metrics = step.update(even)
    assert metrics["num_tokens"] == 0 and metrics["nonfinite_steps"] == 0
    assert np.isnan(metrics["approx_kl"]) and metrics["policy_loss"] == metrics["coverage"] == 0
    assert metrics["entropy"] == pytest.approx(float(even.entropy.mean()))
    assert not torch.equal(step.policy.actor.head.weight, before)


def test_counts_follow_a_selection() -> None:
    _, batch = make()
    assert batch.active_lengths.tolist() == [4, 1, 0, 0, 8, 2]
    assert vars(batch.select([4, 2, 0]))["active_lengths"].tolist() == [8, 0, 4]
    batch = batch.replace(loss_mask=torch.arange(batch.num_responses) != 0)
    assert batch.active_lengths.tolist() == [3, 1, 0, 0, 8, 2]
