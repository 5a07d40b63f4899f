"""The CUDA side of the ops: `_rows` and the rows of `linear_ppo_loss` through Triton kernels.

Same signatures as their torch counterparts, float16, bfloat16 and float32 only. Imported when an op
first meets a CUDA tensor, because Triton does not exist everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fastppo_kernels.ppo_math import PPOInputs as KernelInputs
from fastppo_kernels.ppo_math import PPOKnobs
from fastppo_kernels.ppo_rows import ppo_rows
from fastppo_kernels.token_logprobs import (
    RowStatistics,
    token_logprobs_bwd_out,
    token_logprobs_fwd,
)
from torch import Tensor

from fastppo.ops._ppo_loss_config import PPOLossConfig
from fastppo.ops._ppo_metrics import NUM_SUMS
from fastppo.ops._ppo_rows import PPOInputs
from fastppo.ops._rows import RowStats
from fastppo.ops.kl_penalty import KL_ESTIMATORS


def _contiguous(temperature: float | Tensor) -> float | Tensor:
    return temperature.contiguous() if isinstance(temperature, Tensor) else temperature


def row_stats(
    logits: Tensor, targets: Tensor, temperature: float | Tensor, softcap: float | None
) -> RowStats:
    """As `_rows.row_stats`, except that `max` is before the temperature."""
    tau = _contiguous(temperature)
    return RowStats(*token_logprobs_fwd(logits, targets.contiguous(), tau, softcap))


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
    token_logprobs_bwd_out(
        logits,
        targets.contiguous(),
        RowStatistics(*stats),
        logprob_grad.contiguous(),
        None if entropy_grad is None else entropy_grad.contiguous(),
        _contiguous(temperature),
        softcap,
        out,
    )


def ppo_knobs(config: PPOLossConfig) -> PPOKnobs:
    """The numbers of the loss, as the kernels take them."""
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


def loss_rows(
    logits: Tensor,
    targets: Tensor,
    inputs: PPOInputs,
    config: PPOLossConfig,
    temperature: float | Tensor,
    softcap: float | None,
    out: Tensor | None,
) -> Tensor:
    """As `linear_ppo_loss.loss_rows`, in one launch."""
    knobs = ppo_knobs(config)
    per_row = KernelInputs(*inputs.contiguous())
    tau = _contiguous(temperature)
    return ppo_rows(logits, targets.contiguous(), per_row, knobs, tau, softcap, out)


def total(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `linear_ppo_loss.total`, from entries (len(ENTRIES), C): the loss, PPO_METRIC_NAMES."""
    entries = torch.cat(list(parts), dim=1)
    sums = entries.sum(dim=1)
    return sums[0], torch.cat([sums[1 : 1 + NUM_SUMS], entries[1 + NUM_SUMS :].amax(dim=1)])
