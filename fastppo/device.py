"""Which device a run uses, in which precision it computes there, and when its memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Literal, TypeVar

import torch

T = TypeVar("T")


def resolve_device(name: str) -> torch.device:
    """The device named in a configuration; "auto" is CUDA where there is one.

    Raises:
        ValueError: a CUDA device on a machine without one.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a device of this machine, got {name!r} without CUDA")
    return device


def resolve_precision(name: str, device: torch.device) -> Literal["fp32", "bf16"]:
    """The compute precision; "auto" is bf16 where matrix products in bf16 are faster than fp32."""
    if name != "auto":
        return "bf16" if name == "bf16" else "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def describe(device: torch.device) -> str:
    """The hardware, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    isa = torch.backends.cpu.get_cpu_capability()
    return f"CPU, {torch.get_num_threads()} threads, {isa}"


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


def retried(work: Callable[[], T], device: torch.device) -> T:
    """What `work` returns; where memory runs out it is freed and `work` is called once more.

    Args:
        work: changes nothing before the last of its allocations, or nothing at all.
        device: whose memory is freed.
    """
    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    free_memory(device)  # the error, gone by now, kept the tensors of the call alive
    return work()
