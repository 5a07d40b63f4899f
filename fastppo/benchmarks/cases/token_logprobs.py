"""Log-probability and entropy of each token from logits: forward, and with gradients.

TRL's kernel does the same in both. flash-attn and Liger give log-probabilities only, and Liger's
kernel has no backward pass; both are in the forward case alone, where entropy costs no byte.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.benchmarks.head import by_parts, compiled, logprobs_of
from fastppo.benchmarks.peers import flash_attn, liger, trl
from fastppo.benchmarks.registry import (
    Benchmark,
    Provider,
    each_call,
    forward_backward,
    forward_only,
)
from fastppo.profiling.case import Call, Inputs, Outputs, Prepare, Size
from fastppo.profiling.op_cases import CASES

CASE = CASES["token_logprobs"]
Scorer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # logits (N, V), targets → (N,), (N,)


def eager(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`logprobs_of` with a gradient for the entropy too."""
    log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)
    entropy = -(log_p.exp() * log_p).sum(dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], entropy


def outputs_of(scorer: Scorer) -> Callable[[Inputs, Size], Outputs]:
    def function(x: Inputs, size: Size) -> Outputs:
        logprobs, entropy = scorer(x["logits"], x["targets"])
        return {"logprobs": logprobs, "entropy": entropy}

    return function


def forward(scorer: Scorer) -> Prepare:
    return forward_only(each_call(outputs_of(scorer)))


def flash_forward(x: Inputs, size: Size) -> Call:
    return torch.no_grad()(lambda: {"logprobs": flash_attn.logprobs(x["logits"], x["targets"])})


def liger_forward(x: Inputs, size: Size) -> Call:
    logits = liger.with_last_row(x["logits"], 1)  # a copy, made once
    return torch.no_grad()(lambda: {"logprobs": liger.triton_logprobs(logits, x["targets"])})


def forward_and_backward(scorer: Scorer) -> Prepare:
    return with_gradients(each_call(outputs_of(scorer)))


def with_gradients(prepare: Prepare) -> Prepare:
    return forward_backward(prepare, CASE.leaves, CASE.upstream)


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
        leaves=CASE.leaves,
        upstream=lambda out, x: (out["logprobs"] * x["g"] + out["entropy"] * x["h"]).sum(),
    )


def providers(
    ours: Prepare, prepare: Callable[[Scorer], Prepare], plain: Scorer
) -> dict[str, Provider]:
    """Those that do the same in both cases."""
    return {
        "fastppo": Provider(prepare=ours),
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


BENCHMARKS = (
    Benchmark.of(
        CASE,
        forward=True,
        reference=reference,
        providers={
            **providers(forward_only(CASE.prepare), forward, logprobs_of),
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
    ),
    Benchmark.of(
        CASE,
        reference=reference_with_gradient,
        providers=providers(with_gradients(CASE.prepare), forward_and_backward, eager),
        baseline="torch",
    ),
)
