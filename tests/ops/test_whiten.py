"""whiten against the picked-entries formula, and where its peers divide by zero."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import whiten, whiten_reference


@pytest.mark.parametrize("n", [0, 1, 2, 1003])
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(n, shift_mean, masked, dtype, rng, no_worse):
    x = (3 * torch.randn(n, generator=rng) + 5).to(dtype)
    mask = torch.rand(n, generator=rng) < 0.6 if masked else None
    truth = whiten_reference(x.double(), mask, shift_mean=shift_mean)
    plain = whiten_reference(x, mask, shift_mean=shift_mean)
    ours = whiten(x, mask, shift_mean=shift_mean)
    assert ours.dtype == torch.float32
    no_worse(ours, plain, truth)


def test_trl_formula(rng):
    x = torch.randn(50, generator=rng)
    mask = torch.rand(50, generator=rng) < 0.5
    m = mask.float()
    mean = (x * m).sum() / m.sum()
    var = ((x - mean) ** 2 * m).sum() / m.sum()
    var = var * m.sum() / (m.sum() - 1)
    expected = (x - mean) * torch.rsqrt(var + 1e-8)
    torch.testing.assert_close(whiten(x, mask)[mask], expected[mask])
    torch.testing.assert_close(whiten(x, mask, shift_mean=False)[mask], (expected + mean)[mask])


def test_moments_masked_slots_and_nan(rng):
    x = 7 + torch.randn(1000, generator=rng)
    mask = torch.rand(1000, generator=rng) < 0.3
    y = whiten(torch.where(mask, x, torch.nan), mask)
    assert (y[~mask] == 0).all()
    assert abs(float(y[mask].mean())) < 1e-6
    assert abs(float(y[mask].var()) - 1) < 1e-5


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_entries(count):
    x = torch.tensor([3.5, torch.nan])
    mask = torch.tensor([count == 1, False])
    assert whiten(x, mask).tolist() == [0.0, 0.0]
    assert whiten(x, mask, shift_mean=False).tolist() == [3.5 * count, 0.0]


@pytest.mark.parametrize("value", [0.0, 0.3, -1e4])
def test_equal_entries_become_zero(value):
    assert whiten(torch.full((1003,), value)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_custom_op(dtype, masked, rng):
    x = torch.randn(50, generator=rng).to(dtype).requires_grad_()
    mask = torch.rand(50, generator=rng) < 0.5 if masked else None
    for shift_mean in (True, False):
        op = torch.ops.fastppo.whiten.default
        torch.library.opcheck(op, (x.detach(), mask, shift_mean))
    compiled = torch.compile(whiten, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, mask), whiten(x, mask))
    assert not whiten(x, mask).requires_grad


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="^mask: .*got float32"):
        whiten(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"^x: .*got \(2, 2\)"):
        whiten(torch.zeros(2, 2))
