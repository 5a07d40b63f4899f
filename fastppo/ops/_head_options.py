"""How the language-model head is evaluated: the options of one call, and the checks of its
arguments.

Shapes: N rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastppo.ops._checks import (
    FLOATS,
    INTS,
    check_softcap,
    check_temperature,
    check_tensor,
)
from fastppo.ops._precision import autocast_dtype


class HeadOptions(NamedTuple):
    """How the head is evaluated and which gradients are wanted: the last arguments of the linear
    ops, in the order of OPTIONS_SCHEMA."""

    temperature: float
    temperatures: Tensor | None
    """(N,), in place of the number."""
    softcap: float | None
    chunk_bytes: int | None
    low_memory: bool
    fp32_logits: bool
    dtype: torch.dtype
    """Of the operands of every product."""
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def needs_grad(self) -> bool:
        return any(self.needs)

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Whether the gradients of hidden, weight and bias are wanted."""
        return self.needs_hidden, self.needs_weight, self.needs_bias

    def logits_dtype(self) -> torch.dtype:
        """float32 under fp32_logits where the operands have fewer digits, else theirs."""
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if half and self.fp32_logits else self.dtype

    def temperature_at(self, rows: slice | Tensor) -> float | Tensor:
        """The temperature of some rows."""
        return self.temperature if self.temperatures is None else self.temperatures[rows]

    def select(self, rows: Tensor) -> HeadOptions:
        """The options of some rows."""
        if self.temperatures is None:
            return self
        return self._replace(temperatures=self.temperatures[rows])


OPTIONS_SCHEMA = (
    "float temperature, Tensor? temperatures, float? softcap, SymInt? chunk_bytes, "
    "bool low_memory, bool fp32_logits, ScalarType dtype, "
    "bool needs_hidden, bool needs_weight, bool needs_bias"
)


def options_of(arguments: Sequence[Any]) -> HeadOptions:
    """The options at the end of the arguments of an op."""
    return HeadOptions(*arguments[-len(HeadOptions._fields) :])


def check_head(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    chunk_bytes: int | None,
) -> None:
    """Raise unless the arguments of a linear op fit together (target ids are checked apart)."""
    check_tensor("hidden", hidden, ("N", "H"), FLOATS)
    check_tensor("weight", weight, ("V", hidden.shape[1]), FLOATS, hidden.device)
    check_tensor("targets", targets, (hidden.shape[0],), INTS, hidden.device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), FLOATS, hidden.device)
    same = all(t.dtype == hidden.dtype for t in (weight, bias) if t is not None)
    if not same and not torch.is_autocast_enabled(hidden.device.type):
        dtypes = f"hidden {hidden.dtype}, weight {weight.dtype}"
        dtypes += "" if bias is None else f", bias {bias.dtype}"
        raise TypeError(f"hidden, weight, bias: expected one dtype outside autocast, got {dtypes}")
    check_temperature(temperature, targets)
    check_softcap(softcap)
    if chunk_bytes is not None and not chunk_bytes > 0:
        raise ValueError(f"chunk_bytes: expected None or a number > 0, got {chunk_bytes}")


def head_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    chunk_bytes: int | None,
    low_memory: bool,
    fp32_logits: bool,
) -> HeadOptions:
    """Options of one call; no gradient is wanted under torch.no_grad(). Autocast is asked here
    because torch.compile runs its graphs outside it."""
    recording = torch.is_grad_enabled()
    return HeadOptions(
        temperature=1.0 if isinstance(temperature, Tensor) else float(temperature),
        temperatures=temperature.detach() if isinstance(temperature, Tensor) else None,
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        low_memory=low_memory,
        fp32_logits=fp32_logits,
        dtype=autocast_dtype(hidden),
        needs_hidden=recording and hidden.requires_grad,
        needs_weight=recording and weight.requires_grad,
        needs_bias=recording and bias is not None and bias.requires_grad,
    )
