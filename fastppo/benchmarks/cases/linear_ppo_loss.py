"""PPO's clipped loss and its gradients from hidden states and the head's weight.

What all providers can do: clip 0.2 both ways, no KL term, no entropy bonus, one advantage per
sequence (Liger takes no other), the mean over all tokens. Entropy is reported, as trainers do;
Liger has none. fastppo returns its other metrics too, which nobody else computes here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.head import by_parts, head_inputs, linear_logprobs_of, part_slices
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

CLIP = 0.2
CONFIG = ops.PPOLossConfig(clip_coef_low=CLIP, clip_coef_high=CLIP)
Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
LEAVES = ("hidden", "weight")
ROWS = ("hidden", "targets", "old_logprobs", "advantages", "weights")


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    """A fifth of the ratios is far outside the clip range, the others are well inside: rounding
    must not decide which rows have a gradient."""
    n, b = size["N"], size["B"]
    x = head_inputs(size, device, seed)
    rng = torch.Generator(device).manual_seed(seed + 1)
    chance, sign, small = torch.rand(3, n, generator=rng, device=device)
    log_ratio = torch.where(chance < 0.2, (sign - 0.5).sign() * 0.5, 0.16 * (small - 0.5))
    hidden, weight = x["hidden"].float(), x["weight"].float()
    with torch.no_grad():
        new = [
            linear_logprobs_of(hidden[rows], weight, x["targets"][rows])[0]
            for rows in part_slices(n, size["V"])
        ]
    per_sequence = torch.randn(b, generator=rng, device=device)
    return {
        **x,
        "old_logprobs": torch.cat(new) - log_ratio,
        "advantages": per_sequence.repeat_interleave(n // b),
        "per_sequence": per_sequence,
        "weights": torch.full((n,), 1 / n, device=device),
    }


def clipped_loss(logprobs: Tensor, x: Inputs) -> Tensor:
    """Σ w·max(−A·r, −A·clip(r)) over rows (N,)."""
    ratio, advantages = (logprobs - x["old_logprobs"]).exp(), x["advantages"]
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))
    return (x["weights"] * loss).sum()


def loss_of(scorer: Scorer) -> Callable[[Inputs, Size], Outputs]:
    """The loss in torch on someone's log-probabilities; entropy is the mean over tokens."""

    def function(x: Inputs, size: Size) -> Outputs:
        logprobs, entropy = scorer(x["hidden"], x["weight"], x["targets"])
        mean = (entropy.detach() * x["weights"]).sum()
        return {"loss": clipped_loss(logprobs, x), "entropy": mean}

    return function


def fastppo(low_memory: bool) -> Callable[[Inputs, Size], Call]:
    def function(x: Inputs, size: Size) -> Outputs:
        loss, metrics = ops.linear_ppo_loss(
            x["hidden"],
            x["weight"],
            x["targets"],
            x["old_logprobs"],
            x["advantages"],
            x["weights"],
            CONFIG,
            num_live=size["N"],
            low_memory=low_memory,
        )
        return {"loss": loss, "entropy": metrics[ENTROPY] / size["N"]}

    return forward_backward(function, LEAVES)


def compiled(x: Inputs, size: Size) -> Call:
    """The whole loss, compiled for one size."""
    function = torch.compile(loss_of(linear_logprobs_of), dynamic=False)
    return forward_backward(function, LEAVES)(x, size)


def liger_chunked(x: Inputs, size: Size) -> Outputs:
    loss = liger.chunked_ppo_loss(
        x["hidden"], x["weight"], x["targets"], x["old_logprobs"], x["per_sequence"], CLIP
    )
    return {"loss": loss}


def liger_kernel(x: Inputs, size: Size) -> Call:
    """Its layout of B × (T + 1) rows is made beforehand: models make such logits anyway."""

    def function(y: Inputs, size: Size) -> Outputs:
        logits = torch.nn.functional.linear(y["hidden"], y["weight"])
        loss = liger.triton_ppo_loss(
            logits, y["targets"], y["old_logprobs"], y["per_sequence"], CLIP
        )
        return {"loss": loss}

    laid_out = {**x, "hidden": liger.with_last_row(x["hidden"], size["B"])}
    run = forward_backward(function, LEAVES)(laid_out, size)

    def call() -> Outputs:
        outputs = dict(run())
        outputs["grad hidden"] = outputs["grad hidden"][:, :-1].reshape(x["hidden"].shape)
        return outputs

    return call


def reference(x: Inputs, size: Size) -> Outputs:
    return by_parts(
        lambda part: loss_of(linear_logprobs_of)(part, size),
        x,
        size["V"],
        per_row=ROWS,
        leaves=LEAVES,
        upstream=lambda out, x: out["loss"],
    )


def through(scorer: Scorer) -> Callable[[Inputs, Size], Call]:
    return forward_backward(loss_of(scorer), LEAVES)


ENTROPY = ops.PPO_METRIC_NAMES.index("entropy")
NO_ENTROPY = {"entropy": liger.NO_ENTROPY}

CASES = (
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
        inputs=inputs,
        reference=reference,
        providers={
            "fastppo": Provider(prepare=fastppo(low_memory=False)),
            "fastppo low memory": Provider(
                prepare=fastppo(low_memory=True), note="4 matrix passes, over vocabulary tiles"
            ),
            "torch": Provider(prepare=through(linear_logprobs_of)),
            "torch.compile": Provider(prepare=compiled),
            "TRL chunked": Provider(
                prepare=through(trl.chunked_logprobs), needs=trl.NEEDS_BACKWARD
            ),
            "TRL kernel": Provider(
                prepare=through(trl.fused_linear_logprobs), needs=trl.NEEDS, devices=("cuda",)
            ),
            "Liger chunked": Provider(
                prepare=forward_backward(liger_chunked, LEAVES),
                needs=liger.NEEDS,
                omits=NO_ENTROPY,
                note="sums dW over sequences in the dtype of the weight",
            ),
            "Liger kernel": Provider(
                prepare=liger_kernel, needs=liger.NEEDS, devices=("cuda",), omits=NO_ENTROPY
            ),
            "verl chunked": Provider(
                prepare=through(verl.chunked_logprobs),
                needs=verl.NEEDS,
                note="512 rows at a time; sums dW and returns entropy in the dtype of the weight",
            ),
        },
        baseline="torch",
        # both matrices read, both gradients written; five numbers a row
        bytes=Count(
            "2·(N + V)·H·itemsize + 24·N",
            lambda size: (
                2 * (size["N"] + size["V"]) * size["H"] * size.dtype.itemsize + 24 * size["N"]
            ),
        ),
        # the useful ones: logits, dX, dW. Who makes the logits again does 8·N·H·V
        flops=Count("6·N·H·V", lambda size: 6 * size["N"] * size["H"] * size["V"]),
    ),
)
