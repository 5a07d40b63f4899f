"""GRPO's advantages: B completions in groups of G, interleaved as a sampler returns them."""

from __future__ import annotations

from collections import defaultdict

import torch

from fastppo import ops
from fastppo.benchmarks.registry import Call, Case, Count, Inputs, Outputs, Provider, Size

EPS = 1e-4


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    b = size["B"]
    return {
        "scores": torch.randn(b, generator=rng, device=device),
        "groups": torch.arange(b, device=device) % (b // size["G"]),
    }


def fastppo(x: Inputs, size: Size) -> Call:
    return lambda: {"advantages": ops.group_advantages(x["scores"], x["groups"], kind="grpo")}


def verl_loop(x: Inputs, size: Size) -> Call:
    """verl core_algos.compute_grpo_outcome_advantage: groups of any size, in a dictionary."""
    scores, groups = x["scores"], x["groups"].tolist()

    def call() -> Outputs:
        members = defaultdict(list)
        for i, group in enumerate(groups):
            members[group].append(scores[i])
        mean, std = {}, {}
        for group, values in members.items():
            stacked = torch.stack(values)
            mean[group], std[group] = stacked.mean(), stacked.std()
        out = [(scores[i] - mean[g]) / (std[g] + EPS) for i, g in enumerate(groups)]
        return {"advantages": torch.stack(out)}

    return call


def trl_reshape(x: Inputs, size: Size) -> Call:
    """TRL's GRPOTrainer: equal groups, whose members lie side by side."""
    scores, g = x["scores"], size["G"]

    def call() -> Outputs:
        rows = scores.view(g, -1)  # interleaved: a group is a column
        return {"advantages": ((rows - rows.mean(0)) / (rows.std(0) + EPS)).view(-1)}

    return call


CASES = (
    Case(
        name="group_advantages",
        sizes={
            "smoke": [Size(B=32, G=4)],
            "cpu": [Size(B=512, G=8), Size(B=4096, G=8)],
            "gpu": [Size(B=4096, G=8)],
        },
        inputs=inputs,
        reference=lambda x, size: verl_loop(x, size)(),
        providers={
            "fastppo": Provider(prepare=fastppo, note="any group sizes, in any order"),
            "verl loop": Provider(prepare=verl_loop, note="any group sizes, in any order"),
            "TRL reshape": Provider(prepare=trl_reshape, note="equal groups only, known order"),
        },
        baseline="verl loop",
        # score (4) and id (8) read, advantage (4) written
        bytes=Count("16·B: score, id read, advantage written", lambda s: 16 * s["B"]),
        flops=Count("6·B", lambda s: 6 * s["B"]),
    ),
)
