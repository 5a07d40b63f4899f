"""PPOStep under faults: memory that runs out, numbers that are not finite, interruptions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo import PackedBatch, PPOConfig, PPOStep
from fastppo.models.tiny import tiny_model
from fastppo.training import interrupts
from fastppo.training.errors import NonFiniteError

Tensors = list[Tensor]


def make_step(**options: Any) -> PPOStep:
    defaults: dict[str, Any] = {
        **{"max_prompt_length": 8, "max_response_length": 8, "token_budget": 64},
        **{"num_minibatches": 2, "update_epochs": 2, "learning_rate": 1e-3, "precision": "fp32"},
        **{"device": "cpu", "prompts_per_iteration": 12, "bootstrap_truncated": True},
    }
    return PPOStep(tiny_model(32, seed=0), PPOConfig(**{**defaults, **options}))


def make_batch(count: int = 12) -> PackedBatch:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 32, n) for n in rng.integers(1, 9, count)]
    responses = [rng.integers(2, 32, n) for n in rng.integers(1, 9, count)]
    return PackedBatch.pack(prompts, responses, truncated=rng.random(count) < 0.5)


def scores(batch: PackedBatch) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(batch.num_sequences).astype(np.float32)


def prepared(step: PPOStep) -> PackedBatch:
    batch = step.evaluate(make_batch())
    return step.advantages(batch, scores(batch))


def state_of(step: PPOStep) -> Tensors:
    """Parameters and the state of both optimisers."""
    moments = [
        value
        for optimizer in (step.actor_optimizer, step.critic_optimizer)
        for state in optimizer.state.values()
        for value in state.values()
    ]
    return [x.detach().clone() for x in (*step.policy.parameters(), *moments)]


def same(a: Tensors, b: Tensors) -> bool:
    return all(map(torch.equal, a, b))


class Failing:
    """Raises an error at chosen calls of a method, which is otherwise what it was."""

    def __init__(self, method: Callable[..., Any], calls: set[int], error: BaseException) -> None:
        self.method, self.calls, self.error, self.count = method, calls, error, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise self.error
        return self.method(*args, **kwargs)


# Out of memory

OUT = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
)


@pytest.mark.parametrize("where", ["hidden", "values"])
@pytest.mark.parametrize("error", OUT, ids=["cuda", "python", "cpu"])
def test_out_of_memory_halves_the_budget_and_changes_no_gradient(
    where: str, error: BaseException
) -> None:
    plain = make_step()
    expected = plain.update(prepared(plain))

    step = make_step()
    # the second pass of the evaluation, and one in the middle of the update
    owner = step.policy.actor if where == "hidden" else step.policy
    failing = Failing(getattr(owner, where), {2, 9}, error)
    setattr(owner, where, failing)
    metrics = step.update(prepared(step))
    assert failing.count > 9
    assert step.token_budget == 16 and metrics["token_budget"] == 16
    for a, b in zip(state_of(step), state_of(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for name in ("policy_loss", "value_loss", "approx_kl", "actor_grad_norm"):
        assert metrics[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6)


def test_memory_for_less_than_one_sequence_is_an_error() -> None:
    step = make_step()
    batch = prepared(step)
    actor = step.policy.actor
    actor.hidden = Failing(actor.hidden, set(range(1, 99)), OUT[0])  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        step.update(batch)
    assert step.token_budget == batch.max_seqlen
    assert all(p.grad is None for p in step.policy.parameters())
    assert step.progress is None


def test_other_errors_are_not_swallowed() -> None:
    step = make_step()
    batch = prepared(step)
    step.policy.actor.hidden = Failing(
        step.policy.actor.hidden, {2}, RuntimeError("shape mismatch")
    )  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        step.update(batch)
    assert step.token_budget == 64
    assert all(p.grad is None for p in step.policy.parameters())


# Numbers that are not finite


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "values", "bootstrap"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sequence_with_a_bad_number_is_left_out(name: str, value: float) -> None:
    """The same update as without its score, and the rest of the batch is none the worse."""
    results = []
    for poisoned in (True, False):
        step = make_step()
        batch = step.evaluate(make_batch())
        given = scores(batch)
        if poisoned:
            x = getattr(batch, name).clone()
            x[3 if name == "bootstrap" else int(batch.cu_responses_host[3])] = value
            batch = batch.replace(**{name: x})
        else:
            given[3] = np.nan
        metrics = step.update(step.advantages(batch, given))
        assert metrics["dropped"] == pytest.approx(1 / 12)
        assert metrics["nonfinite_steps"] == 0
        results.append(state_of(step))
    assert same(*results)


def test_a_sequence_whose_forward_is_always_nan_stops_nothing() -> None:
    """It is left out of the forward pass of the update too."""
    step = make_step()
    batch = make_batch()
    first = int(batch.cu_seqlens_host[3])
    batch = batch.replace(input_ids=batch.input_ids.clone())
    batch.input_ids[batch.input_ids == 31] = 30
    batch.input_ids[first] = 31
    with torch.no_grad():
        step.policy.actor.model.get_input_embeddings().weight[31] = torch.nan
    batch = step.evaluate(batch)
    assert batch.old_logprobs.isnan().any()
    metrics = step.update(step.advantages(batch, scores(batch)))
    assert metrics["dropped"] == pytest.approx(1 / 12) and metrics["nonfinite_steps"] == 0
    assert metrics["actor_grad_norm"] > 0


def test_a_batch_without_scores_changes_nothing() -> None:
    """Adam's momentum would move the parameters even with a gradient of 0."""
    step = make_step()
    step.update(prepared(step))
    before = state_of(step)
    batch = step.evaluate(make_batch())
    metrics = step.update(step.advantages(batch, np.full(12, np.nan)))
    assert same(state_of(step), before)
    assert metrics["nonfinite_steps"] == 0 and metrics["dropped"] == 1.0
    assert step.iteration == 2


