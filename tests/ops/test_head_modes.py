"""The modes of the linear ops: low memory, vocabulary tiles, float32 logits, dropped rows."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import (
    PPOLossConfig,
    linear_logprobs,
    linear_logprobs_reference,
    linear_ppo_loss,
    linear_ppo_loss_reference,
    live_rows,
    reduce_ppo_metrics,
    token_logprobs,
)
from fastppo.ops._head import Head
from fastppo.ops._head_options import HeadOptions
from fastppo.ops._head_tiles import tiled_gradients
from fastppo.ops.linear_logprobs import chunked_gradients
from fastppo.profiling.case import Size
from fastppo.profiling.head_cases import head_inputs

BF16_ROUNDING = 2**-8
N, H, V = 61, 12, 1003
EVERYTHING = PPOLossConfig(dual_clip=1.5, kl_coef=0.1, ent_coef=0.02, is_correction="tis")
# One tile, tiles that divide V and tiles that do not, with a last one of a single column.
TILES = [None, 32 * N, 334 * N, 1002 * N]


def draw(rng, n=N, dtype=torch.float32, vocab=V):
    x = head_inputs(Size(dtype, N=n, H=H, V=vocab), torch.device("cpu"), rng.initial_seed())
    hidden, weight, targets = x["hidden"], x["weight"], x["targets"]
    bias = torch.randn(vocab, generator=rng).to(dtype)
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


def doubled(leaves, targets, rows):
    return [x.double() for x in leaves], targets, {k: v.double() for k, v in rows.items()}


def run(fn, leaves, targets, rows, config=EVERYTHING, scale=3.0, **kwargs):
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in leaves)
    out = fn(hidden, weight, targets, config=config, bias=bias, **rows, **kwargs)
    grads = torch.autograd.grad(scale * out.loss, (hidden, weight, bias))
    return out.loss.detach(), *grads, out.metrics


def run_logprobs(fn, leaves, targets, upstream, **kwargs):
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in leaves)
    out = fn(hidden, weight, targets, bias=bias, **kwargs)
    loss = (out.logprobs * upstream[0].to(out.logprobs)).sum()
    loss = loss + (out.entropy * upstream[1].to(out.entropy)).sum()
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    return out.logprobs.detach(), out.entropy.detach(), *grads


@pytest.mark.parametrize("elements", TILES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_memory_against_float64(elements, dtype, rng, no_worse):
    args = draw(rng, dtype=dtype)
    extra = {"temperature": torch.rand(N, generator=rng) + 0.5, "softcap": 8.0}
    doubles = {"temperature": extra["temperature"].double(), "softcap": 8.0}
    truth = run(linear_ppo_loss_reference, *doubled(*args), **doubles)
    plain = run(linear_ppo_loss_reference, *args, **extra)
    chunk_bytes = None if elements is None else elements * dtype.itemsize
    ours = run(linear_ppo_loss, *args, low_memory=True, chunk_bytes=chunk_bytes, **extra)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c, rel=BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5)
    assert [x.dtype for x in ours] == [torch.float32] + [dtype] * 3 + [torch.float32]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("elements", TILES[1:], ids=str)
def test_low_memory_in_float64_agrees_to_the_last_digits(elements, softcap, rng):
    leaves, targets, rows = draw(rng, dtype=torch.float64)
    args = leaves, targets, {k: v.double() for k, v in rows.items()}
    ours = run(linear_ppo_loss, *args, softcap=softcap, low_memory=True, chunk_bytes=8 * elements)
    truth = run(linear_ppo_loss_reference, *args, softcap=softcap)
    for a, b in zip(ours[:4], truth, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_low_memory_never_multiplies_into_a_sum_of_the_weights_size(rng, monkeypatch):
    """Every product of the weight's gradient is over all rows that count; chunks see fewer."""
    from fastppo.ops import _head, _head_tiles

    args = draw(rng, dtype=torch.bfloat16)
    live = int((args[2]["weights"] != 0).sum())
    shapes, product = [], _head.product

    def recorded(a, b, out, *, add=False):
        shapes.append((*a.shape, add))
        product(a, b, out, add=add)

    monkeypatch.setattr(_head, "product", recorded)
    monkeypatch.setattr(_head_tiles, "product", recorded)
    budget = {"chunk_bytes": 334 * live * 2}  # rounded down to 320 columns
    run(linear_ppo_loss, *args, low_memory=True, **budget)
    into_weight = [(rows, summed, add) for rows, summed, add in shapes if summed == live]
    assert sum(rows for rows, _, _ in into_weight) == V
    assert len(into_weight) == 4 and not any(add for _, _, add in into_weight)
    shapes.clear()
    run(linear_ppo_loss, *args, chunk_bytes=32 * V * 2)
    assert [add for rows, _, add in shapes if rows == V] == [False, True]


