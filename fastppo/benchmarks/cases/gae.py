"""GAE: the packed scan against the loops and vectorised forms of other trainers.

Each peer is written from its project's formula, in its layout, on B sequences of T tokens: equal
length, so no padding, which favours them. fastppo reads the same numbers packed. Masks mean
different things in different projects, so each convention is a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.profiling.case import Call, Inputs, Outputs, Prepare, Size
from fastppo.profiling.op_cases import CASES
from fastppo.profiling.token_cases import GAMMA, LAMBDA

Padded = Callable[[Tensor, Tensor, Tensor], Tensor]  # rewards, values, mask (B, T) → advantages


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """trl 1.12 experimental/ppo: no mask inside the loop."""
    lastgaelam: float | Tensor = 0.0
    advantages_reversed = []
    gen_length = rewards.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * nextvalues - values[:, t]
        lastgaelam = delta + GAMMA * LAMBDA * lastgaelam
        advantages_reversed.append(lastgaelam)
    return torch.stack(advantages_reversed[::-1], dim=1)


def verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """verl core_algos.compute_gae_advantage_return: masked tokens carry the state."""
    nextvalues: float | Tensor = 0.0
    lastgaelam: float | Tensor = 0.0
    advantages_reversed = []
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[:, t] + GAMMA * nextvalues - values[:, t]
        lastgaelam_ = delta + GAMMA * LAMBDA * lastgaelam
        nextvalues = values[:, t] * mask[:, t] + (1 - mask[:, t]) * nextvalues
        lastgaelam = lastgaelam_ * mask[:, t] + (1 - mask[:, t]) * lastgaelam
        advantages_reversed.append(lastgaelam)
    return torch.stack(advantages_reversed[::-1], dim=1)


def openrlhf_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """OpenRLHF get_advantages_and_returns: values and rewards zeroed, then the plain loop."""
    return loop(mask * rewards, mask * values, mask)


def deltas(rewards: Tensor, values: Tensor) -> Tensor:
    following = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], dim=1)
    return rewards + GAMMA * following - values


def torchrl_convolution(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """torchrl _fast_vec_gae: δ convolved with powers of γλ, cut where they fall below 1e-7."""
    delta = deltas(rewards, values)
    decay = GAMMA * LAMBDA
    taps = min(delta.shape[1], math.ceil(math.log(1e-7) / math.log(decay)))
    powers = decay ** torch.arange(taps, dtype=delta.dtype, device=delta.device)
    padded = torch.nn.functional.pad(delta, (0, taps - 1))
    return torch.nn.functional.conv1d(padded[:, None], powers[None, None])[:, 0]


def scipy_lfilter(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The recurrence as an IIR filter over reversed time."""
    from scipy import signal

    delta = deltas(rewards, values).numpy()[:, ::-1]
    filtered = signal.lfilter([1.0], [1.0, -GAMMA * LAMBDA], delta, axis=1)
    return torch.from_numpy(filtered[:, ::-1].copy())


def padded(function: Padded) -> Prepare:
    """A peer: its mask is of the values' dtype, and returns are A + V."""

    def prepare(x: Inputs, size: Size) -> Call:
        rewards, values, mask = x["rewards"], x["values"], x["mask"].to(x["values"].dtype)

        def call() -> Outputs:
            advantages = function(rewards, values, mask)
            return {"advantages": advantages, "returns": advantages + values}

        return call

    return prepare


def valid_tokens(outputs: Outputs, x: Inputs) -> Outputs:
    """Advantages and returns at masked tokens are whatever a project leaves there."""
    return {name: out[x["mask"]] for name, out in outputs.items()}


def reference(function: Padded) -> Callable[[Inputs, Size], Outputs]:
    """A loop over tokens in float64, vectorised over sequences."""
    return lambda x, size: padded(function)(x, size)()


def benchmark(name: str, peers: dict[str, Provider], baseline: Padded) -> Benchmark:
    case = CASES[name]
    return Benchmark.of(
        case,
        reference=reference(baseline),
        providers={"fastppo": Provider(prepare=case.prepare), **peers},
        baseline=next(iter(peers)),
        launch_bound=True,
        counted=None if name == "gae" else valid_tokens,
    )


BENCHMARKS = (
    benchmark(
        "gae",
        {
            "TRL loop": Provider(prepare=padded(loop)),
            "torchrl convolution": Provider(
                prepare=padded(torchrl_convolution), note="cuts powers of γλ below 1e-7"
            ),
            "scipy lfilter": Provider(
                prepare=padded(scipy_lfilter),
                needs=("scipy",),
                devices=("cpu",),
                torch_memory=False,
            ),
        },
        loop,
    ),
    benchmark("gae_carry", {"verl loop": Provider(prepare=padded(verl_loop))}, verl_loop),
    benchmark(
        "gae_dense_zero",
        {"OpenRLHF loop": Provider(prepare=padded(openrlhf_loop))},
        openrlhf_loop,
    ),
)
