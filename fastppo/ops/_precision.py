"""Where the ops compute: float32 whatever the input dtype, float64 for float64 inputs.

bf16 log-probabilities make the PPO ratio differ from 1 on unchanged weights, so nothing after the
logits is ever computed in half precision, autocast or not. float64 passes through for gradcheck.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for a float64 tensor, float32 for every other one."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> torch.autocast:
    """Context in which torch leaves dtypes alone."""
    return torch.autocast(device_type=device.type, enabled=False)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which torch would multiply `x` here: autocast's where it is on, else its own."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
