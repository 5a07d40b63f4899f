"""Per-token estimates of KL(π‖π_ref) from samples of π, with d = logprob − ref_logprob.

    k1 = d                    unbiased, may be negative; for a penalty inside the reward
    k2 = d²/2                 its gradient is that of the KL; biased value
    k3 = e^{−d} − 1 + d       unbiased and never negative; for a penalty inside the loss

Source: http://joschu.net/blog/kl-approx.html. The exponent of k3 is clamped to ±20, so that one
token the reference finds impossible gives a large number, not infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops._checks import check_choice, check_rows, check_tensor
from fastppo.ops._precision import compute_dtype

KL_ESTIMATORS = ("k1", "k2", "k3")
LOG_RATIO_LIMIT = 20.0


def kl_penalty_reference(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """The formulas as they stand, differentiable by autograd."""
    d = logprobs.to(compute_dtype(logprobs)) - ref_logprobs.detach()
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    return torch.exp((-d).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)) - 1 + d


def kl_and_slope(d: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
    """The estimate and its derivative with respect to d, each shaped like d."""
    if estimator == "k1":
        return d, torch.ones_like(d)
    if estimator == "k2":
        return d.square() / 2, d
    growth = torch.expm1((-d).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    # Not <=: a NaN has to reach the gradient and be seen there.
    return growth + d, torch.where(d.abs() > LOG_RATIO_LIMIT, 1.0, -growth)


class _KLPenalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
        kl, slope = kl_and_slope(logprobs.to(compute_dtype(logprobs)) - ref_logprobs, estimator)
        ctx.save_for_backward(slope)
        ctx.dtype = logprobs.dtype
        return kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grad * slope).to(ctx.dtype), None, None


_apply: Callable[..., Tensor] = _KLPenalty.apply


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Per-token KL estimate.

    Args:
        logprobs: (N,) floating, log-probabilities under the policy, in nats.
        ref_logprobs: (N,) floating, under the reference; treated as a constant.
        estimator: "k1", "k2" or "k3".

    Returns:
        (N,) float32 in nats, differentiable in `logprobs`. Masked tokens are the caller's: multiply
        by the mask only after `torch.where` has removed NaN.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or estimator.
    """
    check_tensor("logprobs", logprobs, ("N",))
    check_rows("ref_logprobs", ref_logprobs, logprobs)
    check_choice("estimator", estimator, KL_ESTIMATORS)
    return _apply(logprobs, ref_logprobs.detach(), estimator)
