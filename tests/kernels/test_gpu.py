"""The head ops on a CUDA device against float64 on the CPU, and what only a GPU can show."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import (
    PPOLossConfig,
    linear_logprobs,
    linear_logprobs_reference,
    linear_ppo_loss,
    linear_ppo_loss_reference,
    reduce_ppo_metrics,
    token_logprobs,
    token_logprobs_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING = PPOLossConfig(dual_clip=1.5, kl_coef=0.1, ent_coef=0.02, is_correction="tis")


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def close(result, plain, truth, rel):
    """The op errs against float64 at most as plain torch does in the same dtype, plus rel."""
    result, plain, truth = (x.detach().double().cpu() for x in (result, plain, truth))
    allowed = (plain - truth).abs().max() + 2e-6 + rel * truth.abs().max()
    assert (result - truth).abs().max() <= allowed


def on(device, *tensors):
    return [x if x is None else x.to(device) for x in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [2, 1003, 1024, 16384, 32001, 50257, 128256, 129280, 151936])
def test_token_logprobs(vocab, dtype, rng):
    logits = (4 * torch.randn(70, vocab, generator=rng)).to(dtype)
    targets = torch.randint(vocab, (70,), generator=rng)
    upstream = torch.randn(2, 70, generator=rng)
    results = []
    for fn, x in (
        (token_logprobs, logits.cuda()),
        (token_logprobs_reference, logits.cuda()),
        (token_logprobs_reference, logits.double()),
    ):
        x = x.requires_grad_()
        out = fn(x, targets.to(x.device), temperature=0.7)
        g, h = on(x.device, *upstream.to(out.entropy.dtype))
        (grad,) = torch.autograd.grad((out.logprobs * g + out.entropy * h).sum(), x)
        results.append((*out, grad))
    for a, b, c in zip(*results, strict=True):
        close(a, b, c, rel=4e-6)


@pytest.mark.parametrize("inplace", [False, True])
def test_inplace_backward_on_many_rows(inplace):
    """70 000 rows: more than a grid axis other than the first holds; no race on the storage."""
    logits = torch.randn(70_000, 1003, device="cuda", requires_grad=True)
    targets = torch.arange(70_000, device="cuda") % 1003
    out = token_logprobs(logits * 1.0, targets, inplace_backward=inplace)
    (out.logprobs - out.entropy).sum().backward()
    expected = torch.log_softmax(logits.detach(), dim=-1)
    h = -(expected.exp() * expected).sum(1, keepdim=True)
    grad = torch.zeros_like(expected).scatter_(1, targets[:, None], 1.0) - expected.exp()
    grad += expected.exp() * (expected + h)
    torch.testing.assert_close(logits.grad, grad, rtol=1e-4, atol=1e-6)


def draw(rng, dtype, n=300, hidden_size=64, vocab=50257):
    hidden = torch.randn(n, hidden_size, generator=rng).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=rng) / 8).to(dtype)
    targets = torch.randint(vocab, (n,), generator=rng)
    lp = linear_logprobs_reference(hidden.float(), weight.float(), targets).logprobs
    old, ref, rollout = (lp + 0.3 * torch.randn(n, generator=rng) for _ in range(3))
    weights = torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) < 0.7) / n
    return hidden, weight, targets, old, torch.randn(n, generator=rng), weights, ref, rollout


def run_loss(fn, inputs, **kwargs):
    hidden, weight, targets, old, advantages, weights, ref, rollout = inputs
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    extra = {"ref_logprobs": ref, "rollout_logprobs": rollout}
    out = fn(hidden, weight, targets, old, advantages, weights, EVERYTHING, **extra, **kwargs)
    return out.loss, *torch.autograd.grad(out.loss, (hidden, weight)), out.metrics


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_ppo_loss(dtype, rng):
    inputs = draw(rng, dtype)
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    truth = run_loss(linear_ppo_loss_reference, doubles)
    plain = run_loss(linear_ppo_loss_reference, on("cuda", *inputs))
    ours = run_loss(linear_ppo_loss, on("cuda", *inputs), chunk_bytes=64 * 50257 * dtype.itemsize)
    rel = 1e-4 if dtype == torch.float32 else 2**-7
    for a, b, c in zip(ours, plain, truth, strict=True):
        close(a, b, c, rel)


def test_repeats_are_bitwise_equal(rng):
    inputs = on("cuda", *draw(rng, torch.bfloat16))
    a, b = (run_loss(linear_ppo_loss, inputs) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("vocab", [1003, 16384, 151936])
def test_on_policy_ratio_is_exactly_one(vocab, rng):
    hidden, weight, targets, _, advantages, _, _, _ = on(
        "cuda", *draw(rng, torch.bfloat16, n=257, vocab=vocab)
    )
    ones = torch.ones(257, device="cuda")
    rounded = [linear_logprobs(hidden, weight, targets).logprobs]
    if vocab % 16 == 0:  # rows of logits start where the op has them: another product rounds alike
        rounded.append(token_logprobs(hidden @ weight.t(), targets).logprobs)
    for old in rounded:
        out = linear_ppo_loss(hidden, weight, targets, old, advantages, ones, PPOLossConfig())
        metrics = reduce_ppo_metrics(out.metrics)
        assert float(metrics["ratio_max"]) == float(metrics["ratio"]) == 1.0


def test_weight_gradient_of_many_chunks_stays_accurate(rng):
    """One chunk or 64: bfloat16 sums over chunks would drift apart."""
    n, h, v = 65_536, 32, 1024
    hidden = torch.randn(n, h, generator=rng).bfloat16().cuda()
    weight = torch.randn(v, h, generator=rng).div(8).bfloat16().cuda().requires_grad_()
    targets = torch.randint(v, (n,), generator=rng).cuda()
    grads = []
    for chunk_bytes in (None, 1024 * v * 2):
        lp = linear_logprobs(hidden, weight, targets, chunk_bytes=chunk_bytes).logprobs
        grads.append(torch.autograd.grad(lp.sum(), weight)[0].double())
    assert (grads[0] - grads[1]).norm() <= 4e-3 * grads[0].norm()


def test_compiled(rng):
    x = torch.randn(64, 1003, generator=rng).cuda().requires_grad_()
    targets = torch.arange(64, device="cuda")

    def loss(x):
        out = token_logprobs(x, targets, temperature=0.7)
        return (out.logprobs * 2 + out.entropy).sum()

    expected = torch.autograd.grad(loss(x), x)[0]
    assert torch.equal(torch.autograd.grad(torch.compile(loss, fullgraph=True)(x), x)[0], expected)


def test_the_number_of_rows_does_not_recompile():
    from fastppo_kernels.token_logprobs import token_logprobs_fwd_kernel

    token_logprobs(torch.zeros(3, 512, device="cuda"), torch.zeros(3, device="cuda").long())
    caches = token_logprobs_fwd_kernel.device_caches
    before = sum(len(cache[0]) for cache in caches.values())
    for n in (1, 2, 16, 17, 1000):
        token_logprobs(torch.zeros(n, 512, device="cuda"), torch.zeros(n, device="cuda").long())
    assert sum(len(cache[0]) for cache in caches.values()) == before
