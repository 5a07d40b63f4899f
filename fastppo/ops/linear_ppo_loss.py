"""The whole PPO loss from hidden states in one sweep: 3 matrix passes, never an [N, V] array.

Shapes: N rows, H hidden, V vocabulary. The result is `ppo_loss(*linear_logprobs(...))`. A
token-level PPO gradient depends only on its own row, and everything else about the row is known
beforehand, so for each chunk of rows the forward pass does

    logits = hidden · weightᵀ  →  logprob, entropy  →  g, h (`ppo_rows`)  →  ∂L/∂logits, in place
    ∂L/∂hidden = ∂L/∂logits · weight,    ∂L/∂weight += ∂L/∂logitsᵀ · hidden   (float32 sum)

and keeps the gradients; the backward pass only scales them by the gradient of the loss. On a CUDA
device the first line, after the product, is one Triton kernel. Recomputing the logits in the
backward pass would cost a fourth matrix pass. Rows of weight 0 never reach the head.

Sequence-level ratios need every row of a sequence before any g is known; they take the plain road,
`linear_logprobs` then `ppo_loss`, with 4 matrix passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastppo.ops._checks import check_num_live, check_targets, is_one
from fastppo.ops._head import (
    Head,
    HeadGradients,
    HeadOptions,
    check_head,
    chunks,
    head_operands,
    head_options,
)
from fastppo.ops._ppo_config import PPOLossConfig
from fastppo.ops._ppo_metrics import combine_ppo_metrics
from fastppo.ops._ppo_rows import PPOInputs, check_ppo_inputs, ppo_rows
from fastppo.ops._precision import compute_dtype, without_autocast
from fastppo.ops._rows import row_gradient, row_stats
from fastppo.ops.linear_logprobs import linear_logprobs, linear_logprobs_reference
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


_Sweep = tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]


def linear_ppo_loss_sweep(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    inputs: PPOInputs,
    config: PPOLossConfig,
    options: HeadOptions,
) -> _Sweep:
    """Loss (), metrics and the gradients of (hidden, weight, bias) at rows that all count."""
    total = HeadGradients(hidden, head, options)
    losses, metrics = [], []
    for rows, buffer in chunks(hidden, head.weight.shape[0], options.chunk_bytes):
        logits = head.logits(hidden[rows], out=buffer)
        tau = options.temperature_at(rows)
        stats = row_stats(logits, targets[rows], tau, options.softcap)
        part = ppo_rows(stats.logprobs, stats.entropy, inputs.select(rows), config)
        losses.append(part.loss)
        metrics.append(part.metrics)
        if options.needs_grad:
            g, h = part.logprob_grad, part.entropy_grad
            row_gradient(logits, targets[rows], stats, g, h, tau, options.softcap, out=logits)
            total.add(rows, logits)
    if not losses:
        empty = hidden.new_zeros(0, dtype=compute_dtype(hidden))
        part = ppo_rows(empty, empty, inputs, config)
        return part.loss, part.metrics, total.finish()
    return torch.stack(losses).sum(), combine_ppo_metrics(metrics), total.finish()


def _implementation(device: torch.device) -> Callable[..., _Sweep]:
    """The sweep for a device; the one place that chooses."""
    if device.type == "cuda":
        from fastppo.ops import _cuda

        return _cuda.linear_ppo_loss_sweep
    return linear_ppo_loss_sweep


class _LinearPPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inputs: PPOInputs,
        config: PPOLossConfig,
        options: HeadOptions,
    ) -> tuple[Tensor, Tensor]:
        x, head = head_operands(hidden, weight, bias)
        with without_autocast(hidden.device):
            sweep = _implementation(hidden.device)
            loss, metrics, grads = sweep(x, head, targets, inputs, config, options)
        pairs = zip(grads, (hidden, weight, bias), strict=True)
        ctx.grads = [None if g is None or t is None else g.to(t.dtype) for g, t in pairs]
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError(
                "linear_ppo_loss: backward ran twice; its gradients are computed in the forward "
                "pass and handed out once. Call linear_ppo_loss again"
            )
        grads, ctx.grads = ctx.grads, None
        if not is_one(grad):
            for g in grads:
                if g is not None:
                    g.mul_(grad)
        return (*grads, None, None, None, None)


_apply: Callable[..., tuple[Tensor, Tensor]] = _LinearPPOLoss.apply


def _live_rows(weights: Tensor, num_live: int | None) -> Tensor:
    """Where the weights (N,) are not 0: (num_live,) int64."""
    if num_live is None:
        return weights.nonzero().squeeze(1)
    check_num_live(num_live, weights)
    return torch.nonzero_static(weights, size=num_live).squeeze(1)


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
) -> PPOLoss:
    """`ppo_loss` of the head's log-probabilities and entropies, with gradients for the head's
    inputs.

    Args:
        hidden, weight, targets, bias, temperature, softcap, chunk_bytes: as in `linear_logprobs`.
        old_logprobs, advantages, weights, config, ref_logprobs, rollout_logprobs, cu_seqlens: as in
            `ppo_loss`. Rows of weight 0 are dropped first (hidden may be NaN there, targets out of
            range).
        num_live: how many weights are not 0; None: counting them costs one host sync on a GPU.

    Returns:
        PPOLoss(loss, metrics). Gradients are computed together with the loss, unless nothing
        requires one or grad mode is off, and handed out once: a second backward raises
        RuntimeError.

    Raises:
        TypeError, ValueError: as `linear_logprobs` and `ppo_loss`.
    """
    check_head(hidden, weight, targets, bias, temperature, softcap, chunk_bytes)
    inputs = PPOInputs(old_logprobs, advantages, weights, ref_logprobs, rollout_logprobs)
    check_ppo_inputs(targets, inputs, config, cu_seqlens)
    inputs = inputs.detach()
    live = _live_rows(inputs.weights, num_live)
    all_inputs, num_rows = inputs, targets.shape[0]
    if live.shape[0] < num_rows:
        hidden, targets = hidden.index_select(0, live), targets[live]
        inputs = inputs.select(live)
        temperature = temperature[live] if isinstance(temperature, Tensor) else temperature
    check_targets(targets, weight.shape[0])
    if config.ratio_level == "sequence":
        lp = linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=softcap,
            chunk_bytes=chunk_bytes,
        )
        zeros = lp.logprobs.new_zeros(num_rows)
        return ppo_loss(
            zeros.index_copy(0, live, lp.logprobs),
            *all_inputs[:3],
            config,
            entropy=zeros.index_copy(0, live, lp.entropy),
            ref_logprobs=ref_logprobs,
            rollout_logprobs=rollout_logprobs,
            cu_seqlens=cu_seqlens,
        )
    options = head_options(hidden, weight, bias, temperature, softcap, chunk_bytes)
    return PPOLoss(*_apply(hidden, weight, bias, targets.long(), inputs, config, options))
