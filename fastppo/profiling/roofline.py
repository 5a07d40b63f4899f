"""The roofline: what a device can do at best, given its bandwidth and its arithmetic.

A call that moves b bytes and does f operations takes at least max(b / bandwidth, f / peak)
(Williams, Waterman, Patterson 2009, https://doi.org/10.1145/1498765.1498785). Both ceilings are
measured, so a call whose data is already in a cache can do better than 100 %.
"""

from __future__ import annotations

from fastppo.profiling.meta import Ceilings, Cost


def peak_tflops(ceilings: Ceilings, half: bool) -> float:
    """The flat part of the roof, in 1e12 operations a second."""
    if not half:
        return ceilings.fp32_tflops
    # the same may be computed in fp32, which on a CPU without instructions for bf16 is faster
    return max(ceilings.bf16_tflops, ceilings.fp32_tflops)


def floor_us(cost: Cost, ceilings: Ceilings) -> float:
    """The least time of one call, in µs."""
    moving = cost.bytes / (ceilings.copy_gb_s * 1e3)
    computing = cost.flops / (peak_tflops(ceilings, cost.half) * 1e6)
    return max(moving, computing)


def attainable_tflops(intensity: float, ceilings: Ceilings, half: bool) -> float:
    """The roof at `intensity` operations per byte, in 1e12 operations a second."""
    return min(intensity * ceilings.copy_gb_s / 1e3, peak_tflops(ceilings, half))


def ridge(ceilings: Ceilings, half: bool) -> float:
    """Operations per byte from which on arithmetic, not bandwidth, is the limit."""
    return peak_tflops(ceilings, half) * 1e3 / ceilings.copy_gb_s
