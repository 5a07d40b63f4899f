"""Whitening of advantages over the tokens that count."""

from __future__ import annotations

import torch

from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.profiling.case import Call, Inputs, Outputs, Size
from fastppo.profiling.op_cases import CASES


def masked_whiten(x: Inputs, size: Size) -> Call:
    """TRL's and verl's: a mask that multiplies, Bessel's correction afterwards."""
    values, mask = x["advantages"], x["mask"].to(x["advantages"].dtype)

    def call() -> Outputs:
        count = mask.sum()
        mean = (values * mask).sum() / count
        variance = ((values - mean).square() * mask).sum() / count * (count / (count - 1))
        return {"whitened": (values - mean) * torch.rsqrt(variance + 1e-8)}

    return call


CASE = CASES["whiten"]
BENCHMARKS = (
    Benchmark.of(
        CASE,
        reference=lambda x, size: masked_whiten(x, size)(),
        providers={
            "fastppo": Provider(prepare=CASE.prepare),
            "masked_whiten": Provider(prepare=masked_whiten, note="of TRL and verl"),
        },
        baseline="masked_whiten",
        launch_bound=True,
        counted=lambda outputs, x: {"whitened": outputs["whitened"][x["mask"]]},
    ),
)
