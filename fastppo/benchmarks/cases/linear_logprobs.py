"""Log-probability and entropy of each token from hidden states: forward, and with gradients.

The forward case is what scores a rollout. With gradients only the log-probabilities are
differentiated: entropy is reported, as in a PPO loss without an entropy bonus, so that Liger, which
has no entropy, does the same products as the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.head import Prepare, by_parts, compiled, head_inputs, linear_logprobs_of
from fastppo.benchmarks.peers import liger, trl, verl
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

Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
LEAVES = ("hidden", "weight")
SMOKE = [Size(N=48, H=32, V=1000), Size(torch.bfloat16, N=48, H=32, V=1000)]


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed + 1)
    g = torch.randn(size["N"], generator=rng, device=device)
    return {**head_inputs(size, device, seed), "g": g}


def fastppo(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return ops.linear_logprobs(hidden, weight, targets)


def liger_scorer(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    return liger.chunked_logprobs(hidden, weight, targets), None


def outputs_of(scorer: Scorer) -> Callable[[Inputs, Size], Outputs]:
    def function(x: Inputs, size: Size) -> Outputs:
        logprobs, entropy = scorer(x["hidden"], x["weight"], x["targets"])
        return {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})

    return function


def forward(scorer: Scorer) -> Prepare:
    def prepare(x: Inputs, size: Size) -> Call:
        return torch.no_grad()(lambda: outputs_of(scorer)(x, size))

    return prepare


def forward_and_backward(scorer: Scorer) -> Prepare:
    return forward_backward(outputs_of(scorer), LEAVES, {"logprobs": "g"})


def reference(x: Inputs, size: Size) -> Outputs:
    return by_parts(
        lambda part: outputs_of(linear_logprobs_of)(part, size),
        x,
        size["V"],
        per_row=("hidden", "targets"),
    )


def reference_with_gradients(x: Inputs, size: Size) -> Outputs:
    return by_parts(
        lambda part: outputs_of(linear_logprobs_of)(part, size),
        x,
        size["V"],
        per_row=("hidden", "targets", "g"),
        leaves=LEAVES,
        upstream=lambda out, x: (out["logprobs"] * x["g"]).sum(),
    )


def providers(
    prepare: Callable[[Scorer], Prepare], trl_needs: tuple[str, ...]
) -> dict[str, Provider]:
    return {
        "fastppo": Provider(prepare=prepare(fastppo)),
        "torch": Provider(prepare=prepare(linear_logprobs_of)),
        "torch.compile": Provider(prepare=compiled(prepare, linear_logprobs_of)),
        "TRL chunked": Provider(prepare=prepare(trl.chunked_logprobs), needs=trl_needs),
        "TRL kernel": Provider(
            prepare=prepare(trl.fused_linear_logprobs), needs=trl.NEEDS, devices=("cuda",)
        ),
        "Liger chunked": Provider(
            prepare=prepare(liger_scorer),
            needs=liger.NEEDS,
            omits={"entropy": liger.NO_ENTROPY},
        ),
        "verl chunked": Provider(
            prepare=prepare(verl.chunked_logprobs),
            needs=verl.NEEDS,
            note="512 rows at a time; sums dW and returns entropy in the dtype of the weight",
        ),
    }


def matrix_bytes(size: Size) -> int:
    """One read of hidden and weight."""
    return (size["N"] + size["V"]) * size["H"] * size.dtype.itemsize


CASES = (
    Case(
        name="linear_logprobs_forward",
        sizes={
            "smoke": SMOKE,
            "cpu": [Size(N=2048, H=576, V=49152)],
            "gpu": [Size(torch.bfloat16, N=8192, H=4096, V=131072)],
        },
        inputs=inputs,
        reference=reference,
        providers=providers(forward, trl.NEEDS),
        baseline="torch",
        # logits need not be in memory; int64 targets read, two float32 numbers a row written
        bytes=Count(
            "(N + V)·H·itemsize + 16·N: hidden and weight read once",
            lambda size: matrix_bytes(size) + 16 * size["N"],
        ),
        flops=Count("2·N·H·V", lambda size: 2 * size["N"] * size["H"] * size["V"]),
    ),
    Case(
        name="linear_logprobs",
        sizes={
            "smoke": SMOKE,
            "cpu": [Size(N=2048, H=576, V=49152)],
            "gpu": [Size(torch.bfloat16, N=8192, H=4096, V=131072)],
        },
        inputs=inputs,
        reference=reference_with_gradients,
        providers=providers(forward_and_backward, trl.NEEDS_BACKWARD),
        baseline="torch",
        # both matrices read, both gradients written
        bytes=Count(
            "2·(N + V)·H·itemsize + 20·N",
            lambda size: 2 * matrix_bytes(size) + 20 * size["N"],
        ),
        # the useful ones: logits, dX, dW. Who makes the logits again does 8·N·H·V
        flops=Count("6·N·H·V", lambda size: 6 * size["N"] * size["H"] * size["V"]),
    ),
)
