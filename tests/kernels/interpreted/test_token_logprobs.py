"""token_logprobs' kernels: forward and both gradients against float64, and the peers' bugs."""

from __future__ import annotations

import tempfile

import pytest
import torch
from fastppo_kernels.launch import choose
from fastppo_kernels.token_logprobs import (
    GRADIENT_LAUNCHES,
    STATISTICS_LAUNCHES,
    RowStatistics,
    token_logprobs_bwd_out,
    token_logprobs_fwd,
)

from fastppo.ops import token_logprobs, token_logprobs_reference

pytestmark = pytest.mark.usefixtures("on_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Less than a block, a block, a prime, vocabularies of real models (Llama 2 + 1, GPT-2, Llama 3,
# DeepSeek V3, Qwen 2.5) that no block divides: tails, and every entry of both launch tables.
VOCABS = [2, 1003, 1024, 4096, 32001, 50257, 128256, 129280, 151936]


def run(fn, logits, targets, upstream, **kwargs):
    x = logits.detach().clone().requires_grad_()
    out = fn(x, targets, **kwargs)
    loss = (out.logprobs * upstream[0].to(out.logprobs)).sum()
    loss = loss + (out.entropy * upstream[1].to(out.entropy)).sum()
    (grad,) = torch.autograd.grad(loss, x)
    return out.logprobs.detach(), out.entropy.detach(), grad


def compare(logits, targets, upstream, no_worse, **kwargs):
    doubles = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    truth = run(token_logprobs_reference, logits.double(), targets, upstream, **doubles)
    plain = run(token_logprobs_reference, logits, targets, upstream, **kwargs)
    ours = run(token_logprobs, logits, targets, upstream, **kwargs)
    for a, b, c in zip(ours, plain, truth, strict=True):
        no_worse(a, b, c)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert ours[2].dtype == logits.dtype
    assert (ours[0] <= 0).all() and (ours[1] >= 0).all()
    return ours


SHAPES = [
    pytest.param(v, torch.bfloat16, marks=[pytest.mark.slow] * (100_000 < v < max(VOCABS)))
    for v in VOCABS
]
SHAPES += [(v, dtype) for v in (1003, 32001) for dtype in (torch.float32, torch.float16)]


@pytest.mark.parametrize(("vocab", "dtype"), SHAPES, ids=str)
def test_forward_and_gradient(vocab, dtype, rng, no_worse):
    logits = (4 * torch.randn(3, vocab, generator=rng)).to(dtype)
    targets = torch.tensor([0, vocab - 1, vocab // 2])
    compare(logits, targets, torch.randn(2, 3, generator=rng), no_worse)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [0.7, "rows"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_options(dtype, temperature, softcap, rng, no_worse):
    logits = (4 * torch.randn(5, 1003, generator=rng)).to(dtype)
    targets = torch.randint(1003, (5,), generator=rng, dtype=torch.int32)
    upstream = torch.randn(2, 5, generator=rng)
    tau = torch.rand(5, generator=rng) + 0.5 if temperature == "rows" else temperature
    compare(logits, targets, upstream, no_worse, temperature=tau, softcap=softcap)


def test_every_table_entry_is_reached():
    for table in (STATISTICS_LAUNCHES, GRADIENT_LAUNCHES):
        assert {choose(table, v) for v in VOCABS} == {entry for _, entry in table}


@pytest.mark.parametrize("offset", [-1000.0, 0.0, 1000.0])
def test_extreme_rows(offset, rng, no_worse):
    logits = torch.randn(5, 5003, generator=rng) + offset
    logits[1] = offset
    logits[2, 5] += 100.0
    logits[3] = 100.0 * torch.randn(5003, generator=rng).sign()
    logits[4] = -100.0 - torch.rand(5003, generator=rng)  # zeros past V would win
    compare(logits, torch.full((5,), 5), torch.ones(2, 5), no_worse)


def test_minus_inf_logits_are_absent_tokens(rng):
    logits = torch.randn(3, 5003, generator=rng)
    logits[:, 4:] = -torch.inf
    logits[2] = logits[2].flip(0)  # whole blocks of −inf come first
    targets = torch.tensor([0, 1, 5002])
    ours = run(token_logprobs, logits, targets, torch.ones(2, 3))
    few = torch.stack([logits[0, :4], logits[1, :4], logits[2, -4:].flip(0)])
    small = run(token_logprobs_reference, few, torch.tensor([0, 1, 0]), torch.ones(2, 3))
    torch.testing.assert_close(ours[:2], small[:2])
    torch.testing.assert_close(ours[2][:2, :4], small[2][:2])
    assert (ours[2][:2, 4:] == 0).all() and (ours[2][2, :-4] == 0).all()
    assert token_logprobs(logits[:1], torch.tensor([9])).logprobs == -torch.inf


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("column", [0, 5002])
def test_a_broken_logit_is_seen(bad, column, rng):
    logits = torch.randn(2, 5003, generator=rng)
    logits[1, column] = bad
    logprobs, entropy, grad = run(token_logprobs, logits, torch.tensor([1, 1]), torch.ones(2, 2))
    assert torch.isfinite(logprobs[0]) and torch.isfinite(entropy[0])
    assert torch.isfinite(grad[0]).all()
    assert logprobs[1].isnan() and entropy[1].isnan() and grad[1].isnan().any()


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum
def test_rows_without_gradient_may_hold_nan(rng):
    x = torch.randn(4, 1003, generator=rng)
    x[1] = torch.nan
    x.requires_grad_()
    out = token_logprobs(x, torch.zeros(4, dtype=torch.long))
    live = torch.tensor([True, False, True, True])
    torch.where(live, out.logprobs + out.entropy, 0.0).sum().backward()
    assert (x.grad[1] == 0).all()
    assert torch.isfinite(x.grad).all() and (x.grad[0] != 0).any()


@pytest.mark.parametrize("target", [-100, -1, 1003, 2**40])
def test_a_target_out_of_range_reads_nothing_and_gives_nan(target, rng):
    logits = torch.randn(3, 1003, generator=rng)
    logprobs = token_logprobs_fwd(logits, torch.tensor([5, target, 6]), 1.0, None).logprobs
    assert logprobs.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("vocab", [1003, 4099])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_written_or_read_outside(vocab, dtype, rng, canaries):
    """The rest of the arrays is huge: one element read too many would win every maximum."""
    values = torch.randn(3, vocab, generator=rng).to(dtype)
    targets = torch.tensor([0, 5, vocab - 1])
    upstream = torch.randn(2, 3, generator=rng)
    logits, out = canaries(3, vocab, dtype), canaries(3, vocab, dtype)
    logits.copy_(values)
    stats = token_logprobs_fwd(logits, targets, 1.0, None)
    token_logprobs_bwd_out(logits, targets, stats, *upstream, 1.0, None, out=out)
    expected = run(token_logprobs, values, targets, upstream)
    assert torch.equal(stats.logprobs, expected[0])
    assert torch.equal(out, expected[2])
    assert torch.equal(logits, values)
    token_logprobs_bwd_out(logits, targets, stats, *upstream, 1.0, None, out=logits)
    assert torch.equal(logits, expected[2])


def test_statistics_stay_inside_their_arrays(rng, canaries, monkeypatch):
    rows = [canaries(1, 3, torch.float32)[0] for _ in range(4)]
    supply, new_empty = list(rows), torch.Tensor.new_empty
    logits = torch.randn(3, 1003, generator=rng)
    expected = token_logprobs_fwd(logits, torch.zeros(3, dtype=torch.long), 1.0, None)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *a, **k: supply.pop(0) if supply else new_empty(*a, **k)
    )
    token_logprobs_fwd(logits, torch.zeros(3, dtype=torch.long), 1.0, None)
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.stack([x, x], dim=2).flatten(1)[:, ::2],  # strided columns
        lambda x: x.t().contiguous().t(),  # transposed
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],  # padded rows
        lambda x: torch.cat([x.flatten(), x.new_zeros(3)]).roll(3)[3:].view_as(x),  # unaligned
    ],
    ids=["columns", "transposed", "rows", "unaligned"],
)
def test_any_strides(view, rng):
    logits = torch.randn(4, 1003, generator=rng)
    targets, upstream = torch.randint(1003, (4,), generator=rng), torch.randn(2, 4, generator=rng)
    other = view(logits)
    assert torch.equal(other, logits)
    stats = token_logprobs_fwd(other, targets, 1.0, None)
    expected = token_logprobs_fwd(logits, targets, 1.0, None)
    assert all(torch.equal(a, b) for a, b in zip(stats, expected, strict=True))
    outs = [torch.empty_like(logits) for _ in range(2)]
    token_logprobs_bwd_out(other, targets, stats, *upstream, 1.0, None, out=outs[0])
    token_logprobs_bwd_out(logits, targets, stats, *upstream, 1.0, None, out=outs[1])
    assert torch.equal(*outs)


