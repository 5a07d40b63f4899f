"""How a kernel is launched: knobs from a table, and one door that runs a launch or writes it down.

There is no search at run time. A table lists (largest vocabulary, knobs) and the first entry that
fits wins, so that one shape always runs one kernel and gives bitwise equal results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


@dataclass(frozen=True, slots=True)
class Launch:
    """Knobs of one launch."""

    block: int
    """Columns one program handles in one step."""
    num_warps: int
    """Of 32 threads; half as many on an AMD GPU, whose warps have 64."""
    max_registers: int | None = field(default=None, kw_only=True)
    """Of a thread on an NVIDIA GPU; None: ptxas decides, and may spill to fit more programs."""


@dataclass(frozen=True, slots=True)
class ReductionLaunch(Launch):
    """Knobs of a reduction over tokens; a program's columns are a block of them."""

    programs: int
    """The most there are: each takes several blocks where there are more of those. A number of its
    own, and not the device's, so that the order of a sum is the same on every GPU."""


Table = tuple[tuple[float, Launch], ...]


def choose(table: Table, vocab: int) -> Launch:
    """The first entry of `table` whose limit is at least `vocab`."""
    return next(launch for limit, launch in table if vocab <= limit)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One launch: everything a compiler needs to know about it."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    max_registers: int | None


_recorded: ContextVar[list[KernelCall] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[KernelCall]]:
    """Inside, launches are written down and not run, so launchers accept meta tensors."""
    calls: list[KernelCall] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], knobs: Launch, **arguments: Any) -> None:
    """Run `kernel` over `grid`, or only write the call down inside `recording()`."""
    calls = _recorded.get()
    if calls is not None:
        calls.append(KernelCall(kernel, grid, arguments, knobs.num_warps, knobs.max_registers))
        return
    # Triton 3.10 turns the fusion of a·b + c off unless asked.
    options: dict[str, Any] = {"num_warps": knobs.num_warps, "enable_fp_fusion": True}
    if torch.version.hip:
        options["num_warps"] //= 2
    elif knobs.max_registers is not None:
        options["maxnreg"] = knobs.max_registers
    # Triton launches on the current device, whichever the tensors are on.
    with torch.cuda.device_of(first_tensor(arguments.values())):
        kernel[grid](**arguments, **options)


def first_tensor(arguments: Iterable[Any]) -> torch.Tensor:
    """The first of a launch's arguments that is one, or has one in it."""
    for x in arguments:
        if isinstance(x, torch.Tensor):
            return x
        if isinstance(x, tuple) and any(isinstance(part, torch.Tensor) for part in x):
            return first_tensor(x)
    raise ValueError("arguments: expected a tensor among them, got none")


def check_device(name: str, x: torch.Tensor) -> None:
    """Raise unless Triton can run on the tensor's device here."""
    anywhere = triton.knobs.runtime.interpret or _recorded.get() is not None
    if x.device.type != "cuda" and not anywhere:
        raise ValueError(f"{name}: expected a tensor on a CUDA device, got {x.device}")
