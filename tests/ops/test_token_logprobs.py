"""token_logprobs against float64 autograd: forward, both gradients, extreme rows, options."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import token_logprobs, token_logprobs_reference

# One row, no row, a prime vocabulary, vocabularies that pad badly, one larger than a block of rows.
SHAPES = [(1, 2), (0, 7), (5, 1003), (3, 32001), (40, 50257)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def run(fn, logits, targets, upstream, **kwargs):
    x = logits.detach().clone().requires_grad_()
    out = fn(x, targets, **kwargs)
    loss = (out.logprobs * upstream[0].to(out.logprobs)).sum()
    loss = loss + (out.entropy * upstream[1].to(out.entropy)).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return out.logprobs.detach(), out.entropy.detach(), grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, "rows"])
def test_forward_and_gradient(shape, dtype, temperature, rng, no_worse):
    n, v = shape
    logits = (4 * torch.randn(n, v, generator=rng)).to(dtype)
    targets = torch.randint(v, (n,), generator=rng, dtype=torch.int32)
    upstream = torch.randn(2, n, generator=rng)
    tau = torch.rand(n, generator=rng) + 0.5 if temperature == "rows" else temperature
    tau64 = tau.double() if temperature == "rows" else tau
    truth = run(token_logprobs_reference, logits.double(), targets, upstream, temperature=tau64)
    plain = run(token_logprobs_reference, logits, targets, upstream, temperature=tau)
    ours = run(token_logprobs, logits, targets, upstream, temperature=tau)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert ours[2].dtype == dtype


@pytest.mark.parametrize("which", [0, 1], ids=["logprobs", "entropy"])
def test_one_output_used(which, rng):
    logits = torch.randn(4, 11, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (4,), generator=rng)
    grads = [
        torch.autograd.grad(fn(logits, targets, temperature=0.5)[which].sum(), logits)[0]
        for fn in (token_logprobs, token_logprobs_reference)
    ]
    torch.testing.assert_close(*grads)
    assert grads[0].abs().max() > 1e-3


def test_gradcheck(rng):
    logits = torch.randn(3, 7, generator=rng, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 6, 3])
    tau = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, targets, temperature=tau), logits)


def test_minus_inf_logits_add_nothing_to_the_entropy(rng):
    logits = torch.randn(3, 10, generator=rng)
    logits[:, 4:] = -torch.inf
    targets = torch.tensor([0, 1, 2])
    ours = run(token_logprobs, logits, targets, torch.ones(2, 3))
    small = run(token_logprobs, logits[:, :4], targets, torch.ones(2, 3))
    torch.testing.assert_close(ours[:2], small[:2])
    torch.testing.assert_close(ours[2][:, :4], small[2])
    assert (ours[2][:, 4:] == 0).all()
    out = token_logprobs(logits, torch.tensor([9, 9, 9]))
    assert (out.logprobs == -torch.inf).all()


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_extreme_rows(offset, rng, no_worse):
    logits = torch.randn(4, 1003, generator=rng) + offset
    logits[1] = offset
    logits[2, 5] += 100.0
    logits[3] = 100.0 * torch.randn(1003, generator=rng).sign()
    targets = torch.tensor([5, 5, 5, 5])
    upstream = torch.ones(2, 4)
    truth = run(token_logprobs_reference, logits.double(), targets, upstream)
    plain = run(token_logprobs_reference, logits, targets, upstream)
    ours = run(token_logprobs, logits, targets, upstream)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c)
    assert (ours[0] <= 0).all()
    assert (ours[1] >= 0).all()


def test_logprobs_are_never_positive():
    logits = torch.zeros(64, 32001)
    logits[:, 3] = torch.linspace(0, 40, 64)
    assert (token_logprobs(logits, torch.full((64,), 3)).logprobs <= 0).all()


def test_rows_without_gradient_may_hold_nan(rng):
    logits = torch.randn(4, 9, generator=rng)
    logits[1] = torch.nan
    x = logits.requires_grad_()
    out = token_logprobs(x, torch.zeros(4, dtype=torch.long))
    live = torch.tensor([True, False, True, True])
    torch.where(live, out.logprobs + out.entropy, 0.0).sum().backward()
    assert (x.grad[1] == 0).all()
    assert torch.isfinite(x.grad).all()
    assert (x.grad[0] != 0).any()


def test_inplace_backward_returns_the_same_gradient_in_the_same_storage(rng):
    weight = torch.randn(12, 6, generator=rng)
    hidden = torch.randn(5, 6, generator=rng, requires_grad=True)
    targets = torch.randint(12, (5,), generator=rng)
    grads = []
    for inplace in (False, True):
        logits = hidden @ weight.t()
        seen = []
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        out = token_logprobs(logits, targets, inplace_backward=inplace)
        (grad,) = torch.autograd.grad((out.logprobs - out.entropy).sum(), hidden)
        grads.append(grad)
        assert (seen[0] == logits.data_ptr()) == inplace
    assert torch.equal(*grads)


def test_second_backward_after_inplace_raises(rng):
    x = torch.randn(3, 5, generator=rng, requires_grad=True)
    out = token_logprobs(x * 1.0, torch.zeros(3, dtype=torch.long), inplace_backward=True)
    out.logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logprobs.sum().backward()


def test_strided_logits_and_determinism(rng):
    wide = torch.randn(6, 2 * 1003, generator=rng)
    view = wide[:, ::2]
    targets = torch.randint(1003, (6,), generator=rng)
    upstream = torch.ones(2, 6)
    a = run(token_logprobs, view, targets, upstream)
    b = run(token_logprobs, view.contiguous(), targets, upstream)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
    out = token_logprobs(view, targets)  # the view itself, not a clone
    assert torch.equal(out.logprobs, a[0])


def test_autocast_does_not_touch_it(rng):
    logits = torch.randn(3, 50, generator=rng)
    targets = torch.zeros(3, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = token_logprobs(logits, targets)
    assert torch.equal(inside.logprobs, token_logprobs(logits, targets).logprobs)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.tensor([0, 5])}, ValueError, r"targets: .*\[0, 5\), got 5"),
        ({"targets": torch.tensor([0, -100])}, ValueError, r"targets: .* got -100"),
        ({"targets": torch.tensor([0.0, 1.0])}, TypeError, r"targets: .*int32 or int64, got float"),
        ({"targets": torch.tensor([0])}, ValueError, r"targets: .*got \(1,\)"),
        ({"logits": torch.zeros(2, 5, dtype=torch.long)}, TypeError, r"logits: .*got int64"),
        ({"logits": torch.zeros(5)}, ValueError, r"logits: .*got \(5,\)"),
        ({"temperature": 0.0}, ValueError, r"temperature: .* > 0, got 0.0"),
        ({"temperature": torch.tensor([1.0, -1.0])}, ValueError, r"temperature: .*got -1.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature: expected"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    args = {"logits": torch.zeros(2, 5), "targets": torch.tensor([0, 1])} | change
    with pytest.raises(error, match=message):
        token_logprobs(**args)
