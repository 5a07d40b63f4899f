"""Details 01, 02, 03, 05, 06, 26, 27: which state, token and flag belongs to which.

Shapes: B sequences, N response tokens, L tokens of the longest sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastppo.data.text import decode
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.ppo.trainer import PPOTrainer
from fastppo.rollout.engine import Sampling
from fastppo.rollout.packed import PackedEngine

EOS = 2


def lists(batch: PackedBatch, x: Tensor) -> list[list[float]]:
    """(N,) as one list per sequence."""
    return [row.tolist() for row in batch.unpack(x)]


def padded_forward(model: Any, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N,) and states before each token (N, H), from right-padded (B, L) ids."""
    cu, lengths = batch.cu_seqlens_host, batch.sequence_lengths
    ids = torch.zeros(batch.num_sequences, batch.max_seqlen, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        ids[i, :n], mask[i, :n] = batch.input_ids[cu[i] : cu[i + 1]], 1
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids, attention_mask=mask)[0]  # (B, L, H)
        logprobs = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)  # (B, L, V)
    found, states = [], []
    for i, (n, r) in enumerate(zip(lengths, batch.response_lengths, strict=True)):
        context = n - r
        found.append(logprobs[i, context - 1 : n - 1].gather(1, ids[i, context:n, None])[:, 0])
        states.append(hidden[i, context - 1 : n - 1])
    return torch.cat(found), torch.cat(states)


def test_01_one_step_shift(
    make_model: Callable[..., Any],
    make_step: Callable[..., PPOStep],
    make_batch: Callable[..., PackedBatch],
) -> None:
    """Log-probability and value of a token come from the state before it; packed == padded."""
    plain, given = make_model(), make_batch()
    step = make_step(copy.deepcopy(plain), value_std=0.3, reference="copy", token_budget=40)
    batch = step.evaluate(given)  # in two bins, and back in the order given
    logprobs, states = padded_forward(plain, given)
    torch.testing.assert_close(batch.old_logprobs, logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch.ref_logprobs, logprobs, atol=1e-5, rtol=0)
    values = (states @ step.policy.value_head.weight.T)[:, 0].detach()
    torch.testing.assert_close(batch.values, values, atol=1e-5, rtol=0)
    # the update reads the same states: its value loss is that of those values
    batch = step.advantages(batch, np.arange(5.0))
    expected = 0.5 * (values - batch.returns).square().mean().item()
    assert step.update(batch)["value_loss"] == pytest.approx(expected, rel=1e-5)


def test_01_neighbours_do_not_leak(make_step: Callable[..., PPOStep]) -> None:
    """The last token of a sequence reads nothing of the next one, nor an earlier token a later."""
    step = make_step(value_std=0.3)
    prompts, responses = [[3, 4], [5, 6, 7]], [[8, 9, 10], [11, 12]]
    one = step.evaluate(PackedBatch.pack(prompts, responses, truncated=[True, True]))
    # Of the same lengths: matrix products of other shapes may round differently.
    prompts, responses = [[3, 4], [30, 31, 32]], [[8, 9, 20], [21, 22]]
    two = step.evaluate(PackedBatch.pack(prompts, responses, truncated=[True, True]))
    assert torch.equal(one.values[:3], two.values[:3])
    assert torch.equal(one.old_logprobs[:2], two.old_logprobs[:2])
    alone = step.evaluate(PackedBatch.pack([[3, 4]], [[8, 9, 10]], truncated=[True]))
    torch.testing.assert_close(alone.values, one.values[:3], atol=1e-5, rtol=0)
    assert alone.bootstrap[0].item() == pytest.approx(one.bootstrap[0].item(), abs=1e-6)


@pytest.mark.parametrize("advantage", ["gae", "reinforce"])
def test_02_reward_at_last_response_token(
    advantage: str,
    make_step: Callable[..., PPOStep],
    make_batch: Callable[..., PackedBatch],
) -> None:
    """The score sits on the last token the policy chose, also where tool tokens follow it."""
    step = make_step(advantage=advantage)
    masks = [[True] * 4, [True, False, True, False, False], [True]]
    batch = make_batch((2, 1, 3), (4, 5, 1), loss_mask=masks)
    batch = step.advantages(step.evaluate(batch), [1.0, 2.0, 3.0])
    assert lists(batch, batch.rewards) == [[0, 0, 0, 1], [0, 0, 2, 0, 0], [3]]


