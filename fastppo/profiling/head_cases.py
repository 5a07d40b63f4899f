"""The cases of the language-model head, from logits and from hidden states.

Letters: N rows (tokens) in B sequences of equal length, H hidden, V vocabulary. Targets are int64,
results and gradients of rows float32, matrices and their gradients of the size's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.profiling.case import Call, Case, Inputs, Size
from fastppo.profiling.work import WORK

CLIP = 0.2
CONFIG = ops.PPOLossConfig(clip_coef_low=CLIP, clip_coef_high=CLIP)
LOGIT_STD = 2.5  # an entropy of about 7.7 nats at V = 50,000, log-probabilities down to −20


def head_inputs(size: Size, device: torch.device, seed: int) -> dict[str, Tensor]:
    """hidden (N, H) and weight (V, H), such that logits have the spread of a model's, and targets.

    The entries of hidden are of size 1, as after a norm.
    """
    n, h, v = size["N"], size["H"], size["V"]
    rng = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(n, h, generator=rng, device=device)
    weight = torch.randn(v, h, generator=rng, device=device).mul_(LOGIT_STD / h**0.5)
    return {
        "hidden": hidden.to(size.dtype),
        "weight": weight.to(size.dtype),
        "targets": torch.randint(v, (n,), generator=rng, device=device),
    }


def token_logprobs_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    n, v = size["N"], size["V"]
    rng = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(n, v, generator=rng, device=device).mul_(LOGIT_STD).to(size.dtype)
    g, h = torch.randn(2, n, generator=rng, device=device)
    targets = torch.randint(v, (n,), generator=rng, device=device)
    return {"logits": logits, "targets": targets, "g": g, "h": h}


def token_logprobs(x: Inputs, size: Size) -> Call:
    return lambda: ops.token_logprobs(x["logits"], x["targets"])._asdict()


def linear_logprobs_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed + 1)
    g = torch.randn(size["N"], generator=rng, device=device)
    return {**head_inputs(size, device, seed), "g": g}


def linear_logprobs(x: Inputs, size: Size) -> Call:
    return lambda: ops.linear_logprobs(x["hidden"], x["weight"], x["targets"])._asdict()


def linear_ppo_loss_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    """A fifth of the ratios is far outside the clip range, the others are well inside: rounding
    must not decide which rows have a gradient."""
    n, b = size["N"], size["B"]
    x = head_inputs(size, device, seed)
    rng = torch.Generator(device).manual_seed(seed + 1)
    chance, sign, small = torch.rand(3, n, generator=rng, device=device)
    log_ratio = torch.where(chance < 0.2, (sign - 0.5).sign() * 0.5, 0.16 * (small - 0.5))
    with torch.no_grad():
        hidden, weight = x["hidden"].float(), x["weight"].float()
        new = ops.linear_logprobs(hidden, weight, x["targets"]).logprobs
    per_sequence = torch.randn(b, generator=rng, device=device)
    return {
        **x,
        "old_logprobs": new - log_ratio,
        "advantages": per_sequence[torch.arange(n, device=device) * b // n],
        "per_sequence": per_sequence,
        "weights": torch.full((n,), 1 / n, device=device),
    }


def linear_ppo_loss(x: Inputs, size: Size, **options: Any) -> Call:
    names = ("hidden", "weight", "targets", "old_logprobs", "advantages", "weights")
    inputs: dict[str, Any] = {name: x[name] for name in names}
    inputs |= {"num_live": size["N"], **options}
    return lambda: ops.linear_ppo_loss(**inputs, config=CONFIG)._asdict()


CASES = (
    Case(
        name="token_logprobs",
        sizes={
            "smoke": [Size(N=48, V=1000), Size(torch.bfloat16, N=48, V=1000)],
            "cpu": [Size(N=1024, V=49152)],
            "gpu": [Size(torch.bfloat16, N=8192, V=151936)],
        },
        inputs=token_logprobs_inputs,
        prepare=token_logprobs,
        leaves=("logits",),
        upstream={"logprobs": "g", "entropy": "h"},
        work=WORK["token_logprobs"],
    ),
    Case(
        name="linear_logprobs",
        sizes={
            "smoke": [Size(N=48, H=32, V=1000), Size(torch.bfloat16, N=48, H=32, V=1000)],
            "cpu": [Size(N=2048, H=576, V=49152)],
            "gpu": [Size(torch.bfloat16, N=8192, H=4096, V=131072)],
        },
        inputs=linear_logprobs_inputs,
        prepare=linear_logprobs,
        leaves=("hidden", "weight"),
        upstream={"logprobs": "g"},
        work=WORK["linear_logprobs"],
    ),
    Case(
        name="linear_ppo_loss",
        sizes={
            "smoke": [
                Size(N=48, B=4, H=32, V=1000),
                Size(torch.bfloat16, N=48, B=4, H=32, V=1000),
            ],
            "cpu": [Size(N=2048, B=4, H=576, V=49152)],
            "gpu": [
                Size(torch.bfloat16, N=8192, B=8, H=4096, V=131072),
                Size(torch.bfloat16, N=16384, B=16, H=896, V=151936),
            ],
        },
        inputs=linear_ppo_loss_inputs,
        prepare=linear_ppo_loss,
        leaves=("hidden", "weight"),
        work=WORK["linear_ppo_loss"],
    ),
)
