"""The loss of `ppo_loss` with its gradients and metrics as one torch op, by device.

C++ on the CPU and one Triton launch on CUDA, both for token-level ratios. A ratio per sequence,
float64 on CUDA (numbers reach a kernel as float32) and other devices run `ppo_rows` in torch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo import _C
from fastppo.ops._ppo_loss_config import CONFIG_SCHEMA, PPOLossConfig, config_of
from fastppo.ops._ppo_metrics import PPO_METRIC_NAMES
from fastppo.ops._ppo_rows import PPOInputs, ppo_rows
from fastppo.ops._precision import compute_dtype
from fastppo.ops.kl_penalty import KL_ESTIMATORS

_Four = tuple[Tensor, Tensor, Tensor, Tensor]


class _Arguments(NamedTuple):
    """The op's arguments, taken apart."""

    logprobs: Tensor
    entropy: Tensor | None
    inputs: PPOInputs
    cu_seqlens: Tensor | None
    config: PPOLossConfig


def _parse(logprobs: Tensor, entropy: Tensor | None, *rest: Any) -> _Arguments:
    """`rest`: the fields of PPOInputs, cu_seqlens, the fields of the config."""
    count = len(PPOInputs._fields)
    inputs, (cu_seqlens, *config) = PPOInputs(*rest[:count]), rest[count:]
    return _Arguments(logprobs, entropy, inputs, cu_seqlens, config_of(config))


def ppo_loss_torch(*arguments: Any) -> _Four:
    """As `ppo_loss_op`, on any device."""
    x = _parse(*arguments)
    rows = ppo_rows(x.logprobs, x.entropy, x.inputs, x.config, x.cu_seqlens)
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
    x = _parse(*arguments)
    dtype = compute_dtype(x.logprobs)
    g = x.logprobs.new_empty(x.logprobs.shape, dtype=dtype)
    h = torch.empty_like(g) if x.config.ent_coef != 0 else g.new_empty(0)
    return g.new_empty(()), g, h, g.new_empty(len(PPO_METRIC_NAMES), dtype=torch.float32)


@ppo_loss_op.register_kernel("cpu")
def ppo_loss_cpp(*arguments: Any) -> _Four:
    """As `ppo_loss_op`, in one pass over the tokens."""
    x = _parse(*arguments)
    config = x.config
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
        *(array(tensor) for tensor in (x.logprobs, x.entropy, *x.inputs)),
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
    x = _parse(*arguments)
    in_torch = x.config.ratio_level == "sequence" or x.logprobs.dtype == torch.float64
    if in_torch or x.logprobs.shape[0] == 0:
        return ppo_loss_torch(*arguments)
    from fastppo_kernels.ppo_loss import ppo_loss
    from fastppo_kernels.ppo_math import PPOInputs as KernelInputs

    from fastppo.ops._cuda import ppo_knobs

    return ppo_loss(x.logprobs, x.entropy, KernelInputs(*x.inputs), ppo_knobs(x.config))
