"""The head's ops inside torch.compile: one graph, no recompilation per number of rows, and the bits
of eager mode; and what torch.library.opcheck asks of a custom op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastppo.ops import PPOLossConfig, linear_logprobs, linear_ppo_loss, live_rows, token_logprobs
from fastppo.ops._ppo_loss_config import config_arguments

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo's own

H, V = 12, 103
TOKEN = PPOLossConfig(ent_coef=0.01)
SPARSE = PPOLossConfig(dual_clip=2.0)
SEQUENCE = PPOLossConfig(ratio_level="sequence")


def draw(n: int, seed: int = 0) -> tuple[Any, ...]:
    rng = torch.Generator().manual_seed(seed)
    leaves = torch.randn(n, H, generator=rng), torch.randn(V, H, generator=rng)
    leaves = *leaves, torch.randn(V, generator=rng)
    rows = torch.randn(2, n, generator=rng)
    rows[1][::3] = 0.0
    weights = torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) < 0.7)
    targets = torch.randint(V, (n,), generator=rng)
    cu = torch.tensor([0, n // 2, n])
    return [x.requires_grad_() for x in leaves], (targets, rows[0] - 5, rows[1], weights, cu)


def from_logits(leaves, targets, old, advantages, weights, cu, num_live):
    hidden, weight, bias = leaves
    out = token_logprobs(hidden @ weight.t() + bias, targets, temperature=0.7)
    return (out.logprobs * weights + out.entropy).sum()


def logprobs_only(leaves, targets, old, advantages, weights, cu, num_live):
    hidden, weight, bias = leaves
    return (linear_logprobs(hidden, weight, targets, bias=bias).logprobs * weights).sum()


def logprobs(leaves, targets, old, advantages, weights, cu, num_live):
    hidden, weight, bias = leaves
    tau = advantages.abs() + 0.5
    out = linear_logprobs(hidden, weight, targets, bias=bias, temperature=tau, softcap=9.0)
    return (out.logprobs * weights + out.entropy).sum()


def loss_of(config, **options):
    def loss(leaves, targets, old, advantages, weights, cu, num_live):
        hidden, weight, bias = leaves
        rows = (targets, old, advantages, weights)
        more = {"bias": bias, "cu_seqlens": cu, "num_live": num_live, **options}
        return 3 * linear_ppo_loss(hidden, weight, *rows, config, **more).loss

    return loss


def under_autocast(function):
    def inside(*args):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return function(*args)

    return inside


FUNCTIONS = {
    "token_logprobs": from_logits,
    "linear_logprobs": logprobs,
    "logprobs alone": logprobs_only,
    "loss": loss_of(TOKEN),
    "loss, dropping": loss_of(SPARSE),
    "loss, low memory": loss_of(SPARSE, low_memory=True),
    "loss, sequence": loss_of(SEQUENCE),
    "loss, autocast": under_autocast(loss_of(TOKEN)),
    "loss, autocast, fp32 logits": under_autocast(loss_of(TOKEN, fp32_logits=True)),
    "linear_logprobs, autocast": under_autocast(logprobs),
}
CONFIGS = {"loss, dropping": SPARSE, "loss, low memory": SPARSE, "loss, sequence": SEQUENCE}


def results(function, leaves, *rest):
    out = function(leaves, *rest)
    return out.detach(), *torch.autograd.grad(out, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True], ids=["counted", "known"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_any_number_of_rows(name, known):
    function = FUNCTIONS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    for n in (30, 41, 57, 64):
        leaves, rows = draw(n, seed=n)
        config = CONFIGS.get(name, TOKEN)
        num_live = int(live_rows(rows[3], rows[2], config).sum()) if known else None
        eager = results(function, leaves, *rows, num_live)
        assert max(g.abs().max() for g in eager[1:]) > 1e-3
        for a, b in zip(results(compiled, leaves, *rows, num_live), eager, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 2  # the first number of rows, then any


def test_ambient_autocast_is_part_of_the_graph():
    """The compiled function runs outside autocast whatever is in force around its call."""
    leaves, rows = draw(30)
    compiled = torch.compile(FUNCTIONS["loss"], backend="aot_eager", fullgraph=True)
    for dtype in (None, torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            eager = results(FUNCTIONS["loss"], leaves, *rows, None)
            ours = results(compiled, leaves, *rows, None)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("frozen", ["nothing", "head", "all", "no_grad"])
def test_products_that_nobody_needs_are_not_made(frozen, compiled, monkeypatch):
    from fastppo.ops import _head

    (hidden, weight, bias), rows = draw(30)
    leaves = [x.detach() for x in (hidden, weight, bias)]
    for x in {"head": leaves[:1], "all": []}.get(frozen, leaves):
        x.requires_grad_()
    made, product = [], _head.product

    def recorded(*args, **kwargs):
        made.append(args)
        product(*args, **kwargs)

    monkeypatch.setattr(_head, "product", recorded)
    function = FUNCTIONS["loss"]
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, backend="aot_eager", fullgraph=True)
    with torch.set_grad_enabled(frozen != "no_grad"):
        out = function(leaves, *rows, None)
    assert len(made) == {"nothing": 2, "head": 1, "all": 0, "no_grad": 0}[frozen]
    assert out.requires_grad == (frozen in ("nothing", "head"))


def test_metrics_come_out_of_the_graph_without_a_gradient():
    leaves, (targets, *rows, _) = draw(30)

    def both(leaves):
        return linear_ppo_loss(leaves[0], leaves[1], targets, *rows, TOKEN, bias=leaves[2])

    eager, ours = both(leaves), torch.compile(both, backend="aot_eager", fullgraph=True)(leaves)
    assert torch.equal(eager.metrics.nan_to_num(), ours.metrics.nan_to_num())
    assert not eager.metrics.requires_grad and not ours.metrics.requires_grad


OPTIONS = {
    "plain": (1.0, None, None, None, False, False, torch.float32, True, True, True),
    "everything": (1.0, "rows", 9.0, 2000, True, True, torch.bfloat16, True, True, True),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck(options):
    (hidden, weight, bias), (targets, old, advantages, weights, _) = draw(7)
    tau = advantages.abs() + 0.5
    tail = tuple(tau if x == "rows" else x for x in OPTIONS[options])
    ops, check = torch.ops.fastppo, torch.library.opcheck
    keep = weights != 0
    check(ops.linear_logprobs, (hidden, weight, bias, targets, None, None, *tail))
    check(ops.linear_logprobs, (hidden, weight, None, targets, keep, None, *tail[:-1], False))
    x = [t.detach() for t in (hidden, weight, bias)]
    rows = [t.detach() for t in ops.linear_logprobs(*x, targets, None, None, *tail)[1:]]
    check(ops.linear_logprobs_backward, (*x, targets, keep, None, *rows, old, None, *tail))
    check(ops.linear_logprobs_backward, (*x, targets, None, None, *rows, old, advantages, *tail))
    names = config_arguments(
        PPOLossConfig(dual_clip=2.0, kl_coef=0.1, ent_coef=0.01, is_correction="tis")
    )
    constants = (targets, old, advantages, weights, old, old)
    check(ops.linear_ppo_loss, (hidden, weight, bias, *constants, None, *names, *tail))
    frozen = (*tail[:-2], False, False)
    live = int(keep.sum())
    check(ops.linear_ppo_loss, (hidden, x[1], x[2], *constants, live, *names, *frozen))


def test_opcheck_from_logits():
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 130, generator=rng), torch.tensor([0, 129, 5])
    tau, ops, check = torch.tensor([0.5, 1.0, 2.0]), torch.ops.fastppo, torch.library.opcheck
    stats = ops.token_logprobs_fwd(logits, targets, 1.0, tau, 3.0)
    backward = (targets, *stats[1:], torch.ones(3), torch.ones(3), 1.0, tau, 3.0)
    check(ops.token_logprobs_fwd, (logits, targets, 0.7, None, None))
    check(ops.token_logprobs_fwd, (logits, targets, 1.0, tau, 3.0))
    check(ops.token_logprobs_bwd_out, (logits, *backward, torch.zeros_like(logits)))
    check(ops.token_logprobs_bwd_, (logits.clone(), *backward))
