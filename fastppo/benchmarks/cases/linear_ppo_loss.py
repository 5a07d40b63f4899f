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
from fastppo.benchmarks.head import by_parts, linear_logprobs_of
from fastppo.benchmarks.peers import liger, trl, verl
from fastppo.benchmarks.registry import Benchmark, Provider, each_call, forward_backward
from fastppo.profiling.case import Call, Inputs, Outputs, Prepare, Size
from fastppo.profiling.head_cases import CLIP, linear_ppo_loss
from fastppo.profiling.op_cases import CASES

CASE = CASES["linear_ppo_loss"]
Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ROWS = ("hidden", "targets", "old_logprobs", "advantages", "weights")


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


def fastppo(**options: bool) -> Prepare:
    def prepare(x: Inputs, size: Size) -> Call:
        call = linear_ppo_loss(x, size, **options)

        def measured() -> Outputs:
            outputs = call()
            return {"loss": outputs["loss"], "entropy": outputs["metrics"][ENTROPY] / size["N"]}

        return measured

    return with_gradients(prepare)


def compiled(x: Inputs, size: Size) -> Call:
    """The whole loss, compiled for one size."""
    function = torch.compile(loss_of(linear_logprobs_of), dynamic=False)
    return with_gradients(each_call(function))(x, size)


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
    run = with_gradients(each_call(function))(laid_out, size)

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
        leaves=CASE.leaves,
        upstream=lambda out, x: out["loss"],
    )


def with_gradients(prepare: Prepare) -> Prepare:
    return forward_backward(prepare, CASE.leaves)


def through(scorer: Scorer) -> Prepare:
    return with_gradients(each_call(loss_of(scorer)))


ENTROPY = ops.PPO_METRIC_NAMES.index("entropy")
NO_ENTROPY = {"entropy": liger.NO_ENTROPY}

BENCHMARKS = (
    Benchmark.of(
        CASE,
        reference=reference,
        providers={
            "fastppo": Provider(prepare=fastppo()),
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
                prepare=with_gradients(each_call(liger_chunked)),
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
    ),
)
