"""linear_ppo_loss: every option against float64, and equal to its two-op form; dropped rows."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import (
    PPOLossConfig,
    combine_ppo_metrics,
    linear_logprobs,
    linear_ppo_loss,
    linear_ppo_loss_reference,
    ppo_loss,
    reduce_ppo_metrics,
)

BF16_ROUNDING = 2**-8
N, H, V = 61, 12, 1003
CU = torch.tensor([0, 20, 20, 21, 61])
OPTIONS = {
    "plain": {},
    "dual": {"dual_clip": 1.5, "clip_coef_low": 0.1},
    "kl": {"kl_coef": 0.1},
    "entropy": {"ent_coef": 0.02},
    "icepop": {"is_correction": "icepop", "is_high": 1.3},
    "everything": {"dual_clip": 1.5, "kl_coef": 0.1, "ent_coef": 0.02, "is_correction": "tis"},
    "sequence": {"ratio_level": "sequence", "ent_coef": 0.02, "kl_coef": 0.1},
}


def draw(rng, n=N, dtype=torch.float32):
    hidden = torch.randn(n, H, generator=rng).to(dtype)
    weight = (torch.randn(V, H, generator=rng) / 2).to(dtype)
    bias = torch.randn(V, generator=rng).to(dtype)
    targets = torch.randint(V, (n,), generator=rng)
    lp = linear_logprobs(hidden, weight, targets, bias=bias).logprobs
    old, ref, rollout = (lp + 0.3 * torch.randn(n, generator=rng) for _ in range(3))
    valid = torch.rand(n, generator=rng) < 0.7
    rows = {
        "old_logprobs": old,
        "advantages": torch.randn(n, generator=rng),
        "weights": torch.rand(n, generator=rng) * valid / max(n, 1),
        "ref_logprobs": ref,
        "rollout_logprobs": rollout,
    }
    return (hidden, weight, bias), targets, rows


def run(fn, leaves, targets, rows, config, scale=3.0, cu=CU, **kwargs):
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in leaves)
    out = fn(hidden, weight, targets, config=config, bias=bias, cu_seqlens=cu, **rows, **kwargs)
    grads = torch.autograd.grad(scale * out.loss, (hidden, weight, bias))
    return out.loss.detach(), *grads, out.metrics


def two_ops(hidden, weight, targets, *, config, bias, cu_seqlens, temperature=1.0, **rows):
    lp = linear_logprobs(hidden, weight, targets, bias=bias, temperature=temperature)
    return ppo_loss(lp.logprobs, config=config, entropy=lp.entropy, cu_seqlens=cu_seqlens, **rows)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(option, dtype, rng, no_worse):
    config = PPOLossConfig(**OPTIONS[option])
    leaves, targets, rows = draw(rng, dtype=dtype)
    doubles = [x.double() for x in leaves], targets, {k: v.double() for k, v in rows.items()}
    extra = {"temperature": 0.9, "softcap": 8.0}
    truth = run(linear_ppo_loss_reference, *doubles, config, **extra)
    plain = run(linear_ppo_loss_reference, leaves, targets, rows, config, **extra)
    ours = run(linear_ppo_loss, leaves, targets, rows, config, **extra)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c, rel=BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5)
    assert [x.dtype for x in ours] == [torch.float32] + [dtype] * 3 + [torch.float32]


@pytest.mark.parametrize("option", OPTIONS)
def test_equals_its_two_op_form(option, rng):
    config = PPOLossConfig(**OPTIONS[option])
    leaves, targets, rows = draw(rng)
    ours = run(linear_ppo_loss, leaves, targets, rows, config)
    apart = run(two_ops, leaves, targets, rows, config)
    for a, b in zip(ours, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_float64_agrees_to_the_last_digits(option, rng):
    """Stands in for gradcheck, which needs to run backward several times."""
    config = PPOLossConfig(**OPTIONS[option])
    leaves, targets, rows = draw(rng, dtype=torch.float64)
    rows = {k: v.double() for k, v in rows.items()}
    extra = {"temperature": torch.rand(N, generator=rng).double() + 0.5, "softcap": 5.0}
    ours = run(linear_ppo_loss, leaves, targets, rows, config, chunk_bytes=7 * V * 8, **extra)
    truth = run(linear_ppo_loss_reference, leaves, targets, rows, config, **extra)
    for a, b in zip(ours[:4], truth, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 32, 1000])
def test_chunk_size_only_rounds(rows_per_chunk, rng):
    config = PPOLossConfig(**OPTIONS["everything"])
    args = draw(rng)
    whole = run(linear_ppo_loss, *args, config)
    parts = run(linear_ppo_loss, *args, config, chunk_bytes=rows_per_chunk * V * 4)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("option", ["everything", "sequence"])
def test_dropped_rows_may_hold_anything(option, rng):
    config = PPOLossConfig(**OPTIONS[option])
    leaves, targets, rows = draw(rng)
    clean = run(linear_ppo_loss, leaves, targets, rows, config)
    masked = rows["weights"] == 0
    hidden = torch.where(masked[:, None], torch.nan, leaves[0])
    ids = torch.where(masked, -100, targets)
    poison = {
        k: v if k == "weights" else torch.where(masked, torch.nan, v) for k, v in rows.items()
    }
    dirty = run(linear_ppo_loss, (hidden, *leaves[1:]), ids, poison, config)
    for a, b in zip(dirty, clean, strict=True):
        assert torch.equal(a, b)
    assert (dirty[1][masked] == 0).all()


@pytest.mark.parametrize("option", ["everything", "sequence"])
def test_a_known_number_of_live_rows_changes_nothing(option, rng):
    config = PPOLossConfig(**OPTIONS[option])
    leaves, targets, rows = draw(rng)
    live = int((rows["weights"] != 0).sum())
    counted = run(linear_ppo_loss, leaves, targets, rows, config)
    known = run(linear_ppo_loss, leaves, targets, rows, config, num_live=live)
    for a, b in zip(known, counted, strict=True):
        assert torch.equal(a, b)
    for wrong in (live - 1, live + 1, -1, N + 1):
        with pytest.raises(ValueError, match="^num_live: expected"):
            run(linear_ppo_loss, leaves, targets, rows, config, num_live=wrong)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("n", [0, 5])
def test_nothing_valid(option, n, rng):
    config = PPOLossConfig(**OPTIONS[option])
    leaves, targets, rows = draw(rng, n)
    rows["weights"] = torch.zeros(n)
    results = run(linear_ppo_loss, leaves, targets, rows, config, cu=torch.tensor([0, n]))
    for x, like in zip(results, (torch.zeros(()), *leaves), strict=False):
        assert x.shape == like.shape
        assert (x == 0).all()
    assert all(float(x) == 0.0 for x in reduce_ppo_metrics(results[-1]).values())


def test_micro_batches_add_up(rng):
    config = PPOLossConfig(**OPTIONS["everything"])
    leaves, targets, rows = draw(rng)
    whole = run(linear_ppo_loss, leaves, targets, rows, config)
    parts = [
        run(
            linear_ppo_loss,
            (leaves[0][a:b], *leaves[1:]),
            targets[a:b],
            {k: v[a:b] for k, v in rows.items()},
            config,
        )
        for a, b in [(0, 20), (20, 21), (21, 61)]
    ]
    losses, hidden, weight, bias, metrics = zip(*parts, strict=True)
    sums = sum(losses), torch.cat(hidden), sum(weight), sum(bias), combine_ppo_metrics(metrics)
    for a, b in zip(sums, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_on_policy_ratio_is_exactly_one(rng):
    leaves, targets, rows = draw(rng)
    rows["weights"] = torch.full((N,), 1 / N)
    hidden, weight, bias = leaves
    rows["old_logprobs"] = linear_logprobs(hidden, weight, targets, bias=bias).logprobs
    out = linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), bias=bias, **rows)
    metrics = reduce_ppo_metrics(out.metrics)
    assert float(metrics["ratio"]) == float(metrics["ratio_max"]) == 1.0
    assert float(metrics["approx_kl"]) == 0.0


def test_no_gradient_work_when_none_is_wanted(rng, monkeypatch):
    import sys

    module = sys.modules["fastppo.ops._ppo_sweep"]
    (hidden, weight, _), targets, rows = draw(rng)
    wanted = linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), **rows)
    calls = []
    monkeypatch.setattr(module, "row_gradient", lambda *a, **k: calls.append(a))
    again = linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), **rows)
    with torch.no_grad():
        weight.requires_grad_()
        quiet = linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), **rows)
    assert not calls
    assert not quiet.loss.requires_grad
    for out in (again, quiet):
        assert torch.equal(out.loss, wanted.loss)
        assert torch.equal(out.metrics.nan_to_num(), wanted.metrics.nan_to_num())


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_gradients_only_where_needed(wanted, rng):
    leaves, targets, rows = draw(rng)
    config = PPOLossConfig(ent_coef=0.1)
    everything = run(linear_ppo_loss, leaves, targets, rows, config, scale=1.0)
    leaves[wanted].requires_grad_()
    hidden, weight, bias = leaves
    linear_ppo_loss(hidden, weight, targets, config=config, bias=bias, **rows).loss.backward()
    torch.testing.assert_close(leaves[wanted].grad, everything[1 + wanted])
    assert [x.grad is None for x in leaves].count(True) == 2


def test_second_backward_is_refused(rng):
    (hidden, weight, _), targets, rows = draw(rng)
    out = linear_ppo_loss(hidden.requires_grad_(), weight, targets, config=PPOLossConfig(), **rows)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        out.loss.backward()


def test_autocast(rng, no_worse):
    leaves, targets, rows = draw(rng)
    config = PPOLossConfig(**OPTIONS["everything"])
    doubles = [x.double() for x in leaves], targets, {k: v.double() for k, v in rows.items()}
    truth = run(linear_ppo_loss_reference, *doubles, config)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(linear_ppo_loss_reference, leaves, targets, rows, config)
        ours = run(linear_ppo_loss, leaves, targets, rows, config)
    same = run(linear_ppo_loss, [x.bfloat16() for x in leaves], targets, rows, config)
    assert torch.equal(ours[0], same[0])
    for a, b, c in zip(ours[:4], plain, truth, strict=False):
        no_worse(a, b, c, rel=BF16_ROUNDING)
    assert all(x.dtype == torch.float32 for x in ours)


def test_repeats_are_bitwise_equal(rng):
    args = draw(rng)
    config = PPOLossConfig(**OPTIONS["everything"])
    a, b = (run(linear_ppo_loss, *args, config) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_bad_arguments_are_named(rng):
    (hidden, weight, _), targets, rows = draw(rng)
    with pytest.raises(ValueError, match="ref_logprobs: kl_coef = 0.1 needs"):
        linear_ppo_loss(
            hidden,
            weight,
            targets,
            rows["old_logprobs"],
            rows["advantages"],
            rows["weights"],
            PPOLossConfig(kl_coef=0.1),
        )
    rows["advantages"] = rows["advantages"][1:]
    with pytest.raises(ValueError, match=r"^advantages: .*got \(60,\)"):
        linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), **rows)
