"""The scans (gae, classic GAE) and whitening against plain loops.

The same tests run under Triton's interpreter, in the process of test_interpreted.py, and with
`-m gpu` on a CUDA device. Blocks of 8 tokens and 2 block maps at a time put sequences across blocks
and chunks at sizes the interpreter can take; a device also gets long ones, with the real knobs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from fastppo_kernels.gae import gae_fwd
from fastppo_kernels.gae_classic import gae_classic_fwd
from fastppo_kernels.launch import Launch
from fastppo_kernels.scan import ScanLaunch
from fastppo_kernels.whiten import whiten as whiten_kernels

from fastppo.ops import (
    gae_classic_reference,
    gae_reference,
    whiten_reference,
)
from fastppo.ops.gae import gae_triton
from fastppo.ops.gae_classic import gae_classic_triton
from fastppo.ops.whiten import EPS, whiten_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED:
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ]

# Empty ones, single tokens, one that ends with its block, one over more blocks than a chunk holds.
LENGTHS = [3, 0, 1, 4, 0, 27, 9]
N = sum(LENGTHS)
KNOBS = {
    "one block": ScanLaunch(block=64, num_warps=4, chunk=4, one_launch=0),
    "one launch": ScanLaunch(block=8, num_warps=4, chunk=2, one_launch=1000),
    "two launches": ScanLaunch(block=8, num_warps=4, chunk=2, one_launch=0),
}
MODES = ["carry", "dense-zero", "none"]
LONG = [pytest.mark.slow] * INTERPRETED  # many seconds under the interpreter
every_plan = pytest.mark.parametrize("knobs", KNOBS.values(), ids=KNOBS.keys())


@pytest.fixture(autouse=True)
def no_floating_point_traps() -> Iterator[None]:
    """Overflow to inf and 0·inf are values on a GPU, and warnings in numpy."""
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def on_device(*tensors):
    return [x if x is None else x.to(DEVICE) for x in tensors]


def there(options):
    return {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def offsets(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.long).cumsum(0)], dtype=torch.int32)


def inputs(rng, dtype=torch.float32, lengths=LENGTHS):
    cu = offsets(lengths)
    rewards, values, kl = torch.randn(3, int(cu[-1]), generator=rng, dtype=dtype)
    ends = torch.randn(2, len(lengths), generator=rng, dtype=dtype)
    mask = torch.rand(int(cu[-1]), generator=rng) < 0.6
    mask[-1] = mask[3] = False
    optional = {"kl": kl, "kl_coef": 0.3, "bootstrap": ends[0], "scores": ends[1]}
    return rewards, values, cu, mask, optional


def run_gae(rewards, values, cu, **options):
    """Advantages and returns, on the CPU."""
    args = there(options | {"rewards": rewards})
    return [x.cpu() for x in gae_fwd(values.to(DEVICE), cu.to(DEVICE), **args)[:2]]


def check(result, truth, rtol=1e-5, atol=1e-5):
    for x, y in zip(result, truth, strict=True):
        torch.testing.assert_close(x.cpu().double(), y.double(), rtol=rtol, atol=atol)


def same(result, other):
    return all(torch.equal(x, y) for x, y in zip(result, other, strict=True))


@every_plan
@pytest.mark.parametrize(
    ("mode", "two"), [(None, False), ("carry", True), ("dense-zero", False), ("none", False)]
)
def test_gae_against_the_loop(knobs, mode, two, rng):
    rewards, values, cu, mask, optional = inputs(rng)
    if mode in ("dense-zero", "none"):
        optional["scores"] = None
    options = {"gamma": 0.97, "gae_lambda": 0.9, "returns_lambda": 1.0 if two else None}
    options |= optional | {"mask": mask if mode else None, "mask_mode": mode or "carry"}
    result = run_gae(rewards, values, cu, knobs=knobs, **options)
    check(result, gae_reference(rewards, values.double(), cu, **options))
    if mode == "carry":
        poison = [torch.where(mask, x, torch.nan) for x in (values, rewards, options["kl"])]
        options["kl"] = poison[2]
        assert same(run_gae(poison[1], poison[0], cu, knobs=knobs, **options), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_discount_for_each_sequence(dtype, rng):
    rewards, values, cu, mask, optional = inputs(rng, dtype)
    factors = torch.rand(3, len(LENGTHS), generator=rng, dtype=torch.float64)
    factors[0, 3] = 0.0
    numbers = {"gamma": 0.0, "gae_lambda": 0.0, "discounts": factors, "mask": mask} | optional
    result = run_gae(rewards, values, cu, knobs=KNOBS["two launches"], **numbers)
    discounts = {"gamma": factors[0], "gae_lambda": factors[1], "returns_lambda": factors[2]}
    truth = gae_reference(rewards, values.double(), cu, mask=mask, **discounts, **optional)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    check(result, truth, tolerance, tolerance)
    assert result[0].dtype == dtype


@every_plan
def test_integers_are_exact(knobs, rng):
    rewards, values, cu, mask, optional = inputs(rng)
    rewards, values = (4 * rewards).round(), (4 * values).round()
    optional = {k: 2.0 if k == "kl_coef" else (4 * x).round() for k, x in optional.items()}
    options = {"gamma": 1.0, "gae_lambda": 1.0, "returns_lambda": 0.0, "mask": mask} | optional
    result = run_gae(rewards, values, cu, knobs=knobs, **options)
    check(result, gae_reference(rewards, values, cu, **options), 0, 0)


def test_float64_numbers_keep_their_precision(rng):
    rewards, values, cu, _, _ = inputs(rng, torch.float64)
    options = {"gamma": 0.99, "gae_lambda": 0.95}
    result = run_gae(rewards, values, cu, knobs=KNOBS["two launches"], **options)
    check(result, gae_reference(rewards, values, cu, **options), 1e-12, 1e-12)


@pytest.mark.parametrize("plan", [pytest.param("one launch", marks=LONG), "two launches"])
def test_a_poisoned_sequence_leaves_its_neighbours_alone(plan, rng):
    rewards, values, cu, _, _ = inputs(rng)
    options = {"gamma": 1.0, "gae_lambda": 1.0, "knobs": KNOBS[plan]}
    before = run_gae(rewards, values, cu, **options)
    for poison in (torch.nan, torch.inf):
        for start, stop in ((4, 8), (35, 44)):  # each shares a block with the sequence before it
            bad = rewards.clone()
            bad[start] = poison
            after = run_gae(bad, values, cu, **options)
            rows = torch.cat([torch.arange(start), torch.arange(stop, N)])
            assert all(torch.equal(a[rows], b[rows]) for a, b in zip(after, before, strict=True))
            assert not after[0][start].isfinite()


def test_a_wrong_hint_costs_time_only(rng):
    """The sequence of 27 tokens, said to have 1, is still followed over four blocks."""
    rewards, values, cu, mask, optional = inputs(rng)
    options = {"gamma": 0.97, "gae_lambda": 0.9, "mask": mask} | optional
    hinted = run_gae(rewards, values, cu, knobs=KNOBS["one launch"], max_seqlen=1, **options)
    check(hinted, gae_reference(rewards, values.double(), cu, **options))


def test_empty_batch():
    cu, none = torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.zeros(0, device=DEVICE)
    advantages, returns, moments = gae_fwd(none, cu, gamma=1.0, gae_lambda=1.0, with_moments=True)
    assert advantages.shape == returns.shape == (0,)
    assert moments.shape == (0, 3)
    assert whiten_kernels(none, None, True, EPS).shape == (0,)


@pytest.mark.parametrize(
    "mode", [mode if mode == "none" else pytest.param(mode, marks=LONG) for mode in MODES]
)
def test_the_gae_op_on_its_device(mode, rng):
    """What ops.gae calls on CUDA, with its default launch: scores beside masks, whitening."""
    rewards, values, cu, mask, optional = inputs(rng)
    tensors = on_device(mask, *(optional[k] for k in ("bootstrap", "kl", "scores")), None)
    options = {"gamma": 0.9, "gae_lambda": 0.8, "mask": mask, "mask_mode": mode, "norm_adv": True}
    r = None if mode == "none" else rewards
    arguments = (*on_device(values, cu, r), *tensors, 0.9, 0.8, None, 0.3, mode, True, None)
    result = gae_triton(*arguments)
    check(result, gae_reference(r, values.double(), cu, **options, **optional))
    if mode == "carry":
        assert same(gae_triton(*arguments), result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shift_mean", "masked"), [(True, False), (True, True), (False, True)])
def test_whiten(dtype, shift_mean, masked, rng):
    """A block holds 4 of the 70 entries and 4 of the 18 blocks: combined in three stages."""
    x = (3 * torch.randn(70, generator=rng, dtype=torch.float64) + 5).to(dtype)
    mask = torch.rand(70, generator=rng) < 0.6
    if masked:
        mask[4:8] = False  # a whole block
        x[4:8] = torch.nan
    given = mask if masked else None
    knobs = Launch(block=4, num_warps=1)
    result = whiten_kernels(*on_device(x, given), shift_mean, EPS, knobs).cpu()
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    truth = whiten_reference(x.double(), given, shift_mean=shift_mean)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("value", [0.3, -1e4])
@pytest.mark.parametrize("count", [0, 1, 9])
def test_whiten_equal_entries_to_zero(value, count):
    mask = torch.arange(13) < count
    x = torch.where(mask, value, torch.nan)
    knobs = Launch(block=4, num_warps=1)
    assert (whiten_kernels(*on_device(x, mask), True, EPS, knobs) == 0).all()
    kept = whiten_kernels(*on_device(x, mask), False, EPS, knobs).cpu()
    assert torch.equal(kept, torch.where(mask, torch.tensor(value), 0.0))


def rollout(steps, envs, rng, dtype=torch.float32):
    rewards, values, final = torch.randn(3, steps, envs, generator=rng, dtype=dtype)
    ends = torch.rand(2, steps, envs, generator=rng) < 0.15
    next_value = torch.randn(envs, generator=rng, dtype=dtype)
    truncated = ends[1] & ~ends[0]
    final = torch.where(truncated, final, torch.nan)
    return rewards, values, next_value, ends[0], truncated, final


# Tiles of 8 steps × 4 environments, 16 × 2 and 32 × 1: one tile, several, and a ragged last one.
@pytest.mark.parametrize(("steps", "envs"), [(1, 1), (70, 1), (16, 2), (19, 3), (5, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_classic_against_the_loop(steps, envs, dtype, rng, monkeypatch):
    monkeypatch.setattr("fastppo_kernels.gae_classic.MAX_ENVS", 4)
    args = rollout(steps, envs, rng, dtype)
    for given in (args, (*args[:4], None, None)):
        options = {"gamma": 0.97, "gae_lambda": 0.9}
        knobs = Launch(block=32, num_warps=1)
        result = gae_classic_fwd(*on_device(*given), *options.values(), knobs=knobs)
        truth = gae_classic_reference(
            *(x.double() for x in given[:3]),
            given[3],
            truncated=given[4],
            final_values=given[5],
            **options,
        )
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        check(result, truth, tolerance, tolerance)


def test_classic_integers_are_exact_and_a_nan_stays_in_its_episode(rng):
    rewards, values, next_value, terminated, _, _ = rollout(40, 3, rng)
    rounded = [(4 * x).round() for x in (rewards, values, next_value)]
    run = lambda r: gae_classic_triton(  # noqa: E731
        *on_device(r, rounded[1], rounded[2], terminated), None, None, 1.0, 1.0
    )
    before = run(rounded[0])
    check(before, gae_classic_reference(*rounded, terminated, gamma=1.0, gae_lambda=1.0), 0, 0)
    poison = rounded[0].clone()
    poison[20, 1] = torch.nan
    after = run(poison)
    # Steps 20 and before, back to the end of the episode before.
    ends = terminated[:20, 1].nonzero()
    first = int(ends[-1]) + 1 if len(ends) else 0
    clean = torch.ones(40, 3, dtype=torch.bool)
    clean[first:21, 1] = False
    for x, y in zip(after, before, strict=True):
        assert torch.equal(x.cpu()[clean], y.cpu()[clean])
        assert x.cpu()[~clean].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
@pytest.mark.parametrize(
    "lengths", [[200_000, 0, 1, 5000], [7] * 30_000, [4096] * 64], ids=["long", "short", "even"]
)
@pytest.mark.parametrize("hinted", [False, True])
def test_real_sizes_on_a_device(lengths, hinted, rng):
    rewards, values, cu, mask, optional = inputs(rng, lengths=lengths)
    bootstrap = optional["bootstrap"]
    hint = max(lengths) if hinted else None
    tensors = on_device(mask, bootstrap, None, bootstrap, None)
    arguments = (*on_device(values, cu, rewards), *tensors, 1.0, 0.95, 1.0, 0.0, "carry", True)
    result = gae_triton(*arguments, hint)
    assert same(gae_triton(*arguments, hint), result)
    options = {"gamma": 1.0, "mask": mask, "bootstrap": bootstrap}
    from fastppo.ops import gae

    truth = gae(
        rewards.double(),
        values.double(),
        cu,
        gae_lambda=0.95,
        returns_lambda=1.0,
        scores=bootstrap,
        norm_adv=True,
        **options,
    )
    check(result, truth, 1e-4, 1e-4 * float(truth.returns.abs().max()))
    check(result[:1], truth[:1], 1e-3, 1e-4)
    x = whiten_triton(*on_device(rewards, mask), True)
    check([x], [whiten_reference(rewards.double(), mask)], 1e-5, 1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="too long for the interpreter")
@pytest.mark.parametrize(("steps", "envs"), [(128, 4096), (2048, 8), (1000, 33)])
def test_real_rollouts_on_a_device(steps, envs, rng):
    args = rollout(steps, envs, rng)
    result = gae_classic_triton(*on_device(*args), 0.99, 0.95)
    from fastppo.ops import gae_classic

    options = {"gamma": 0.99, "gae_lambda": 0.95, "truncated": args[4], "final_values": args[5]}
    check(result, gae_classic(*args[:4], **options), 1e-4, 1e-4)
    assert same(gae_classic_triton(*on_device(*args), 0.99, 0.95), result)