def test_more_rows_than_a_grid_axis_holds(rng):
    """65536 limits every grid axis but the first. One program is enough to see the address."""
    n, vocab = 70_000, 3
    logits = torch.randn(n, vocab, generator=rng)
    targets = torch.zeros(n, dtype=torch.long)
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            seen.append(grid)
            return lambda **_: None

    import fastppo_kernels.token_logprobs as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "token_logprobs_fwd_kernel", Kernel())
        patch.setattr(module, "token_logprobs_bwd_kernel", Kernel())
        stats = RowStatistics(*(torch.zeros(n) for _ in range(4)))
        token_logprobs_fwd(logits, targets, 1.0, None)
        token_logprobs_bwd_out(logits, targets, stats, *stats[:2], 1.0, None, out=logits)
    assert seen == [(n,), (n, 1)]


def test_addresses_beyond_two_billion_elements(rng):
    """Rows 2^30 elements apart, in a sparse file: row 2 starts where int32 ends."""
    vocab, stride = 130, 2**30
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * (2 * stride + vocab))
        file.flush()
        whole = torch.from_file(
            f"/proc/self/fd/{file.fileno()}", True, 2 * stride + vocab, dtype=torch.float16
        )
        logits = whole.as_strided((3, vocab), (stride, 1))
        values = torch.randn(3, vocab, generator=rng).half()
        logits.copy_(values)
        targets, upstream = torch.tensor([0, 5, 129]), torch.randn(2, 3, generator=rng)
        stats = token_logprobs_fwd(logits, targets, 1.0, None)
        token_logprobs_bwd_out(logits, targets, stats, *upstream, 1.0, None, out=logits)
        expected = run(token_logprobs, values, targets, upstream)
        assert torch.equal(stats.logprobs, expected[0])
        assert torch.equal(logits, expected[2])


