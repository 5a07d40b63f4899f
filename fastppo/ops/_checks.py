"""Argument checks shared by the ops: every message names the argument, what was expected, what
came.

Checks that read tensor *values* would make the host wait for a GPU. They run on CPU tensors, and on
other devices only under `torch.autograd.set_detect_anomaly(True)`, torch's own debug switch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTS = (torch.int32, torch.int64)


def may_read_values(x: Tensor) -> bool:
    """True where looking at values costs no device sync, or where the user asked for debugging.
    Never under torch.compile: there are no values to look at while it traces."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or torch.is_anomaly_enabled()


def check_tensor(
    name: str,
    x: Tensor,
    shape: tuple[int | str, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    device: torch.device | None = None,
) -> None:
    """Raise unless `x` is a tensor of this shape (a string stands for any size), dtype and
    device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in dtypes:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected dtype {expected}, got {got}; convert it first")
    fits = x.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, x.shape, strict=True)
    )
    if not fits:
        expected = "(" + ", ".join(str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name}: expected device {device}, got {x.device}; move it there first")


def check_rows(name: str, x: Tensor | None, like: Tensor) -> None:
    """Raise unless `x` is None or a floating (N,) tensor beside `like` (N,)."""
    if x is not None:
        check_tensor(name, x, (like.shape[0],), FLOATS, like.device)


def check_targets(targets: Tensor, num_classes: int) -> None:
    """Raise IndexError-like ValueError when a target lies outside [0, num_classes)."""
    if targets.numel() == 0 or not may_read_values(targets):
        return
    low, high = (int(v) for v in targets.aminmax())
    if low < 0 or high >= num_classes:
        bad = low if low < 0 else high
        raise ValueError(
            f"targets: expected token ids in [0, {num_classes}), got {bad}; "
            "drop masked rows or give them any valid id"
        )


def check_temperature(temperature: float | Tensor, like: Tensor) -> None:
    """Raise unless the temperature is a positive number or a positive floating (N,) tensor."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (like.shape[0],), FLOATS, like.device)
        if may_read_values(temperature) and not bool((temperature > 0).all()):
            raise ValueError(f"temperature: expected values > 0, got {float(temperature.min())}")
    elif not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")


def check_total(total: float | Tensor) -> None:
    """Raise unless total is a number >= 0 or a () tensor of one."""
    if isinstance(total, Tensor):
        if total.dim() != 0:
            raise ValueError(
                f"total: expected a number or a () tensor, got shape {tuple(total.shape)}"
            )
        if not may_read_values(total):
            return
    if not float(total) >= 0:
        raise ValueError(f"total: expected a count >= 0, got {float(total)}")


def check_num_live(num_live: int, keep: Tensor) -> None:
    """Raise unless so many of (N,) bool are True."""
    if not 0 <= num_live <= keep.shape[0]:
        raise ValueError(f"num_live: expected a number in [0, {keep.shape[0]}], got {num_live}")
    if may_read_values(keep) and num_live != (count := int(keep.count_nonzero())):
        raise ValueError(
            f"num_live: expected {count}, the number of rows that count, got {num_live}"
        )


def is_one(x: Tensor) -> bool:
    """Whether a () tensor is 1, where looking costs no device sync and there is a value to look at
    (not under torch.compile); else False."""
    return type(x) is Tensor and may_read_values(x) and x.item() == 1.0


def check_softcap(softcap: float | None) -> None:
    """Raise unless softcap is None or a positive number."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap: expected None or a number > 0, got {softcap}")


def check_cu_seqlens(cu_seqlens: Tensor, num_rows: int, device: torch.device) -> None:
    """Raise unless cu_seqlens is (B+1,) int, starts at 0, never falls and ends at num_rows."""
    check_tensor("cu_seqlens", cu_seqlens, ("B+1",), INTS, device)
    if cu_seqlens.numel() == 0:
        raise ValueError("cu_seqlens: expected shape (B+1,) with at least the entry 0, got (0,)")
    if not may_read_values(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0:
        raise ValueError(f"cu_seqlens: expected cu_seqlens[0] = 0, got {int(cu_seqlens[0])}")
    if int(cu_seqlens[-1]) != num_rows:
        raise ValueError(
            f"cu_seqlens: expected the last entry to be the number of rows {num_rows}, "
            f"got {int(cu_seqlens[-1])}"
        )
    falls = cu_seqlens.diff() < 0
    if bool(falls.any()):
        i = int(falls.nonzero()[0])
        raise ValueError(
            f"cu_seqlens: expected non-decreasing offsets, got cu_seqlens[{i}] = "
            f"{int(cu_seqlens[i])} > cu_seqlens[{i + 1}] = {int(cu_seqlens[i + 1])}"
        )


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor) -> None:
    """Raise unless max_seqlen is None or at least the length of every sequence."""
    if max_seqlen is None:
        return
    if not isinstance(max_seqlen, int | torch.SymInt):
        raise TypeError(f"max_seqlen: expected an int, got {type(max_seqlen).__name__}")
    if cu_seqlens.numel() < 2 or not may_read_values(cu_seqlens):
        return
    longest = int(cu_seqlens.diff().max())
    if max_seqlen < longest:
        raise ValueError(
            f"max_seqlen: expected at least {longest}, the length of the longest sequence in "
            f"cu_seqlens, got {max_seqlen}"
        )


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_unit_interval(name: str, value: float) -> None:
    """Raise unless 0 <= value <= 1."""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_discount(
    name: str, value: float | Tensor, num_sequences: int, device: torch.device
) -> None:
    """Raise unless value is a number in [0, 1] or a floating (B,) tensor of them."""
    if not isinstance(value, Tensor):
        check_unit_interval(name, value)
        return
    check_tensor(name, value, (num_sequences,), FLOATS, device)
    if may_read_values(value) and not bool(((value >= 0) & (value <= 1)).all()):
        raise ValueError(
            f"{name}: expected values in [0, 1], got {float(value.min())} to {float(value.max())}"
        )
