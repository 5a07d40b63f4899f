"""Which device a run uses, and in which precision it computes there."""

from __future__ import annotations

from typing import Literal

import torch


def resolve_device(name: str) -> torch.device:
    """The device named in a configuration; "auto" is CUDA where there is one.

    Raises:
        ValueError: no device's name, or a CUDA device on a machine without one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cuda, cuda:1, cpu or auto, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a device of this machine, got {name!r} without CUDA")
    return device


def resolve_precision(name: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """The compute precision; "auto" is bf16 where matrix products in bf16 are faster than fp32."""
    if name != "auto":
        return "bf16" if name == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def describe(device: torch.device) -> str:
    """The hardware, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    isa = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {torch.get_num_threads()} threads, {isa}"