def test_inplace_backward_returns_the_same_gradient_in_the_same_storage(rng):
    weight = torch.randn(1003, 6, generator=rng)
    hidden = torch.randn(5, 6, generator=rng, requires_grad=True)
    targets = torch.randint(1003, (5,), generator=rng)
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


def test_empty_batch_launches_nothing():
    x = torch.zeros(0, 7, requires_grad=True)
    out = token_logprobs(x, torch.zeros(0, dtype=torch.long))
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert out.logprobs.shape == (0,) and x.grad.shape == (0, 7)


def test_repeats_are_bitwise_equal(rng):
    logits = torch.randn(2, 5003, generator=rng)
    args = logits, torch.tensor([1, 2]), torch.ones(2, 2)
    for a, b in zip(run(token_logprobs, *args), run(token_logprobs, *args), strict=True):
        assert torch.equal(a, b)


def test_float64_is_refused_by_name():
    with pytest.raises(TypeError, match=r"^logits: .*got float64"):
        token_logprobs(torch.zeros(2, 5, dtype=torch.float64), torch.tensor([0, 1]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo's own
@pytest.mark.parametrize("rows", [False, True], ids=["number", "rows"])
def test_compiled(rows, rng):
    """One graph, no breaks; the kernels are opaque calls inside."""
    x = torch.randn(3, 1003, generator=rng, requires_grad=True)
    targets = torch.tensor([0, 1002, 5])
    tau = torch.tensor([0.5, 1.0, 2.0]) if rows else 0.7

    def loss(x):
        out = token_logprobs(x, targets, temperature=tau)
        return (out.logprobs * 2 + out.entropy).sum()

    expected = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(torch.autograd.grad(compiled(x), x)[0], expected[0])


@pytest.mark.slow
def test_opcheck(rng):
    logits = torch.randn(3, 130, generator=rng)
    targets = torch.tensor([0, 129, 5])
    tau = torch.tensor([0.5, 1.0, 2.0])
    stats = token_logprobs_fwd(logits, targets, tau, None)
    backward = (targets, *stats[1:], torch.ones(3), torch.ones(3), 1.0, tau, 3.0)
    ops = torch.ops.fastppo
    torch.library.opcheck(ops.token_logprobs_fwd, (logits, targets, 0.7, None, None))
    torch.library.opcheck(ops.token_logprobs_fwd, (logits, targets, 1.0, tau, 3.0))
    torch.library.opcheck(ops.token_logprobs_bwd_out, (logits, *backward, torch.zeros_like(logits)))
    torch.library.opcheck(ops.token_logprobs_bwd_, (logits.clone(), *backward))
