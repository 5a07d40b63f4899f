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
from fastppo.benchmarks.registry import Case, Count, Inputs, Outputs, Provider, Size
from fastppo.benchmarks.registry import forward_backward as with_gradients

CONFIG = ops.PPOLossConfig(kl_coef=0.05, ent_coef=0.01)
LEAVES = ("logprobs", "entropy")
LOSS_ONLY = {"metrics": "loss and gradients only"}


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    n = size["N"]
    names = ("logprobs", "entropy", "old", "advantages", "ref")
    made = dict(zip(names, 0.3 * torch.randn(5, n, generator=rng, device=device), strict=True))
    counts = torch.rand(n, generator=rng, device=device) < 0.7
    return made | {"weights": counts.float() / n}


def fused(x: Inputs, size: Size) -> Outputs:
    loss, metrics = ops.ppo_loss(
        *(x["logprobs"], x["old"], x["advantages"], x["weights"], CONFIG),
        entropy=x["entropy"],
        ref_logprobs=x["ref"],
    )
    return {"loss": loss, "metrics": _measured(metrics)}


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


def reference(x: Inputs, size: Size) -> Outputs:
    return with_gradients(plain, LEAVES)(x, size)()


CASES = (
    Case(
        name="ppo_loss",
        sizes={
            "smoke": [Size(N=1000)],
            "cpu": [Size(N=4096), Size(N=65_536)],
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
        # logprob, old, advantage, weight, ref, entropy read; two gradients written; all float32
        bytes=Count("32·N: 6 arrays read, 2 gradients written, fp32", lambda s: 32 * s["N"]),
        # ratio 3, its branches 5, KL 5, sum 4, gradients 8; transcendentals count as one
        flops=Count("25·N", lambda s: 25 * s["N"]),
        launch_bound=True,
    ),
)
