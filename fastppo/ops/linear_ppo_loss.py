"""The whole PPO loss from hidden states in one sweep: 3 matrix passes, never an [N, V] array.

Shapes: N rows, H hidden, V vocabulary. The result is `ppo_loss(*linear_logprobs(...))`. A
token-level PPO gradient depends only on its own row, and everything else about the row is known
beforehand, so for each chunk of rows the forward pass does

    logits = hidden · weightᵀ  →  logprob, entropy  →  g, h (`ppo_rows`)  →  ∂L/∂logits, in place
    ∂L/∂hidden = ∂L/∂logits · weight,    ∂L/∂weight += ∂L/∂logitsᵀ · hidden   (float32 sum)

and keeps the gradients; the backward pass only scales them by the gradient of the loss. On a CUDA
device the first line, after the product, is one Triton kernel. Recomputing the logits in the
backward pass would cost a fourth matrix pass; `low_memory` pays for it to sum nothing of the
weight's size. Rows that cannot change the loss never reach the head (`live_rows`).

Sequence-level ratios need every row of a sequence before any g is known; they take the plain road,
`linear_logprobs` then `ppo_loss`, with 4 matrix passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from fastppo.ops._checks import check_targets, is_one
from fastppo.ops._head import fake_gradients, gradient_dtypes, head_operands, present, wanted
from fastppo.ops._head_options import OPTIONS_SCHEMA, check_head, head_options, options_of
from fastppo.ops._ppo_loss_config import (
    CONFIG_SCHEMA,
    NUM_CONFIG_ARGUMENTS,
    PPOLossConfig,
    config_arguments,
    config_of,
)
from fastppo.ops._ppo_metrics import PPO_METRIC_NAMES
from fastppo.ops._ppo_rows import PPOInputs, check_ppo_inputs
from fastppo.ops._ppo_sweep import loss_ops, low_memory_sweep, one_sweep
from fastppo.ops._precision import without_autocast
from fastppo.ops._row_ops import row_ops
from fastppo.ops.linear_logprobs import (
    linear_logprobs_reference,
    masked_logprobs,
    rows_where,
    scatter,
)
from fastppo.ops.ppo_loss import PPOLoss, ppo_loss, ppo_loss_reference


def linear_ppo_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: PPOLossConfig,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> PPOLoss:
    """Through full [N, V] logits of the valid rows; the loss differentiable by autograd."""
    live = (weights != 0).nonzero().squeeze(1)
    tau = temperature[live] if isinstance(temperature, Tensor) else temperature
    lp = linear_logprobs_reference(
        hidden[live], weight, targets[live], bias=bias, temperature=tau, softcap=softcap
    )
    zeros = lp.logprobs.new_zeros(weights.shape[0])
    return ppo_loss_reference(
        zeros.index_copy(0, live, lp.logprobs),
        old_logprobs,
        advantages,
        weights,
        config,
        entropy=zeros.index_copy(0, live, lp.entropy),
        ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs,
        cu_seqlens=cu_seqlens,
    )


def live_rows(weights: Tensor, advantages: Tensor, config: PPOLossConfig) -> Tensor:
    """(N,) bool, which rows of `linear_ppo_loss` reach the head: those whose loss and gradient can
    be other than 0."""
    live = weights != 0
    return live & (advantages != 0) if config.zero_advantages_change_nothing else live


@custom_op(
    "fastppo::linear_ppo_loss",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor old_logprobs, "
    "Tensor advantages, Tensor weights, Tensor? ref_logprobs, Tensor? rollout_logprobs, "
    f"SymInt? num_live, {CONFIG_SCHEMA}, {OPTIONS_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    num_live: int | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Loss, metrics, and the gradients of hidden, weight and bias, empty where not wanted."""
    config = config_of(rest[:NUM_CONFIG_ARGUMENTS])
    options = options_of(rest)
    inputs = PPOInputs(old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    num_rows, device = targets.shape[0], hidden.device
    dtypes = gradient_dtypes(hidden, weight, bias)
    rows = rows_where(live_rows(weights, advantages, config), num_live)
    if rows is not None:
        hidden, targets = hidden[rows], targets[rows]
        inputs, options = inputs.select(rows), options.select(rows)
    check_targets(targets, weight.shape[0])
    with without_autocast(device):
        x, head = head_operands(hidden, weight, bias, options.dtype)
        at = (x, head, targets, inputs, config, options, dtypes)
        if x.shape[0] == 0 or (options.low_memory and options.needs_weight):
            loss, metrics, (dx, *others) = low_memory_sweep(*at, row_ops(device))
        else:
            loss, metrics, (dx, *others) = one_sweep(*at, loss_ops(device))
        dx = None if dx is None else scatter(dx, rows, num_rows)
        return loss, metrics, *present((dx, *others), weight)


@_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    options = options_of(rest)
    dtype = torch.float64 if options.dtype == torch.float64 else torch.float32
    loss = hidden.new_empty((), dtype=dtype)
    metrics = hidden.new_empty(len(PPO_METRIC_NAMES), dtype=torch.float32)
    return loss, metrics, *fake_gradients(hidden, weight, bias, options.needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, metrics, *gradients = output
    ctx.grads = wanted(gradients, options_of(inputs).needs)
    ctx.num_inputs = len(inputs)
    ctx.mark_non_differentiable(metrics, *gradients)
    ctx.set_materialize_grads(False)  # else zeros are made for each output, of the weight's size


def _run_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    if ctx.grads is None:
        raise RuntimeError(
            "linear_ppo_loss: backward ran twice; its gradients are computed in the forward "
            "pass and handed out once. Call linear_ppo_loss again"
        )
    grads, ctx.grads = ctx.grads, None
    if not is_one(grad):
        # In place where the memory is real; torch.compile must not see an output change.
        in_place = type(grad) is Tensor
        grads = [g if g is None else g.mul_(grad) if in_place else g * grad for g in grads]
    return (*grads, *[None] * (ctx.num_inputs - 3))


_loss.register_autograd(_run_backward, setup_context=_setup_context)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: PPOLossConfig,
    *,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    cu_seqlens: Tensor | None = None,
    num_live: int | None = None,
    low_memory: bool = False,
    fp32_logits: bool = False,
) -> PPOLoss:
    """`ppo_loss` of the head's log-probabilities and entropies, with gradients for the head's
    inputs.

    Args:
        hidden, weight, targets, bias, temperature, softcap, chunk_bytes, fp32_logits: as in
            `linear_logprobs`.
        old_logprobs, advantages, weights, config, ref_logprobs, rollout_logprobs, cu_seqlens: as in
            `ppo_loss`. Rows that `live_rows` leaves out are dropped first (hidden may be NaN there,
            targets out of range): weight 0, or advantage 0 and neither a KL term nor an entropy
            bonus nor a sequence-level ratio.
        num_live: how many rows `live_rows` keeps; None: counting them costs one host sync on a GPU.
        low_memory: 4 matrix passes instead of 3 where weight needs a gradient, and smaller parts of
            logits by default (256 MiB instead of 2 GiB on a GPU). Memory besides the gradients, in
            bytes, b those of an operand and P = chunk_bytes: min(P, N·V·b), and unless that is all
            of them, 4·V·H and at most 256 MiB; with low_memory P + 8·N·H.

    Returns:
        PPOLoss(loss, metrics). The metrics describe the rows that reached the head; so does their
        num_tokens, and means stay means. Gradients are computed together with the loss,
        unless nothing requires one or grad mode is off, and handed out once: a second backward
        raises RuntimeError.

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `ppo_loss`.
    """
    check_head(hidden, weight, targets, bias, temperature, softcap, chunk_bytes)
    inputs = PPOInputs(old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    check_ppo_inputs(targets, inputs, config, cu_seqlens)
    inputs = inputs.detach()
    how = (temperature, softcap, chunk_bytes, low_memory, fp32_logits)
    options = head_options(hidden, weight, bias, *how)
    if config.ratio_level == "sequence":
        keep = live_rows(inputs.weights, inputs.advantages, config)
        lp = masked_logprobs(hidden, weight, bias, targets, keep, num_live, options)
        return ppo_loss(
            lp.logprobs,
            *inputs[:3],
            config,
            entropy=lp.entropy,
            ref_logprobs=inputs.ref_logprobs,
            rollout_logprobs=inputs.rollout_logprobs,
            cu_seqlens=cu_seqlens,
        )
    loss, metrics, *_ = _loss(
        hidden,
        weight,
        bias,
        targets.long(),
        *inputs,
        num_live,
        *config_arguments(config),
        *options,
    )
    return PPOLoss(loss, metrics)
