"""Device and precision of a run, and its memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch

from fastppo.training.device import describe, resolve_device, resolve_precision
from fastppo.training.memory import free_memory, is_out_of_memory

CPU = torch.device("cpu")


def test_cpu_is_taken_as_named() -> None:
    assert resolve_device("cpu") == CPU


def test_auto_is_cuda_where_there_is_one() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: .*'{name}' without CUDA"):
        resolve_device(name)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_a_named_precision_is_kept(name: str) -> None:
    assert resolve_precision(name, CPU) == name


def test_auto_precision_is_one_the_cpu_computes_fast() -> None:
    fast = torch.cpu._is_amx_tile_supported()
    assert resolve_precision("auto", CPU) == ("bf16" if fast else "fp32")


def test_the_description_names_threads_and_vector_width() -> None:
    words = describe(CPU)
    assert words.startswith("CPU, ")
    assert f"{torch.get_num_threads()} threads" in words
    assert torch.backends.cpu.get_cpu_capability() in words


def raised_by(work: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:  # whatever it raises
        work()
    return caught.value


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**52, dtype=torch.uint8),
        lambda: np.empty(2**52, dtype=np.uint8),
        lambda: bytearray(2**52),
    ],
    ids=["torch", "numpy", "python"],
)
def test_memory_that_cannot_be_had_is_out_of_memory(work: Callable[[], object]) -> None:
    assert is_out_of_memory(raised_by(work))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("std::bad_alloc"),
    ],
    ids=str,
)
def test_out_of_memory_of_cuda_and_its_libraries(error: RuntimeError) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        raised_by(lambda: torch.zeros(2) + torch.zeros(3)),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"),
        ValueError("out of memory"),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
def test_other_errors_are_not_out_of_memory(error: BaseException) -> None:
    assert not is_out_of_memory(error)


def test_freeing_memory_breaks_cycles() -> None:
    cycle: list[object] = [torch.zeros(3)]
    cycle.append(cycle)
    tensor = weakref.ref(cycle[0])
    del cycle
    free_memory(CPU)
    assert tensor() is None


@pytest.mark.gpu
def test_memory_of_a_gpu_runs_out_and_is_given_back() -> None:
    device = resolve_device("auto")
    assert is_out_of_memory(raised_by(lambda: torch.empty(2**52, dtype=torch.uint8, device=device)))
    block = torch.zeros(2**28, device=device)
    before = torch.cuda.memory_reserved(device)
    del block
    free_memory(device)
    assert torch.cuda.memory_reserved(device) <= before - 2**30


@pytest.mark.gpu
def test_the_description_of_a_gpu_is_its_name() -> None:
    device = resolve_device("auto")
    assert describe(device) == torch.cuda.get_device_name(device)
    assert resolve_precision("auto", device) in ("fp32", "bf16")


def test_what_is_no_device_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="^device: .*got 'foo'"):
        resolve_device("foo")