def test_one_chunk_writes_the_gradients_as_they_are_wanted(rng, monkeypatch):
    """No float32 array of the weight's size for bfloat16 weights."""
    from fastppo.ops import _head

    args = draw(rng, dtype=torch.bfloat16)
    outs, product = [], _head.product

    def recorded(a, b, out, *, add=False):
        outs.append((out.dtype, add))
        product(a, b, out, add=add)

    monkeypatch.setattr(_head, "product", recorded)
    run(linear_ppo_loss, *args)
    assert outs == [(torch.bfloat16, False)] * 2


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tiles_and_chunks_give_the_same_gradients(softcap, rng):
    (hidden, weight, bias), targets, _ = draw(rng, dtype=torch.float64)
    from fastppo.ops._rows import row_gradient, row_stats

    head, (g, h) = Head(weight, bias), torch.randn(2, N, generator=rng, dtype=torch.float64)
    g[3] = h[3] = 0.0
    stats = row_stats(hidden @ weight.t() + bias, targets, 0.7, softcap)
    results = []
    for gradients in (tiled_gradients, chunked_gradients):
        options = HeadOptions(
            *(0.7, None, softcap, 7 * V * 8, False, False, torch.float64, True, True, True)
        )
        at = (stats, g, h, options, (torch.float64,) * 3, row_gradient)
        results.append(gradients(hidden, head, targets, *at))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert (results[0][0][3] == 0).all()


@pytest.mark.parametrize("vocab", [5, 61, 62, 1003])
def test_more_rows_than_tokens_or_fewer(vocab, rng):
    """The backward pass of linear_logprobs goes by tiles or by chunks."""
    leaves, targets, _ = draw(rng, dtype=torch.float64, vocab=vocab)
    upstream = torch.randn(2, N, generator=rng)
    ours = run_logprobs(linear_logprobs, leaves, targets, upstream, chunk_bytes=7 * 61 * 8)
    truth = run_logprobs(linear_logprobs_reference, leaves, targets, upstream)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# float32 logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunk_bytes", [None, 7 * V * 6, 32 * V * 6])
def test_fp32_logits_lose_nothing_after_the_operands(dtype, chunk_bytes, rng, no_worse):
    """As good as float32 products of the same half-precision numbers, up to the gradients."""
    leaves, targets, _ = draw(rng, dtype=dtype)
    upstream = torch.randn(2, N, generator=rng)
    exact = [x.double() for x in leaves]
    truth = run_logprobs(linear_logprobs_reference, exact, targets, upstream)
    plain = run_logprobs(linear_logprobs_reference, [x.float() for x in leaves], targets, upstream)
    how = {"chunk_bytes": chunk_bytes, "fp32_logits": True}
    ours = run_logprobs(linear_logprobs, leaves, targets, upstream, **how)
    half = run_logprobs(linear_logprobs, leaves, targets, upstream)
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        no_worse(a, b, c, rel=2e-6 if i < 2 else BF16_ROUNDING)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 3
    error, coarse = ((x[0] - truth[0]).abs().max() for x in (ours, half))
    assert 20 * error < coarse


@pytest.mark.parametrize("low_memory", [False, True])
def test_fp32_logits_of_the_loss(low_memory, rng, no_worse):
    leaves, targets, rows = draw(rng, dtype=torch.bfloat16)
    truth = run(linear_ppo_loss_reference, *doubled(leaves, targets, rows))
    plain = run(linear_ppo_loss_reference, [x.float() for x in leaves], targets, rows)
    how = {"low_memory": low_memory, "chunk_bytes": 32 * V * 6}
    ours = run(linear_ppo_loss, leaves, targets, rows, fp32_logits=True, **how)
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        # The gradient of the logits is rounded, its product, and three times that.
        no_worse(a, b, c, rel=2 * BF16_ROUNDING if 1 <= i <= 3 else 1e-5)


