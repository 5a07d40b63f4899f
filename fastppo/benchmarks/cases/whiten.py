"""Whitening of advantages over the tokens that count."""

from __future__ import annotations

import torch

from fastppo import ops
from fastppo.benchmarks.registry import Call, Case, Count, Inputs, Outputs, Provider, Size


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    n = size["N"]
    x = 3.0 + torch.randn(n, generator=rng, device=device)
    return {"advantages": x, "mask": torch.rand(n, generator=rng, device=device) < 0.8}


def fastppo(x: Inputs, size: Size) -> Call:
    return lambda: {"whitened": ops.whiten(x["advantages"], x["mask"])}


def masked_whiten(x: Inputs, size: Size) -> Call:
    """TRL's and verl's: a mask that multiplies, Bessel's correction afterwards."""
    values, mask = x["advantages"], x["mask"].to(x["advantages"].dtype)

    def call() -> Outputs:
        count = mask.sum()
        mean = (values * mask).sum() / count
        variance = ((values - mean).square() * mask).sum() / count * (count / (count - 1))
        return {"whitened": (values - mean) * torch.rsqrt(variance + 1e-8)}

    return call


CASES = (
    Case(
        name="whiten",
        sizes={
            "smoke": [Size(N=1000)],
            "cpu": [Size(N=65_536), Size(N=1_048_576)],
            "gpu": [Size(N=65_536), Size(N=1_048_576)],
        },
        inputs=inputs,
        reference=lambda x, size: masked_whiten(x, size)(),
        providers={
            "fastppo": Provider(prepare=fastppo),
            "masked_whiten": Provider(prepare=masked_whiten, note="of TRL and verl"),
        },
        baseline="masked_whiten",
        # x and the mask are read once, in the best case; the result is written
        bytes=Count("9·N: x, mask read, result written, fp32", lambda s: 9 * s["N"]),
        flops=Count("6·N", lambda s: 6 * s["N"]),
        launch_bound=True,
        counted=lambda outputs, x: {"whitened": outputs["whitened"][x["mask"]]},
    ),
)
