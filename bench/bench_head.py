"""The head's ops on a CPU against plain torch: forward and backward, SmolLM2's head.

    python -m pytest bench/bench_head.py --benchmark-sort=mean

N = 512 rows, H = 576, V = 49152, in fp32 and under bf16 autocast. Losses are compared first. Matrix
products: 6·N·H·V flops with the logits kept (plain), 8 with them recomputed (linear_logprobs), 6 in
one sweep (linear_ppo_loss).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo import PPOLossConfig, ops

N, H, V = 512, 576, 49152
CONFIG = PPOLossConfig()


def plain_logprobs(hidden: Tensor, weight: Tensor, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, x["targets"][:, None])[:, 0], entropy


def plain_lp(hidden: Tensor, weight: Tensor, x: dict[str, Tensor]) -> Tensor:
    logprobs, entropy = plain_logprobs(hidden, weight, x)
    return (logprobs * x["advantages"]).mean() + entropy.mean()


def fastppo_lp(hidden: Tensor, weight: Tensor, x: dict[str, Tensor]) -> Tensor:
    logprobs, entropy = ops.linear_logprobs(hidden, weight, x["targets"])
    return (logprobs * x["advantages"]).mean() + entropy.mean()


def plain_ppo(hidden: Tensor, weight: Tensor, x: dict[str, Tensor]) -> Tensor:
    ratio = (plain_logprobs(hidden, weight, x)[0] - x["old"]).exp()
    a = x["advantages"]
    return (x["weights"] * torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))).sum()


def fastppo_ppo(hidden: Tensor, weight: Tensor, x: dict[str, Tensor]) -> Tensor:
    inputs = (x["targets"], x["old"], x["advantages"], x["weights"])
    return ops.linear_ppo_loss(hidden, weight, *inputs, CONFIG).loss


CASES = {"logprobs": (plain_lp, fastppo_lp), "ppo_loss": (plain_ppo, fastppo_ppo)}


@pytest.mark.parametrize("provider", ["plain torch", "fastppo"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_head(benchmark: Any, case: str, precision: str, provider: str) -> None:
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=rng, requires_grad=True)
    weight = (0.05 * torch.randn(V, H, generator=rng)).requires_grad_()
    x = {
        "targets": torch.randint(V, (N,), generator=rng),
        "advantages": torch.randn(N, generator=rng),
        "weights": torch.full((N,), 1 / N),
    }
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        x["old"] = plain_logprobs(hidden, weight, x)[0]

    def run(function: Any) -> Tensor:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss: Tensor = function(hidden, weight, x)
        loss.backward()
        return loss.detach()

    plain, fused = CASES[case]
    torch.testing.assert_close(run(fused), run(plain), rtol=1e-2, atol=1e-3)
    benchmark.group = f"{case}, {precision}"
    benchmark.pedantic(run, (plain if provider == "plain torch" else fused,), rounds=5)
