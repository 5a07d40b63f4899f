"""Zero mean and unit variance over the valid entries.

    y = (x − mean)·rsqrt(var + 1e−8)      var unbiased: Σ(x − mean)² / (n − 1)
    shift_mean=False adds the mean back, which keeps the sign of rewards

Source: `masked_whiten` of TRL and verl. Theirs divides by zero for n = 1; here n < 2 has variance
0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.ops._checks import check_tensor
from fastppo.ops._precision import compute_dtype

EPS = 1e-8


def whiten_reference(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """The formula over the valid entries picked out one by one."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    out = torch.zeros(x.shape, dtype=compute_dtype(x), device=x.device)
    v = x[keep].to(out.dtype)
    if v.numel() == 0:
        return out
    var = v.var() if v.numel() > 1 else v.new_zeros(())
    out[keep] = (v - v.mean()) * torch.rsqrt(var + EPS) + (0.0 if shift_mean else v.mean())
    return out


@torch.library.custom_op(
    "fastppo::whiten",
    mutates_args=(),
    schema="(Tensor x, Tensor? mask, bool shift_mean) -> Tensor",
)
def _whiten(x: Tensor, mask: Tensor | None, shift_mean: bool) -> Tensor:
    """In torch, without host syncs: masked sums instead of picked entries."""
    x = x.to(compute_dtype(x))
    valid = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    n = valid.sum().to(x.dtype)
    v = torch.where(valid, x, 0.0)
    mean = v.sum() / n.clamp(min=1.0)
    centred = torch.where(valid, v - mean, 0.0)
    # The rounding of the mean, times rsqrt(1e-8) = 1e4, would show where all entries are equal.
    residue = centred.sum() / n.clamp(min=1.0)
    centred = torch.where(valid, centred - residue, 0.0)
    var = centred.square().sum() / (n - 1).clamp(min=1.0)
    out = centred * torch.rsqrt(var + EPS)
    return out if shift_mean else torch.where(valid, out + mean, 0.0)


@_whiten.register_kernel("cuda")
def whiten_triton(x: Tensor, mask: Tensor | None, shift_mean: bool) -> Tensor:
    """Two launches up to a million entries, no host sync."""
    from fastppo_kernels.whiten import whiten as launch_whiten

    return launch_whiten(x, mask, shift_mean, EPS)


@_whiten.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape, dtype=compute_dtype(x))


def whiten(x: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True) -> Tensor:
    """Whitened copy of `x` over all valid entries together.

    Args:
        x: (N,) floating. Whiten over the whole rollout batch, not a micro-batch.
        mask: (N,) bool, False where `x` does not count (it may be NaN there); None: all count.
        shift_mean: False keeps the mean, for rewards.

    Returns:
        (N,) float32 without gradient; masked entries are 0. One valid entry becomes 0 (or stays,
        without the shift).

    Raises:
        TypeError, ValueError: wrong dtype, shape or device.
    """
    check_tensor("x", x, ("N",))
    if mask is not None:
        check_tensor("mask", mask, (x.shape[0],), (torch.bool,), x.device)
    out: Tensor = _whiten(x.detach(), mask, shift_mean)
    return out
