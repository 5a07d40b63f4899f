"""The GAE scan under Triton's interpreter, against the reference loop in float64.

Blocks of 8 tokens and 2 block maps at a time put sequences across blocks and chunks at sizes the
interpreter can take; one block of 128 is the single launch.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; run by test_packed_kernels.py", allow_module_level=True)

from fastppo_kernels.gae import Launch, gae_fwd

from fastppo.ops.gae import gae_reference, gae_triton

# Empty ones, single tokens, one that ends with its block, one over more blocks than a chunk holds.
LENGTHS = [3, 0, 1, 4, 0, 27, 9]
LAUNCHES = {"one block": Launch(64, 4, 4), "many blocks": Launch(8, 2, 4)}
MODES = ["carry", "dense-zero", "none"]


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def inputs(rng, dtype=torch.float32, lengths=LENGTHS):
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    rewards, values, kl = torch.randn(3, int(cu[-1]), generator=rng, dtype=dtype)
    ends = torch.randn(2, len(lengths), generator=rng, dtype=dtype)
    mask = torch.rand(int(cu[-1]), generator=rng) < 0.6
    mask[-1] = mask[3] = False
    optional = {"kl": kl, "kl_coef": 0.3, "bootstrap": ends[0], "scores": ends[1]}
    return rewards, values, cu, mask, optional


def check(result, truth, rtol=1e-5, atol=1e-5):
    for x, y in zip(result, truth, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES.keys())
@pytest.mark.parametrize(
    ("mode", "two"),
    [(None, False), ("carry", False), ("carry", True), ("dense-zero", True), ("none", False)],
)
def test_against_the_loop(launch, mode, two, rng):
    rewards, values, cu, mask, optional = inputs(rng)
    if mode in ("dense-zero", "none"):
        optional["scores"] = None
    options = {"gamma": 0.97, "gae_lambda": 0.9, "returns_lambda": 1.0 if two else None}
    options |= optional | {"mask": mask if mode else None, "mask_mode": mode or "carry"}
    result = gae_fwd(values, cu, rewards=rewards, launch=launch, **options)
    check(result, gae_reference(rewards, values.double(), cu, **options))
    if mode in ("carry", "dense-zero"):
        poison = [torch.where(mask, x, torch.nan) for x in (values, rewards, options["kl"])]
        options["kl"] = poison[2]
        again = gae_fwd(poison[0], cu, rewards=poison[1], launch=launch, **options)
        assert all(torch.equal(a, b) for a, b in zip(again, result, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_discount_for_each_sequence(dtype, rng):
    rewards, values, cu, mask, optional = inputs(rng, dtype)
    factors = torch.rand(3, len(LENGTHS), generator=rng, dtype=torch.float64)
    factors[0, 3] = 0.0
    discounts = {"gamma": factors[0], "gae_lambda": factors[1], "returns_lambda": factors[2]}
    result = gae_fwd(
        values,
        cu,
        gamma=0.0,
        gae_lambda=0.0,
        rewards=rewards,
        mask=mask,
        discounts=factors,
        launch=LAUNCHES["many blocks"],
        **optional,
    )
    truth = gae_reference(rewards, values.double(), cu, mask=mask, **discounts, **optional)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    check(result, truth, tolerance, tolerance)
    assert result[0].dtype == dtype


def test_integers_are_exact(rng):
    rewards, values, cu, mask, optional = inputs(rng)
    rewards, values = (4 * rewards).round(), (4 * values).round()
    optional = {k: 2.0 if k == "kl_coef" else (4 * x).round() for k, x in optional.items()}
    options = {"gamma": 1.0, "gae_lambda": 1.0, "returns_lambda": 0.0, "mask": mask} | optional
    result = gae_fwd(values, cu, rewards=rewards, launch=LAUNCHES["many blocks"], **options)
    check(result, gae_reference(rewards, values, cu, **options), 0, 0)


def test_float64_numbers_keep_their_precision(rng):
    rewards, values, cu, _, _ = inputs(rng, torch.float64)
    options = {"gamma": 0.99, "gae_lambda": 0.95}
    result = gae_fwd(values, cu, rewards=rewards, launch=LAUNCHES["many blocks"], **options)
    check(result, gae_reference(rewards, values, cu, **options), 1e-12, 1e-12)


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, at 0·inf before it is dropped
def test_a_poisoned_sequence_leaves_its_neighbours_alone(rng):
    rewards, values, cu, _, _ = inputs(rng)
    options = {"gamma": 1.0, "gae_lambda": 1.0, "launch": LAUNCHES["many blocks"]}
    before = gae_fwd(values, cu, rewards=rewards, **options)
    for poison in (torch.nan, torch.inf):
        rewards[10:12] = poison  # inside the sequence of rows 8 to 34
        after = gae_fwd(values, cu, rewards=rewards, **options)
        rows = torch.cat([torch.arange(8), torch.arange(35, 44)])
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(after, before, strict=True))
        assert not after[0][8:12].isfinite().any()


def test_empty_batch():
    cu = torch.zeros(3, dtype=torch.int32)
    advantages, returns = gae_fwd(torch.zeros(0), cu, gamma=1.0, gae_lambda=1.0)
    assert advantages.shape == returns.shape == (0,)


@pytest.mark.parametrize("mode", MODES)
def test_the_op_on_its_device(mode, rng):
    """What ops.gae calls on CUDA, with its default launch: scores beside masks, whitening."""
    rewards, values, cu, mask, optional = inputs(rng)
    kl, scores, bootstrap = optional["kl"], optional["scores"], optional["bootstrap"]
    for r in (rewards, None):
        arguments = (r, mask, bootstrap, kl, scores, None, 0.9, 0.8, None, 0.3, mode, True)
        truth = gae_reference(
            r,
            values.double(),
            cu,
            gamma=0.9,
            gae_lambda=0.8,
            mask=mask,
            mask_mode=mode,
            norm_adv=True,
            **optional,
        )
        check(gae_triton(values, cu, *arguments), truth)
