"""Details 20 to 23, 25, 28, 29: what an optimiser step is, and which steps there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.training.errors import NonFiniteError

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

MakeStep = Callable[..., PPOStep]
MakeBatch = Callable[..., PackedBatch]
Spy = Callable[[Any, str], list[tuple[Any, Any]]]


def parameters(step: PPOStep) -> list[torch.Tensor]:
    return [p.detach().clone() for p in step.policy.actor_parameters()]


def learn(step: PPOStep, batch: PackedBatch) -> dict[str, float]:
    """One iteration with different scores."""
    scores = np.arange(float(batch.num_sequences))
    return step.update(step.advantages(step.evaluate(batch), scores))


@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16], ids=str)
def test_20_fp32_masters(
    loaded: torch.dtype,
    make_model: Callable[..., Any],
    make_step: MakeStep,
    make_batch: MakeBatch,
) -> None:
    """Under bf16 a step of lr 1e-6 still moves the weights, even of a model that came in bf16."""
    step = make_step(make_model().to(loaded), precision="bf16", learning_rate=1e-6)
    names = [
        n for n, p in step.policy.actor.model.named_parameters() if p.ndim == 2 and "layers" in n
    ]
    assert len(names) == 14
    weights = dict(step.policy.actor.model.named_parameters())
    before = {n: weights[n].detach().clone() for n in names}
    learn(step, make_batch())
    for name in names:
        assert weights[name].dtype == torch.float32
        moved = (weights[name] - before[name]).abs()
        # entries whose gradient is far below Adam's ε move less than a step
        assert (moved > 0).float().mean() > 0.5 and moved.max() < 1.1e-6, name


def test_21_adam_eps(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """Adam's ε is 1e-5: the first step is −lr·g/(|g| + 1e-5) for the clipped gradient g."""
    assert PPOConfig().adam_eps == 1e-5
    step = make_step(max_grad_norm=1e-3)  # gradients of the size of ε
    before = parameters(step)
    learn(step, make_batch())
    for old, p in zip(before, step.policy.actor_parameters(), strict=True):
        g = step.actor_optimizer.state[p]["exp_avg"] / (1 - 0.9)
        torch.testing.assert_close(
            p.detach() - old, -1e-3 * g / (g.abs() + 1e-5), atol=2e-7, rtol=1e-3
        )
    optimizers = (step.actor_optimizer, step.critic_optimizer)
    assert all(g["eps"] == 1e-5 for o in optimizers if o for g in o.param_groups)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_21_learning_rate_anneals_per_iteration(
    schedule: str, make_step: MakeStep, make_batch: MakeBatch, spy: Spy
) -> None:
    """The learning rates decay towards 0 over the iterations and stay put inside one."""
    assert PPOConfig().lr_schedule == "linear"
    step = make_step(
        lr_schedule=schedule,
        learning_rate=1e-3,
        critic_learning_rate=4e-3,
        num_iterations=4,
        num_minibatches=2,
        update_epochs=2,
    )
    expected = {
        "linear": [1.0, 0.75, 0.5, 0.25],
        "cosine": [1.0, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)],
        "constant": [1.0] * 4,
    }[schedule]
    rates: list[tuple[float, float]] = []
    step.actor_optimizer.register_step_pre_hook(
        lambda *_: rates.append(
            (
                step.actor_optimizer.param_groups[0]["lr"],
                step.critic_optimizer.param_groups[0]["lr"],
            )
        )
    )
    logged = [learn(step, make_batch())["learning_rate"] for _ in range(4)]
    assert logged == pytest.approx([1e-3 * f for f in expected])
    assert rates == [pytest.approx((1e-3 * f, 4e-3 * f)) for f in expected for _ in range(4)]


def test_21_weight_decay_on_matrices_only(make_step: MakeStep) -> None:
    """Norms and the value head do not decay."""
    step = make_step(weight_decay=0.1)
    decays = {
        id(p): group["weight_decay"]
        for optimizer in (step.actor_optimizer, step.critic_optimizer)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for name, p in step.policy.named_parameters():
        matrix = p.ndim == 2 and "value_head" not in name
        assert decays[id(p)] == (0.1 if matrix else 0.0), name


def dropping_gpt2(make_model: Callable[..., Any]) -> Any:
    return make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)


