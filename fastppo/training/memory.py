"""When memory runs out: how it is recognised, given back, and a piece of work called again."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# of the CPU allocator, of CUDA and its libraries, and of C++; torch raises them as RuntimeError
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "_STATUS_ALLOC_FAILED", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU, so that less may succeed."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, to the device's other users too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def named(doing: str, remedy: str) -> Iterator[None]:
    """Say in one line what a run was doing when memory ran out, where it cannot do with less.

    Raises:
        RuntimeError: of which `is_out_of_memory` is true.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"out of memory while {doing}. {remedy} ({first})") from error


def retried(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A method that is called once more, after its device's memory was freed, where that runs out.

    Args:
        method: changes nothing before the last of its allocations, or nothing at all.
    """

    @functools.wraps(method)
    def twice(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        free_memory(self.device)  # the error, gone by now, kept the tensors of the call alive
        return method(self, *args, **kwargs)

    return twice
