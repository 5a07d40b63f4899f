"""What a benchmark is: a case, its sizes, and the providers that compute the same thing.

A file in fastppo/benchmarks/cases defines `CASES`, a tuple of `Case`; that is all it takes to be
found. The smallest complete one is cases/gae.py.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Inputs = Mapping[str, Tensor]
Outputs = Mapping[str, Tensor]
Call = Callable[[], Outputs]
"""One call of a provider, ready to be timed: its results by name, gradients among them."""

SIZE_NAMES = ("smoke", "cpu", "gpu")
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float64: "fp64"}


class Size:
    """How much a case gets to do: numbers by letter, and the dtype of its matrices."""

    def __init__(self, dtype: torch.dtype = torch.float32, **numbers: int) -> None:
        self.dtype, self.numbers = dtype, numbers

    def __getitem__(self, letter: str) -> int:
        return self.numbers[letter]

    @property
    def text(self) -> str:
        """Such as "N=8192 V=151936 bf16"; rows of two results are matched by it."""
        numbers = [f"{letter}={number}" for letter, number in self.numbers.items()]
        return " ".join([*numbers, _DTYPES[self.dtype]])


class Count(NamedTuple):
    """Bytes or operations of one call: the formula as people read it, and as a function."""

    formula: str
    of: Callable[[Size], float]


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way of computing a case.

    Args:
        prepare: makes a call from inputs, which the call must leave as they are. Everything that is
            not part of the work (compiling, laying out) happens here.
        needs: modules that must be importable.
        devices: device types it runs on.
        omits: results of the reference that it cannot give, each with the reason.
        tolerance: error allowed instead of what follows from the baseline's, where this provider
            rounds more; say why in the note.
        torch_memory: its memory comes from torch's allocator; if not, it is not measured.
        note: what a reader of the table should know.
    """

    prepare: Callable[[Inputs, Size], Call]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    omits: Mapping[str, str] = field(default_factory=dict)
    tolerance: float | None = None
    torch_memory: bool = True
    note: str = ""

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot run here; None if it can."""
        for name in self.needs:
            if importlib.util.find_spec(name.partition(".")[0]) is None:
                return f"{name} is not installed"
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """Something worth timing.

    Args:
        name: such as "gae".
        sizes: by name: smoke (milliseconds, for tests), cpu, gpu.
        inputs: (size, device, seed) → tensors by name. Equal seeds give equal inputs.
        reference: the right answer, from inputs whose floating tensors are float64.
        providers: by name.
        baseline: name of the provider in plain torch, in the same dtype, whose error against the
            reference the others are held to (check.py).
        bytes, flops: what one call must at least read and write, and compute.
        launch_bound: on CUDA a call is so short that it is timed as a CUDA graph.
        counted: (outputs, inputs) → the part of the outputs that is compared, where some of
            it means nothing, such as what stands at masked tokens. None: all.
        axis: of a scaling case, the letter of Size that grows; None: no scaling.
    """

    name: str
    sizes: Mapping[str, Sequence[Size]]
    inputs: Callable[[Size, torch.device, int], Inputs]
    reference: Callable[[Inputs, Size], Outputs]
    providers: Mapping[str, Provider]
    baseline: str
    bytes: Count
    flops: Count
    launch_bound: bool = False
    counted: Callable[[Outputs, Inputs], Outputs] | None = None
    axis: str | None = None

    def __post_init__(self) -> None:
        if self.baseline not in self.providers:
            raise ValueError(f"{self.name}: baseline {self.baseline!r} is not among its providers")
        if unknown := set(self.sizes) - set(SIZE_NAMES):
            raise ValueError(f"{self.name}: expected sizes {SIZE_NAMES}, got {sorted(unknown)}")


def forward_backward(
    function: Callable[[Inputs, Size], Outputs],
    leaves: Sequence[str],
    upstream: Mapping[str, str] | None = None,
) -> Callable[[Inputs, Size], Call]:
    """A `prepare` that runs a function and differentiates it.

    Args:
        function: results by name from inputs.
        leaves: inputs that get a gradient, which is returned as "grad NAME".
        upstream: results that are differentiated, each with the input that holds the gradient
            coming in. None: the result "loss", with gradient 1.
    """

    def prepare(inputs: Inputs, size: Size) -> Call:
        own = dict(inputs) | {name: inputs[name].detach().requires_grad_() for name in leaves}
        targets = [own[name] for name in leaves]

        def call() -> Outputs:
            outputs = function(own, size)
            roots = [outputs[name] for name in upstream or ("loss",)]
            incoming = [own[name] for name in upstream.values()] if upstream else None
            grads = torch.autograd.grad(roots, targets, incoming)
            found = {name: x.detach() for name, x in outputs.items()}
            return found | {f"grad {n}": g for n, g in zip(leaves, grads, strict=True)}

        return call

    return prepare


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def all_cases() -> dict[str, Case]:
    """Every case by name, in the order of the files' names."""
    from fastppo.benchmarks import cases

    found: dict[str, Case] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(cases.__path__)):
        for case in importlib.import_module(f"{cases.__name__}.{module}").CASES:
            if case.name in found:
                raise ValueError(f"two cases are named {case.name!r}")
            found[case.name] = case
    return found


def select_cases(names: Sequence[str]) -> list[Case]:
    """Cases by name; all of them for no name.

    Raises:
        ValueError: a name that is not one; the nearest is suggested.
    """
    known = all_cases()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"cases: unknown case {name!r}.{hint} Known: {', '.join(known)}")
    return [known[name] for name in names or known]
