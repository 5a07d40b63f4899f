"""Log-probability and entropy of each token from hidden states: forward, and with gradients.

The forward case is what scores a rollout. With gradients only the log-probabilities are
differentiated: entropy is reported, as in a PPO loss without an entropy bonus, so that Liger, which
has no entropy, does the same products as the others.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastppo.benchmarks.head import by_parts, compiled, linear_logprobs_of
from fastppo.benchmarks.peers import liger, trl, verl
from fastppo.benchmarks.registry import (
    Benchmark,
    Provider,
    each_call,
    forward_backward,
    forward_only,
)
from fastppo.profiling.case import Inputs, Outputs, Prepare, Size
from fastppo.profiling.op_cases import CASES

Scorer = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
CASE = CASES["linear_logprobs"]


def liger_scorer(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, None]:
    return liger.chunked_logprobs(hidden, weight, targets), None


def outputs_of(scorer: Scorer) -> Callable[[Inputs, Size], Outputs]:
    def function(x: Inputs, size: Size) -> Outputs:
        logprobs, entropy = scorer(x["hidden"], x["weight"], x["targets"])
        return {"logprobs": logprobs} | ({} if entropy is None else {"entropy": entropy})

    return function


def forward(scorer: Scorer) -> Prepare:
    return forward_only(each_call(outputs_of(scorer)))


def forward_and_backward(scorer: Scorer) -> Prepare:
    return with_gradients(each_call(outputs_of(scorer)))


def with_gradients(prepare: Prepare) -> Prepare:
    return forward_backward(prepare, CASE.leaves, CASE.upstream)


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
        leaves=CASE.leaves,
        upstream=lambda out, x: (out["logprobs"] * x["g"]).sum(),
    )


def providers(
    ours: Prepare, prepare: Callable[[Scorer], Prepare], trl_needs: tuple[str, ...]
) -> dict[str, Provider]:
    return {
        "fastppo": Provider(prepare=ours),
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


BENCHMARKS = (
    Benchmark.of(
        CASE,
        forward=True,
        reference=reference,
        providers=providers(forward_only(CASE.prepare), forward, trl.NEEDS),
        baseline="torch",
    ),
    Benchmark.of(
        CASE,
        reference=reference_with_gradients,
        providers=providers(with_gradients(CASE.prepare), forward_and_backward, trl.NEEDS_BACKWARD),
        baseline="torch",
    ),
)
