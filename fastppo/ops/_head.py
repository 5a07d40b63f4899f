"""The language-model head in parts: logits = hidden · weightᵀ + bias, and its gradients.

Shapes: N rows, H hidden, V vocabulary. Only one part of the (N, V) logits is alive at a time: a
chunk of rows (C, V), or in `_head_tiles` a tile of columns (N, W). Products run in the operands'
dtype (autocast's under autocast). Sums over parts are float32: bf16 sums lose small terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.ops._head_options import HeadOptions
from fastppo.ops._precision import compute_dtype

# Default bytes of one part of the logits. Larger parts make fewer, more efficient matrix products
# and fewer passes over what is summed; 8192 rows of 131072 bf16 logits are one part on a GPU.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 2 << 30}
LOW_MEMORY_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 1 << 28}
# A part is a multiple of this many rows or columns: matrix units work on such tiles.
MULTIPLE = 32
# Elements of a product that a CPU adds to a sum in another dtype: 256 MiB of float32.
SUM_ELEMENTS = 1 << 26


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Of hidden, weight and bias; None where not wanted."""


def product(a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
    """out = a·b, or out += a·b. Half-precision operands may have a float32 `out`: a GPU then rounds
    nothing to their dtype, a CPU rounds each product to it."""
    into_float32 = a.is_cuda and out.dtype == torch.float32 != a.dtype
    if not add:
        if out.dtype == a.dtype:
            torch.mm(a, b, out=out)
        elif into_float32:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            out.copy_(torch.mm(a, b))
    elif out.dtype == a.dtype:
        out.addmm_(a, b)
    elif into_float32:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        step = max(1, SUM_ELEMENTS // max(1, out.shape[1]))
        for start in range(0, out.shape[0], step):
            rows = slice(start, start + step)
            out[rows].add_(torch.mm(a[rows], b))


@dataclass(frozen=True, slots=True)
class Head:
    """Operands in the dtype of the product."""

    weight: Tensor
    bias: Tensor | None

    def logits(self, hidden: Tensor, out: Tensor, columns: slice = slice(None)) -> Tensor:
        """Logits of hidden (C, H) at some columns, written into `out`, whose dtype they have."""
        weight = self.weight[columns].t()
        bias = None if self.bias is None else self.bias[columns]
        if out.dtype == hidden.dtype:
            if bias is None:
                return torch.mm(hidden, weight, out=out)
            return torch.addmm(bias, hidden, weight, out=out)
        if hidden.is_cuda:
            torch.mm(hidden, weight, out_dtype=out.dtype, out=out)
        else:
            torch.mm(hidden.to(out.dtype), weight.to(out.dtype), out=out)
        return out if bias is None else out.add_(bias)


def head_operands(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Head]:
    """Hidden states and head in the dtype of the products."""
    return hidden.to(dtype), Head(weight.to(dtype), None if bias is None else bias.to(dtype))


def part_size(options: HeadOptions, device: torch.device, total: int, across: int) -> int:
    """How many of `total` rows (or columns) of `across` logits each make one part: equal parts, no
    short tail. A part is not larger where it also holds a gradient beside float32 logits, so that
    the same product gives the same log-probability with gradients and without."""
    budget = options.chunk_bytes
    if budget is None:
        defaults = LOW_MEMORY_CHUNK_BYTES if options.low_memory else CHUNK_BYTES
        budget = defaults.get(device.type, defaults["cuda"])
    bytes_each = options.dtype.itemsize
    if options.logits_dtype() != options.dtype:
        bytes_each += options.logits_dtype().itemsize
    most = max(1, budget // max(1, across * bytes_each))
    if most >= MULTIPLE:
        most -= most % MULTIPLE
        even = -(-total // -(-total // most))
        most = -(-even // MULTIPLE) * MULTIPLE
    return min(most, total)


class Part(NamedTuple):
    """Memory for one part of the logits."""

    logits: Tensor
    grad: Tensor
    """For their gradient, in the dtype of the products: `logits` itself where that is theirs."""

    def first_rows(self, count: int) -> Part:
        """Memory for fewer rows."""
        logits = self.logits[:count]
        return Part(logits, logits if self.grad is self.logits else self.grad[:count])

    def first_columns(self, count: int) -> Part:
        """Memory for fewer columns."""
        logits = self.logits[:, :count]
        return Part(logits, logits if self.grad is self.logits else self.grad[:, :count])


def part_buffer(x: Tensor, rows: int, columns: int, options: HeadOptions, grad: bool) -> Part:
    """Memory for (rows, columns) logits, and for their gradient where `grad` and it needs its own.

    On a GPU rows start at multiples of 16 elements: its loads are 16 bytes wide only then.
    """
    stride = -(-columns // 16) * 16 if x.is_cuda else columns
    dtype = options.logits_dtype()
    logits = x.new_empty((rows, stride), dtype=dtype)[:, :columns]
    if not grad or dtype == options.dtype:
        return Part(logits, logits)
    return Part(logits, x.new_empty((rows, stride), dtype=options.dtype)[:, :columns])


def chunks(
    x: Tensor, vocab: int, options: HeadOptions, *, grad: bool = False
) -> Iterator[tuple[slice, Part]]:
    """Slices of the rows of x (N, H), each with memory, reused, for its logits (C, V)."""
    n = x.shape[0]
    if n == 0:
        return
    size = part_size(options, x.device, n, vocab)
    buffer = part_buffer(x, size, vocab, options, grad)
    for start in range(0, n, size):
        stop = min(start + size, n)
        yield slice(start, stop), buffer.first_rows(stop - start)


class HeadGradients:
    """Gradients of hidden, weight and bias, summed over chunks of rows; None where not wanted.

    Args:
        x: (N, H) the hidden states of all chunks, in the dtype of the products.
        dtypes: of the three gradients. A weight gradient of several chunks is summed in float32,
            that of one chunk is written as it is.
    """

    def __init__(
        self, x: Tensor, head: Head, options: HeadOptions, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        (vocab, _), self._dtypes = head.weight.shape, dtypes
        self._x, self._head, self._sum_dtype = x, head, compute_dtype(x)
        self._one = part_size(options, x.device, x.shape[0], vocab) >= x.shape[0]
        self._new = x.shape[0] > 0
        self.hidden = x.new_empty(x.shape, dtype=dtypes[0]) if options.needs_hidden else None
        weight_dtype = dtypes[1] if self._one else self._sum_dtype
        make = x.new_empty if self._new else x.new_zeros
        weight = options.needs_weight
        self.weight = make(head.weight.shape, dtype=weight_dtype) if weight else None
        self.bias = x.new_zeros(vocab, dtype=self._sum_dtype) if options.needs_bias else None

    def add(self, rows: slice, logits_grad: Tensor) -> None:
        """Add the contribution of a chunk: logits_grad (C, V) in the dtype of the products."""
        if self.hidden is not None:
            product(logits_grad, self._head.weight, self.hidden[rows])
        if self.weight is not None:
            product(logits_grad.t(), self._x[rows], self.weight, add=not self._new)
        if self.bias is not None:
            self.bias.add_(logits_grad.sum(dim=0, dtype=self._sum_dtype))
        self._new = False

    def finish(self) -> Gradients:
        """In the dtypes wanted; zeros where no row contributed."""
        weight = None if self.weight is None else self.weight.to(self._dtypes[1])
        return self.hidden, weight, None if self.bias is None else self.bias.to(self._dtypes[2])


def gradient_dtypes(*inputs: Tensor | None) -> tuple[torch.dtype, ...]:
    """Of the gradients of (hidden, weight, bias); of a bias that is None, any."""
    return tuple(torch.float32 if x is None else x.dtype for x in inputs)


def present(gradients: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors only: what is not wanted is an empty one."""
    return tuple(like.new_empty(0) if g is None else g for g in gradients)


def wanted(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of `present`."""
    return [g if need else None for g, need in zip(gradients, needs, strict=True)]


def fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The shapes of `present`."""
    inputs = zip((hidden, weight, bias), needs, strict=True)
    return present(
        [x.new_empty(x.shape) if x is not None and n else None for x, n in inputs], weight
    )
