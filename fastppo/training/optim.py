"""AdamW whose clipping and non-finite check cost no host sync and no extra pass over the gradients.

torch's fused AdamW reads two optional device scalars: `grad_scale`, by which it divides every
gradient, and `found_inf`, which makes it leave parameters and state alone. Gradient clipping
divides by max(1, ‖g‖ / max_grad_norm), so both are set from one norm
(https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html, `fused`).

A step is taken by all optimisers or by none of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastppo.training.config import OptimConfig

SMALLEST_EPS = 1e-30
"""A normal fp32 number, by which 0 can be divided."""


def make_adamw(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW with weight decay on matrices only; norms, biases and value heads have none.

    Its state is allocated here, so that a step needs no memory and a checkpoint is always whole.
    """
    params = list(parameters)
    decayed = [p for p in params if p.ndim >= 2 and p.shape[0] > 1]
    plain = [p for p in params if not (p.ndim >= 2 and p.shape[0] > 1)]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if group
    ]
    eps = max(config.adam_eps, SMALLEST_EPS)
    optimizer = torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=config.adam_betas, eps=eps, fused=True
    )
    for p in params:
        p.grad = torch.zeros_like(p)
    apply_step([optimizer], [torch.ones((), device=params[0].device)], 0.0, skip=True)
    return optimizer


def check_shapes(*optimizers: torch.optim.Optimizer | None) -> None:
    """Refuse parameters whose moments have another shape: fused AdamW would write past them.

    Raises:
        ValueError: a parameter was resized after `make_adamw`.
    """
    for optimizer in optimizers:
        for p, state in optimizer.state.items() if optimizer is not None else ():
            if p.shape != state["exp_avg"].shape:
                raise ValueError(
                    f"model: expected a parameter of shape {tuple(state['exp_avg'].shape)}, as "
                    f"when its optimiser was made, got {tuple(p.shape)}. Resize the model first, "
                    "then make a new PPOStep from it"
                )


def grad_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """‖g‖₂ over all parameters of the optimiser that have a gradient, fp32 (), on the device."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return torch.nn.utils.get_total_norm([g for g in grads if g is not None]).float()


def apply_step(
    optimizers: Sequence[torch.optim.Optimizer],
    norms: Sequence[Tensor],
    max_grad_norm: float,
    skip: Tensor | bool,
) -> None:
    """Clip each optimiser's gradients to `max_grad_norm` (0: off), step, drop the gradients.

    A call that ran out of memory can be repeated: what needs memory comes before the first step,
    and an optimiser that has stepped has no gradients left.

    Args:
        optimizers: made by `make_adamw`.
        norms: the `grad_norm` of each, fp32 ().
        max_grad_norm: largest norm of one optimiser's gradients.
        skip: () where true, no parameter and no state changes.
    """
    for optimizer, norm in zip(optimizers, norms, strict=True):
        found_inf = torch.as_tensor(skip, device=norm.device).float()
        optimizer.grad_scale = (norm / max_grad_norm).clamp(min=1.0) if max_grad_norm else None  # type: ignore[attr-defined]  # read by fused AdamW
        optimizer.found_inf = found_inf  # type: ignore[attr-defined]  # read by fused AdamW
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
