"""The critic's clipped squared error, forward and backward, with its metrics.

Providers as in ppo_loss.py: `torch` does all that fastppo does, the others the loss alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.registry import Case, Count, Inputs, Outputs, Provider, Size
from fastppo.benchmarks.registry import forward_backward as with_gradients

CLIP = 0.2
LEAVES = ("values",)
LOSS_ONLY = {"metrics": "loss and gradient only"}
ORDER = ("values", "old_values", "returns", "weights")


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    n = size["N"]
    made = dict(zip(ORDER, 0.3 * torch.randn(3, n, generator=rng, device=device), strict=False))
    counts = torch.rand(n, generator=rng, device=device) < 0.7
    return made | {"weights": counts.float() / n}


def fused(x: Inputs, size: Size) -> Outputs:
    loss, metrics = ops.value_loss(*(x[name] for name in ORDER), clip=CLIP)
    return {"loss": loss, "metrics": metrics}


def plain(x: Inputs, size: Size) -> Outputs:
    values, old, returns, weights = (x[name] for name in ORDER)
    loss, metrics = ops.value_loss_reference(values, old, returns, weights, clip=CLIP)
    return {"loss": loss, "metrics": metrics}


def dense(values: Tensor, old: Tensor, returns: Tensor, weights: Tensor) -> Tensor:
    """Loss () from (N,) each."""
    clipped = old + (values - old).clamp(-CLIP, CLIP)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (weights * worse).sum()


@functools.cache
def compiled_dense() -> Callable[..., Tensor]:
    return torch.compile(dense, dynamic=False)


def eager_loss(x: Inputs, size: Size) -> Outputs:
    return {"loss": dense(*(x[name] for name in ORDER))}


def compiled_loss(x: Inputs, size: Size) -> Outputs:
    return {"loss": compiled_dense()(*(x[name] for name in ORDER))}


def reference(x: Inputs, size: Size) -> Outputs:
    return with_gradients(plain, LEAVES)(x, size)()


CASES = (
    Case(
        name="value_loss",
        sizes={
            "smoke": [Size(N=1000)],
            "cpu": [Size(N=65_536)],
            "gpu": [Size(N=65_536), Size(N=1_048_576)],
        },
        inputs=inputs,
        reference=reference,
        providers={
            "fastppo": Provider(prepare=with_gradients(fused, LEAVES)),
            "torch": Provider(prepare=with_gradients(plain, LEAVES)),
            "torch, loss only": Provider(
                prepare=with_gradients(eager_loss, LEAVES), omits=LOSS_ONLY
            ),
            "torch.compile, loss only": Provider(
                prepare=with_gradients(compiled_loss, LEAVES), omits=LOSS_ONLY
            ),
        },
        baseline="torch",
        # v, v_old, R, w read; one gradient written; all float32
        bytes=Count("20·N: 4 arrays read, 1 gradient written, fp32", lambda s: 20 * s["N"]),
        # two errors squared 5, clip 3, larger one and sum 4, gradient 3
        flops=Count("15·N", lambda s: 15 * s["N"]),
        launch_bound=True,
    ),
)
