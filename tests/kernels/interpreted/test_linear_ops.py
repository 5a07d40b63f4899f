"""linear_logprobs and linear_ppo_loss on their kernels: every option against float64."""

from __future__ import annotations

import pytest
import torch
from fastppo_kernels.ppo_math import PPOInputs, PPOKnobs
from fastppo_kernels.ppo_rows import ppo_rows

from fastppo.ops import (
    PPO_METRIC_NAMES,
    PPOLossConfig,
    linear_logprobs,
    linear_logprobs_reference,
    linear_ppo_loss,
    linear_ppo_loss_reference,
    reduce_ppo_metrics,
    token_logprobs,
)

pytestmark = pytest.mark.usefixtures("on_kernels")

BF16_ROUNDING = 2**-8
N, H, V = 21, 12, 1003
OPTIONS = {
    "plain": {},
    "dual": {"dual_clip": 1.5, "clip_coef_low": 0.1},
    "k1": {"kl_coef": 0.1, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.1, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.1},
    "entropy": {"ent_coef": 0.02},
    "icepop": {"is_correction": "icepop", "is_high": 1.3},
    "everything": {"dual_clip": 1.5, "kl_coef": 0.1, "ent_coef": 0.02, "is_correction": "tis"},
    "sequence": {"ratio_level": "sequence", "ent_coef": 0.02, "kl_coef": 0.1},
}
KNOBS = PPOKnobs(0.8, 1.2, 1.5, 0.1, 0.02, 2.0, 0.5, 5.0, kl=3, correction=1)


def draw(rng, n=N, dtype=torch.float32, vocab=V):
    hidden = torch.randn(n, H, generator=rng).to(dtype)
    weight = (torch.randn(vocab, H, generator=rng) / 2).to(dtype)
    bias = torch.randn(vocab, generator=rng).to(dtype)
    targets = torch.randint(vocab, (n,), generator=rng)
    lp = linear_logprobs_reference(hidden, weight, targets, bias=bias).logprobs
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


def run(fn, leaves, targets, rows, config, scale=2.0, **kwargs):
    """A power of two as the incoming gradient scales bfloat16 gradients without rounding again."""
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in leaves)
    cu = torch.tensor([0, 7, 7, 8, N] if len(targets) == N else [0, len(targets)])
    out = fn(hidden, weight, targets, config=config, bias=bias, cu_seqlens=cu, **rows, **kwargs)
    grads = torch.autograd.grad(scale * out.loss, (hidden, weight, bias))
    return out.loss.detach(), *grads, out.metrics


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_against_float64(option, dtype, rng, no_worse):
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


@pytest.mark.parametrize("vocab", [4099, 50257])
def test_loss_with_a_vocabulary_of_many_blocks(vocab, rng, no_worse):
    config = PPOLossConfig(**OPTIONS["everything"])
    leaves, targets, rows = draw(rng, n=4, vocab=vocab)
    rows["weights"] = torch.tensor([0.5, 0.0, 0.25, 0.25])
    doubles = [x.double() for x in leaves], targets, {k: v.double() for k, v in rows.items()}
    truth = run(linear_ppo_loss_reference, *doubles, config)
    plain = run(linear_ppo_loss_reference, leaves, targets, rows, config)
    ours = run(linear_ppo_loss, leaves, targets, rows, config)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c, rel=1e-5)


@pytest.mark.parametrize("missing", ["ref_logprobs", "rollout_logprobs"])
def test_what_was_not_given_is_not_measured(missing, rng):
    leaves, targets, rows = draw(rng)
    whole = run(linear_ppo_loss, leaves, targets, rows, PPOLossConfig())
    metrics = run(linear_ppo_loss, leaves, targets, rows | {missing: None}, PPOLossConfig())[-1]
    nan = {
        "ref_logprobs": {"ref_kl"},
        "rollout_logprobs": {"logprob_diff", "logprob_diff_max", "rollout_kl"},
    }[missing]
    for name, now, before in zip(PPO_METRIC_NAMES, metrics, whole[-1], strict=True):
        assert now.isnan() if name in nan else now == before, name


@pytest.mark.parametrize("rows_per_chunk", [1, 5, 1000])
def test_chunk_size_only_rounds(rows_per_chunk, rng):
    config = PPOLossConfig(**OPTIONS["everything"])
    args = draw(rng)
    whole = run(linear_ppo_loss, *args, config)
    parts = run(linear_ppo_loss, *args, config, chunk_bytes=rows_per_chunk * V * 4)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_dropped_rows_may_hold_anything(rng):
    config = PPOLossConfig(**OPTIONS["everything"])
    leaves, targets, rows = draw(rng)
    clean = run(linear_ppo_loss, leaves, targets, rows, config)
    masked = rows["weights"] == 0
    hidden = torch.where(masked[:, None], torch.nan, leaves[0])
    ids = torch.where(masked, -100, targets)
    poison = {
        k: v if k == "weights" else torch.where(masked, torch.nan, v) for k, v in rows.items()
    }
    dirty = run(linear_ppo_loss, (hidden, *leaves[1:]), ids, poison, config)
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True))


