"""Log-probability and entropy of each token from logits: forward, and with gradients.

TRL's kernel does the same in both. flash-attn and Liger give log-probabilities only, and Liger's
kernel has no backward pass; both are in the forward case alone, where entropy costs no byte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.head import LOGIT_STD, Prepare, by_parts, compiled, logprobs_of
from fastppo.benchmarks.peers import flash_attn, liger, trl
from fastppo.benchmarks.registry import (
    Call,
    Case,
    Count,
    Inputs,
    Outputs,
    Provider,
    Size,
    forward_backward,
)

SIZES = {
    "smoke": [Size(N=48, V=1000), Size(torch.bfloat16, N=48, V=1000)],
    "cpu": [Size(N=1024, V=49152)],
    "gpu": [Size(torch.bfloat16, N=8192, V=151936)],
}
Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits (N, V), targets → (N,), (N,)
UPSTREAM = {"logprobs": "g", "entropy": "h"}


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    n, v = size["N"], size["V"]
    rng = torch.Generator(device).manual_seed(seed)
    logits = torch.randn(n, v, generator=rng, device=device).mul_(LOGIT_STD).to(size.dtype)
    g, h = torch.randn(2, n, generator=rng, device=device)
    targets = torch.randint(v, (n,), generator=rng, device=device)
    return {"logits": logits, "targets": targets, "g": g, "h": h}


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`logprobs_of` with a gradient for the entropy too."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def fastppo(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return ops.token_logprobs(logits, targets)


def outputs_of(scorer: Scorer) -> Callable[[Inputs, Size], Outputs]:
    def function(x: Inputs, size: Size) -> Outputs:
        logprobs, entropy = scorer(x["logits"], x["targets"])
        return {"logprobs": logprobs, "entropy": entropy}

    return function


def forward(scorer: Scorer) -> Prepare:
    def prepare(x: Inputs, size: Size) -> Call:
        return torch.no_grad()(lambda: outputs_of(scorer)(x, size))

    return prepare


def flash_forward(x: Inputs, size: Size) -> Call:
    return torch.no_grad()(lambda: {"logprobs": flash_attn.logprobs(x["logits"], x["targets"])})


def liger_forward(x: Inputs, size: Size) -> Call:
    logits = liger.with_last_row(x["logits"], 1)  # a copy, made once
    return torch.no_grad()(lambda: {"logprobs": liger.triton_logprobs(logits, x["targets"])})


def forward_and_backward(scorer: Scorer) -> Prepare:
    return forward_backward(outputs_of(scorer), ("logits",), UPSTREAM)


def reference(x: Inputs, size: Size) -> Outputs:
    return by_parts(
        lambda part: outputs_of(eager)(part, size), x, size["V"], per_row=("logits", "targets")
    )


def reference_with_gradient(x: Inputs, size: Size) -> Outputs:
    return by_parts(
        lambda part: outputs_of(eager)(part, size),
        x,
        size["V"],
        per_row=("logits", "targets", "g", "h"),
        leaves=("logits",),
        upstream=lambda out, x: (out["logprobs"] * x["g"] + out["entropy"] * x["h"]).sum(),
    )


def providers(prepare: Callable[[Scorer], Prepare], plain: Scorer) -> dict[str, Provider]:
    """Those that do the same in both cases."""
    return {
        "fastppo": Provider(prepare=prepare(fastppo)),
        "torch": Provider(prepare=prepare(plain)),
        "torch.compile": Provider(prepare=compiled(prepare, plain)),
        "TRL kernel": Provider(
            prepare=prepare(trl.fused_logprobs), needs=trl.NEEDS, devices=("cuda",)
        ),
        "TRL torch": Provider(
            prepare=prepare(trl.torch_logprobs),
            needs=trl.NEEDS_BACKWARD,
            devices=("cpu",),
            tolerance=1e-2,  # bf16 logits have bf16 log-probabilities, others float32 ones
            note="a loop over rows; log-softmax in the dtype of the logits",
        ),
    }


def itemsize(size: Size) -> int:
    return size.dtype.itemsize


CASES = (
    Case(
        name="token_logprobs_forward",
        sizes=SIZES,
        inputs=inputs,
        reference=reference,
        providers={
            **providers(forward, logprobs_of),
            "flash-attn cross-entropy": Provider(
                prepare=flash_forward,
                needs=flash_attn.NEEDS,
                devices=("cuda",),
                omits={"entropy": "a cross-entropy does not compute it"},
            ),
            "Liger kernel": Provider(
                prepare=liger_forward,
                needs=liger.NEEDS,
                devices=("cuda",),
                omits={"entropy": liger.NO_ENTROPY},
            ),
        },
        baseline="torch",
        # logits and int64 targets read once, two float32 numbers a row written
        bytes=Count(
            "N·V·itemsize + 16·N: the logits read once",
            lambda size: size["N"] * (size["V"] * itemsize(size) + 16),
        ),
        flops=Count("none", lambda size: 0.0),
    ),
    Case(
        name="token_logprobs",
        sizes=SIZES,
        inputs=inputs,
        reference=reference_with_gradient,
        providers=providers(forward_and_backward, eager),
        baseline="torch",
        # forward as above; backward reads the logits and two gradients a row, writes the gradient
        bytes=Count(
            "3·N·V·itemsize + 32·N: the logits read twice, their gradient written",
            lambda size: size["N"] * (3 * size["V"] * itemsize(size) + 32),
        ),
        flops=Count("none", lambda size: 0.0),
    ),
)
