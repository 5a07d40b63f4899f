"""The loss of rows of hidden states together with every gradient, for `linear_ppo_loss`.

Shapes: N rows, H hidden, V vocabulary, C rows of one chunk. A sweep takes rows that all count and
returns the loss (), the metrics of PPO_METRIC_NAMES and the gradients of (hidden, weight, bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops._head import Gradients, Head, HeadGradients, chunks
from fastppo.ops._head_options import HeadOptions
from fastppo.ops._head_tiles import tiled_gradients
from fastppo.ops._ppo_loss_config import PPOLossConfig
from fastppo.ops._ppo_metrics import combine_ppo_metrics
from fastppo.ops._ppo_rows import PPOInputs, ppo_rows
from fastppo.ops._row_ops import RowOps
from fastppo.ops._rows import row_gradient, row_stats
from fastppo.ops.linear_logprobs import head_stats


def loss_rows(
    logits: Tensor,
    targets: Tensor,
    inputs: PPOInputs,
    config: PPOLossConfig,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Loss () and metrics of rows of logits (C, V), whose gradient goes to `out`, which may be
    `logits` itself or have another dtype; None: nobody wants it."""
    stats = row_stats(logits, targets, temperature, softcap)
    part = ppo_rows(stats.logprobs, stats.entropy, inputs, config)
    if out is not None:
        g, h = part.logprob_grad, part.entropy_grad
        row_gradient(logits, targets, stats, g, h, temperature, softcap, out=out)
    return part.loss, part.metrics


def total(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Loss and metrics of all `loss_rows`."""
    losses, metrics = zip(*parts, strict=True)
    return torch.stack(losses).sum(), combine_ppo_metrics(metrics)


class LossOps(NamedTuple):
    """What a device does with the loss of rows: `loss_rows` and `total`."""

    rows: Callable[..., Any]
    total: Callable[..., tuple[Tensor, Tensor]]


def loss_ops(device: torch.device) -> LossOps:
    """Those of a device."""
    if device.type == "cuda":
        from fastppo.ops import _cuda

        return LossOps(_cuda.loss_rows, _cuda.total)
    return LossOps(loss_rows, total)


Sweep = tuple[Tensor, Tensor, Gradients]


def one_sweep(
    x: Tensor,
    head: Head,
    targets: Tensor,
    inputs: PPOInputs,
    config: PPOLossConfig,
    options: HeadOptions,
    dtypes: tuple[torch.dtype, ...],
    ops: LossOps,
) -> Sweep:
    """Loss, metrics and the gradients of (hidden, weight, bias), in `dtypes`, at rows that all
    count: 3 matrix passes."""
    gradients, needs_grad = HeadGradients(x, head, options, dtypes), options.needs_grad
    parts = []
    for rows, part in chunks(x, head.weight.shape[0], options, grad=needs_grad):
        logits = head.logits(x[rows], out=part.logits)
        at = (targets[rows], inputs.select(rows), config, options.temperature_at(rows))
        out = part.grad if needs_grad else None
        parts.append(ops.rows(logits, *at, options.softcap, out))
        if needs_grad:
            gradients.add(rows, part.grad)
    return *ops.total(parts), gradients.finish()


def low_memory_sweep(
    x: Tensor,
    head: Head,
    targets: Tensor,
    inputs: PPOInputs,
    config: PPOLossConfig,
    options: HeadOptions,
    dtypes: tuple[torch.dtype, ...],
    ops: RowOps,
) -> Sweep:
    """As `one_sweep`, with 4 matrix passes: statistics by chunks of rows, then the gradients by
    tiles of the vocabulary, which sum nothing of the weight's size."""
    stats = head_stats(x, head, targets, options, ops.stats)
    part = ppo_rows(stats.logprobs, stats.entropy, inputs, config)
    upstream = (part.logprob_grad, part.entropy_grad, options, dtypes, ops.gradient)
    return part.loss, part.metrics, tiled_gradients(x, head, targets, stats, *upstream)
