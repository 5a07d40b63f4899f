"""Device and precision of a run."""

from __future__ import annotations

import pytest
import torch

from fastppo.device import describe, resolve_device, resolve_precision

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


@pytest.mark.gpu
def test_the_description_of_a_gpu_is_its_name() -> None:
    device = resolve_device("auto")
    assert describe(device) == torch.cuda.get_device_name(device)
    assert resolve_precision("auto", device) in ("fp32", "bf16")
