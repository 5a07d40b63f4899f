"""The critic's clipped squared error, forward and backward, with its metrics.

Providers as in ppo_loss.py: `torch` does all that fastppo does, the others the loss alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.registry import Benchmark, Provider, each_call, forward_backward
from fastppo.profiling.case import Inputs, Outputs, Prepare, Size
from fastppo.profiling.op_cases import CASES
from fastppo.profiling.token_cases import CLIP, VALUE_INPUTS

CASE = CASES["value_loss"]
LOSS_ONLY = {"metrics": "loss and gradient only"}


def plain(x: Inputs, size: Size) -> Outputs:
    values, old, returns, weights = (x[name] for name in VALUE_INPUTS)
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
    return {"loss": dense(*(x[name] for name in VALUE_INPUTS))}


def compiled_loss(x: Inputs, size: Size) -> Outputs:
    return {"loss": compiled_dense()(*(x[name] for name in VALUE_INPUTS))}


def with_gradients(prepare: Prepare) -> Prepare:
    return forward_backward(prepare, CASE.leaves)


def loss_only(loss: Callable[[Inputs, Size], Outputs]) -> Provider:
    return Provider(prepare=with_gradients(each_call(loss)), omits=LOSS_ONLY)


BENCHMARKS = (
    Benchmark.of(
        CASE,
        reference=lambda x, size: with_gradients(each_call(plain))(x, size)(),
        providers={
            "fastppo": Provider(prepare=with_gradients(CASE.prepare)),
            "torch": Provider(prepare=with_gradients(each_call(plain))),
            "torch, loss only": loss_only(eager_loss),
            "torch.compile, loss only": loss_only(compiled_loss),
        },
        baseline="torch",
        launch_bound=True,
    ),
)