def poison(batch: PackedBatch, sequences: list[int]) -> PackedBatch:
    advantages = batch.advantages.clone()
    for i in sequences:
        advantages[int(batch.cu_responses_host[i])] = torch.nan
    return batch.replace(advantages=advantages)


def test_after_too_many_bad_steps_nothing_moves() -> None:
    """The steps queued behind the last bad one are good, and still must not change anything."""
    step = make_step(num_minibatches=6, update_epochs=1, max_nonfinite_steps=2)
    batch = prepared(step)
    order = [int(i) for m in step._minibatches(numbered(batch), 0) for i in m.truncated_ids]
    # minibatches 0: good, 1: bad, 2: good, 3 and 4: bad, 5: good
    bad = [order[2 * k] for k in (1, 3, 4)]
    good = make_step(num_minibatches=6, update_epochs=1, max_nonfinite_steps=9)
    good.update(poison(batch, [*bad, order[10]]))
    with pytest.raises(NonFiniteError, match="2 optimiser steps in a row") as caught:
        step.update(poison(batch, bad))
    assert same(state_of(step), state_of(good))  # 5 was poisoned there, so only 0 and 2 moved
    progress = caught.value.progress
    assert (progress.epoch, progress.minibatch, len(progress.steps)) == (0, 4, 4)
    assert [bool(s.skipped) for s in progress.steps] == [False, True, False, True]
    assert step.progress is None and step.iteration == 0


class numbered:  # noqa: N801
    """Follows which sequences `select` chose, without a batch's own fields."""

    def __init__(self, batch: PackedBatch, ids: np.ndarray | None = None) -> None:
        self.num_sequences = batch.num_sequences
        self.truncated_ids = np.arange(batch.num_sequences) if ids is None else ids
        self.batch = batch

    def select(self, indices: np.ndarray) -> numbered:
        return numbered(self.batch, self.truncated_ids[indices])


# Interruptions


@pytest.mark.parametrize("target_kl", [None, 1e-4], ids=["all-epochs", "target-kl"])
@pytest.mark.parametrize("calls", [{1}, {4}, {7}, {12}, {5, 8, 11}])
def test_an_interrupted_update_goes_on_where_it_was(
    calls: set[int], target_kl: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"target_kl": target_kl, "update_epochs": 3, "kl_target": 0.1}
    options["token_budget"] = 32
    plain = make_step(**options)
    expected = plain.update(prepared(plain))

    step = make_step(**options)
    batch = prepared(step)
    failing = Failing(lambda: None, calls, interrupts.Interrupted(15))
    monkeypatch.setattr(interrupts, "check", failing)
    metrics, stops = None, 0
    while metrics is None:
        try:
            metrics = step.update(batch)
        except interrupts.Interrupted:
            stops += 1
            assert all(p.grad is None for p in step.policy.parameters())
            # what a new process would get: only parameters, optimisers, counters and progress
            step.progress = copy.deepcopy(step.progress)
    reachable = {call for call in calls if call <= failing.count}
    assert stops == len(reachable) >= 1 or target_kl is not None
    assert metrics == pytest.approx(expected, nan_ok=True, rel=0, abs=0)
    assert same(state_of(step), state_of(plain))
    assert step.kl_coef == plain.kl_coef and step.iteration == plain.iteration == 1


def test_an_interrupted_evaluation_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step()
    monkeypatch.setattr(interrupts, "check", Failing(lambda: None, {2}, interrupts.Interrupted(2)))
    with pytest.raises(interrupts.Interrupted):
        step.evaluate(make_batch())
    again, plain = step.evaluate(make_batch()), make_step().evaluate(make_batch())
    assert torch.equal(again.old_logprobs, plain.old_logprobs)


@pytest.mark.parametrize("role", ["model", "ref_model", "value_model"])
@pytest.mark.parametrize("other", ["smollm2-135m-instruct", torch.nn.Linear(2, 2)])
def test_what_is_no_model_is_named(role: str, other: Any) -> None:
    models = {"model": tiny_model(32, seed=0), role: other}
    config = PPOConfig(critic="separate", precision="fp32", device="cpu")
    with pytest.raises(ValueError, match=f"^{role}: expected a transformers model, got "):
        PPOStep(config=config, **models)