def test_fp32_logits_change_nothing_for_float32(rng):
    args = draw(rng)
    results = [run(linear_ppo_loss, *args, fp32_logits=flag) for flag in (False, True)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("mode", [{}, {"low_memory": True}, {"fp32_logits": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_policy_ratio_is_exactly_one_in_every_mode(mode, dtype, rng):
    (hidden, weight, bias), targets, rows = draw(rng, dtype=dtype)
    rows |= {"weights": torch.full((N,), 1 / N), "advantages": torch.ones(N)}
    old = [linear_logprobs(hidden, weight, targets, bias=bias, **mode).logprobs]
    if mode != {"fp32_logits": True} or dtype == torch.float32:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        old.append(token_logprobs(logits, targets).logprobs)
    for rows["old_logprobs"] in old:
        out = linear_ppo_loss(
            hidden,
            weight.requires_grad_(),
            targets,
            config=PPOLossConfig(),
            bias=bias,
            **rows,
            **mode,
        )
        metrics = reduce_ppo_metrics(out.metrics)
        assert float(metrics["ratio"]) == float(metrics["ratio_max"]) == 1.0
        assert float(metrics["approx_kl"]) == 0.0


@pytest.mark.parametrize("mode", [{}, {"low_memory": True}, {"fp32_logits": True}], ids=str)
def test_repeats_are_bitwise_equal_in_every_mode(mode, rng):
    args = draw(rng, dtype=torch.bfloat16)
    a, b = (run(linear_ppo_loss, *args, chunk_bytes=32 * V * 2, **mode) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# Rows that cannot matter


@pytest.fixture
def rows_multiplied(monkeypatch):
    from fastppo.ops import _head

    seen, logits = [], _head.Head.logits

    def recorded(self, hidden, *args, **kwargs):
        seen.append(hidden.shape[0])
        return logits(self, hidden, *args, **kwargs)

    monkeypatch.setattr(_head.Head, "logits", recorded)
    return seen


@pytest.mark.parametrize("known", [False, True], ids=["counted", "known"])
def test_rows_of_advantage_zero_never_reach_the_head(known, rng, rows_multiplied):
    leaves, targets, rows = draw(rng)
    rows["advantages"][torch.rand(N, generator=rng) < 0.5] = 0.0
    config = PPOLossConfig(dual_clip=1.5, is_correction="icepop")
    live = live_rows(rows["weights"], rows["advantages"], config)
    assert 0 < live.sum() < (rows["weights"] != 0).sum()
    masked = leaves[0].masked_fill(~live[:, None], torch.nan)
    ids = torch.where(live, targets, -100)
    num_live = int(live.sum()) if known else None
    rows_multiplied.clear()
    ours = run(linear_ppo_loss, (masked, *leaves[1:]), ids, rows, config, num_live=num_live)
    assert rows_multiplied == [int(live.sum())]
    truth = run(linear_ppo_loss_reference, *doubled(leaves, targets, rows), config)
    for a, b in zip(ours[:4], truth, strict=False):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)
    assert (ours[1][~live] == 0).all()
    rows["weights"] = torch.where(live, rows["weights"], 0.0)
    same = run(linear_ppo_loss, leaves, targets, rows, config)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    assert reduce_ppo_metrics(ours[-1])["num_tokens"] == live.sum()


@pytest.mark.parametrize(
    "options", [{"kl_coef": 0.1}, {"ent_coef": 0.1}, {"ratio_level": "sequence"}], ids=str
)
def test_rows_of_advantage_zero_that_still_matter(options, rng):
    config, cu = PPOLossConfig(**options), torch.tensor([0, 20, N])
    leaves, targets, rows = draw(rng)
    rows["advantages"][torch.rand(N, generator=rng) < 0.5] = 0.0
    truth = run(linear_ppo_loss_reference, *doubled(leaves, targets, rows), config, cu_seqlens=cu)
    ours = run(linear_ppo_loss, leaves, targets, rows, config, cu_seqlens=cu)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-6)
    assert reduce_ppo_metrics(ours[-1])["num_tokens"] == (rows["weights"] != 0).sum()


def test_a_nan_advantage_is_seen(rng):
    leaves, targets, rows = draw(rng)
    rows["weights"] = torch.full((N,), 1 / N)
    rows["advantages"][3] = torch.nan
    loss, hidden, *_ = run(linear_ppo_loss, leaves, targets, rows, PPOLossConfig())
    assert loss.isnan() and hidden[3].isnan().all()


def test_many_rows(rng):
    """More than 65536, in 3 modes; the weight's gradient keeps its digits."""
    n, h, v = 70_000, 2, 16
    hidden, weight = torch.randn(n, h, generator=rng), torch.randn(v, h, generator=rng)
    targets = torch.randint(v, (n,), generator=rng)
    rows = {"advantages": torch.randn(n, generator=rng), "weights": torch.full((n,), 1 / n)}
    rows["old_logprobs"] = linear_logprobs(hidden, weight, targets).logprobs
    exact = weight.double().requires_grad_()
    doubles = {k: x.double() for k, x in rows.items()}
    config = PPOLossConfig()
    out = linear_ppo_loss_reference(hidden.double(), exact, targets, config=config, **doubles)
    out.loss.backward()
    for mode in ({}, {"chunk_bytes": 4096 * v * 4}, {"low_memory": True, "chunk_bytes": n * 4 * 4}):
        leaf = weight.clone().requires_grad_()
        linear_ppo_loss(hidden, leaf, targets, config=config, **rows, **mode).loss.backward()
        torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-8)


def rounding_room(leaves, targets, upstream):
    """The room that the float32 sums of the logits need, by `linear_logprobs`' bound of them, in
    (logprobs, entropy) and the gradients of (hidden, weight, bias), elementwise to first order. The
    forward and the backward pass may each err by the bound r, so that with L = ln Σe^z

        |δL| ≤ Σp·r,   |δE| ≤ Σp·|ln p + E|·r,   |δ ln p| ≤ r + |δL|
        G = ∂L/∂z = −p·(g + h·(ln p + E)) where it is not the target's, whose g is exact

    leaves: float64, of numbers exact in float32. Temperature 1, no softcap.
    """
    hidden, weight, bias = leaves
    g, h = (x.double()[:, None] for x in upstream)
    size = hidden.abs() @ weight.abs().t() + bias.abs()
    r = (hidden.shape[1] + 1) * 2**-24 * size
    log_p = (hidden @ weight.t() + bias).log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1, keepdim=True)
    log_sum_room = (p * r).sum(-1, keepdim=True)
    entropy_room = (p * (log_p + entropy).abs() * r).sum(-1, keepdim=True)
    log_p_room = r + log_sum_room
    slope = (g + h * (log_p + entropy)).abs() * log_p_room + h.abs() * (log_p_room + entropy_room)
    logprobs_room = log_p_room.gather(1, targets[:, None])
    gradients = (p * slope) @ weight.abs(), (p * slope).t() @ hidden.abs(), (p * slope).sum(0)
    return logprobs_room.squeeze(1), entropy_room.squeeze(1), *gradients


@pytest.mark.parametrize("vocab", [32001, 50257, 128256, 129280, 151936])
def test_real_vocabularies(vocab, rng, no_worse):
    """Large logits of both signs, and rows all below 0: nothing past V takes part."""
    hidden, weight = torch.randn(3, 4, generator=rng), 20 * torch.randn(vocab, 4, generator=rng)
    bias = torch.full((vocab,), -100.0)
    targets, upstream = torch.tensor([0, vocab - 1, vocab // 2]), torch.ones(2, 3)
    leaves = hidden, weight, bias
    exact = [x.double() for x in leaves]
    truth = run_logprobs(linear_logprobs_reference, exact, targets, upstream)
    plain = run_logprobs(linear_logprobs_reference, leaves, targets, upstream)
    # In one part the shapes are plain torch's. Smaller parts have others, in the backward pass yet
    # others, and what a sum of another shape is rounded to differs between processors.
    rooms = rounding_room(exact, targets, upstream)
    for chunk_bytes, parts in ((None, [0.0] * 5), (1 << 20, rooms)):
        ours = run_logprobs(linear_logprobs, leaves, targets, upstream, chunk_bytes=chunk_bytes)
        for a, b, c, room in zip(ours, plain, truth, parts, strict=True):
            no_worse(a, b, c, room=room)
        assert (ours[0] <= 0).all()
