"""The language-model head in row chunks: logits = hidden · weightᵀ + bias, and its gradients.

Shapes: N rows, H hidden, V vocabulary, C rows of one chunk. Only one (C, V) chunk of logits is
alive at a time. Products run in the operands' dtype (autocast's under autocast); the weight and
bias gradients are summed over chunks in float32, because bf16 sums lose small terms.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastppo.ops._checks import (
    FLOATS,
    INTS,
    check_softcap,
    check_temperature,
    check_tensor,
)
from fastppo.ops._precision import autocast_dtype, compute_dtype

# Default bytes of one chunk of logits. Larger chunks make fewer, more efficient matrix products and
# fewer passes over the float32 weight gradient.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
# A chunk is a multiple of this many rows: matrix units work on such tiles.
ROW_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadOptions:
    """How the head is evaluated and which gradients are wanted."""

    temperature: float | Tensor
    softcap: float | None
    chunk_bytes: int | None
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool

    @property
    def needs_grad(self) -> bool:
        return self.needs_hidden or self.needs_weight or self.needs_bias

    def temperature_at(self, rows: slice | Tensor) -> float | Tensor:
        """The temperature of some rows."""
        return self.temperature[rows] if isinstance(self.temperature, Tensor) else self.temperature


@dataclass(frozen=True, slots=True)
class Head:
    """Operands in the dtype of the product."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """(C, V) logits of hidden (C, H), written into `out`."""
        if self.bias is None:
            return torch.mm(hidden, self.weight.t(), out=out)
        return torch.addmm(self.bias, hidden, self.weight.t(), out=out)


def head_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Head]:
    """Hidden states and head cast to the dtype torch would multiply in here."""
    dtype = autocast_dtype(hidden)
    return hidden.to(dtype), Head(weight.to(dtype), None if bias is None else bias.to(dtype))


def chunks(hidden: Tensor, vocab: int, chunk_bytes: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Row slices of hidden (N, H), each with a (C, V) buffer for its logits (one buffer,
    reused)."""
    n = hidden.shape[0]
    if n == 0:
        return
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(hidden.device.type, 1 << 30)
    most = max(1, chunk_bytes // max(1, vocab * hidden.dtype.itemsize))
    if most >= ROW_MULTIPLE:
        most -= most % ROW_MULTIPLE
        even = -(-n // -(-n // most))  # equal chunks, no short tail
        most = -(-even // ROW_MULTIPLE) * ROW_MULTIPLE
    # On a GPU rows start at multiples of 16 elements: its loads are 16 bytes wide only then.
    stride = -(-vocab // 16) * 16 if hidden.is_cuda else vocab
    buffer = hidden.new_empty((min(most, n), stride))[:, :vocab]
    for start in range(0, n, most):
        stop = min(start + most, n)
        yield slice(start, stop), buffer[: stop - start]


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks; None where not wanted."""

    def __init__(self, hidden: Tensor, head: Head, options: HeadOptions) -> None:
        self.hidden = torch.empty_like(hidden) if options.needs_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self._needs_weight, self._needs_bias = options.needs_weight, options.needs_bias
        self._x, self._head, self._dtype = hidden, head, compute_dtype(hidden)

    def add(self, rows: slice, logits_grad: Tensor) -> None:
        """Add the contribution of a chunk: logits_grad (C, V) in the dtype of the product."""
        if self.hidden is not None:
            torch.mm(logits_grad, self._head.weight, out=self.hidden[rows])
        if self._needs_weight:
            transposed, x = logits_grad.t(), self._x[rows]
            if x.is_cuda and x.dtype != self._dtype:
                self._add_weight_in_float32(transposed, x)
            elif self.weight is None:
                self.weight = torch.mm(transposed, x).to(self._dtype)
            elif x.dtype == self._dtype:
                self.weight.addmm_(transposed, x)
            else:
                self.weight.add_(torch.mm(transposed, x))
        if self._needs_bias:
            bias = logits_grad.sum(dim=0, dtype=self._dtype)
            self.bias = bias if self.bias is None else self.bias.add_(bias)

    def _add_weight_in_float32(self, transposed: Tensor, x: Tensor) -> None:
        """cuBLAS multiplies half-precision matrices into float32; chunks add up in float32."""
        product = torch.mm(transposed, x, out_dtype=self._dtype)
        self.weight = product if self.weight is None else self.weight.add_(product)

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of (hidden, weight, bias); zeros where wanted and no row contributed."""
        if self._needs_weight and self.weight is None:
            self.weight = torch.zeros_like(self._head.weight, dtype=self._dtype)
        if self._needs_bias and self.bias is None:
            self.bias = self._x.new_zeros(self._head.weight.shape[0], dtype=self._dtype)
        return self.hidden, self.weight, self.bias


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
) -> HeadOptions:
    """Options of one call; no gradient is wanted under torch.no_grad()."""
    recording = torch.is_grad_enabled()
    return HeadOptions(
        temperature=temperature.detach() if isinstance(temperature, Tensor) else float(temperature),
        softcap=softcap,
        chunk_bytes=chunk_bytes,
        needs_hidden=recording and hidden.requires_grad,
        needs_weight=recording and weight.requires_grad,
        needs_bias=recording and bias is not None and bias.requires_grad,
    )
