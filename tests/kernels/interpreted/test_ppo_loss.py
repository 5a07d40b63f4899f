"""The PPO loss kernel under Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; run by test_interpreted.py", allow_module_level=True)

from fastppo_kernels.launch import ReductionLaunch
from fastppo_kernels.ppo_loss import ppo_loss
from fastppo_kernels.ppo_math import PPOInputs

from fastppo.ops import PPOLossConfig, ppo_loss_reference
from fastppo.ops._cuda import ppo_knobs
from fastppo.ops._ppo_loss_config import config_arguments
from fastppo.ops._ppo_loss_op import ppo_loss_torch, ppo_loss_triton

# Blocks of 16 tokens, 3 programs: 100 tokens are 7 blocks in 3 steps.
SMALL = ReductionLaunch(16, 4, programs=3)
KL = {"kl_coef": 0.1, "kl_estimator": "k1"}
CONFIGS = {
    "plain": PPOLossConfig(),
    "k1 icepop": PPOLossConfig(**KL, is_correction="icepop", is_low=0.8, is_high=1.3),
    "k2 entropy": PPOLossConfig(kl_coef=0.1, kl_estimator="k2", ent_coef=0.02),
    "everything": PPOLossConfig(
        clip_coef_low=0.1,
        clip_coef_high=0.3,
        dual_clip=1.2,
        kl_coef=0.05,
        ent_coef=0.01,
        is_correction="tis",
        is_cap=1.1,
    ),
}


def launch(tensors, config):
    lp, entropy, *constants = tensors
    return ppo_loss(lp, entropy, PPOInputs(*constants), ppo_knobs(config), SMALL)


def draw(n, dtype=torch.float32):
    """logprobs, entropy, old, advantages, weights, ref, rollout."""
    rng = torch.Generator().manual_seed(0)
    lp = -3 * torch.rand(n, generator=rng) - 0.01
    old, ref, rollout = (lp + 0.3 * torch.randn(n, generator=rng) for _ in range(3))
    weights = torch.rand(n, generator=rng) + 0.1
    weights[torch.rand(n, generator=rng) < 0.3] = 0.0
    entropy, advantages = torch.rand(n, generator=rng), torch.randn(n, generator=rng)
    return [x.to(dtype) for x in (lp, entropy, old, advantages, weights, ref, rollout)]


def truth(tensors, config):
    lp, entropy, *rest = (x.double() for x in tensors)
    lp.requires_grad_()
    entropy.requires_grad_()
    names = ("ref_logprobs", "rollout_logprobs")
    optional = dict(zip(names, rest[3:], strict=True)) | {"entropy": entropy}
    out = ppo_loss_reference(lp, *rest[:3], config, **optional)
    g, h = torch.autograd.grad(out.loss, (lp, entropy), allow_unused=True)
    return out.loss.detach(), g, torch.zeros(0) if h is None else h, out.metrics


@pytest.mark.parametrize("n", [1, 16, 17, 100])
@pytest.mark.parametrize("name", CONFIGS)
def test_against_float64(n, name, no_worse):
    tensors, config = draw(n), CONFIGS[name]
    expected = truth(tensors, config)
    result = launch(tensors, config)
    plain = ppo_loss_torch(*tensors, None, *config_arguments(config))
    for a, b, c in zip(result, plain, expected, strict=True):
        no_worse(a, b, c)
    usual = ppo_loss_triton(*tensors, None, *config_arguments(config))
    for a, c in zip(usual, expected, strict=True):
        torch.testing.assert_close(a.double(), c.double(), rtol=5e-6, atol=5e-6)
    masked = tensors[4] == 0
    for poison in (torch.nan, torch.inf):
        dirty = [torch.where(masked, poison, x) for x in tensors]
        dirty[4] = tensors[4]
        again = launch(dirty, config)
        assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_read_exactly(dtype, no_worse):
    tensors, config = draw(50, dtype), CONFIGS["everything"]
    floats = [x.float() for x in tensors]
    result = launch(tensors, config)
    expected = launch(floats, config)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_inputs_not_given_are_not_measured():
    lp, _, old, advantages, weights, _, _ = draw(40)
    tensors = (lp, None, old, advantages, weights, None, None)
    result = launch(tensors, PPOLossConfig())
    expected = ppo_loss_torch(*tensors, None, *config_arguments(PPOLossConfig()))
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-6, atol=2e-6)
    assert int(result[3].isnan().sum()) == 5


def test_strided_inputs():
    tensors, config = draw(40), CONFIGS["everything"]
    strided = [torch.stack([x, x + 1], dim=1)[:, 0] for x in tensors]
    expected = launch(tensors, config)
    result = launch(strided, config)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 2, 3, 5, 6])
def test_a_valid_token_that_is_not_finite_shows_as_in_torch(bad, which):
    tensors, config = draw(40), CONFIGS["everything"]
    tensors[which][int(tensors[4].nonzero()[3])] = bad
    result = launch(tensors, config)
    expected = ppo_loss_torch(*tensors, None, *config_arguments(config))
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("n", [0, 40])
def test_nothing_valid(n):
    tensors = [torch.full_like(x, torch.nan) for x in draw(n)]
    tensors[4] = torch.zeros(n)
    config = CONFIGS["everything"]
    loss, g, h, metrics = ppo_loss_triton(*tensors, None, *config_arguments(config))
    assert float(loss) == 0.0
    assert torch.equal(g, torch.zeros(n))
    assert torch.equal(h, torch.zeros(n))
    assert torch.equal(metrics, torch.zeros(19))


def test_sequence_ratios_and_float64_run_in_torch():
    tensors = draw(40)
    for x, config in (
        (tensors, PPOLossConfig(ratio_level="sequence")),
        ([t.double() for t in tensors], CONFIGS["everything"]),
    ):
        arguments = (*x, torch.tensor([0, 15, 40]), *config_arguments(config))
        for a, b in zip(ppo_loss_triton(*arguments), ppo_loss_torch(*arguments), strict=True):
            assert torch.equal(a, b)
