"""What a case is: an op with its inputs at some sizes, and the work of a call (work.py)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.profiling.meta import Cost
from fastppo.profiling.work import OpWork, Work, evaluate

Inputs = Mapping[str, Tensor]
Outputs = Mapping[str, Tensor]
Call = Callable[[], Outputs]
"""Ready to be timed: results by name."""

SIZE_NAMES = ("smoke", "cpu", "gpu")
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}
_AT_MOST = {"B": "N", "G": "B"}  # no sequence is empty, no group is larger than the batch


class Size:
    """How much there is to do: numbers by letter, and the dtype of matrices."""

    def __init__(self, dtype: torch.dtype = torch.float32, **numbers: int) -> None:
        self.dtype, self.numbers = dtype, numbers

    def __getitem__(self, letter: str) -> int:
        return self.numbers[letter]

    @property
    def text(self) -> str:
        """Such as "N=8192 V=151936 bf16"; rows of two results are matched by it."""
        return " ".join([*self._parts(), _DTYPES[self.dtype]])

    @property
    def argument(self) -> str:
        """Such as "N=8192,V=151936", as `Case.size` reads it."""
        return ",".join(self._parts())

    @property
    def letters(self) -> dict[str, int]:
        """What formulas need."""
        return {**self.numbers, "itemsize": self.dtype.itemsize}

    def cost(self, work: Work) -> Cost:
        """Of a call at this size."""
        return Cost(work.bytes(self.letters), work.flops(self.letters), self.half)

    @property
    def half(self) -> bool:
        """Whether matrices are multiplied, in half precision."""
        return "H" in self.numbers and self.dtype == torch.bfloat16

    def _parts(self) -> list[str]:
        return [f"{letter}={number}" for letter, number in self.numbers.items()]


class Count(NamedTuple):
    """Bytes or operations of one call: the formula as people read it, and as a function."""

    formula: str
    of: Callable[[Size], float]

    @classmethod
    def read(cls, *formulas: str, text: str = "") -> Count:
        """The sum of formulas in letters of the size and `itemsize`, bytes of its dtype."""

        def of(size: Size) -> float:
            return sum(evaluate(formula, size.letters) for formula in formulas)

        return cls(text or " + ".join(formulas), of)


class Passes(NamedTuple):
    """A call, and the gradients of its leaves from its results; None: it has none."""

    forward: Call
    backward: Callable[[Outputs], Outputs] | None

    def run(self) -> Outputs:
        """Results and gradients, without the graph between them."""
        outputs = self.forward()
        found = {name: x.detach() for name, x in outputs.items()}
        return found if self.backward is None else {**found, **self.backward(outputs)}


Prepare = Callable[[Inputs, Size], Call]


def passes(
    prepare: Prepare,
    leaves: Sequence[str],
    upstream: Mapping[str, str],
    inputs: Inputs,
    size: Size,
) -> Passes:
    """A call with its backward pass.

    Args:
        prepare: makes the call from inputs.
        leaves: inputs that get a gradient, which is returned as "grad NAME".
        upstream: results that are differentiated, each with the input that holds the gradient
            coming in. Empty: the result "loss", with gradient 1.
        inputs, size: of it.
    """
    own = dict(inputs) | {name: inputs[name].detach().requires_grad_() for name in leaves}
    targets = [own[name] for name in leaves]
    incoming = [own[name] for name in upstream.values()] or None

    def backward(outputs: Outputs) -> Outputs:
        roots = [outputs[name] for name in upstream or ("loss",)]
        grads = torch.autograd.grad(roots, targets, incoming)
        return {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}

    return Passes(prepare(own, size), backward if leaves else None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """An op with its inputs.

    Args:
        name: such as "gae".
        sizes: by name: smoke (milliseconds, for tests), cpu, gpu.
        inputs: (size, device, seed) → tensors by name. Equal seeds give equal inputs.
        prepare: a call of the op from inputs, which it leaves as they are.
        work: what a call must do.
        leaves, upstream: see `passes`.
    """

    name: str
    sizes: Mapping[str, Sequence[Size]]
    inputs: Callable[[Size, torch.device, int], Inputs]
    prepare: Prepare
    work: OpWork
    leaves: Sequence[str] = ()
    upstream: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_matrices(self) -> bool:
        """Whether the dtype of a size means anything."""
        return any("V" in size.numbers for size in self.sizes["smoke"])

    def size(self, text: str, default: str, dtype: torch.dtype) -> Size:
        """A size for one run.

        Args:
            text: smoke, cpu or gpu, whose first size it is, or numbers such as "N=8192,V=32000";
                what they leave out is that of `default`. Empty: `default`.
            default: one of these names.
            dtype: of matrices.

        Raises:
            ValueError: neither, or a number that the op does not depend on, or that is too small.
        """
        if not text or text in SIZE_NAMES:
            return Size(dtype, **self.sizes[text or default][0].numbers)
        numbers = dict(self.sizes[default][0].numbers)
        for part in text.split(","):
            found = re.fullmatch(r"([A-Z])=(\d+)", part.strip())
            if found is None or found[1] not in numbers or int(found[2]) < 1:
                expected = ",".join(f"{letter}=NUMBER" for letter in numbers)
                raise ValueError(
                    f"--size: expected one of {', '.join(SIZE_NAMES)}, or numbers ≥ 1 for "
                    f"{self.name} ({expected}), got {text!r}"
                )
            numbers[found[1]] = int(found[2])
        size = Size(dtype, **numbers)
        for few, many in _AT_MOST.items():
            if numbers.get(few, 0) > numbers.get(many, numbers.get(few, 0)):
                raise ValueError(f"--size: expected {many} ≥ {few}, got {size.argument}")
        return size
