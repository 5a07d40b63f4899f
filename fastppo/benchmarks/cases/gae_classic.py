"""GAE of a rectangular (T, E) rollout with episode ends: CleanRL's setting and its loop."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.profiling.case import Call, Inputs, Outputs, Size
from fastppo.profiling.op_cases import CASES
from fastppo.profiling.token_cases import GAMMA, LAMBDA


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


CASE = CASES["gae_classic"]
BENCHMARKS = (
    Benchmark.of(
        CASE,
        reference=lambda x, size: cleanrl_loop(x, size)(),
        providers={
            "fastppo": Provider(prepare=CASE.prepare),
            "CleanRL loop": Provider(prepare=cleanrl_loop),
        },
        baseline="CleanRL loop",
        launch_bound=True,
    ),
)
