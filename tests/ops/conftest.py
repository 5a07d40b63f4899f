"""What every op test shares: tolerance by comparison.

`no_worse(result, plain, truth)`: the op may err against float64 as much as plain torch does in the
same dtype, plus a hair. A fixed tolerance wide enough for bf16 would hide four digits of
regression. Where both round their results to bf16, whose largest error is smaller is luck: pass
rel=2**-8. `room`, for each element of the result, is what the op's docstring allows beyond
that; it follows from the inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def _no_worse(
    result: Tensor,
    plain: Tensor,
    truth: Tensor,
    rel: float = 2e-6,
    room: Tensor | float = 0.0,
) -> None:
    assert result.shape == truth.shape
    if truth.numel() == 0:
        return
    error = ((result.double() - truth.double()).abs() - room).max()
    allowed = (plain.double() - truth.double()).abs().max() + 2e-6 + rel * truth.abs().max()
    assert error <= allowed, f"error {error:.3g} > allowed {allowed:.3g}"


@pytest.fixture
def no_worse() -> Callable[..., None]:
    return _no_worse


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)
