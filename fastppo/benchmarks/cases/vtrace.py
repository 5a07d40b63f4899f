"""V-trace: the packed scan against the loop over time of IMPALA's authors, vectorised over
sequences of equal length."""

from __future__ import annotations

import torch

from fastppo import ops
from fastppo.benchmarks.registry import Call, Case, Count, Inputs, Outputs, Provider, Size

GAMMA = 0.99


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    names = ("rewards", "values", "logprobs", "behaviour")
    made = 0.5 * torch.randn(4, size["B"], size["T"], generator=rng, device=device)
    ends = torch.arange(size["B"] + 1, dtype=torch.int32, device=device) * size["T"]
    return dict(zip(names, made, strict=True)) | {"cu_seqlens": ends}


def fastppo(x: Inputs, size: Size) -> Call:
    names = ("rewards", "values", "logprobs", "behaviour")
    r, v, logprobs, behaviour = (x[name].view(-1) for name in names)
    ends, shape = x["cu_seqlens"], (size["B"], size["T"])

    def call() -> Outputs:
        advantages, returns = ops.vtrace(r, v, logprobs, behaviour, ends, gamma=GAMMA)
        return {"advantages": advantages.view(shape), "returns": returns.view(shape)}

    return call


def impala_loop(x: Inputs, size: Size) -> Call:
    """vtrace.py of deepmind/scalable_agent, with both caps 1."""
    rewards, values, logprobs, behaviour = (
        x[name] for name in ("rewards", "values", "logprobs", "behaviour")
    )

    def call() -> Outputs:
        rhos = torch.exp(logprobs - behaviour).clamp(max=1.0)
        zero = values.new_zeros(values.shape[0], 1)
        deltas = rhos * (rewards + GAMMA * torch.cat([values[:, 1:], zero], 1) - values)
        acc, steps = zero[:, 0], []
        for t in reversed(range(values.shape[1])):
            acc = deltas[:, t] + GAMMA * rhos[:, t] * acc
            steps.append(acc)
        targets = torch.stack(steps[::-1], 1) + values
        following = torch.cat([targets[:, 1:], zero], 1)
        return {
            "advantages": rhos * (rewards + GAMMA * following - values),
            "returns": targets,
        }

    return call


CASES = (
    Case(
        name="vtrace",
        sizes={
            "smoke": [Size(B=4, T=64)],
            "cpu": [Size(B=64, T=4096), Size(B=4096, T=256)],
            "gpu": [Size(B=64, T=16384), Size(B=4096, T=256)],
        },
        inputs=inputs,
        reference=lambda x, size: impala_loop(x, size)(),
        providers={
            "fastppo": Provider(prepare=fastppo),
            "IMPALA loop": Provider(prepare=impala_loop),
        },
        baseline="IMPALA loop",
        # r, V, two log-probabilities read and two results written, all float32
        bytes=Count("24·B·T: 4 arrays read, 2 written, fp32", lambda s: 24 * s["B"] * s["T"]),
        flops=Count("14·B·T", lambda s: 14 * s["B"] * s["T"]),
        launch_bound=True,
    ),
)
