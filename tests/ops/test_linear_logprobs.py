"""linear_logprobs: forward, every gradient, chunk sizes, autocast, and what it keeps in memory."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import linear_logprobs, linear_logprobs_reference

BF16_ROUNDING = 2**-8
# No row, one row, sizes no tile divides, a vocabulary above one block of rows.
SHAPES = [(0, 4, 7), (1, 3, 5), (37, 24, 1003), (6, 16, 32001)]


def draw(shape, rng, dtype=torch.float32):
    n, h, v = shape
    hidden = torch.randn(n, h, generator=rng).to(dtype)
    weight = (torch.randn(v, h, generator=rng) / 2).to(dtype)
    bias = torch.randn(v, generator=rng).to(dtype)
    targets = torch.randint(v, (n,), generator=rng, dtype=torch.int32)
    return hidden, weight, bias, targets, torch.randn(2, n, generator=rng)


def run(fn, hidden, weight, bias, targets, upstream, **kwargs):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    out = fn(leaves[0], leaves[1], targets, bias=leaves[2], **kwargs)
    loss = (out.logprobs * upstream[0].to(out.logprobs)).sum()
    loss = loss + (out.entropy * upstream[1].to(out.entropy)).sum()
    return out.logprobs.detach(), out.entropy.detach(), *torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7}, {"softcap": 3.0, "temperature": 1.3}],
    ids=["plain", "temperature", "softcap"],
)
def test_forward_and_gradients(shape, dtype, options, rng, no_worse):
    args = draw(shape, rng, dtype)
    doubles = [x.double() if x.is_floating_point() else x for x in args]
    truth = run(linear_logprobs_reference, *doubles, **options)
    plain = run(linear_logprobs_reference, *args, **options)
    ours = run(linear_logprobs, *args, **options)
    rel = BF16_ROUNDING if dtype == torch.bfloat16 else 2e-6
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c, rel=rel)
    assert [x.dtype for x in ours] == [torch.float32] * 2 + [dtype] * 3


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap, rng):
    hidden, weight, bias, targets, _ = draw((5, 3, 7), rng, torch.float64)
    tau = torch.rand(5, generator=rng, dtype=torch.float64) + 0.5

    def fn(hidden, weight, bias):
        return linear_logprobs(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=tau,
            softcap=softcap,
            chunk_bytes=2 * 7 * 8,
        )

    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(fn, leaves)


@pytest.mark.parametrize("rows", [1, 3, 32, 64, 1000])
def test_chunk_size_only_rounds(rows, rng):
    args = draw((101, 16, 257), rng)
    whole = run(linear_logprobs, *args)
    parts = run(linear_logprobs, *args, chunk_bytes=rows * 257 * 4)
    for a, b in zip(parts, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_gradients_only_where_needed(wanted, rng):
    *leaves, targets, _ = draw((9, 4, 11), rng)
    everything = run(linear_logprobs, *leaves, targets, torch.ones(2, 9))
    leaves[wanted].requires_grad_()
    out = linear_logprobs(leaves[0], leaves[1], targets, bias=leaves[2])
    (out.logprobs + out.entropy).sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, everything[2 + wanted])
    assert [x.grad is None for x in leaves].count(True) == 2


def test_no_grad(rng):
    hidden, weight, _, targets, _ = draw((9, 4, 11), rng)
    with torch.no_grad():
        assert not linear_logprobs(hidden, weight.requires_grad_(), targets).logprobs.requires_grad


def test_rows_without_gradient_may_hold_nan(rng):
    args = draw((20, 8, 31), rng)
    live = torch.rand(20, generator=rng) < 0.5
    upstream = torch.where(live, args[-1], 0.0)
    hidden = torch.where(live[:, None], args[0], torch.nan)
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, *args[1:3])]
    out = linear_logprobs(leaves[0], leaves[1], args[3], bias=leaves[2])
    loss = torch.where(live, out.logprobs * upstream[0] + out.entropy * upstream[1], 0.0).sum()
    grads = torch.autograd.grad(loss, leaves)
    clean = run(linear_logprobs, *args[:4], upstream)
    for a, b in zip(grads, clean[2:], strict=True):
        torch.testing.assert_close(a, b)
    assert (grads[0][~live] == 0).all()


def test_autocast_multiplies_in_bf16_and_sums_in_float32(rng, no_worse):
    args = draw((64, 32, 1003), rng)
    doubles = [x.double() if x.is_floating_point() else x for x in args]
    truth = run(linear_logprobs_reference, *doubles)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(linear_logprobs_reference, *args)
        ours = run(linear_logprobs, *args, chunk_bytes=32 * 1003 * 2)
        mixed = linear_logprobs(args[0].bfloat16(), args[1], args[3]).logprobs
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c, rel=BF16_ROUNDING)
    assert [x.dtype for x in ours] == [torch.float32] * 5
    assert mixed.dtype == torch.float32


def test_weight_gradient_does_not_lose_small_terms(rng):
    """bf16 sums over many chunks would stall; float32 sums do not."""
    n, h, v = 2048, 8, 16
    hidden = torch.randn(n, h, generator=rng).abs().bfloat16()
    weight = torch.zeros(v, h, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(n, dtype=torch.long)
    exact = weight.detach().double().requires_grad_()
    linear_logprobs_reference(hidden.double(), exact, targets).logprobs.sum().backward()
    linear_logprobs(hidden, weight, targets, chunk_bytes=32 * v * 2).logprobs.sum().backward()
    error = (weight.grad.double() - exact.grad).abs().max() / exact.grad.abs().max()
    assert error < 2**-8


def test_repeats_are_bitwise_equal(rng):
    args = draw((37, 24, 1003), rng)
    for a, b in zip(run(linear_logprobs, *args), run(linear_logprobs, *args), strict=True):
        assert torch.equal(a, b)


def test_no_full_logits_are_saved(rng):
    hidden, weight, _, targets, _ = draw((300, 8, 1003), rng)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        linear_logprobs(hidden.requires_grad_(), weight.requires_grad_(), targets)
    assert max(saved) == max(hidden.numel(), weight.numel())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"hidden": torch.zeros(2, 4)},
            ValueError,
            r"weight: .*got \(5, 3\)",
        ),
        ({"hidden": torch.zeros(2, 3).bfloat16()}, TypeError, "one dtype outside autocast"),
        ({"targets": torch.tensor([0, 5])}, ValueError, r"targets: .*got 5"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias: .*got \(4,\)"),
        ({"softcap": 0.0}, ValueError, "softcap: .* > 0, got 0.0"),
        ({"chunk_bytes": 0}, ValueError, "chunk_bytes: .* > 0, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature: .* > 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    args = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "targets": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        linear_logprobs(**(args | change))
