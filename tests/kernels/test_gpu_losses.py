"""ppo_loss and value_loss on a CUDA device: results, one launch each, streams, graphs, compile."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastppo.ops import (
    PPOLossConfig,
    ppo_loss,
    ppo_loss_reference,
    value_loss,
    value_loss_reference,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
CONFIGS = {
    "plain": PPOLossConfig(),
    "k1 icepop": PPOLossConfig(kl_coef=0.1, kl_estimator="k1", is_correction="icepop", is_low=0.8),
    "everything": PPOLossConfig(dual_clip=1.2, kl_coef=0.1, ent_coef=0.02, is_correction="tis"),
    "sequence": PPOLossConfig(ratio_level="sequence", clip_coef_high=0.03, kl_coef=0.1),
}
# One program and many, whole and not; 300 001 are more blocks than programs.
SIZES = [1, 511, 512, 513, 65_537, 300_001]


def draw(n, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    lp = -3 * torch.rand(n, generator=rng) - 0.01
    old, ref, rollout = (lp + 0.3 * torch.randn(n, generator=rng) for _ in range(3))
    weights = (torch.rand(n, generator=rng) + 0.1) * (torch.rand(n, generator=rng) < 0.7) / n**0.5
    inputs = {
        "logprobs": lp,
        "entropy": torch.rand(n, generator=rng),
        "old_logprobs": old,
        "advantages": torch.randn(n, generator=rng),
        "weights": weights,
        "ref_logprobs": ref,
        "rollout_logprobs": rollout,
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def run_ppo(fn, inputs, config):
    leaves = [inputs[k].detach().clone().requires_grad_() for k in ("logprobs", "entropy")]
    n, device, cu = inputs["weights"].shape[0], inputs["weights"].device, None
    if config.ratio_level == "sequence":
        cu = torch.tensor([0, n // 3, n // 3, n], device=device)
    rest = {k: v for k, v in inputs.items() if k not in ("logprobs", "entropy")}
    out = fn(leaves[0], entropy=leaves[1], config=config, cu_seqlens=cu, **rest)
    grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return out.loss.detach(), *grads, out.metrics


def run_value(fn, inputs, huber):
    names = ("logprobs", "old_logprobs", "advantages", "weights")
    v, *rest = (inputs[k].detach().clone() for k in names)
    v.requires_grad_()
    out = fn(v, *rest, clip=0.2, huber=huber)
    return out.loss.detach(), *torch.autograd.grad(out.loss, v), out.metrics


def cuda(inputs):
    return {k: v.to(DEVICE) for k, v in inputs.items()}


def double(inputs):
    return {k: v.double() for k, v in inputs.items()}


def check(results, plain, truth, rel):
    """No larger an error against float64 than plain torch makes in the same dtype, plus rel."""
    for result, other, exact in zip(results, plain, truth, strict=True):
        a, b, c = (x.double().cpu() for x in (result, other, exact))
        assert (a - c).abs().max() <= (b - c).abs().max() + 2e-6 + rel * c.abs().max()


LOSSES = {
    "ppo": lambda x: run_ppo(ppo_loss, x, CONFIGS["everything"]),
    "value": lambda x: run_value(value_loss, x, 0.7),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", CONFIGS)
def test_ppo_loss(name, n, dtype):
    inputs, config = draw(n, dtype), CONFIGS[name]
    ours = run_ppo(ppo_loss, cuda(inputs), config)
    plain = run_ppo(ppo_loss_reference, inputs, config)
    truth = run_ppo(ppo_loss_reference, double(inputs), config)
    check(ours, plain, truth, rel=4e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("huber", [None, 0.7])
def test_value_loss(huber, n, dtype):
    inputs = draw(n, dtype)
    ours = run_value(value_loss, cuda(inputs), huber)
    plain = run_value(value_loss_reference, inputs, huber)
    truth = run_value(value_loss_reference, double(inputs), huber)
    check(ours, plain, truth, rel=4e-6 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("name", LOSSES)
def test_repeats_are_bitwise_equal(name):
    inputs = cuda(draw(65_537))
    expected = LOSSES[name](inputs)
    for _ in range(50):
        again = LOSSES[name](inputs)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_one_launch_each():
    x = cuda(draw(65_536))
    config = CONFIGS["everything"]
    forwards = {
        "ppo_loss_kernel": lambda: ppo_loss(config=config, **x),
        "value_loss_kernel": lambda: value_loss(
            x["logprobs"], x["old_logprobs"], x["advantages"], x["weights"]
        ),
    }
    for kernel, forward in forwards.items():
        forward()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            forward()
            torch.cuda.synchronize()
        on_device = [e.name for e in recorded.events() if e.device_type.name == "CUDA"]
        assert [name for name in on_device if "Sync" not in name] == [kernel]


@pytest.mark.parametrize("name", LOSSES)
def test_streams_side_by_side(name):
    """Launches of two streams overlap; a counter they shared would end one of them early."""
    batches = [cuda(draw(n, seed=n)) for n in (65_537, 40_000)]
    expected = [LOSSES[name](x) for x in batches]
    streams = [torch.cuda.Stream() for _ in batches]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(100):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(LOSSES[name](batches[i]))
    torch.cuda.synchronize()
    for got, want in zip(results, expected, strict=True):
        for result in got:
            assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_inside_cuda_graphs(name):
    """Two graphs replayed side by side, with eager launches between them, on new inputs."""
    sizes = (65_537, 40_000)
    static = [cuda(draw(n)) for n in sizes]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in static:
            LOSSES[name](x)
    torch.cuda.current_stream().wait_stream(side)
    graphs, outputs = [], []
    for x in static:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append(LOSSES[name](x))
        graphs.append(graph)
    streams = [torch.cuda.Stream() for _ in graphs]
    for seed in range(1, 6):
        fresh = [cuda(draw(n, seed=seed)) for n in sizes]
        expected = [LOSSES[name](x) for x in fresh]
        for x, new in zip(static, fresh, strict=True):
            for key, value in x.items():
                value.copy_(new[key])
        torch.cuda.synchronize()
        for _ in range(20):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            LOSSES[name](fresh[0])
        torch.cuda.synchronize()
        for got, want in zip(outputs, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore")  # Dynamo's and inductor's own
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode):
    fns = {
        "ppo": torch.compile(ppo_loss, fullgraph=True, mode=mode),
        "value": torch.compile(value_loss, fullgraph=True, mode=mode),
    }
    config = CONFIGS["everything"]
    for n in (700, 1300):
        x = cuda(draw(n))
        for _ in range(3):
            got = [t.clone() for t in run_ppo(fns["ppo"], x, config)]
            for a, b in zip(got, run_ppo(ppo_loss, x, config), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
            got = [t.clone() for t in run_value(fns["value"], x, None)]
            for a, b in zip(got, run_value(value_loss, x, None), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_the_number_of_tokens_does_not_recompile():
    from fastppo_kernels.ppo_loss import ppo_loss_kernel
    from fastppo_kernels.value_loss import value_loss_kernel

    def compiled():
        kernels = (ppo_loss_kernel, value_loss_kernel)
        return [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]

    for loss in LOSSES.values():
        loss(cuda(draw(3)))
    before = compiled()
    for n in (1, 2, 16, 512, 513, 65_536):
        for loss in LOSSES.values():
            loss(cuda(draw(n)))
    assert compiled() == before
