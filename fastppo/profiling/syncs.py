"""Host syncs and the line of Python behind each.

A host sync is a place where the program needs a number that the device has yet to compute: nothing
more is launched until it is there. `SyncCounter` finds them while a piece of work runs.

On CUDA torch itself says where it waits (torch.cuda.set_sync_debug_mode). On a CPU nothing waits;
what counts there are the operators that would wait on a GPU, because they hand a value of a tensor
to Python or need one for the shape of their result. Copies of whole tensors to the host (`.cpu()`,
`.numpy()`) cannot be told from no-ops on a CPU and count on CUDA only, and so do copies from
ordinary memory to the device. Checks of arguments that only ever read CPU tensors
(fastppo/ops/_checks.py) do not count.

Every operator passes through Python while counting, which costs microseconds a call: count in
another step than the one that is timed.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.ops import _checks
from fastppo.profiling.meta import Sync

_READS = frozenset(
    {
        *("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select"),
        *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
        *("aten::unique_dim_consecutive", "aten::bincount"),
    }
)
"""Operators that hand a value to Python or whose result has a shape that depends on values."""

_WARNING = "called a synchronizing"
"""How torch's warning about a synchronising CUDA operation begins."""


class Place(NamedTuple):
    """A line of the program."""

    file: str
    line: int
    function: str


class SyncCounter:
    """Counts host syncs inside `with counter: ...`, and restores every mode afterwards.

    Args:
        device: of the work.
        phase: names the phase under way, which is asked at each sync.
    """

    def __init__(self, device: torch.device, phase: Callable[[], str] = str) -> None:
        self._device, self._phase = device, phase
        self._counts: Counter[tuple[str, Place, str]] = Counter()
        self._stack = contextlib.ExitStack()
        self._operator = self._latest = ""
        """The operator under way, and the latest: torch's warning names none, and is told to Python
        when the operator has ended."""

    @property
    def syncs(self) -> tuple[Sync, ...]:
        """What was found, the most frequent first."""
        return tuple(
            Sync(api, *place, phase, count)
            for (api, place, phase), count in self._counts.most_common()
        )

    def __enter__(self) -> SyncCounter:
        with contextlib.ExitStack() as stack:
            if self._device.type == "cuda":
                stack.enter_context(_sync_debug_mode(self._warned))
            else:
                stack.enter_context(_ListReads(self))
            stack.enter_context(_Operators(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, name: str, waits: bool, call: Callable[[], Any]) -> Any:
        """What `call` returns, counted where the operator `name` would wait for a GPU."""
        outer, self._operator = self._operator, self._operator or name
        try:
            return call()
        finally:
            if waits and not outer and self._device.type != "cuda":
                self._count()
            self._latest, self._operator = self._operator, outer

    def _warned(self, message: Warning | str, *_: Any) -> bool:
        if not str(message).startswith(_WARNING):
            return False
        self._count()
        return True

    def _count(self) -> None:
        place = _place(sys._getframe(1), skip=() if self._device.type == "cuda" else (_checks,))
        if place is not None:
            self._counts[self._operator or self._latest or "CUDA", place, self._phase()] += 1


class _Operators(TorchDispatchMode):
    """Hands every operator to a counter."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._counter = counter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        waits = name in _READS or _shape_depends_on_values(name, args, kwargs or {})
        return self._counter.run(name, waits, lambda: func(*args, **(kwargs or {})))


class _ListReads(TorchFunctionMode):
    """`Tensor.tolist`, which on a CPU is no operator."""

    def __init__(self, counter: SyncCounter) -> None:
        super().__init__()
        self._counter = counter

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        waits = func is Tensor.tolist
        if not waits:
            return func(*args, **(kwargs or {}))
        return self._counter.run("tolist", waits, lambda: func(*args, **(kwargs or {})))


def _shape_depends_on_values(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator that usually does not wait has arguments with which it does."""
    if name == "aten::repeat_interleave":
        return isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
    if name == "aten::index":
        return _has_mask(args[1])
    if name == "aten::index_put_":  # one value for all is filled in without counting them
        return _has_mask(args[1]) and args[2].numel() != 1
    return False


def _has_mask(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


@contextlib.contextmanager
def _sync_debug_mode(warned: Callable[..., bool]) -> Iterator[None]:
    """CUDA's warnings about syncs go to `warned`; all it does not want are shown as usual."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", message=_WARNING)
        show = warnings.showwarning
        warnings.showwarning = lambda *details: None if warned(*details) else show(*details)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)


_TORCH = str(Path(torch.__file__).parent)
_OWN = frozenset({__file__, contextlib.__file__, warnings.__file__})


def _place(frame: FrameType | None, skip: tuple[ModuleType, ...]) -> Place | None:
    """The innermost line that is not torch's; None where it is one of a module to skip."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file not in _OWN and not file.startswith((_TORCH, "<")):
            if any(file == module.__file__ for module in skip):
                return None
            return Place(_short(file), frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return Place("?", 0, "?")


def _short(file: str) -> str:
    """A path below the folder that its package was imported from, or as it is."""
    roots = [root for root in sys.path if root and Path(root) in Path(file).parents]
    return Path(file).relative_to(max(roots, key=len)).as_posix() if roots else file
