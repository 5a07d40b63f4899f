"""What a device reaches at best: a large copy and large matrix products, measured here and now."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from fastppo.profiling.meta import Ceilings

REPEATS = 3
LONG = 0.5  # seconds


def measure_ceilings(device: torch.device) -> Ceilings:
    """Measure them; the best of a few repeats, a fraction of a second on a GPU, a few on a CPU."""
    cuda = device.type == "cuda"
    # Larger than any cache; as large as it takes to fill the device.
    numel, size = (1 << 28, 8192) if cuda else (1 << 26, 1024)
    source = torch.randn(numel, device=device)
    target = torch.empty_like(source)
    copy = _seconds(partial(target.copy_, source), device)
    del source, target

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / _seconds(lambda: a @ b, device) / 1e12

    return Ceilings(
        copy_gb_s=2 * 4 * numel / copy / 1e9,  # read and written
        bf16_tflops=product(torch.bfloat16),
        fp32_tflops=product(torch.float32),
    )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The best of `REPEATS`, after one that does not count unless it is long."""
    best = float("inf")
    for repeat in range(REPEATS + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        took = time.perf_counter() - start
        if repeat or took > LONG:
            best = min(best, took)
        if took > LONG:  # a CPU without instructions for bf16
            break
    return best
