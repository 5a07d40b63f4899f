"""value_loss: forward and gradient against float64, masking, splitting, explained variance."""

from __future__ import annotations

import pytest
import torch

from fastppo.ops import (
    VALUE_METRIC_NAMES,
    combine_value_metrics,
    reduce_value_metrics,
    value_loss,
    value_loss_reference,
)


def inputs(n, rng):
    values, returns = torch.randn(2, n, generator=rng)
    old = values + 0.3 * torch.randn(n, generator=rng)
    weights = torch.rand(n, generator=rng) * (torch.rand(n, generator=rng) < 0.8) / max(n, 1)
    return values, old, returns, weights


def run(fn, args, clip, huber=None):
    v = args[0].detach().clone().requires_grad_()
    out = fn(v, *args[1:], clip=clip, huber=huber)
    (grad,) = torch.autograd.grad(3.0 * out.loss, v)
    return out.loss.detach(), grad, out.metrics


@pytest.mark.parametrize("n", [0, 1, 2, 257])
@pytest.mark.parametrize("clip", [None, 0.0, 0.2])
@pytest.mark.parametrize("huber", [None, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(n, clip, huber, dtype, rng, no_worse):
    args = inputs(n, rng)
    args = [args[0].to(dtype), *args[1:]]
    truth = run(value_loss_reference, [x.double() for x in args], clip, huber)
    plain = run(value_loss_reference, args, clip, huber)
    for a, b, c in zip(run(value_loss, args, clip, huber), plain, truth, strict=True):
        no_worse(a, b, c)


def test_huber_is_quadratic_near_and_linear_far():
    v = torch.tensor([0.5, 3.0, -3.0], requires_grad=True)
    out = value_loss(v, None, torch.zeros(3), torch.ones(3), clip=None, huber=1.0)
    out.loss.backward()
    assert out.loss.item() == 0.125 + 2.5 + 2.5
    assert v.grad.tolist() == [0.5, 1.0, -1.0]


@pytest.mark.parametrize("loss", [value_loss, value_loss_reference])
def test_a_clip_of_0_is_off(loss, rng):
    v, old, *rest = inputs(257, rng)
    off = run(loss, (v, None, *rest), None)
    assert all(map(torch.equal, off, run(loss, (v, None, *rest), 0)))
    assert not torch.equal(off[0], run(loss, (v, old, *rest), 0.2)[0])


def test_custom_op(rng):
    v, old, returns, w = inputs(30, rng)
    for optional in ((None, None), (0.2, None), (0.2, 0.5)):
        torch.library.opcheck(torch.ops.fastppo.value_loss.default, (v, old, returns, w, *optional))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
def test_compiles_without_a_graph_break(rng):
    v, old, returns, w = inputs(30, rng)
    compiled = torch.compile(value_loss, fullgraph=True, backend="aot_eager")
    expected, result = (run(f, (v, old, returns, w), 0.2) for f in (value_loss, compiled))
    for a, b in zip(result, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_cleanrl_expression(rng):
    newvalue, old, returns, _ = inputs(50, rng)
    v_loss_unclipped = (newvalue - returns) ** 2
    v_clipped = old + torch.clamp(newvalue - old, -0.2, 0.2)
    v_loss_max = torch.max(v_loss_unclipped, (v_clipped - returns) ** 2)
    loss = value_loss(newvalue, old, returns, torch.full((50,), 1 / 50), clip=0.2).loss
    torch.testing.assert_close(loss, 0.5 * v_loss_max.mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_tokens_in_strided_tensors(dtype, rng, no_worse):
    args = [torch.stack([x, x], dim=1)[:, 0].to(dtype) for x in inputs(65_537, rng)]
    args[3] = (65_537 * args[3].float() / 1000).to(dtype)
    truth = run(value_loss_reference, [x.double() for x in args], 0.2)
    plain = run(value_loss_reference, args, 0.2)
    for a, b, c in zip(run(value_loss, args, 0.2), plain, truth, strict=True):
        no_worse(a, b, c)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_valid_value_that_is_not_finite_shows(bad, rng):
    v, old, returns, w = inputs(30, rng)
    v[int(w.nonzero()[3])] = bad
    loss, grad, _ = run(value_loss, (v, old, returns, w), None)
    assert not loss.isfinite()
    assert int((~grad.isfinite()).sum()) == 1


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo
def test_compiles_once_for_every_number_of_tokens(rng):
    torch._dynamo.reset()
    compiled = torch.compile(value_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    run(compiled, inputs(30, rng), 0.2)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n in (2, 17, 300):
            run(compiled, inputs(n, rng), 0.2)


def test_gradcheck(rng):
    v, old, returns, w = (x.double() for x in inputs(20, rng))
    v.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: value_loss(x, old, returns, w, clip=0.1).loss, v)


def test_clipped_value_has_no_gradient():
    v = torch.tensor([1.0, 1.0], requires_grad=True)
    out = value_loss(v, torch.zeros(2), torch.tensor([0.0, 2.0]), torch.ones(2), clip=0.2)
    out.loss.backward()
    # 1 is far above old + 0.2; the target 0 pulls it back (kept), the target 2 is cut by the clip.
    assert v.grad.tolist() == [1.0, 0.0]
    assert float(reduce_value_metrics(out.metrics)["value_clipfrac"]) == 0.5


def test_masked_nan_and_nothing_valid(rng):
    v, old, returns, w = inputs(30, rng)
    poison = [torch.where(w != 0, x, torch.nan) for x in (v, old, returns)]
    clean, dirty = run(value_loss, (v, old, returns, w), 0.2), run(value_loss, (*poison, w), 0.2)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
    loss, grad, metrics = run(value_loss, (*poison, torch.zeros(30)), 0.2)
    assert float(loss) == 0.0
    assert (grad == 0).all()
    assert all(float(x) == 0.0 for x in reduce_value_metrics(metrics).values())


def test_splitting_adds_up(rng):
    v, old, returns, w = inputs(101, rng)
    returns = returns * 1e-3 + 1.0  # nearly equal returns: sums of squares would cancel
    whole = value_loss(v, old, returns, w)
    parts = [
        value_loss(*(x[a:b] for x in (v, old, returns, w)))
        for a, b in [(0, 7), (7, 7), (7, 60), (60, 101)]
    ]
    torch.testing.assert_close(sum(p.loss for p in parts), whole.loss)
    together = reduce_value_metrics([p.metrics for p in parts])
    for name, x in reduce_value_metrics(whole.metrics).items():
        torch.testing.assert_close(together[name], x)
    again = combine_value_metrics([combine_value_metrics([p.metrics for p in parts[:2]])])
    assert again.shape == (len(VALUE_METRIC_NAMES),)
    m = w != 0
    error = returns[m].double() - v[m].double()
    expected = 1 - error.var(correction=0) / returns[m].double().var(correction=0)
    torch.testing.assert_close(
        together["explained_variance"].double(), expected, rtol=1e-4, atol=1e-4
    )


def test_explained_variance_of_equal_returns_is_zero(rng):
    v, old, _, w = inputs(10, rng)
    metrics = value_loss(v, old, torch.ones(10), w).metrics
    assert float(reduce_value_metrics(metrics)["explained_variance"]) == 0.0
    perfect = value_loss(v, old, v.clone(), w).metrics
    assert float(reduce_value_metrics(perfect)["explained_variance"]) == 1.0


def test_bad_arguments_are_named():
    z = torch.zeros(3)
    with pytest.raises(ValueError, match="old_values: clip = 0.2 needs"):
        value_loss(z, None, z, z)
    with pytest.raises(ValueError, match="^clip: .*got -1"):
        value_loss(z, z, z, z, clip=-1)
    for huber in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="^huber: expected"):
            value_loss(z, z, z, z, huber=huber)
    with pytest.raises(ValueError, match=r"^returns: .*got \(2,\)"):
        value_loss(z, z, z[:2], z)
    with pytest.raises(ValueError, match="^returns: .*got meta"):
        value_loss(z, z, z.to("meta"), z)
    with pytest.raises(ValueError, match="^clip: .*got nan"):
        value_loss(z, z, z, z, clip=float("nan"))
    with pytest.raises(TypeError, match="weights: .* got bool"):
        value_loss(z, z, z, z.bool())
    with pytest.raises(ValueError, match="^vectors: expected"):
        combine_value_metrics([z])
