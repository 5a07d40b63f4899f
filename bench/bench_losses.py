"""ppo_loss, value_loss and their metrics on a CPU: forward, backward, one step's worth.

    python -m pytest bench/bench_losses.py --benchmark-sort=mean

Baselines: the references, which pick the valid tokens out (a graph break for the compiler) and are
differentiated by autograd, eager and under torch.compile (inductor). All of them return loss,
gradients and the whole vector of metrics, and are compared with each other.

Bytes per token, float32: ppo reads logprob, old, advantage, weight, ref, entropy (24), writes two
gradients (8); value reads v, v_old, R, w (16), writes one (4).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastppo import ops

TOKENS = (4096, 65_536)
CONFIG = ops.PPOLossConfig(kl_coef=0.05, ent_coef=0.01)

torch.set_num_threads(1)


def dense_ppo_reference(lp: Tensor, entropy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    old, advantages, weights, ref = rest
    options = {"entropy": entropy, "ref_logprobs": ref}
    return ops.ppo_loss_reference(lp, old, advantages, weights, CONFIG, **options)


def fused_ppo(lp: Tensor, entropy: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    old, advantages, weights, ref = rest
    options = {"entropy": entropy, "ref_logprobs": ref}
    return ops.ppo_loss(lp, old, advantages, weights, CONFIG, **options)


def value_reference(values: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return ops.value_loss_reference(values, *rest, clip=0.2)


def fused_value(values: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    return ops.value_loss(values, *rest, clip=0.2)


def differentiated(loss: Callable[..., tuple[Tensor, Tensor]], num_inputs: int):
    def run(*tensors: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        out = loss(*tensors)
        return out[0].detach(), out[1], torch.autograd.grad(out[0], tensors[:num_inputs])

    return run


CASES = {
    "ppo": (dense_ppo_reference, fused_ppo, 2, 6, 32),
    "value": (value_reference, fused_value, 1, 4, 20),
}


def inputs(count: int, num_inputs: int, n: int, name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = list(0.3 * torch.randn(count, n, generator=generator))
    weights = 3 if name == "value" else 4  # position among the arguments
    tensors[weights] = (tensors[weights] < 0.3).float() / n
    for x in tensors[:num_inputs]:
        x.requires_grad_()
    return tensors


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("form", ["reference", "compiled reference", "fastppo"])
@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("name", CASES)
def test_loss(benchmark, name: str, n: int, form: str) -> None:
    reference, fused, num_inputs, count, bytes_per_token = CASES[name]
    tensors = inputs(count, num_inputs, n, name)
    loss = fused if form == "fastppo" else reference
    if form == "compiled reference":
        loss = torch.compile(loss, dynamic=False)
    benchmark.group = f"{name} loss, {n} tokens"
    benchmark.extra_info["bytes"] = n * bytes_per_token
    benchmark.extra_info["torch"] = torch.__version__
    run = differentiated(loss, num_inputs)
    result = benchmark.pedantic(run, tensors, rounds=20, iterations=1, warmup_rounds=3)
    expected = differentiated(reference, num_inputs)(*tensors)
    torch.testing.assert_close(result[0], expected[0])
    for x, y in zip(result[2], expected[2], strict=True):
        torch.testing.assert_close(x, y)
