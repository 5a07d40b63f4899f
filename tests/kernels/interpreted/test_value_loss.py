"""The value loss kernels under Triton's interpreter, against the reference in float64."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; run by test_interpreted.py", allow_module_level=True)

from fastppo_kernels.launch import ReductionLaunch
from fastppo_kernels.value_loss import value_loss

from fastppo.ops.value_loss import value_loss_reference, value_loss_triton

# Blocks of 16 tokens, 3 programs; the ops take the default launch.
SMALL = ReductionLaunch(16, 4, programs=3)


def inputs(n, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    values, returns, noise = torch.randn(3, n, generator=rng, dtype=dtype)
    weights = torch.rand(n, generator=rng, dtype=dtype) + 0.1
    weights[torch.rand(n, generator=rng) < 0.3] = 0.0
    return values, values + 0.3 * noise, returns, weights


def truth(values, old, returns, weights, clip, huber):
    v = values.double().requires_grad_()
    rest = [x.double() for x in (old, returns, weights)]
    out = value_loss_reference(v, *rest, clip=clip, huber=huber)
    (grad,) = torch.autograd.grad(out.loss, v)
    return out.loss.detach(), grad, out.metrics


def check(result, expected, tolerance=2e-6):
    for x, y in zip(result, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("n", [1, 16, 17, 100])
@pytest.mark.parametrize("clip", [None, 0.01, 0.2])
@pytest.mark.parametrize("huber", [None, 0.7])
def test_against_float64(n, clip, huber):
    args = inputs(n)
    result = value_loss(*args, clip, huber, SMALL)
    check(result, truth(*args, clip, huber), 5e-6)
    check(value_loss_triton(*args, clip, huber), [x.double() for x in result], 5e-6)
    poison = [torch.where(args[3] != 0, x, torch.nan) for x in args[:3]]
    again = value_loss(*poison, args[3], clip, huber, SMALL)
    assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))


@pytest.mark.parametrize(
    ("programs", "rtol"), [(1, 2e-5), (3, 1e-3)]
)  # means are parts, in float32
def test_large_returns_keep_their_spread(programs, rtol):
    rng = torch.Generator().manual_seed(0)
    returns = 1e6 + 4 * torch.randn(800, generator=rng)
    values, weights = torch.zeros(800), torch.ones(800)
    table = ReductionLaunch(16, 4, programs=programs)
    metrics = value_loss(values, None, returns, weights, None, None, table)[2]
    mean, spread = returns.double().mean(), returns.double().var(correction=0) * 800
    torch.testing.assert_close(
        metrics[4:6].double(), torch.stack([mean, spread]), rtol=rtol, atol=0
    )


def test_float64_stays_float64():
    args = inputs(100, torch.float64)
    loss, grad, metrics = value_loss_triton(*args, 0.2, None)
    expected = truth(*args, 0.2, None)
    assert loss.dtype == grad.dtype == torch.float64
    check((loss, grad), expected[:2], 1e-12)
    check((metrics,), expected[2:], 1e-6)


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_valid(n):
    nan = torch.full((n,), torch.nan)
    loss, grad, metrics = value_loss(nan, nan, nan, torch.zeros(n), 0.2, None, SMALL)
    assert float(loss) == 0.0
    assert torch.equal(grad, torch.zeros(n))
    assert torch.equal(metrics, torch.zeros(8))


def test_a_valid_nan_is_seen():
    values, old, returns, weights = inputs(40)
    values[int(weights.nonzero()[0])] = torch.nan
    loss, grad, _ = value_loss(values, old, returns, weights, 0.2, None, SMALL)
    assert loss.isnan()
    assert int(grad.isnan().sum()) == 1
