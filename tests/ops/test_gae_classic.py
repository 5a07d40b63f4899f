"""gae_classic against CleanRL's loop, its own reference, and gae on the episodes cut out."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import gae, gae_classic, gae_classic_reference


def rollout(steps, envs, rng, dtype=torch.float64):
    rewards, values, final = torch.randn(3, steps, envs, generator=rng, dtype=dtype)
    ends = torch.rand(2, steps, envs, generator=rng) < 0.15
    next_value = torch.randn(envs, generator=rng, dtype=dtype)
    return rewards, values, next_value, ends[0], ends[1] & ~ends[0], final


@pytest.mark.parametrize(("steps", "envs"), [(0, 3), (3, 0), (1, 1), (17, 1), (128, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_the_loop(steps, envs, dtype, rng):
    rewards, values, next_value, terminated, truncated, final = rollout(steps, envs, rng)
    args = [x.to(dtype) for x in (rewards, values, next_value)]
    options = {
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "truncated": truncated,
        "final_values": torch.where(truncated, final, torch.nan).to(dtype),
    }
    truth = gae_classic_reference(*(x.double() for x in args), terminated, **options)
    result = gae_classic(*args, terminated, **options)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for x, y in zip(result, truth, strict=True):
        assert x.dtype == (dtype if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("integers", [False, True])
def test_cleanrl_loop_with_dones(integers, rng):
    """ppo.py lines 219-231; its dones[t] says that step t − 1 ended the episode."""
    num_steps, num_envs, gamma, gae_lambda = 40, 5, 0.98, 0.9
    rewards, values, next_value, terminated, truncated, _ = rollout(num_steps, num_envs, rng)
    if integers:
        rewards, values, next_value = (
            (4 * x).round().float() for x in (rewards, values, next_value)
        )
        gamma = gae_lambda = 1.0
    ended = terminated | truncated
    dones = torch.cat([torch.zeros(1, num_envs), ended[:-1].to(values)]).to(values)
    next_done = ended[-1].to(values)
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0
    for t in reversed(range(num_steps)):
        if t == num_steps - 1:
            nextnonterminal = 1.0 - next_done
            nextvalues = next_value
        else:
            nextnonterminal = 1.0 - dones[t + 1]
            nextvalues = values[t + 1]
        delta = rewards[t] + gamma * nextvalues * nextnonterminal - values[t]
        advantages[t] = lastgaelam = delta + gamma * gae_lambda * nextnonterminal * lastgaelam
    returns = advantages + values
    result = gae_classic(rewards, values, next_value, ended, gamma=gamma, gae_lambda=gae_lambda)
    exact = {"rtol": 0, "atol": 0} if integers else {}
    torch.testing.assert_close(result.advantages, advantages, **exact)
    torch.testing.assert_close(result.returns, returns, **exact)


def test_every_episode_is_a_packed_sequence(rng):
    rewards, values, next_value, terminated, truncated, final = rollout(30, 1, rng)
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    result = gae_classic(
        rewards,
        values,
        next_value,
        terminated,
        truncated=truncated,
        final_values=final,
        **options,
    )
    ends = (terminated | truncated)[:, 0]
    cuts = sorted({*(ends.nonzero()[:, 0] + 1).tolist(), 30})
    bootstrap = torch.where(terminated, 0.0, torch.where(truncated, final, next_value))[:, 0]
    packed = gae(
        rewards[:, 0],
        values[:, 0],
        torch.tensor([0, *cuts]),
        bootstrap=bootstrap[torch.tensor(cuts) - 1],
        **options,
    )
    assert torch.equal(result.advantages[:, 0], packed.advantages)
    assert torch.equal(result.returns[:, 0], packed.returns)


def test_custom_op(rng):
    rewards, values, next_value, terminated, truncated, final = rollout(6, 3, rng, torch.float32)
    for optional in ((None, None), (truncated, final)):
        torch.library.opcheck(
            torch.ops.fastppo.gae_classic.default,
            (rewards, values, next_value, terminated, *optional, 0.9, 0.8),
        )

    def returns(r, v):
        return gae_classic(r, v, next_value, terminated, gamma=0.9, gae_lambda=0.8).returns

    compiled = torch.compile(returns, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, values), returns(rewards, values))
    strided = values.t().contiguous().t()
    options = {"gamma": 0.9, "gae_lambda": 0.8}
    expected = gae_classic(rewards, values, next_value, terminated, **options)
    result = gae_classic(rewards, strided, next_value, terminated, **options)
    assert torch.equal(result.returns, expected.returns)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rewards": torch.zeros(4, 3)}, ValueError, r"rewards: expected"),
        ({"values": torch.zeros(4)}, ValueError, r"values: .*got \(4,\)"),
        ({"next_value": torch.zeros(4)}, ValueError, r"next_value: expected"),
        ({"terminated": torch.zeros(4, 2)}, TypeError, "terminated: expected dtype bool"),
        ({"truncated": torch.zeros(4, 2).bool()}, ValueError, "final_values: truncated needs"),
        ({"final_values": torch.zeros(4)}, ValueError, r"final_values: expected"),
        ({"gamma": 1.1}, ValueError, r"gamma: .*\[0, 1\], got 1.1"),
        ({"gae_lambda": -1.0}, ValueError, "gae_lambda"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    args = {
        "rewards": torch.zeros(4, 2),
        "values": torch.zeros(4, 2),
        "next_value": torch.zeros(2),
        "terminated": torch.zeros(4, 2, dtype=torch.bool),
        "gamma": 1.0,
        "gae_lambda": 1.0,
    }
    with pytest.raises(error, match=message):
        gae_classic(**(args | change))
