"""The clipped policy loss from log-probabilities, forward and backward.

fastppo returns loss, both gradients and the vector of metrics. So does the baseline, `torch`, with
autograd over the tokens that count. The others compute the loss alone, on dense tensors, as
trainers write it down; they do less than fastppo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.registry import Benchmark, Provider, each_call, forward_backward
from fastppo.profiling.case import Call, Inputs, Outputs, Prepare, Size
from fastppo.profiling.op_cases import CASES
from fastppo.profiling.token_cases import PPO_CONFIG as CONFIG

CASE = CASES["ppo_loss"]
LOSS_ONLY = {"metrics": "loss and gradients only"}


def fused(x: Inputs, size: Size) -> Call:
    call = CASE.prepare(x, size)

    def measured() -> Outputs:
        outputs = call()
        return {"loss": outputs["loss"], "metrics": _measured(outputs["metrics"])}

    return measured


def plain(x: Inputs, size: Size) -> Outputs:
    loss, metrics = ops.ppo_loss_reference(
        *(x["logprobs"], x["old"], x["advantages"], x["weights"], CONFIG),
        entropy=x["entropy"],
        ref_logprobs=x["ref"],
    )
    return {"loss": loss, "metrics": _measured(metrics)}


def _measured(metrics: Tensor) -> Tensor:
    """Without the entries that are NaN because no rollout log-probabilities are given."""
    return metrics.nan_to_num(nan=0.0)


def dense(
    lp: Tensor, entropy: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, ref: Tensor
) -> Tensor:
    """Loss () from (N,) each."""
    ratio = torch.exp(lp - old)
    pg = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    gap = ref - lp
    kl = torch.exp(gap) - gap - 1  # k3
    return (weights * (pg + CONFIG.kl_coef * kl - CONFIG.ent_coef * entropy)).sum()


@functools.cache
def compiled_dense() -> Callable[..., Tensor]:
    return torch.compile(dense, dynamic=False)


def eager_loss(x: Inputs, size: Size) -> Outputs:
    return {"loss": dense(*_ordered(x))}


def compiled_loss(x: Inputs, size: Size) -> Outputs:
    return {"loss": compiled_dense()(*_ordered(x))}


def _ordered(x: Inputs) -> list[Tensor]:
    return [x[n] for n in ("logprobs", "entropy", "old", "advantages", "weights", "ref")]


def with_gradients(prepare: Prepare) -> Prepare:
    return forward_backward(prepare, CASE.leaves)


def loss_only(loss: Callable[[Inputs, Size], Outputs]) -> Provider:
    return Provider(prepare=with_gradients(each_call(loss)), omits=LOSS_ONLY)


BENCHMARKS = (
    Benchmark.of(
        CASE,
        reference=lambda x, size: with_gradients(each_call(plain))(x, size)(),
        providers={
            "fastppo": Provider(prepare=with_gradients(fused)),
            "torch": Provider(prepare=with_gradients(each_call(plain))),
            "torch, loss only": loss_only(eager_loss),
            "torch.compile, loss only": loss_only(compiled_loss),
        },
        baseline="torch",
        launch_bound=True,
    ),
)
