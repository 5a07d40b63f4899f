"""How the head and its loss grow with the vocabulary V, forward and backward.

`torch` keeps the (N, V) logits for the backward pass, and their softmax; fastppo never has more
than a chunk of them. Both compute loss and gradients; fastppo computes metrics and entropy besides.
"""

from __future__ import annotations

import torch

from fastppo import ops
from fastppo.benchmarks.registry import Case, Count, Inputs, Outputs, Provider, Size
from fastppo.benchmarks.registry import forward_backward as with_gradients

CONFIG = ops.PPOLossConfig()
LEAVES = ("hidden", "weight")


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    n, h, v = size["N"], size["H"], size["V"]
    per_token = torch.randn(2, n, generator=rng, device=device)
    hidden = torch.randn(n, h, generator=rng, device=device).to(size.dtype)
    weight = (0.02 * torch.randn(v, h, generator=rng, device=device)).to(size.dtype)
    return {
        "hidden": hidden,
        "weight": weight,
        "targets": torch.randint(v, (n,), generator=rng, device=device),
        "old": 0.2 * per_token[0] - torch.log(torch.tensor(float(v))).item(),
        "advantages": per_token[1],
        "weights": torch.full((n,), 1 / n, device=device),
    }


def fused(x: Inputs, size: Size) -> Outputs:
    rows = (x["targets"], x["old"], x["advantages"], x["weights"])
    live = size["N"]
    return {
        "loss": ops.linear_ppo_loss(x["hidden"], x["weight"], *rows, CONFIG, num_live=live).loss
    }


def plain(x: Inputs, size: Size) -> Outputs:
    logits = (x["hidden"] @ x["weight"].T).to(x["old"].dtype)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, x["targets"][:, None])[:, 0]
    ratio, a = (logprobs - x["old"]).exp(), x["advantages"]
    pg = torch.maximum(-a * ratio, -a * ratio.clamp(0.8, 1.2))
    return {"loss": (x["weights"] * pg).sum()}


CASES = (
    Case(
        name="head_by_vocabulary",
        axis="V",
        sizes={
            "smoke": [Size(N=64, H=64, V=v) for v in (256, 1024)],
            "cpu": [Size(N=512, H=576, V=v) for v in (8192, 32_768, 131_072)],
            "gpu": [
                Size(torch.bfloat16, N=8192, H=2048, V=v) for v in (16_384, 32_768, 65_536, 131_072)
            ],
        },
        inputs=inputs,
        reference=lambda x, size: with_gradients(plain, LEAVES)(x, size)(),
        providers={
            "fastppo": Provider(prepare=with_gradients(fused, LEAVES)),
            "torch": Provider(prepare=with_gradients(plain, LEAVES)),
        },
        baseline="torch",
        # hidden and weight read, their gradients written, in the matrices' dtype
        bytes=Count(
            "2·(N + V)·H·item: hidden, weight read, gradients written",
            lambda s: 2 * (s["N"] + s["V"]) * s["H"] * s.dtype.itemsize,
        ),
        flops=Count("6·N·H·V: logits, dX, dW", lambda s: 6 * s["N"] * s["H"] * s["V"]),
    ),
)
