"""The CUDA side of the ops: `_rows` and the sweep of `linear_ppo_loss` through Triton kernels.

Same signatures as their torch counterparts, float16, bfloat16 and float32 only. Imported when an op
first meets a CUDA tensor, because Triton does not exist everywhere.
"""

from __future__ import annotations

import torch
from fastppo_kernels import custom_ops as kernels
from fastppo_kernels.ppo_rows import PPOKnobs
from torch import Tensor

from fastppo.ops._head import Head, HeadGradients, HeadOptions, chunks
from fastppo.ops._ppo_config import PPOLossConfig
from fastppo.ops._ppo_metrics import NUM_SUMS
from fastppo.ops._ppo_rows import PPOInputs, ppo_rows
from fastppo.ops._rows import RowStats
from fastppo.ops.kl_penalty import KL_ESTIMATORS


def _temperature(temperature: float | Tensor) -> tuple[float, Tensor | None]:
    if isinstance(temperature, Tensor):
        return 1.0, temperature.contiguous()
    return float(temperature), None


def row_stats(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None
) -> RowStats:
    """As `_rows.row_stats`, except that `max` is before the temperature."""
    tau = _temperature(temperature)
    return RowStats(*kernels.token_logprobs_fwd_op(logits, targets.contiguous(), *tau, softcap))


def row_gradient(
    logits: Tensor,
    targets: Tensor,
    stats: RowStats,
    logprob_grad: Tensor,
    entropy_grad: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor,
) -> None:
    """As `_rows.row_gradient`, for statistics of the `row_stats` above."""
    rows = (
        targets.contiguous(),
        *stats[1:],
        logprob_grad.contiguous(),
        None if entropy_grad is None else entropy_grad.contiguous(),
        *_temperature(temperature),
        softcap,
    )
    if out is logits:
        kernels.token_logprobs_bwd_op_(logits, *rows)
    else:
        kernels.token_logprobs_bwd_out_op(logits, *rows, out)


def _knobs(config: PPOLossConfig) -> PPOKnobs:
    return PPOKnobs(
        low=1 - config.clip_coef_low,
        high=1 + config.clip_coef_high,
        dual_clip=float("inf") if config.dual_clip is None else config.dual_clip,
        kl_coef=config.kl_coef,
        ent_coef=config.ent_coef,
        is_cap=config.is_cap,
        is_low=config.is_low,
        is_high=config.is_high,
        kl=1 + KL_ESTIMATORS.index(config.kl_estimator),
        correction=(None, "tis", "icepop").index(config.is_correction),
    )


def linear_ppo_loss_sweep(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    inputs: PPOInputs,
    config: PPOLossConfig,
    options: HeadOptions,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """As `linear_ppo_loss.linear_ppo_loss_sweep`: per chunk one product, one launch that turns the
    logits into their gradient, and the products of the gradients."""
    total = HeadGradients(hidden, head, options)
    if hidden.shape[0] == 0:
        empty = hidden.new_zeros(0, dtype=torch.float32)
        part = ppo_rows(empty, empty, inputs, config)
        return part.loss, part.metrics, total.finish()
    knobs = _knobs(config).flat()
    parts = []
    for rows, buffer in chunks(hidden, head.weight.shape[0], options.chunk_bytes):
        logits = head.logits(hidden[rows], out=buffer)
        per_row = [None if x is None else x[rows].contiguous() for x in inputs]
        tau = _temperature(options.temperature_at(rows))
        at = (targets[rows].contiguous(), *per_row, *knobs, *tau, options.softcap)
        parts.append(kernels.ppo_rows_op_(logits, *at, options.needs_grad))
        if options.needs_grad:
            total.add(rows, logits)
    entries = torch.cat(parts, dim=1)  # the loss, then PPO_METRIC_NAMES; (., N)
    sums = entries.sum(dim=1)
    metrics = torch.cat([sums[1 : 1 + NUM_SUMS], entries[1 + NUM_SUMS :].amax(dim=1)])
    return sums[0], metrics, total.finish()
