"""vtrace against the paper's sums, discounted_returns against a loop, both against gae."""

from __future__ import annotations

import math

import pytest
import torch

from fastppo.ops import (
    discounted_returns,
    discounted_returns_reference,
    gae,
    vtrace,
    vtrace_reference,
)

LENGTHS = [3, 0, 1, 70, 9]


def inputs(rng, dtype=torch.float64):
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    rewards, values, logprobs, behaviour = torch.randn(4, int(cu[-1]), generator=rng, dtype=dtype)
    mask = torch.rand(int(cu[-1]), generator=rng) < 0.7
    bootstrap = torch.randn(len(LENGTHS), generator=rng, dtype=dtype)
    return (rewards, values, logprobs, behaviour, cu), mask, bootstrap


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("caps", [(1.0, 1.0), (2.0, 0.5), (math.inf, math.inf)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_vtrace_against_the_paper(masked, caps, dtype, rng):
    args, mask, bootstrap = inputs(rng)
    options = {
        "gamma": 0.9,
        "gae_lambda": 0.7,
        "rho_cap": caps[0],
        "c_cap": caps[1],
        "mask": mask if masked else None,
        "bootstrap": bootstrap,
    }
    args = [x.to(dtype) if x.is_floating_point() else x for x in args]
    truth = vtrace_reference(*(x.double() if x.is_floating_point() else x for x in args), **options)
    result = vtrace(*args, **options)
    for x, y in zip(result, truth, strict=True):
        assert x.dtype == dtype
        scale = y.abs().max()
        tolerance = {"rtol": 1e-11, "atol": 1e-12 * scale}
        if dtype == torch.float32:
            tolerance = {"rtol": 1e-5, "atol": 1e-6 * scale}
        torch.testing.assert_close(x.double(), y, **tolerance)
    if masked:
        poison = [torch.where(mask, x, torch.nan) for x in args[:4]]
        again = vtrace(*poison, args[4], **options)
        assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))
        assert all((x[~mask] == 0).all() for x in again)


def test_on_policy_vtrace_is_gae(rng):
    (rewards, values, logprobs, _, cu), mask, bootstrap = inputs(rng)
    args = rewards, values, logprobs, logprobs, cu
    options = {"gamma": 0.9, "mask": mask, "bootstrap": bootstrap}
    for lam in (0.8, 1.0):
        expected = gae(rewards, values, cu, gae_lambda=lam, **options)
        result = vtrace(*args, gae_lambda=lam, **options)
        torch.testing.assert_close(result.returns, expected.returns)
    torch.testing.assert_close(result.advantages, expected.advantages)


def test_impossible_samples_stay_finite():
    logprobs = torch.tensor([-1.0, -200.0, 0.0])
    behaviour = torch.tensor([-300.0, -1.0, -1.0])
    result = vtrace(
        torch.ones(3), torch.zeros(3), logprobs, behaviour, torch.tensor([0, 3]), gamma=1.0
    )
    assert result.returns.isfinite().all()


def test_vtrace_custom_op(rng):
    (rewards, values, logprobs, behaviour, cu), mask, bootstrap = inputs(rng, torch.float32)
    for optional in ((None, None), (mask, bootstrap)):
        torch.library.opcheck(
            torch.ops.fastppo.vtrace.default,
            (rewards, values, logprobs, behaviour, cu, *optional, 0.9, 0.8, 1.0, 1.0, 70),
        )

    def advantages(r, v):
        return vtrace(r, v, logprobs, behaviour, cu, gamma=0.9, mask=mask).advantages

    compiled = torch.compile(advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, values), advantages(rewards, values))


def test_vtrace_names_bad_arguments():
    z, cu = torch.zeros(4), torch.tensor([0, 4])
    with pytest.raises(ValueError, match="rho_cap: expected a number > 0, got 0"):
        vtrace(z, z, z, z, cu, gamma=1.0, rho_cap=0.0)
    with pytest.raises(ValueError, match="c_cap: .*nan"):
        vtrace(z, z, z, z, cu, gamma=1.0, c_cap=math.nan)
    with pytest.raises(ValueError, match=r"behaviour_logprobs: expected shape \(4,\), got \(3,\)"):
        vtrace(z, z, z, z[:3], cu, gamma=1.0)
    with pytest.raises(ValueError, match=r"gamma: .*\[0, 1\]"):
        vtrace(z, z, z, z, cu, gamma=2.0)
    with pytest.raises(TypeError, match="mask: expected dtype bool"):
        vtrace(z, z, z, z, cu, gamma=1.0, mask=z)
    with pytest.raises(ValueError, match=r"cu_seqlens\[0\] = 0, got 1"):
        vtrace(z, z, z, z, torch.tensor([1, 4]), gamma=1.0)
    with pytest.raises(ValueError, match="max_seqlen: expected at least 4"):
        vtrace(z, z, z, z, cu, gamma=1.0, max_seqlen=3)


@pytest.mark.parametrize("masked", [False, True])
def test_discounted_returns(masked, rng):
    (rewards, *_, cu), mask, bootstrap = inputs(rng)
    options = {"gamma": 0.9, "mask": mask if masked else None, "bootstrap": bootstrap}
    truth = discounted_returns_reference(rewards, cu, **options)
    torch.testing.assert_close(discounted_returns(rewards, cu, **options), truth)
    single = discounted_returns(rewards.float(), cu, **options)
    torch.testing.assert_close(single, truth.float())
    sums = discounted_returns(torch.ones(7), torch.tensor([0, 3, 7]), gamma=1.0)
    assert sums.tolist() == [3, 2, 1, 4, 3, 2, 1]
    with pytest.raises(ValueError, match=r"rewards: expected shape \(N,\), got \(2, 2\)"):
        discounted_returns(torch.zeros(2, 2), torch.tensor([0, 2]), gamma=1.0)
    with pytest.raises(ValueError, match="max_seqlen: expected at least 2"):
        discounted_returns(torch.zeros(2), torch.tensor([0, 2]), gamma=1.0, max_seqlen=1)
    with pytest.raises(ValueError, match=r"cu_seqlens: .*rows 2, got 3"):
        discounted_returns(torch.zeros(2), torch.tensor([0, 3]), gamma=1.0)
