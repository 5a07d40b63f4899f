"""GRPO's advantages: B completions in groups of G, interleaved as a sampler returns them."""

from __future__ import annotations

from collections import defaultdict

import torch

from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.profiling.case import Call, Inputs, Outputs, Size
from fastppo.profiling.op_cases import CASES

EPS = 1e-4


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


CASE = CASES["group_advantages"]
BENCHMARKS = (
    Benchmark.of(
        CASE,
        reference=lambda x, size: verl_loop(x, size)(),
        providers={
            "fastppo": Provider(prepare=CASE.prepare, note="any group sizes, in any order"),
            "verl loop": Provider(prepare=verl_loop, note="any group sizes, in any order"),
            "TRL reshape": Provider(prepare=trl_reshape, note="equal groups only, known order"),
        },
        baseline="verl loop",
    ),
)