@pytest.mark.parametrize("n", [0, 5])
def test_nothing_valid(n, rng):
    leaves, targets, rows = draw(rng, n)
    rows["weights"] = torch.zeros(n)
    results = run(linear_ppo_loss, leaves, targets, rows, PPOLossConfig(**OPTIONS["everything"]))
    for x, like in zip(results, (torch.zeros(()), *leaves), strict=False):
        assert x.shape == like.shape
        assert (x == 0).all()
    assert all(float(x) == 0.0 for x in reduce_ppo_metrics(results[-1]).values())


@pytest.mark.parametrize("vocab", [V, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_policy_ratio_is_exactly_one(vocab, dtype, rng):
    """Whichever op computed the old log-probabilities."""
    (hidden, weight, bias), targets, rows = draw(rng, n=5, dtype=dtype, vocab=vocab)
    rows["weights"] = torch.full((5,), 0.2)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    for old in (
        linear_logprobs(hidden, weight, targets, bias=bias).logprobs,
        token_logprobs(logits, targets).logprobs,
    ):
        rows["old_logprobs"] = old
        out = linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), bias=bias, **rows)
        metrics = reduce_ppo_metrics(out.metrics)
        assert float(metrics["ratio"]) == float(metrics["ratio_max"]) == 1.0
        assert float(metrics["approx_kl"]) == 0.0


def test_no_gradient_work_when_none_is_wanted(rng):
    leaves, targets, rows = draw(rng)
    hidden, weight, bias = leaves
    out = linear_ppo_loss(hidden, weight, targets, config=PPOLossConfig(), bias=bias, **rows)
    wanted = run(linear_ppo_loss, leaves, targets, rows, PPOLossConfig())
    assert not out.loss.requires_grad
    assert torch.equal(out.loss, wanted[0]) and torch.equal(out.metrics, wanted[-1])


def test_logits_are_overwritten_only_for_gradients_and_nothing_beside_them(rng, canaries):
    _, targets, rows = draw(rng, n=3)
    values = torch.randn(3, V, generator=rng)
    rows = [x.clone() for x in rows.values()]
    rows[2] = torch.tensor([0.5, 0.0, 0.5])
    logits = canaries(3, V, torch.float32).copy_(values)
    before = ppo_rows(logits, targets, PPOInputs(*rows), KNOBS, 1.0, None, out=None)
    assert torch.equal(logits, values)
    after = ppo_rows(logits, targets, PPOInputs(*rows), KNOBS, 1.0, None, out=logits)
    assert torch.equal(before, after)
    assert (logits[1] == 0).all() and (before[:, 1] == 0).all()
    assert (logits[0] != 0).all() and (logits[0].sum().abs() < 1e-6)


def test_a_row_that_counts_shows_its_nan(rng):
    leaves, targets, rows = draw(rng)
    rows["weights"] = torch.full((N,), 1 / N)
    leaves[0][3] = torch.nan
    with pytest.warns(RuntimeWarning, match="All-NaN"):  # the interpreter's maximum
        loss, hidden, *_ = run(linear_ppo_loss, leaves, targets, rows, PPOLossConfig())
    assert loss.isnan() and hidden[3].isnan().any()
    assert torch.isfinite(hidden[torch.arange(N) != 3]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_against_float64(dtype, rng, no_worse):
    leaves, targets, _ = draw(rng, dtype=dtype)
    upstream = torch.randn(2, N, generator=rng)
    upstream[:, 4] = 0.0

    def both(fn, leaves, **kwargs):
        hidden, weight, bias = (x.detach().clone().requires_grad_() for x in leaves)
        out = fn(hidden, weight, targets, bias=bias, softcap=8.0, **kwargs)
        loss = (out.logprobs * upstream[0] + out.entropy * upstream[1]).sum()
        return *(x.detach() for x in out), *torch.autograd.grad(loss, (hidden, weight, bias))

    tau = torch.rand(N, generator=rng) + 0.5
    truth = both(linear_logprobs_reference, [x.double() for x in leaves], temperature=tau.double())
    plain = both(linear_logprobs_reference, leaves, temperature=tau)
    ours = both(linear_logprobs, leaves, temperature=tau, chunk_bytes=7 * V * 4)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c, rel=BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5)
    assert (ours[2][4] == 0).all()


def test_repeats_are_bitwise_equal(rng):
    args = draw(rng)
    config = PPOLossConfig(**OPTIONS["everything"])
    a, b = (run(linear_ppo_loss, *args, config) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
