"""GAE of a rectangular (T, E) rollout with episode ends: CleanRL's setting and its loop."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.registry import Call, Case, Count, Inputs, Outputs, Provider, Size

GAMMA, LAMBDA = 0.99, 0.95


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    shape = (size["T"], size["E"])
    rewards, values = torch.randn(2, *shape, generator=rng, device=device)
    return {
        "rewards": rewards,
        "values": values,
        "next_value": torch.randn(size["E"], generator=rng, device=device),
        "terminated": torch.rand(shape, generator=rng, device=device) < 0.02,
    }


def fastppo(x: Inputs, size: Size) -> Call:
    def call() -> Outputs:
        found = ops.gae_classic(
            *(x["rewards"], x["values"], x["next_value"], x["terminated"]),
            gamma=GAMMA,
            gae_lambda=LAMBDA,
        )
        return found._asdict()

    return call


def cleanrl_loop(x: Inputs, size: Size) -> Call:
    """CleanRL ppo.py; dones here belong to the step that ended, one later there."""
    rewards, values, last = x["rewards"], x["values"], x["next_value"]
    nonterminal = 1.0 - x["terminated"].to(values.dtype)

    def call() -> Outputs:
        advantages = torch.zeros_like(rewards)
        lastgaelam: Tensor | float = 0.0
        for t in reversed(range(rewards.shape[0])):
            nextvalues = last if t == rewards.shape[0] - 1 else values[t + 1]
            delta = rewards[t] + GAMMA * nextvalues * nonterminal[t] - values[t]
            lastgaelam = delta + GAMMA * LAMBDA * nonterminal[t] * lastgaelam
            advantages[t] = lastgaelam
        return {"advantages": advantages, "returns": advantages + values}

    return call


CASES = (
    Case(
        name="gae_classic",
        sizes={
            "smoke": [Size(T=32, E=4)],
            "cpu": [Size(T=128, E=8), Size(T=128, E=4096)],
            "gpu": [Size(T=128, E=4096), Size(T=2048, E=512)],
        },
        inputs=inputs,
        reference=lambda x, size: cleanrl_loop(x, size)(),
        providers={
            "fastppo": Provider(prepare=fastppo),
            "CleanRL loop": Provider(prepare=cleanrl_loop),
        },
        baseline="CleanRL loop",
        # r, V read and A, R written in float32; the end of an episode is one byte
        bytes=Count("17·T·E: r, V, end read, A, R written, fp32", lambda s: 17 * s["T"] * s["E"]),
        flops=Count("8·T·E", lambda s: 8 * s["T"] * s["E"]),
        launch_bound=True,
    ),
)
