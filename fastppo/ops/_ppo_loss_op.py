"""The loss of `ppo_loss` with its gradients and metrics as one torch op, by device.

C++ on the CPU and one Triton launch on CUDA, both for token-level ratios. A ratio per sequence,
float64 on CUDA (numbers reach a kernel as float32) and other devices run `ppo_rows` in torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo import _C
from fastppo.ops._ppo_config import CONFIG_SCHEMA, PPOLossConfig, config_of
from fastppo.ops._ppo_metrics import PPO_METRIC_NAMES
from fastppo.ops._ppo_rows import PPOInputs, ppo_rows
from fastppo.ops._precision import compute_dtype
from fastppo.ops.kl_penalty import KL_ESTIMATORS

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


class _Arguments(NamedTuple):
    """The op's arguments before the fields of the config."""

    logprobs: Tensor
    entropy: Tensor | None
    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    cu_seqlens: Tensor | None


def _parse(arguments: tuple[Any, ...]) -> tuple[_Arguments, PPOLossConfig]:
    count = len(_Arguments._fields)
    return _Arguments(*arguments[:count]), config_of(arguments[count:])


def ppo_loss_torch(*arguments: Any) -> _Four:
    """As `ppo_loss_op`, on any device."""
    x, config = _parse(arguments)
    inputs = PPOInputs(x.old_logprobs, x.advantages, x.weights, x.ref_logprobs, x.rollout_logprobs)
    rows = ppo_rows(x.logprobs, x.entropy, inputs, config, x.cu_seqlens)
    h = rows.logprob_grad.new_empty(0) if rows.entropy_grad is None else rows.entropy_grad
    return rows.loss, rows.logprob_grad, h, rows.metrics


@torch.library.custom_op(
    "fastppo::ppo_loss",
    mutates_args=(),
    schema="(Tensor logprobs, Tensor? entropy, Tensor old_logprobs, Tensor advantages, "
    "Tensor weights, Tensor? ref_logprobs, Tensor? rollout_logprobs, Tensor? cu_seqlens, "
    f"{CONFIG_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def ppo_loss_op(*arguments: Any) -> _Four:
    """Loss, ∂loss/∂logprobs, ∂loss/∂entropy ((0,) where ent_coef is 0) and metrics, without
    autograd."""
    return ppo_loss_torch(*arguments)


@ppo_loss_op.register_fake
def _(*arguments: Any) -> _Four:
    x, config = _parse(arguments)
    dtype = compute_dtype(x.logprobs)
    g = x.logprobs.new_empty(x.logprobs.shape, dtype=dtype)
    h = torch.empty_like(g) if config.ent_coef != 0 else g.new_empty(0)
    return g.new_empty(()), g, h, g.new_empty(len(PPO_METRIC_NAMES), dtype=torch.float32)


@ppo_loss_op.register_kernel("cpu")
def ppo_loss_cpp(*arguments: Any) -> _Four:
    """As `ppo_loss_op`, in one pass over the tokens."""
    x, config = _parse(arguments)
    if config.ratio_level == "sequence":
        return ppo_loss_torch(*arguments)
    dtype = compute_dtype(x.logprobs)

    def array(tensor: Tensor | None) -> object:
        return None if tensor is None else tensor.detach().to(dtype).contiguous().numpy()

    g = torch.empty(x.logprobs.shape, dtype=dtype)
    h = torch.empty(x.logprobs.shape if config.ent_coef != 0 else 0, dtype=dtype)
    entries = torch.empty(1 + len(PPO_METRIC_NAMES), dtype=torch.float64)
    _C.ppo_loss(
        entries.numpy(),
        g.numpy(),
        h.numpy() if config.ent_coef != 0 else None,
        *(array(tensor) for tensor in x[:-1]),
        low=1 - config.clip_coef_low,
        high=1 + config.clip_coef_high,
        dual_clip=float("inf") if config.dual_clip is None else config.dual_clip,
        kl_coef=config.kl_coef,
        kl=1 + KL_ESTIMATORS.index(config.kl_estimator),
        ent_coef=config.ent_coef,
        correction=(None, "tis", "icepop").index(config.is_correction),
        is_cap=config.is_cap,
        is_low=config.is_low,
        is_high=config.is_high,
    )
    return entries[0].to(dtype, copy=True), g, h, entries[1:].float()


@ppo_loss_op.register_kernel("cuda")
def ppo_loss_triton(*arguments: Any) -> _Four:
    """As `ppo_loss_op`, in one launch."""
    x, config = _parse(arguments)
    in_torch = config.ratio_level == "sequence" or x.logprobs.dtype == torch.float64
    if in_torch or x.logprobs.shape[0] == 0:
        return ppo_loss_torch(*arguments)
    from fastppo_kernels.ppo_loss import ppo_loss

    from fastppo.ops._cuda import ppo_knobs

    return ppo_loss(*x[:-1], ppo_knobs(config))
