"""Fixtures of the tests that run kernels under Triton's interpreter.

The interpreter rounds float32 to bfloat16 towards zero and the hardware to nearest even, so its
cast is replaced here. Kernels convert what they load to float32 at once; the interpreter computes
on the raw bits of a bfloat16 and would be silently wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

OPS = ("token_logprobs", "linear_logprobs", "linear_ppo_loss")


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


@pytest.fixture(autouse=True)
def no_floating_point_traps() -> Iterator[None]:
    """Overflow to inf and inf − inf are values on a GPU, and warnings in numpy."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def round_to_nearest_even(monkeypatch: pytest.MonkeyPatch) -> None:
    cast = InterpreterBuilder.cast_impl

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(_round_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def fp_to_fp(self, src, dst_type, rounding_mode):
        return self.cast_impl(src, dst_type)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast_impl)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", fp_to_fp)


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ops take the road of CUDA tensors, with CPU tensors."""
    import fastppo.ops
    from fastppo.ops._ppo_sweep import loss_ops
    from fastppo.ops._row_ops import row_ops

    if not triton.knobs.runtime.interpret:  # there is a GPU
        return
    for name in OPS:
        module = sys.modules[f"{fastppo.ops.__name__}.{name}"]
        for choose in (row_ops, loss_ops):
            monkeypatch.setattr(
                module, choose.__name__, lambda _, f=choose: f(torch.device("cuda")), raising=False
            )


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _no_worse(result: Tensor, plain: Tensor, truth: Tensor, rel: float = 2e-6) -> None:
    assert result.shape == truth.shape
    if truth.numel() == 0:
        return
    error = (result.double() - truth.double()).abs().max()
    allowed = (plain.double() - truth.double()).abs().max() + 2e-6 + rel * truth.abs().max()
    assert error <= allowed, f"error {error:.3g} > allowed {allowed:.3g}"


@pytest.fixture
def no_worse() -> Callable[..., None]:
    """The kernel may err against float64 as much as plain torch does in the same dtype, plus a
    hair."""
    return _no_worse


@pytest.fixture
def canaries() -> Iterator[Callable[..., Tensor]]:
    """`canaries(n, v, dtype)`: an (n, v) view inside a larger array whose every other element must
    still hold the canary at the end of the test."""
    watched = []

    def make(n: int, v: int, dtype: torch.dtype, margin: int = 40) -> Tensor:
        whole = torch.full((n + 2, v + 2 * margin), 77.0, dtype=dtype)
        inside = torch.zeros_like(whole, dtype=torch.bool)
        inside[1:-1, margin : margin + v] = True
        watched.append((whole, inside))
        return whole[1:-1, margin : margin + v]

    yield make
    for whole, inside in watched:
        assert (whole[~inside] == 77.0).all()