def dropping_lora(make_model: Callable[..., Any]) -> Any:
    model = make_model(attention_dropout=0.5)
    lora = LoraConfig(r=4, lora_dropout=0.5, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "lora_B" in name:  # zero at first, and then dropout before it would not show
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("build", [dropping_gpt2, dropping_lora], ids=["gpt2", "lora"])
def test_22_dropout_is_off(
    build: Callable[..., Any],
    make_model: Callable[..., Any],
    make_step: MakeStep,
    make_batch: MakeBatch,
) -> None:
    """No dropout in any mode, the model's own or LoRA's: the same numbers twice, and ratio 1."""
    step = make_step(build(make_model).train(), kl_coef=0.1)
    first = step.evaluate(make_batch())
    step.policy.actor.model.train()
    second = step.evaluate(make_batch())
    step.policy.actor.model.eval()
    third = step.evaluate(make_batch())
    for other in (second, third):
        assert torch.equal(first.old_logprobs, other.old_logprobs)
        assert torch.equal(first.ref_logprobs, other.ref_logprobs)
    step.policy.actor.model.train()
    metrics = learn(step, make_batch())
    assert metrics["ratio"] == metrics["ratio_max"] == 1.0


def marked_batch(size: int) -> PackedBatch:
    """Sequence i starts with token i, and all lengths differ."""
    prompts = [[i, 30] for i in range(size)]
    return PackedBatch.pack(
        prompts, [[31 + (i + j) % 5 for j in range(i + 1)] for i in range(size)]
    )


def epochs_of(calls: list[tuple[Any, Any]], per_epoch: int) -> Iterator[list[list[int]]]:
    """The sequences of each minibatch of each epoch."""
    parts = [args[0].input_ids[args[0].cu_seqlens[:-1].long()].tolist() for args, _ in calls]
    for start in range(0, len(parts), per_epoch):
        yield parts[start : start + per_epoch]


def test_23_fresh_permutation_each_epoch(make_step: MakeStep, spy: Spy) -> None:
    """Other minibatches in every epoch and iteration, and the same ones for the same seed."""

    def orders(seed: int, noise: int = 0) -> list[list[list[int]]]:
        step = make_step(seed=seed, update_epochs=3, num_minibatches=2)
        calls = spy(step, "accumulate_gradients")
        torch.manual_seed(noise)  # the global generator has no say
        for _ in range(2):
            learn(step, marked_batch(8))
        return list(epochs_of(calls, 2))

    one = orders(1)
    assert len(one) == 6
    compositions = {tuple(frozenset(part) for part in epoch) for epoch in one}
    assert len(compositions) == 6
    assert orders(1, noise=1) == one and orders(2) != one


@pytest.mark.parametrize(("size", "parts"), [(7, 3), (5, 4), (8, 8), (3, 8), (1, 2)])
def test_25_ragged_minibatches(size: int, parts: int, make_step: MakeStep, spy: Spy) -> None:
    """Sizes that do not divide: every sequence trains exactly once per epoch, none is dropped."""
    step = make_step(num_minibatches=parts, update_epochs=2)
    calls = spy(step, "accumulate_gradients")
    batch = marked_batch(size)
    batch = step.advantages(step.evaluate(batch), np.arange(1.0, size + 1) ** 2)
    # One sequence alone is its own mean; then every token would be left out.
    advantages = batch.advantages + (size == 1)
    metrics = step.update(batch.replace(advantages=advantages))
    steps = min(size, parts)
    assert len(calls) == 2 * steps
    for epoch in epochs_of(calls, steps):
        assert sorted(i for part in epoch for i in part) == list(range(size))
        assert max(map(len, epoch)) - min(map(len, epoch)) <= 1
    assert metrics["num_tokens"] == 2 * batch.num_responses


def test_25_short_minibatch_weighs_itself(make_step: MakeStep) -> None:
    """A minibatch is a mean over its own tokens, however few they are."""
    step = make_step(num_minibatches=3, advantage="reinforce", learning_rate=1e-30)
    batch = step.evaluate(marked_batch(7))
    ones = torch.ones(batch.num_responses)
    metrics = step.update(batch.replace(advantages=ones, loss_mask=ones.bool()))
    assert metrics["policy_loss"] == pytest.approx(-1.0, abs=1e-5)


def test_28_actor_and_critic_clip_apart(make_step: MakeStep, make_batch: MakeBatch) -> None:
    """A huge critic gradient leaves the actor's alone: each has max_grad_norm to itself."""
    found = []
    for scale in (1.0, 1e6):
        step = make_step(critic="separate", max_grad_norm=1e-2)
        batch = step.advantages(step.evaluate(make_batch()), np.arange(5.0))
        metrics = step.update(batch.replace(returns=batch.returns * scale))
        used = [
            torch.stack([s["exp_avg"].norm() for s in optimizer.state.values()]).norm().item() * 10
            for optimizer in (step.actor_optimizer, step.critic_optimizer)
        ]
        assert used == pytest.approx([1e-2, 1e-2], rel=1e-4)
        found.append((parameters(step), metrics))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(a, b)
    assert found[1][1]["critic_grad_norm"] > 1e5 * found[0][1]["critic_grad_norm"]


def test_28_nonfinite_steps_are_skipped_and_counted(
    make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """A step with a non-finite gradient changes nothing and is counted; a good one starts anew."""
    step = make_step(max_nonfinite_steps=2)
    good = step.advantages(step.evaluate(make_batch()), np.arange(5.0))
    infinite = good.advantages.clone()
    infinite[4] = torch.inf
    for _ in range(2):
        before = parameters(step)
        metrics = step.update(good.replace(advantages=infinite))
        assert metrics["nonfinite_steps"] == 1 and step.nonfinite_in_a_row == 1
        assert all(map(torch.equal, before, parameters(step)))
        assert step.update(good)["nonfinite_steps"] == 0 and step.nonfinite_in_a_row == 0
        assert not all(map(torch.equal, before, parameters(step)))
        assert all(p.isfinite().all() for p in step.policy.parameters())
    assert {float(s["step"]) for s in step.actor_optimizer.state.values()} == {2.0}


def test_28_too_many_nonfinite_steps_stop_the_run(
    make_step: MakeStep, make_batch: MakeBatch
) -> None:
    """max_nonfinite_steps such steps in a row end the run, with every parameter as it was."""
    step = make_step(max_nonfinite_steps=3)
    batch = step.advantages(step.evaluate(make_batch()), np.arange(5.0))
    batch = batch.replace(advantages=torch.full_like(batch.advantages, torch.nan))
    before = parameters(step)
    assert step.update(batch)["nonfinite_steps"] == step.update(batch)["nonfinite_steps"] == 1
    with pytest.raises(NonFiniteError, match="3 optimiser steps in a row"):
        step.update(batch)
    assert all(map(torch.equal, before, parameters(step)))


def test_29_target_kl_stops_the_epochs(
    make_step: MakeStep, make_batch: MakeBatch, spy: Spy
) -> None:
    """Once an epoch's approx_kl is above target_kl no further epoch runs; below it all do."""
    epochs, kls = {}, {}
    for target in (None, 1e-4, 100.0):
        step = make_step(target_kl=target, update_epochs=5, num_minibatches=2, learning_rate=1e-2)
        calls = spy(step, "accumulate_gradients")
        metrics = learn(step, make_batch())
        assert len(calls) == 2 * metrics["update_epochs"]
        epochs[target], kls[target] = metrics["update_epochs"], metrics["approx_kl"]
    assert epochs == {None: 5, 1e-4: 1, 100.0: 5}
    assert kls[None] > kls[1e-4] > 1e-4
