"""AdamW whose clipping and non-finite check cost no host sync and no extra pass over the gradients.

torch's fused AdamW reads two optional device scalars: `grad_scale`, by which it divides every
gradient, and `found_inf`, which makes it leave parameters and state alone. Gradient clipping
divides by max(1, ‖g‖ / max_grad_norm), so both are set from one norm
(https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html, `fused`).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastppo.config import PPOConfig


def make_adamw(parameters: Iterable[nn.Parameter], config: PPOConfig) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only; norms, biases and value heads have none."""
    params = list(parameters)
    decayed = [p for p in params if p.ndim >= 2 and p.shape[0] > 1]
    plain = [p for p in params if not (p.ndim >= 2 and p.shape[0] > 1)]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps, fused=True
    )


def clipped_step(optimizer: torch.optim.Optimizer, max_grad_norm: float) -> tuple[Tensor, Tensor]:
    """Clip to `max_grad_norm` (0: off), step unless a gradient is non-finite, drop the gradients.

    Returns:
        The gradient norm before clipping, fp32 (), and 1.0 where the step was skipped, fp32 ().
        Both stay on the device.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([g for g in grads if g is not None]).float()
    found_inf = norm.isfinite().logical_not().float()
    optimizer.grad_scale = (norm / max_grad_norm).clamp(min=1.0) if max_grad_norm else None  # type: ignore[attr-defined]  # read by fused AdamW
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by fused AdamW
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, found_inf
