"""The modes of the linear ops on their kernels: autocast, float32 logits, vocabulary tiles, dropped
rows, torch.compile. The same tests run on a GPU (`pytest -m gpu`) and under the interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from fastppo_kernels.ppo_math import PPOInputs, PPOKnobs
from fastppo_kernels.ppo_rows import ppo_rows
from fastppo_kernels.token_logprobs import token_logprobs_bwd_out, token_logprobs_fwd

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

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = [pytest.mark.usefixtures("on_kernels")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

BF16_ROUNDING = 2**-8
N, H, V = 21, 16, 1003
EVERYTHING = PPOLossConfig(dual_clip=1.5, kl_coef=0.1, ent_coef=0.02, is_correction="tis")
PLAIN = PPOLossConfig()
KNOBS = PPOKnobs(0.8, 1.2, 1.5, 0.1, 0.02, 2.0, 0.5, 5.0, kl=3, correction=1)
MODES = {
    "default": {},
    "low memory": {"low_memory": True},
    "fp32 logits": {"fp32_logits": True},
    "both": {"low_memory": True, "fp32_logits": True},
}


def draw(rng, dtype=torch.float32):
    hidden = torch.randn(N, H, generator=rng).to(dtype)
    weight = (torch.randn(V, H, generator=rng) / 2).to(dtype)
    bias = torch.randn(V, generator=rng).to(dtype)
    targets = torch.randint(V, (N,), generator=rng)
    lp = linear_logprobs_reference(hidden.float(), weight.float(), targets, bias=bias.float())
    old, ref, rollout = (lp.logprobs + 0.3 * torch.randn(N, generator=rng) for _ in range(3))
    rows = {
        "old_logprobs": old,
        "advantages": torch.randn(N, generator=rng),
        "weights": torch.rand(N, generator=rng) * (torch.rand(N, generator=rng) < 0.7) / N,
        "ref_logprobs": ref,
        "rollout_logprobs": rollout,
    }
    move = torch.device(DEVICE)
    rows = {name: x.to(move) for name, x in rows.items()}
    return tuple(x.to(move) for x in (hidden, weight, bias)), targets.to(move), rows


def doubled(leaves, targets, rows):
    return [x.double() for x in leaves], targets, {k: v.double() for k, v in rows.items()}


def run(fn, leaves, targets, rows, config=EVERYTHING, scale=2.0, **kwargs):
    """A power of two as the incoming gradient scales bfloat16 gradients without rounding again."""
    hidden, weight, bias = (x.detach().clone().requires_grad_() for x in leaves)
    out = fn(hidden, weight, targets, config=config, bias=bias, **rows, **kwargs)
    grads = torch.autograd.grad(scale * out.loss, (hidden, weight, bias))
    return out.loss.detach(), *grads, out.metrics


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_float64(mode, dtype, rng, no_worse):
    args, mode = draw(rng, dtype), MODES[mode]
    budget = {"chunk_bytes": 320 * N * dtype.itemsize}  # 4 tiles, or chunks of rows
    truth = run(linear_ppo_loss_reference, *doubled(*args))
    exact = mode.get("fp32_logits", False) and dtype == torch.bfloat16
    leaves = [x.float() for x in args[0]] if exact else args[0]
    plain = run(linear_ppo_loss_reference, leaves, *args[1:])
    ours = run(linear_ppo_loss, *args, **budget, **mode)
    rel = BF16_ROUNDING if dtype == torch.bfloat16 else 1e-5
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        # The gradient of exact logits is rounded, then its product.
        no_worse(a, b, c, rel=(2 * rel if 1 <= i <= 3 else 1e-5) if exact else rel)
    assert [x.dtype for x in ours] == [torch.float32] + [dtype] * 3 + [torch.float32]


@pytest.mark.parametrize("fp32_logits", [False, True])
def test_logprobs_by_tiles(fp32_logits, rng, no_worse):
    leaves, targets, _ = draw(rng, torch.bfloat16)
    upstream = torch.randn(2, N, generator=rng).to(DEVICE)
    upstream[:, 4] = 0.0

    def both(fn, leaves, **kwargs):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        out = fn(*leaves[:2], targets, bias=leaves[2], temperature=0.8, softcap=9.0, **kwargs)
        loss = (out.logprobs * upstream[0] + out.entropy * upstream[1]).sum()
        return *(x.detach() for x in out), *torch.autograd.grad(loss, leaves)

    truth = both(linear_logprobs_reference, [x.double() for x in leaves])
    plain = both(linear_logprobs_reference, [x.float() for x in leaves] if fp32_logits else leaves)
    ours = both(linear_logprobs, leaves, chunk_bytes=320 * N * 2, fp32_logits=fp32_logits)
    for i, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        no_worse(a, b, c, rel=2e-6 if fp32_logits and i < 2 else 2 * BF16_ROUNDING)
    assert (ours[2][4] == 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode, rng, no_worse):
    """float32 masters, bfloat16 products, float32 gradients."""
    args = draw(rng)
    truth = run(linear_ppo_loss_reference, *doubled(*args))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        plain = run(linear_ppo_loss_reference, *args)
        ours = run(linear_ppo_loss, *args, chunk_bytes=320 * N * 2, **MODES[mode])
    for a, b, c in zip(ours[:4], plain, truth, strict=False):
        no_worse(a, b, c, rel=2 * BF16_ROUNDING)
    assert all(x.dtype == torch.float32 for x in ours)
    rounded = [x.bfloat16() for x in args[0]], *args[1:]
    same = run(linear_ppo_loss, *rounded, chunk_bytes=320 * N * 2, **MODES[mode])
    assert torch.equal(ours[0], same[0]) and torch.equal(ours[-1], same[-1])


@pytest.mark.parametrize("mode", MODES)
def test_on_policy_ratio_is_exactly_one(mode, rng):
    (hidden, weight, bias), targets, rows = draw(rng, torch.bfloat16)
    rows |= {"weights": torch.full((N,), 1 / N, device=DEVICE)}
    mode = MODES[mode]
    olds = [linear_logprobs(hidden, weight, targets, bias=bias, **mode).logprobs]
    if not mode:
        logits = torch.nn.functional.linear(hidden, weight, bias)
        olds.append(token_logprobs(logits, targets).logprobs)
    for rows["old_logprobs"] in olds:
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        out = linear_ppo_loss(*leaves, targets, config=PLAIN, bias=bias, **rows, **mode)
        metrics = reduce_ppo_metrics(out.metrics)
        assert float(metrics["ratio"]) == float(metrics["ratio_max"]) == 1.0
        assert float(metrics["approx_kl"]) == 0.0


@pytest.mark.parametrize("mode", MODES)
def test_repeats_are_bitwise_equal(mode, rng):
    args = draw(rng, torch.bfloat16)
    a, b = (run(linear_ppo_loss, *args, chunk_bytes=7 * V * 2, **MODES[mode]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_advantage_zero_never_reach_the_head(mode, rng):
    leaves, targets, rows = draw(rng)
    rows["advantages"][::2] = 0.0
    live = live_rows(rows["weights"], rows["advantages"], PLAIN)
    masked = leaves[0].masked_fill(~live[:, None], torch.nan)
    how = {"num_live": int(live.sum()), **MODES[mode]}
    ours = run(linear_ppo_loss, (masked, *leaves[1:]), targets, rows, PLAIN, **how)
    rows["weights"] = torch.where(live, rows["weights"], 0.0)
    same = run(linear_ppo_loss, leaves, targets, rows, PLAIN, **MODES[mode])
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
    assert (ours[1][~live] == 0).all() and (ours[1][live] != 0).any()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # dynamo's own
@pytest.mark.parametrize("mode", MODES)
def test_compiled(mode, rng):
    (hidden, weight, bias), targets, rows = draw(rng)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def loss(leaves):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            how = {"config": EVERYTHING, "bias": leaves[2], **rows, **MODES[mode]}
            return 3 * linear_ppo_loss(leaves[0], leaves[1], targets, **how).loss

    torch._dynamo.reset()
    eager = torch.autograd.grad(loss(leaves), leaves)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for a, b in zip(torch.autograd.grad(compiled(leaves), leaves), eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_of_another_dtype_stays_inside_its_array(dtype, rng, canaries):
    """The logits are only read."""
    _, targets, rows = draw(rng)
    values = torch.randn(3, V, generator=rng)
    logits, out, again = (canaries(3, V, t).to(DEVICE) for t in (torch.float32, dtype, dtype))
    logits.copy_(values)
    targets, per_row = targets[:3], PPOInputs(*(x[:3].clone() for x in rows.values()))
    per_row.weights.copy_(torch.tensor([0.5, 0.0, 0.5]))
    entries = ppo_rows(logits, targets, per_row, KNOBS, 0.7, 9.0, out=out)
    assert torch.equal(logits.cpu(), values)
    assert torch.equal(entries, ppo_rows(logits, targets, per_row, KNOBS, 0.7, 9.0, out=None))
    inplace = logits.clone()
    ppo_rows(inplace, targets, per_row, KNOBS, 0.7, 9.0, out=inplace)
    assert torch.equal(out, inplace.to(dtype))
    assert (out[1] == 0).all() and (out[0] != 0).any()
    stats = token_logprobs_fwd(logits, targets, 0.7, 9.0)
    token_logprobs_bwd_out(logits, targets, stats, *per_row[:2], 0.7, 9.0, out=again)
    token_logprobs_bwd_out(logits, targets, stats, *per_row[:2], 0.7, 9.0, out=inplace)
    assert torch.equal(again, inplace.to(dtype))


@pytest.mark.parametrize("start", [0, 320, 999])
def test_columns_of_a_gradient_are_columns_of_the_gradient(start, rng, canaries):
    _, targets, rows = draw(rng)
    targets[0], targets[1] = 320, 1002
    logits = torch.randn(N, V, generator=rng).to(DEVICE)
    stats = token_logprobs_fwd(logits, targets, 0.7, None)
    upstream = rows["advantages"], rows["old_logprobs"]
    whole = torch.empty_like(logits)
    token_logprobs_bwd_out(logits, targets, stats, *upstream, 0.7, None, out=whole)
    width = min(320, V - start)
    tile = canaries(N, width, torch.float32).to(DEVICE)
    tile.copy_(logits[:, start : start + width])
    token_logprobs_bwd_out(tile, targets - start, stats, *upstream, 0.7, None, out=tile)
    assert torch.equal(tile, whole[:, start : start + width])
