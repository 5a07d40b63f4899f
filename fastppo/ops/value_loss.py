"""Clipped squared error of the critic, with per-token weights.

Shapes: N response tokens. With v the values, R the returns, ε the clip, and ρ(x) = x²/2, or with
huber = κ, κ·(|x| − κ/2) where |x| > κ,

    loss = Σ_t weights_t·max( ρ(v − R), ρ(clip(v, v_old − ε, v_old + ε) − R) )
    ∂L/∂v = w·ρ'(v − R), or 0 where the clipped branch is the larger one

Source: CleanRL ppo.py, `clip_vloss`. With a badly initialised critic the clip freezes learning:
clip=0 or None turns it off. `weights` hold mask and normaliser, so micro-batches add up exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops._checks import check_rows, check_tensor
from fastppo.ops._precision import compute_dtype

VALUE_METRIC_NAMES = (
    "num_tokens",
    "value_loss",
    "value_clipfrac",
    "value",
    "return",
    "return_m2",
    "error",
    "error_m2",
)
"""Entries of `ValueLoss.metrics`, over valid tokens (weight ≠ 0): their number; the loss; how many
the clip cut; Σv; then mean and Σ(x − mean)² of the returns R and of the errors R − v. Means and
second moments combine without the cancellation that sums of squares suffer when returns are nearly
equal."""


class ValueLoss(NamedTuple):
    """Results of `value_loss`."""

    loss: Tensor
    """() float32, differentiable."""
    metrics: Tensor
    """(len(VALUE_METRIC_NAMES),) float32, detached; see `reduce_value_metrics`."""


class ValueRows(NamedTuple):
    """Loss (), its gradient (N,), metrics."""

    loss: Tensor
    value_grad: Tensor
    metrics: Tensor


def value_loss_reference(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    *,
    clip: float | None,
    huber: float | None = None,
) -> ValueLoss:
    """Plain torch over the valid tokens picked out; the loss differentiable by autograd."""

    def size(x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        if huber is None:
            return x.square()
        return 2 * torch.nn.functional.huber_loss(x, zeros, reduction="none", delta=huber)

    keep = weights != 0
    v, target = values[keep], returns[keep]
    error = square = size(v - target)
    if clip:
        assert old_values is not None
        old = old_values[keep]
        square = torch.max(error, size(torch.clamp(v, old - clip, old + clip) - target))
    loss = 0.5 * (weights[keep] * square).sum()
    moments = []
    for x in (target, target - v):
        mean = x.mean() if x.numel() else x.sum()
        moments += [mean, (x - mean).square().sum()]
    counts = [keep.sum(), loss, (square > error).sum(), v.sum()]
    metrics = torch.stack([m.to(v.dtype) for m in [*counts, *moments]])
    return ValueLoss(loss, metrics.detach())


def value_rows(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    huber: float | None,
) -> ValueRows:
    """Loss, gradient and metrics in plain torch on any device."""
    dtype = compute_dtype(values)
    w = weights.to(dtype)
    valid = w != 0
    zero = torch.zeros((), dtype=dtype, device=w.device)
    v = torch.where(valid, values.to(dtype), zero)
    target = torch.where(valid, returns.to(dtype), zero)
    error = v - target

    def size(x: Tensor) -> Tensor:
        if huber is None:
            return x.square()
        return torch.where(x.abs() > huber, huber * (2 * x.abs() - huber), x.square())

    square, cut = size(error), torch.zeros_like(valid)
    slope = error if huber is None else error.clamp(-huber, huber)
    if clip is not None:
        assert old_values is not None
        old = torch.where(valid, old_values.to(dtype), zero)
        clipped_square = size(torch.clamp(v, old - clip, old + clip) - target)
        cut = clipped_square > square
        square = torch.maximum(square, clipped_square)
        slope = torch.where(cut, zero, slope)
    loss = 0.5 * (w * square).sum()

    count = valid.sum().to(dtype)
    some = count.clamp(min=1.0)

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        mean = x.sum() / some
        return mean, (torch.where(valid, x - mean, zero)).square().sum()

    metrics = [count, loss, cut.sum(), v.sum(), *moments(target), *moments(-error)]
    return ValueRows(loss, w * slope, torch.stack([m.to(dtype) for m in metrics]).float())


def combine_value_metrics(vectors: Tensor | Sequence[Tensor]) -> Tensor:
    """One vector from many: (K, M) or K vectors (M,) → (M,), by Chan's rule for the moments."""
    stacked = vectors if isinstance(vectors, Tensor) else torch.stack(list(vectors))
    if stacked.shape[-1] != len(VALUE_METRIC_NAMES):
        raise ValueError(
            f"vectors: expected {len(VALUE_METRIC_NAMES)} entries each, got {tuple(stacked.shape)}"
        )
    stacked = stacked.reshape(-1, stacked.shape[-1])
    count = stacked[:, 0]
    some = count.sum().clamp(min=1.0)

    def merge(mean: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:
        total = (count * mean).sum() / some
        return total, (m2 + count * (mean - total).square()).sum()

    moments = [*merge(stacked[:, 4], stacked[:, 5]), *merge(stacked[:, 6], stacked[:, 7])]
    return torch.cat([stacked[:, :4].sum(0), torch.stack(moments)])


def reduce_value_metrics(vectors: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    """Value metrics by name, 0-d tensors on the vectors' device (no host sync).

    Args:
        vectors: the `ValueLoss.metrics` of the micro-batches and ranks of one step: (M,), (K, M) or
            a sequence of (M,).

    Returns:
        num_tokens, value_loss, value_clipfrac, value (mean), return (mean) and
        explained_variance = 1 − Var(R − v) / Var(R), which is 0 where Var(R) = 0 (no NaN).
    """
    entries = dict(zip(VALUE_METRIC_NAMES, combine_value_metrics(vectors).unbind(), strict=True))
    some = entries["num_tokens"].clamp(min=1.0)
    varies = entries["return_m2"] > 0
    unexplained = entries["error_m2"] / torch.where(varies, entries["return_m2"], 1.0)
    return {
        "num_tokens": entries["num_tokens"],
        "value_loss": entries["value_loss"],
        "value_clipfrac": entries["value_clipfrac"] / some,
        "value": entries["value"] / some,
        "return": entries["return"],
        "explained_variance": torch.where(varies, 1 - unexplained, 0.0),
    }


@torch.library.custom_op(
    "fastppo::value_loss",
    mutates_args=(),
    schema="(Tensor values, Tensor? old_values, Tensor returns, Tensor weights, float? clip, "
    "float? huber) -> (Tensor, Tensor, Tensor)",
)
def value_loss_op(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    huber: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One call that torch.compile does not look into; `value_rows` where no kernel is."""
    loss, grad, metrics = value_rows(values, old_values, returns, weights, clip, huber)
    return loss, grad, metrics


@value_loss_op.register_fake
def _(values: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    grad = values.new_empty(values.shape, dtype=compute_dtype(values))
    return grad.new_empty(()), grad, grad.new_empty(len(VALUE_METRIC_NAMES), dtype=torch.float32)


@value_loss_op.register_kernel("cuda")
def value_loss_triton(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    clip: float | None,
    huber: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch. float64, for gradcheck, in torch: numbers reach a kernel
    as float32."""
    if values.dtype == torch.float64:
        loss, grad, metrics = value_rows(values, old_values, returns, weights, clip, huber)
        return loss, grad, metrics
    from fastppo_kernels import value_loss

    return value_loss.value_loss(values, old_values, returns, weights, clip, huber)


def _implementation(device: torch.device) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Loss, gradient and metrics in one call, for a device; the one place that chooses."""
    return value_loss_op if device.type == "cuda" else value_rows


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        old_values: Tensor | None,
        returns: Tensor,
        weights: Tensor,
        clip: float | None,
        huber: float | None,
    ) -> tuple[Tensor, Tensor]:
        rows = _implementation(values.device)
        loss, value_grad, metrics = rows(values, old_values, returns, weights, clip, huber)
        ctx.save_for_backward(value_grad)
        ctx.dtype = values.dtype
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (value_grad,) = ctx.saved_tensors
        return (grad * value_grad).to(ctx.dtype), None, None, None, None, None


_apply: Callable[..., tuple[Tensor, Tensor]] = _ValueLoss.apply


def value_loss(
    values: Tensor,
    old_values: Tensor | None,
    returns: Tensor,
    weights: Tensor,
    *,
    clip: float | None = 0.2,
    huber: float | None = None,
) -> ValueLoss:
    """Weighted, clipped value loss and its metrics.

    Args:
        values: (N,) floating, the critic's current values. Differentiable.
        old_values: (N,) values at rollout time, constant; may be None without a clip.
        returns: (N,) constant targets.
        weights: (N,) from `loss_weights`: 0 for masked tokens, which may hold NaN anywhere.
        clip: largest move of a value away from old_values, in reward units; 0 or None: no clip.
        huber: error beyond which the loss grows linearly, in reward units; None: squared.

    Returns:
        ValueLoss(loss, metrics). Without valid tokens the loss and the gradient are 0.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, a clip or huber out of
            range, or old_values missing.
    """
    check_tensor("values", values, ("N",))
    for name, x in (("old_values", old_values), ("returns", returns), ("weights", weights)):
        check_rows(name, x, values)
    if clip is not None and not clip >= 0:
        raise ValueError(f"clip: expected None or a number >= 0, got {clip}")
    clip = clip or None
    if huber is not None and not huber > 0:
        raise ValueError(f"huber: expected None or a number > 0, got {huber}")
    if clip is not None and old_values is None:
        raise ValueError(f"old_values: clip = {clip} needs a (N,) tensor, got None")
    constants = [None if x is None else x.detach() for x in (old_values, returns, weights)]
    return ValueLoss(*_apply(values, *constants, clip, huber))
