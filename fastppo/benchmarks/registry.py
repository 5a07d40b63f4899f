"""What a benchmark is: a case or something larger, and the providers that compute the same thing.

A file in fastppo/benchmarks/cases defines `BENCHMARKS`, a tuple of `Benchmark`; that is all that it
takes to be found. The smallest complete one is cases/gae_classic.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastppo.options import nearest
from fastppo.profiling.case import SIZE_NAMES, Case, Count, Inputs, Outputs, Prepare, Size, passes


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

    prepare: Prepare
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
class Benchmark:
    """Something worth timing: an op's case, or more than one op does, with who computes it.

    Args:
        name: such as "gae".
        sizes, inputs: as of a case.
        reference: the right answer, from inputs whose floating tensors are float64.
        providers: by name.
        baseline: name of the provider in plain torch, in the same dtype, whose error against the
            reference the others are held to (check.py).
        bytes, flops: what one call must at least read and write, and compute.
        launch_bound: on CUDA a call is so short that it is timed as a CUDA graph.
        counted: (outputs, inputs) → the part of the outputs that is compared, where some of
            it means nothing, such as what stands at masked tokens. None: all.
        axis: of a scaling benchmark, the letter of Size that grows; None: no scaling.
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

    @classmethod
    def of(cls, case: Case, *, forward: bool = False, **rest: Any) -> Benchmark:
        """Of a case, with its gradients, or of its forward pass, which has a name of its own."""
        work = case.work.forward if forward else case.work.both or case.work.forward
        return cls(
            name=f"{case.name}_forward" if forward else case.name,
            sizes=case.sizes,
            inputs=case.inputs,
            bytes=Count.read(
                work.reads, work.writes, text=f"{work.reads} read, {work.writes} written"
            ),
            flops=Count.read(work.operations),
            **rest,
        )


def forward_only(prepare: Prepare) -> Prepare:
    """Without gradients."""
    return lambda x, size: torch.no_grad()(prepare(x, size))


def forward_backward(
    prepare: Prepare, leaves: Sequence[str], upstream: Mapping[str, str] | None = None
) -> Prepare:
    """With gradients; `passes` in profiling/case.py says how."""
    return lambda x, size: passes(prepare, leaves, upstream or {}, x, size).run


def each_call(function: Callable[[Inputs, Size], Outputs]) -> Prepare:
    """A function of inputs as a `prepare` that prepares nothing."""
    return lambda x, size: lambda: function(x, size)


def in_float64(inputs: Inputs) -> Inputs:
    """The inputs with every floating tensor in float64."""
    return {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}


def all_cases() -> dict[str, Benchmark]:
    """Every case by name, in the order of the files' names."""
    from fastppo.benchmarks import cases

    found: dict[str, Benchmark] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(cases.__path__)):
        for case in importlib.import_module(f"{cases.__name__}.{module}").BENCHMARKS:
            if case.name in found:
                raise ValueError(f"two cases are named {case.name!r}")
            found[case.name] = case
    return found


def select_cases(names: Sequence[str]) -> list[Benchmark]:
    """Cases by name; all of them for no name.

    Raises:
        ValueError: a name that is not one; the nearest is suggested.
    """
    known = all_cases()
    for name in names:
        if name not in known:
            hint = nearest(name, known) or "."
            raise ValueError(f"cases: unknown case {name!r}{hint} Known: {', '.join(known)}")
    return [known[name] for name in names or known]
