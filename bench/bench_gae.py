"""GAE on a CPU: the packed scan against the loops and vectorised forms of other trainers.

    python -m pytest bench/bench_gae.py --benchmark-sort=mean

Each baseline is written from its project's formula, in its layout, on sequences of equal length: no
padding, which favours them. `fastppo` reads the same numbers packed. Where a baseline takes a mask
(verl, OpenRLHF), so does fastppo's twin in the group. Answers are compared before timing.

Bytes: r, V read and A, R written in float32 = 16 a token, the mask 1 more; the floor is those bytes
over the rate of a copy (timed in the same run, as `copy`).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastppo import ops

GAMMA, LAMBDA = 0.99, 0.95
SHAPES = {  # (sequences, tokens in each)
    "64x4096": (64, 4096),
    "1M in 64": (64, 16384),
    "1M in 4096": (4096, 256),
    "1M in 65536": (65536, 16),
}

torch.set_num_threads(1)


def trl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """trl 1.12 experimental/ppo: no mask inside the loop."""
    lastgaelam: float | Tensor = 0
    advantages_reversed = []
    gen_length = rewards.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * nextvalues - values[:, t]
        lastgaelam = delta + GAMMA * LAMBDA * lastgaelam
        advantages_reversed.append(lastgaelam)
    advantages = torch.stack(advantages_reversed[::-1], dim=1)
    _ = advantages + values  # returns
    return advantages


def verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """verl core_algos.compute_gae_advantage_return: masked tokens carry the state."""
    nextvalues: float | Tensor = 0
    lastgaelam: float | Tensor = 0
    advantages_reversed = []
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[:, t] + GAMMA * nextvalues - values[:, t]
        lastgaelam_ = delta + GAMMA * LAMBDA * lastgaelam
        nextvalues = values[:, t] * mask[:, t] + (1 - mask[:, t]) * nextvalues
        lastgaelam = lastgaelam_ * mask[:, t] + (1 - mask[:, t]) * lastgaelam
        advantages_reversed.append(lastgaelam)
    advantages = torch.stack(advantages_reversed[::-1], dim=1)
    _ = advantages + values
    return advantages


def openrlhf_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """OpenRLHF get_advantages_and_returns: values and rewards zeroed, then the plain loop."""
    return trl_loop(mask * rewards, mask * values, mask)


def deltas(rewards: Tensor, values: Tensor) -> Tensor:
    following = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], dim=1)
    return rewards + GAMMA * following - values


def torchrl_convolution(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """torchrl _fast_vec_gae: δ convolved with powers of γλ, cut where they fall below 1e-7."""
    delta = deltas(rewards, values)
    decay = GAMMA * LAMBDA
    taps = min(delta.shape[1], math.ceil(math.log(1e-7) / math.log(decay)))
    powers = decay ** torch.arange(taps, dtype=delta.dtype)
    padded = torch.nn.functional.pad(delta, (0, taps - 1))
    advantages = torch.nn.functional.conv1d(padded[:, None], powers[None, None])[:, 0]
    _ = advantages + values
    return advantages


def scipy_lfilter(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The recurrence as an IIR filter over reversed time."""
    signal = pytest.importorskip("scipy.signal")
    delta = deltas(rewards, values).numpy()[:, ::-1]
    filtered = signal.lfilter([1.0], [1.0, -GAMMA * LAMBDA], delta, axis=1)
    advantages = torch.from_numpy(filtered[:, ::-1].copy())
    _ = advantages + values
    return advantages


def packed(rewards: Tensor, values: Tensor, mask: Tensor | None, mode: str) -> Tensor:
    cu_seqlens = torch.arange(rewards.shape[0] + 1, dtype=torch.int32) * rewards.shape[1]
    flat = None if mask is None else mask.view(-1)
    options = {"gamma": GAMMA, "gae_lambda": LAMBDA, "mask": flat, "mask_mode": mode}
    return ops.gae(rewards.view(-1), values.view(-1), cu_seqlens, **options).advantages


BASELINES = {
    "TRL loop": (trl_loop, None),
    "torchrl convolution": (torchrl_convolution, None),
    "scipy lfilter": (scipy_lfilter, None),
    "verl loop": (verl_loop, "carry"),
    "OpenRLHF loop": (openrlhf_loop, "dense-zero"),
}
OURS = {f"fastppo {mode or 'no mask'}": mode for mode in (None, "carry", "dense-zero")}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, *request.param, generator=generator)
    return rewards, values, torch.rand(request.param, generator=generator) < 0.8


def describe(benchmark, rewards: Tensor, mode: str | None) -> None:
    benchmark.group = f"{rewards.shape[0]} × {rewards.shape[1]}"
    # r + V + A + R in float32, the mask one byte
    benchmark.extra_info["bytes"] = rewards.numel() * (16 + (mode is not None))
    benchmark.extra_info["torch"] = torch.__version__


@pytest.mark.parametrize("name", BASELINES)
def test_baseline(benchmark, batch, name: str) -> None:
    baseline, mode = BASELINES[name]
    rewards, values, mask = batch
    describe(benchmark, rewards, mode)
    floats = mask.float()  # the dtype of the projects' masks
    result = benchmark.pedantic(baseline, (rewards, values, floats), rounds=3, warmup_rounds=1)
    expected = packed(rewards, values, mask if mode else None, mode or "none").view_as(rewards)
    keep = mask if mode else torch.ones_like(mask)
    torch.testing.assert_close(result[keep].float(), expected[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_fastppo(benchmark, batch, name: str) -> None:
    mode = OURS[name]
    rewards, values, mask = batch
    describe(benchmark, rewards, mode)
    arguments = (rewards, values, mask if mode else None, mode or "none")
    result = benchmark.pedantic(packed, arguments, rounds=20, warmup_rounds=3)
    assert result.isfinite().all()


def test_copy(benchmark, batch) -> None:
    rewards, values, _ = batch
    describe(benchmark, rewards, None)
    out = torch.empty(2, *rewards.shape)
    result = benchmark.pedantic(
        lambda: torch.stack((rewards, values), out=out), rounds=20, warmup_rounds=3
    )
    assert torch.equal(result[0], rewards)
