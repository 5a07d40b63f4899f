"""PPOStep on awkward batches: unscored, masked, empty and single samples, and misuse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo import PackedBatch, PPOConfig, PPOStep
from fastppo.data.sequences import PackedSequences
from fastppo.models.tiny import WORDS, tiny_model
from fastppo.training.errors import NonFiniteError

FAST: dict[str, Any] = {
    "num_iterations": 10,
    "prompts_per_iteration": 8,
    "max_prompt_length": 8,
    "max_response_length": 8,
    "kl_coef": 0.02,
    "learning_rate": 1e-3,
    "num_minibatches": 1,
    "precision": "fp32",
    "device": "cpu",
}
LENGTHS = (4, 1, 7, 3, 8, 2)
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean")


def make_step(**options: Any) -> PPOStep:
    """With a critic that is not 0, so that values matter."""
    step = PPOStep(tiny_model(len(WORDS), seed=0), PPOConfig(**{**FAST, **options}))
    if step.policy.value_head is not None:
        torch.nn.init.constant_(step.policy.value_head.weight, 0.05)
    return step


def make_batch(lengths: Sequence[int] = LENGTHS, **fields: Any) -> PackedBatch:
    rng = np.random.default_rng(7)
    prompts = [rng.integers(2, len(WORDS), n) for n in rng.integers(1, 8, len(lengths))]
    responses = [rng.integers(2, len(WORDS), n) for n in lengths]
    truncated = [i % 3 == 0 for i in range(len(lengths))]
    return PackedBatch.pack(prompts, responses, truncated=truncated, **fields)


def gradients(step: PPOStep, batch: PackedBatch) -> dict[str, Tensor]:
    step.drop_gradients()
    step.accumulate_gradients(batch)
    return {n: p.grad.clone() for n, p in step.policy.named_parameters() if p.grad is not None}


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert any(grad.abs().max() > 1e-4 for grad in left.values())  # there is something to compare
    for name, grad in left.items():
        torch.testing.assert_close(grad, right[name], rtol=1e-5, atol=1e-6, msg=name)


# None scores


VARIANTS: dict[str, dict[str, Any]] = {
    "gae": {"whiten_rewards": True},
    "gae-separate": {"critic": "separate"},
    "grpo": {"advantage": "grpo", "n_samples": 2},
    "rloo": {"advantage": "rloo", "n_samples": 2},
    "reinforce": {"advantage": "reinforce"},
    "kl-in-loss": {"kl_in": "loss", "kl_estimator": "k3"},
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_unscored_samples_contribute_nothing(options: dict[str, Any], aggregation: str) -> None:
    step = make_step(loss_aggregation=aggregation, **options)
    batch = step.evaluate(make_batch())
    scores = np.array([1.0, math.nan, 0.2, -0.5, math.nan, 0.7])
    groups = np.array([0, 0, 0, 1, 1, 1])
    scored = np.flatnonzero(~np.isnan(scores))
    whole = step.advantages(batch, scores, groups)
    without = step.advantages(batch.select(scored), scores[scored], groups[scored])
    assert_same(gradients(step, whole), gradients(step, without))


@pytest.mark.parametrize("advantage", ["gae", "reinforce"])
def test_a_batch_without_any_score_changes_nothing(advantage: str) -> None:
    step = make_step(advantage=advantage)
    before = [p.detach().clone() for p in step.policy.parameters()]
    batch = step.advantages(step.evaluate(make_batch()), [math.nan] * len(LENGTHS))
    metrics = step.update(batch)
    assert metrics["nonfinite_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, step.policy.parameters(), strict=True))


# tokens of tools


def tool_masks() -> list[list[bool]]:
    """In the middle, at the end, all of one response, and none of the others."""
    masks = [[True] * n for n in LENGTHS]
    masks[0][1:3] = [False, False]
    masks[2][-2:] = [False, False]
    masks[3] = [False] * LENGTHS[3]
    return masks


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_masked_tokens_count_nowhere(options: dict[str, Any]) -> None:
    """Whatever stands at masked positions, the gradient keeps its bits."""
    step = make_step(is_correction="tis", **options)
    masks = tool_masks()
    scores, groups = np.arange(6.0), np.array([0, 0, 0, 1, 1, 1])
    rollout = [[-1.0] * n for n in LENGTHS]
    clean = step.evaluate(make_batch(loss_mask=masks, rollout_logprobs=rollout))
    off = ~torch.tensor([m for mask in masks for m in mask])
    names = ["old_logprobs", "ref_logprobs", "values", "rollout_logprobs"]
    present = {name: getattr(clean, name) for name in names if getattr(clean, name) is not None}
    dirty = clean.replace(
        **{n: torch.where(off, 50.0 + i, x) for i, (n, x) in enumerate(present.items())}
    )
    found = [step.advantages(batch, scores, groups) for batch in (clean, dirty)]
    for batch in found:
        assert batch.advantages is not None and batch.loss_mask is not None
        assert torch.equal(batch.loss_mask, ~off)
        assert not batch.advantages[off].any()
    left, right = (gradients(step, batch) for batch in found)
    assert all(torch.equal(grad, right[name]) for name, grad in left.items())


def test_the_score_lands_on_the_last_token_that_counts() -> None:
    step = make_step(kl_coef=0.0)
    masks = tool_masks()
    batch = step.advantages(step.evaluate(make_batch(loss_mask=masks)), np.arange(1.0, 7.0))
    assert batch.rewards is not None
    rewards = [x.tolist() for x in batch.unpack(batch.rewards)]
    assert rewards[0] == [0.0, 0.0, 0.0, 1.0]
    assert rewards[2] == [0.0] * 4 + [3.0] + [0.0, 0.0]
    assert rewards[3] == [0.0] * LENGTHS[3]  # no token of it counts
    assert rewards[4] == [0.0] * 7 + [5.0]


def test_a_tool_token_is_still_read() -> None:
    """It is context: another one changes the log-probabilities after it, not those before."""
    step = make_step()
    batch = make_batch(loss_mask=tool_masks())
    row = int(batch.rows[1]) + 1  # the second response token of the first sequence
    changed = batch.input_ids.clone()
    changed[row] = 2 + (changed[row] - 1) % 5
    left, right = step.evaluate(batch), step.evaluate(batch.replace(input_ids=changed))
    assert left.old_logprobs is not None and right.old_logprobs is not None
    same = left.old_logprobs == right.old_logprobs
    assert same[:2].all() and not same[2:4].any()


# empty and single


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"critic": "separate"}, {"advantage": "reinforce"}], ids=str
)
def test_empty_responses_contribute_nothing(options: dict[str, Any], aggregation: str) -> None:
    step = make_step(loss_aggregation=aggregation, **options)
    lengths = (0, 4, 3, 0, 2, 0)
    scores = np.array([0.3, 1.0, 0.2, 0.3, 0.0, 0.3])
    if "advantage" in options:  # their scores are part of the baseline, and change it by nothing
        scores[[0, 3, 5]] = scores[[1, 2, 4]].mean()
    kept = np.flatnonzero(lengths)
    batch = step.evaluate(make_batch(lengths))
    whole = step.advantages(batch, scores)
    without = step.advantages(batch.select(kept), scores[kept])
    assert_same(gradients(step, whole), gradients(step, without))
    metrics = step.update(whole)
    assert all(math.isfinite(metrics[name]) for name in ("policy_loss", "entropy", "kl"))


def test_a_batch_of_empty_responses_changes_nothing() -> None:
    step = make_step()
    before = [p.detach().clone() for p in step.policy.parameters()]
    metrics = step.update(step.advantages(step.evaluate(make_batch((0, 0))), [1.0, 2.0]))
    assert metrics["nonfinite_steps"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, step.policy.parameters(), strict=True))


@pytest.mark.parametrize("length", [1, 5])
def test_a_batch_of_one(length: int) -> None:
    step = make_step(num_minibatches=4)  # more than there are sequences
    batch = step.advantages(step.evaluate(make_batch((length,))), [1.0])
    metrics = step.update(batch)
    assert metrics["nonfinite_steps"] == 0
    for name in ("policy_loss", "value_loss", "kl", "entropy", "explained_variance"):
        assert math.isfinite(metrics[name]), name
    # one whitened advantage is 0: its token changes nothing, and is not computed
    assert math.isfinite(metrics["approx_kl"]) == (length > 1)
    assert metrics["coverage"] == (length > 1)


def test_a_gradient_that_is_not_finite_is_skipped_counted_and_in_the_end_fatal() -> None:
    step = make_step(num_minibatches=2, max_nonfinite_steps=3)
    actor = step.policy.actor_parameters
    before = [p.detach().clone() for p in actor()]
    good = step.advantages(step.evaluate(make_batch()), np.arange(6.0))
    assert good.advantages is not None
    bad = good.replace(advantages=torch.full_like(good.advantages, math.nan))
    assert step.update(bad)["nonfinite_steps"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, actor(), strict=True))
    assert step.update(good)["nonfinite_steps"] == 0  # in a row means in a row
    step.update(bad)
    with pytest.raises(NonFiniteError, match="max_nonfinite_steps = 3"):
        step.update(bad)


# misuse


def test_stages_out_of_order_name_the_one_that_is_missing() -> None:
    step, batch = make_step(), make_batch()
    with pytest.raises(ValueError, match=r"batch.old_logprobs: .* Call step.evaluate first"):
        step.advantages(batch, [0.0] * 6)
    for call in (step.update, step.accumulate_gradients):
        with pytest.raises(ValueError, match=r"Call step.advantages first"):
            call(step.evaluate(batch))
    assert step.iteration == 0


def test_wrong_lengths_are_named() -> None:
    step = make_step(advantage="grpo", n_samples=2)
    batch = step.evaluate(make_batch())
    with pytest.raises(ValueError, match=r"scores: .* 6 sequences, got shape \(5,\)"):
        step.advantages(batch, [0.0] * 5, [0] * 6)
    with pytest.raises(ValueError, match=r"scores: .* 6 sequences, got shape \(6, 1\)"):
        step.advantages(batch, np.zeros((6, 1)), [0] * 6)
    with pytest.raises(ValueError, match=r"group_ids: .* 6 sequences, got shape \(7,\)"):
        step.advantages(batch, [0.0] * 6, [0] * 7)
    with pytest.raises(ValueError, match=r"group_ids: .*advantage = 'grpo', got None"):
        step.advantages(batch, [0.0] * 6)


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
@pytest.mark.parametrize("score", [math.inf, -math.inf, 1e300], ids=str)
def test_an_infinite_score_is_refused(score: float, advantage: str) -> None:
    step = make_step(advantage=advantage, **({"n_samples": 2} if advantage == "grpo" else {}))
    batch = step.evaluate(make_batch())
    for scores in ([1.0, score, 0.0, 0.0, 2.0, math.nan], np.array([1.0, score, 0, 0, 0, score])):
        with pytest.raises(ValueError, match=r"^scores\[1\]: .*, got -?inf. NaN drops a response"):
            step.advantages(batch, scores, [0, 0, 0, 1, 1, 1])
    huge = step.advantages(batch, [1e20, 0.0, 1.0, 0.0, 0.0, -1e20], [0, 0, 0, 1, 1, 1])
    assert huge.advantages is not None and huge.advantages.isfinite().all()


@pytest.mark.parametrize(
    "bad",
    [[1, None, 0, 0, 0, 0], ["a"] * 6, np.array(["a"] * 6), {}, [10**400] * 6],
    ids=["None", "strings", "array of strings", "dict", "too large"],
)
def test_what_is_no_number_is_named(bad: Any) -> None:
    step = make_step(advantage="grpo", n_samples=2)
    batch = step.evaluate(make_batch())
    with pytest.raises(ValueError, match=r"^scores: expected \(B,\) numbers"):
        step.advantages(batch, bad, [0] * 6)
    with pytest.raises(ValueError, match=r"^group_ids: expected \(B,\) integers"):
        step.advantages(batch, [0.0] * 6, bad)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ref_logprobs", {}),
        ("ref_logprobs", {"kl_in": "loss", "kl_estimator": "k3"}),
        ("ref_logprobs", {"kl_in": "loss", "kl_estimator": "k3", "advantage": "reinforce"}),
        ("values", {}),
        ("bootstrap", {"bootstrap_truncated": True}),
        ("returns", {}),
    ],
)
def test_what_another_step_left_out_is_named(name: str, options: dict[str, Any]) -> None:
    step = make_step(**options)
    before = [p.detach().clone() for p in step.policy.parameters()]
    batch = step.evaluate(make_batch()).replace(**({} if name == "returns" else {name: None}))
    maker = "advantages" if name == "returns" else "evaluate"
    with pytest.raises(ValueError, match=rf"^batch\.{name}: .*got None. Call step.{maker} first"):
        step.update(step.advantages(batch, np.arange(6.0)).replace(returns=None))
    assert all(torch.equal(a, b) for a, b in zip(before, step.policy.parameters(), strict=True))


def test_values_are_named_by_an_update_that_clips_by_them() -> None:
    step = make_step(clip_vloss=0.2)
    batch = step.advantages(step.evaluate(make_batch()), np.arange(6.0)).replace(values=None)
    with pytest.raises(ValueError, match=r"^batch\.values: .*got None. Call step.evaluate first"):
        step.update(batch)


def test_what_is_no_batch_is_named() -> None:
    step = make_step()
    calls: tuple[Any, ...] = (step.evaluate, step.update, lambda x: step.advantages(x, []))
    for call in calls:
        for other in (None, PackedSequences.pack([[3]], [[4]]), {}):
            with pytest.raises(TypeError, match=r"^batch: expected a PackedBatch, got \w+"):
                call(other)
        with pytest.raises(ValueError, match="^batch: expected at least one sequence, got none"):
            call(PackedBatch.pack([], []))


@pytest.mark.parametrize("minibatches", [1, 2])
def test_gradients_that_somebody_left_are_not_trained_on(minibatches: int) -> None:
    def update(dirty: bool) -> tuple[dict[str, float], list[Tensor]]:
        step = make_step(num_minibatches=minibatches)
        batch = step.advantages(step.evaluate(make_batch()), np.arange(6.0))
        for p in step.policy.parameters() if dirty else ():
            p.grad = torch.ones_like(p)
        return step.update(batch), [p.detach().clone() for p in step.trained()]

    clean, dirty = update(False), update(True)
    assert clean[0]["actor_grad_norm"] == dirty[0]["actor_grad_norm"]
    assert all(map(torch.equal, clean[1], dirty[1]))


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_model_resized_after_the_step_was_made_is_refused(critic: str) -> None:
    """Before anything is stepped: the moments have the old shape, and fused AdamW writes past
    them.
    """
    step = make_step(critic=critic, kl_coef=0.0)
    batch = step.advantages(step.evaluate(make_batch()), np.arange(6.0))
    with pytest.raises(ValueError, match="resize the model's embeddings before PPOStep is made"):
        step.evaluate(PackedBatch.pack([[3]], [[len(WORDS)]]))
    trunk = step.policy.actor if critic == "shared" else step.policy.critic
    trunk.model.resize_token_embeddings(len(WORDS) + 9, mean_resizing=False)
    before = [p.detach().clone() for p in step.trained()]
    with pytest.raises(ValueError, match=r"^model: .* Resize the model first, then make a new"):
        step.update(batch)
    assert all(map(torch.equal, before, step.trained()))
    assert step.iteration == 0


def test_a_sequence_over_the_token_budget_is_refused() -> None:
    step = make_step(token_budget=16)
    long = PackedBatch.pack([[3] * 10], [[4] * 10])
    with pytest.raises(ValueError, match="20"):
        step.evaluate(long)


def test_is_correction_needs_the_samplers_log_probabilities() -> None:
    step = make_step(is_correction="tis")
    batch = step.advantages(step.evaluate(make_batch()), np.arange(6.0))
    with pytest.raises(ValueError, match="rollout_logprobs"):
        step.update(batch)