def test_02_no_step_after_the_last_token(
    make_step: Callable[..., PPOStep], make_batch: Callable[..., PackedBatch]
) -> None:
    """The last token's return is the whole score: no discount for a step past the end."""
    step = make_step(gamma=0.5, gae_lambda=1.0)
    batch = step.advantages(step.evaluate(make_batch((2, 3), (3, 1))), [1.0, -2.0])
    assert lists(batch, batch.returns) == [[0.25, 0.5, 1.0], [-2.0]]


def test_03_end_token_is_trained_though_it_pads(make_step: Callable[..., PPOStep]) -> None:
    """With pad == eos the end token still counts: rewarding it makes it likelier."""
    step = make_step(advantage="reinforce", learning_rate=1e-2)
    assert (
        step.policy.actor.model.config.pad_token_id
        == step.policy.actor.model.config.eos_token_id
        == EOS
    )
    batch = PackedBatch.pack([[EOS, 5], [EOS, 5]], [[EOS], [9]])
    batch = step.advantages(step.evaluate(batch), [1.0, 0.0])
    assert batch.loss_mask.tolist() == [True, True]
    metrics = step.update(batch)
    assert metrics["num_tokens"] == 2
    change = step.evaluate(batch).old_logprobs - batch.old_logprobs
    assert change[0] > 0.05 and change[1] < -0.05


def test_03_lengths_come_from_the_engine(make_step: Callable[..., PPOStep]) -> None:
    """An end token inside or at the end of a prompt hides nothing, and the sampled one is kept."""
    step = make_step()
    prompts = [np.array(p) for p in ([5, EOS, 6, 7], [EOS], [9, EOS], [3])] * 8
    rollouts = PackedEngine(step.policy.actor).generate(
        prompts,
        Sampling(temperature=1.0, max_new_tokens=12, eos_token_ids=(EOS,), seed=1),
    )
    assert rollouts.finished.any() and rollouts.truncated.any()
    for ids, finished in zip(rollouts.responses, rollouts.finished, strict=True):
        assert (ids == EOS).sum() == finished and (ids[-1] == EOS) == finished
    batch = step.evaluate(PackedBatch.pack(prompts, rollouts.responses))
    assert batch.num_responses == sum(map(len, rollouts.responses))
    engine = torch.from_numpy(np.concatenate(rollouts.logprobs))
    torch.testing.assert_close(batch.old_logprobs, engine, atol=1e-4, rtol=0)


def test_05_truncation_bootstrap(
    make_step: Callable[..., PPOStep], make_batch: Callable[..., PackedBatch]
) -> None:
    """Only responses flagged as truncated continue with the value after their last token."""
    batch = make_batch((2, 3, 1), (3, 6, 6), truncated=[True, False, True])  # equally long, ended
    step = make_step(value_std=0.3, gamma=0.9, bootstrap_truncated=True, norm_adv=False)
    batch = step.advantages(step.evaluate(batch), [1.0, 1.0, 1.0])
    values = [0.0] * 3
    for i in (0, 2):  # the value of the next token's state, from a batch that goes on
        ids = batch.select([i]).input_ids.tolist()
        values[i] = step.evaluate(PackedBatch.pack([ids], [[0]])).values.item()
    assert batch.bootstrap.tolist() == pytest.approx(values, abs=1e-6) and values[0] != 0
    last = batch.cu_responses[1:].long() - 1
    expected = 1.0 + 0.9 * torch.tensor(values) - batch.values[last]
    torch.testing.assert_close(batch.advantages[last], expected)
    off = make_step(value_std=0.3, gamma=0.9, norm_adv=False)
    off_batch = off.advantages(off.evaluate(batch), [1.0, 1.0, 1.0])
    torch.testing.assert_close(off_batch.advantages[last], 1.0 - batch.values[last])


