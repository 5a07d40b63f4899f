"""kl_penalty: the three formulas, their gradients, the guard against infinity."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.ops import kl_penalty, kl_penalty_reference

ESTIMATORS = ["k1", "k2", "k3"]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_formula(estimator):
    lp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -0.5])
    d = [0.5, -1.5]
    expected = {
        "k1": d,
        "k2": [x * x / 2 for x in d],
        "k3": [math.exp(-x) - 1 + x for x in d],
    }[estimator]
    result = kl_penalty(lp, ref, estimator=estimator)
    torch.testing.assert_close(result, torch.tensor(expected))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(estimator, dtype, rng, no_worse):
    lp = (-torch.rand(1000, generator=rng) * 5).to(dtype)
    ref = (lp.float() + 0.3 * torch.randn(1000, generator=rng)).to(dtype)
    results = []
    for fn, cast in [
        (kl_penalty, lambda x: x),
        (kl_penalty_reference, lambda x: x),
        (kl_penalty_reference, torch.Tensor.double),
    ]:
        x = cast(lp).requires_grad_()
        out = fn(x, cast(ref), estimator=estimator)
        results.append((out.detach(), torch.autograd.grad(out.sum(), x)[0]))
    for a, b, c in zip(*results, strict=True):
        no_worse(a, b, c)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator, rng):
    lp = torch.randn(5, generator=rng, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(5, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_penalty(x, ref, estimator=estimator), lp)


def test_k3_is_never_negative_and_never_infinite():
    d = torch.tensor([-1e4, -50.0, -1e-4, 0.0, 1e-4, 50.0, 1e4])
    k3 = kl_penalty(d, torch.zeros(7), estimator="k3")
    assert (k3 >= 0).all()
    assert torch.isfinite(k3).all()


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_nan_reaches_the_gradient(estimator):
    lp = torch.tensor([-1.0, -2.0], requires_grad=True)
    ref = torch.tensor([-1.5, torch.nan])
    kl_penalty(lp, ref, estimator=estimator).sum().backward()
    assert lp.grad.isnan().tolist() == [False, True]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_compiles_without_a_graph_break(estimator, rng):
    lp, ref = torch.randn(2, 30, generator=rng)
    compiled = torch.compile(kl_penalty, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (30, 7):
        x, results = lp[:n].detach().requires_grad_(), []
        for fn in (kl_penalty, compiled):
            out = fn(x, ref[:n], estimator=estimator)
            results.append((out, *torch.autograd.grad(out.sum(), x)))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_empty_and_bad_arguments():
    assert kl_penalty(torch.zeros(0), torch.zeros(0), estimator="k3").shape == (0,)
    with pytest.raises(ValueError, match="^estimator: .*got 'k4'"):
        kl_penalty(torch.zeros(2), torch.zeros(2), estimator="k4")
    with pytest.raises(ValueError, match="^ref_logprobs: .*got meta"):
        kl_penalty(torch.zeros(2), torch.zeros(2, device="meta"), estimator="k1")
    with pytest.raises(TypeError, match="^logprobs: .*got int64"):
        kl_penalty(torch.zeros(2).long(), torch.zeros(2), estimator="k1")
    with pytest.raises(ValueError, match=r"^ref_logprobs: .*got \(3,\)"):
        kl_penalty(torch.zeros(2), torch.zeros(3), estimator="k1")