def test_06_masked_gap(
    make_step: Callable[..., PPOStep], make_batch: Callable[..., PackedBatch]
) -> None:
    """Tool tokens inside a response are stepped over: advantages as if they were not there."""
    step = make_step(value_std=0.3, gamma=0.9, gae_lambda=0.8, ref_seed=1)
    keep = [True, True, False, False, True, False, True]
    gap = step.evaluate(make_batch((2, 3), (7, 4), loss_mask=[keep, [True] * 4]))
    scored = step.advantages(gap, [1.0, 0.5])
    chosen = torch.tensor([*keep, *[True] * 4])
    dense = make_batch((2, 3), (4, 4)).replace(
        **{name: getattr(gap, name)[chosen] for name in ("values", "old_logprobs", "ref_logprobs")}
    )
    dense = step.advantages(dense, [1.0, 0.5])
    for name in ("rewards", "advantages", "returns"):
        torch.testing.assert_close(getattr(scored, name)[chosen], getattr(dense, name))
        assert not getattr(scored, name)[~chosen].any()
    tokens = step.update(scored)["num_tokens"]
    assert tokens == 8


def test_26_positions(
    make_model: Callable[..., Any],
    make_step: Callable[..., PPOStep],
    make_batch: Callable[..., PackedBatch],
) -> None:
    """Learned positions start at 0 in every packed sequence, sampled or trained."""
    plain = make_model("gpt2")
    step = make_step(copy.deepcopy(plain))
    batch = step.evaluate(make_batch())
    torch.testing.assert_close(
        batch.old_logprobs, padded_forward(plain, batch)[0], atol=1e-5, rtol=0
    )
    prompts = batch_prompts(batch)
    rollouts = PackedEngine(step.policy.actor).generate(
        prompts,
        Sampling(temperature=1.0, max_new_tokens=6, eos_token_ids=(), seed=1),
    )
    trained = step.evaluate(PackedBatch.pack(prompts, rollouts.responses)).old_logprobs
    sampled = torch.from_numpy(np.concatenate(rollouts.logprobs))
    torch.testing.assert_close(sampled, trained, atol=1e-4, rtol=0)


def batch_prompts(batch: PackedBatch) -> list[np.ndarray]:
    """The prompts of a batch, of different lengths."""
    bounds = itertools.pairwise(batch.cu_seqlens_host)
    whole = [batch.input_ids[a:b].numpy() for a, b in bounds]
    return [ids[: len(ids) - n] for ids, n in zip(whole, batch.response_lengths, strict=True)]


def test_27_token_in_token_out(
    make_trainer: Callable[..., PPOTrainer],
    spy: Callable[[Any, str], list[tuple[Any, Any]]],
) -> None:
    """What is trained on are the engine's ids, which decoding and encoding would change."""
    seen: list[list[int]] = []

    def reward(completions: list[str], completion_ids: list[list[int]]) -> list[float]:
        seen.extend(completion_ids)
        return [float(len(text)) for text in completions]

    trainer = make_trainer(reward, num_iterations=1, reward_workers=0)  # `seen` is in this process
    generated, trained = spy(trainer.engine, "generate"), spy(trainer.step, "update")
    trainer.train()
    (prompts, _), rollouts = generated[0]
    (batch,), _ = trained[0]
    responses = [ids.tolist() for ids in rollouts.responses]
    assert lists(batch, batch.targets) == responses == seen
    assert [p.tolist() for p in batch_prompts(batch)] == [p.tolist() for p in prompts]
    tokenizer, end = trainer.tokenizer, trainer.tokenizer.eos_token_id
    again = [tokenizer(decode(tokenizer, ids))["input_ids"] for ids in responses]
    # special tokens are not in the text, neither the one at the end nor <pad> in the middle
    assert again != [[i for i in ids if i != end] for ids in responses]
    engine = np.concatenate(rollouts.logprobs)
    np.testing.assert_allclose(batch.old_logprobs.numpy(), engine, atol=1e-4)
