"""What only a GPU can decide: candidates beside what is built, with the answers compared.

    python bench/gpu_choices.py [NAME ...] [--output FILE]

Each choice is tried by itself and prints a few lines; one that fails prints its error, the rest
goes on, and the exit status says so; one that lacks a package says which. Times are medians of CUDA
events over random data, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from fastppo.benchmarks.clock import Timer
from fastppo.profiling.ceilings import measure_ceilings

DEVICE = torch.device("cuda")
SIZES = ((8192, 4096, 131_072), (16_384, 896, 151_936))
RESULTS: dict[str, Any] = {}


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """The median of single calls."""
    work()
    work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def say(choice: str, what: str, value: Any) -> None:
    RESULTS.setdefault(choice, {})[what] = value
    print(f"{choice:10} {what:64} {value}", flush=True)


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    rng = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(*shape, device=DEVICE, generator=rng).to(dtype)


def microseconds(calls: list[Callable[[], object]]) -> float:
    """The median of one of several calls whose inputs together are larger than the L2 cache, from
    a CUDA graph of them."""
    timer = Timer(calls, DEVICE, graph=True)
    assert timer.mode == "graph", timer.note
    return statistics.median(timer.sample() for _ in range(15)) * 1e6


def scans() -> None:
    """Tokens, warps and registers of a program of the GAE scan, in one launch and in two."""
    from fastppo_kernels.gae import gae_fwd
    from fastppo_kernels.scan import LAUNCH, ScanLaunch

    candidates = [LAUNCH] + [
        ScanLaunch(block, warps, max_registers=registers, chunk=128, one_launch=LAUNCH.one_launch)
        for block, warps, registers in (
            (512, 4, None),
            (512, 8, None),
            (1024, 4, None),
            (1024, 8, None),
            (1024, 8, 128),
            (2048, 8, None),
            (2048, 16, 128),
        )
    ]

    def at(b: int, t: int) -> None:
        n = b * t
        cu_seqlens = torch.arange(b + 1, dtype=torch.int32, device=DEVICE) * t
        sets = []
        for seed in range(max(2, 2**23 // n)):
            values, rewards = normal(2, n, dtype=torch.float32, seed=seed)
            sets.append((values, rewards, values > -1.5))

        def call(x: tuple[Tensor, ...], knobs: ScanLaunch) -> tuple[Tensor, ...]:
            values, rewards, mask = x
            numbers = {"gamma": 0.99, "gae_lambda": 0.95}
            return gae_fwd(
                values, cu_seqlens, rewards=rewards, mask=mask, max_seqlen=t, knobs=knobs, **numbers
            )[:2]

        expected = call(sets[0], LAUNCH)
        for c in candidates:
            line = []
            for name, limit in (("one launch", 1 << 30), ("two", 0)):
                knobs = ScanLaunch(
                    c.block, c.num_warps, max_registers=c.max_registers, chunk=128, one_launch=limit
                )
                for a, e in zip(call(sets[0], knobs), expected, strict=True):
                    torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
                took = microseconds([lambda x=x, k=knobs: call(x, k) for x in sets])
                line.append(f"{name} {took:.1f} µs")
            what = f"{b}x{t} block={c.block} warps={c.num_warps} registers={c.max_registers}"
            say("scans", what, "; ".join(line))

    for b, t in ((64, 16_384), (4096, 256), (65_536, 16), (64, 4096)):
        at(b, t)


def losses() -> None:
    """Tokens and warps of a program of the losses, and how many there are."""
    from fastppo_kernels.launch import ReductionLaunch
    from fastppo_kernels.ppo_loss import ppo_loss
    from fastppo_kernels.ppo_math import PPOInputs, PPOKnobs
    from fastppo_kernels.value_loss import value_loss

    knobs = PPOKnobs(0.8, 1.2, float("inf"), 0.05, 0.0, 2.0, 0.5, 5.0, kl=3, correction=0)
    shapes = ((512, 8), (512, 4), (1024, 8), (256, 4))
    for n in (65_536, 1_048_576):
        sets = []
        for seed in range(max(2, 2**22 // n)):
            lp, noise, more, advantages, returns = normal(5, n, dtype=torch.float32, seed=seed)
            lp = -lp.abs()
            weights = torch.full((n,), 1 / n, device=DEVICE)
            inputs = PPOInputs(lp + 0.1 * noise, advantages, weights, lp + 0.1 * more, None)
            sets.append((lp, inputs, noise, returns, weights))
        for block, warps in shapes:
            for programs in (132, 264, 528, 1 << 20):
                if programs > 1000 and (block, warps) != (512, 8):
                    continue
                table = ReductionLaunch(block, warps, programs=min(programs, n // block))
                took = (
                    microseconds(
                        [lambda x=x, t=table: ppo_loss(x[0], None, x[1], knobs, t) for x in sets]
                    ),
                    microseconds(
                        [
                            lambda x=x, t=table: value_loss(*x[2:4], x[3], x[4], 0.2, None, t)
                            for x in sets
                        ]
                    ),
                )
                what = f"N={n} block={block} warps={warps} programs={table.programs}"
                say("losses", what, "ppo {:.1f} µs; value {:.1f} µs".format(*took))


def rows() -> None:
    """Block and warps of the kernels that read a row of logits."""
    from fastppo_kernels import ppo_rows as loss
    from fastppo_kernels import token_logprobs as log
    from fastppo_kernels.launch import Launch
    from fastppo_kernels.ppo_math import PPOInputs, PPOKnobs

    knobs = PPOKnobs(0.8, 1.2, float("inf"), 0.0, 0.0, 2.0, 0.5, 5.0, kl=3, correction=0)
    say("rows", "copy GB/s", round(measure_ceilings(DEVICE).copy_gb_s))
    candidates = [(4096, 4), (4096, 8), (8192, 8), (8192, 16), (16384, 16), (16384, 32)]

    def at(vocab: int, n: int = 8192) -> None:
        logits = normal(n, vocab).mul_(2.5)
        targets = torch.randint(vocab, (n,), device=DEVICE)
        old, advantages = normal(2, n, dtype=torch.float32)
        weights = torch.full((n,), 1 / n, device=DEVICE)
        inputs = PPOInputs(old - 12, advantages, weights, None, None)
        out = torch.empty_like(logits)
        g = normal(n, dtype=torch.float32)
        stats = log.token_logprobs_fwd(logits, targets, 1.0, None)
        for block, warps in candidates:
            table = ((float("inf"), Launch(block=block, num_warps=warps)),)
            log.STATISTICS_LAUNCHES = loss.STATISTICS_LAUNCHES = table
            log.GRADIENT_LAUNCHES = table
            works: dict[str, tuple[Callable[[], object], float]] = {
                "fwd": (lambda: log.token_logprobs_fwd(logits, targets, 1.0, None), 1),
                "ppo": (lambda: loss.ppo_rows(logits, targets, inputs, knobs, 1.0, None, out), 2),
            }
            works["bwd"] = (
                lambda: log.token_logprobs_bwd_out(logits, targets, stats, g, None, 1.0, None, out),
                2,
            )
            line = []
            for name, (work, passes) in works.items():
                try:
                    took = milliseconds(work, 5)
                    line.append(f"{name} {took:.3f} ms {passes * logits.nbytes / took / 1e6:.0f}")
                except Exception as error:
                    line.append(f"{name} {type(error).__name__}")
            say("rows", f"V={vocab} block={block} warps={warps}", "; ".join(line))

    for vocab in (151_936, 131_072, 49_152):
        at(vocab)


def products() -> None:
    """The three products of the head, which bound it, and the sum of chunks in place."""

    def at(n: int, h: int, v: int) -> None:
        x, weight = normal(n, h), normal(v, h, seed=1)
        logits = torch.empty(n, v, dtype=torch.bfloat16, device=DEVICE)
        grad_x, grad_w = torch.empty_like(x), torch.empty_like(weight)
        took = {
            "logits": milliseconds(lambda: torch.mm(x, weight.t(), out=logits)),
            "dX": milliseconds(lambda: torch.mm(logits, weight, out=grad_x)),
            "dW": milliseconds(lambda: torch.mm(logits.t(), x, out=grad_w)),
        }
        for name, t in took.items():
            say("products", f"{n}x{h}x{v} {name} ms", round(t, 3))
        rate = 6 * n * h * v / sum(took.values()) / 1e9
        say("products", f"{n}x{h}x{v} all three TFLOP/s", round(rate, 1))

    for size in SIZES:
        at(*size)
    n, h, v = 8192, 896, 151_936
    g, x = normal(n, v), normal(n, h, seed=1)
    total = torch.zeros(v, h, device=DEVICE)
    expected = torch.mm(g.t(), x, out_dtype=torch.float32)

    def in_place() -> None:
        torch.addmm(total, g.t(), x, out_dtype=torch.float32, out=total)

    in_place()
    in_place()
    gap = float((total - 2 * expected).norm() / expected.norm())
    say("products", "addmm in place, relative error of two sums", gap)
    say("products", "addmm in place ms", round(milliseconds(in_place), 3))

    def by_parts() -> None:
        for start in range(0, v, 74_898):
            part = slice(start, start + 74_898)
            total[part].add_(torch.mm(g.t()[part], x, out_dtype=torch.float32))

    say("products", "mm and add by parts ms", round(milliseconds(by_parts), 3))
    alone = milliseconds(lambda: torch.mm(g.t(), x, out_dtype=torch.float32))
    say("products", "mm alone, float32 out, ms", round(alone, 3))


def grouped() -> None:
    """Grouped heads in torch's varlen attention, without repeating keys and values."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = [300, 1024, 17, 4096, 2755]
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    ends, t = ends.to(DEVICE), sum(lengths)
    q, k, v = (normal(t, heads, 64, seed=heads).requires_grad_() for heads in (14, 2, 3))
    v = normal(t, 2, 64, seed=9).requires_grad_()
    upstream = normal(t, 14, 64, seed=5)
    options = {"window_size": (-1, 0)}

    def run(repeat: bool) -> tuple[Tensor, ...]:
        key, value = (x.repeat_interleave(7, 1) if repeat else x for x in (k, v))
        out = varlen_attn(q, key, value, ends, ends, max(lengths), max(lengths), **options)
        assert isinstance(out, Tensor)
        return out, *torch.autograd.grad(out, (q, k, v), upstream)

    for name, a, b in zip(["o", "q", "k", "v"], run(True), run(False), strict=True):
        say(
            "grouped",
            f"relative difference of {name}",
            float((a - b).detach().norm() / a.detach().norm()),
        )
    for repeat in (True, False):
        say("grouped", f"repeat={repeat} ms", round(milliseconds(lambda r=repeat: run(r)), 3))


def decode() -> None:
    """The kernel of decoding's attention, at shapes that change as they do in a rollout."""
    choices = {
        "efficient, math": [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
        "math": [SDPBackend.MATH],
        "cuDNN": [SDPBackend.CUDNN_ATTENTION],
    }
    for name, backends in choices.items():
        for s in (64, 256):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for seen in range(256, 384, 8):
                q = normal(s, 2, 7, 64)
                key, value = normal(2, s, 2, 512, 64)[:, :, :, :seen]
                mask = torch.zeros(s, seen, dtype=torch.bfloat16, device=DEVICE)
                with sdpa_kernel(backends):
                    F.scaled_dot_product_attention(q, key, value, attn_mask=mask[:, None, None])
            torch.cuda.synchronize()
            first = time.perf_counter() - start
            with sdpa_kernel(backends):
                again = milliseconds(
                    lambda m=mask, q=q, k=key, v=value: F.scaled_dot_product_attention(
                        q, k, v, attn_mask=m[:, None, None]
                    )
                )
            say("decode", f"{name} S={s}: 16 new shapes s; one again ms", (first, again))


def profiled(
    work: Callable[[], object],
) -> tuple[float, int, float, list[tuple[str, int, float]]]:
    """Wall seconds, kernels, their seconds, and the 25 that take longest with ms."""
    work()
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        work()
        torch.cuda.synchronize()
    found = [e for e in recorded.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    total = sum(e.self_device_time_total for e in found) / 1e6
    top = [(e.key[:90], e.count, e.self_device_time_total / 1e3) for e in found[:25]]
    return wall, sum(e.count for e in found), total, top


def model() -> None:
    """Kernels of a decoded token and of an update at Qwen2.5-0.5B's shape, and what they take."""
    import numpy as np
    from bench_step import make_model, prepared

    from fastppo import PackedBatch, PPOConfig, PPOStep
    from fastppo.rollout.engine import Sampling
    from fastppo.rollout.packed import PackedEngine

    config = PPOConfig(precision="bf16", num_minibatches=1, kl_coef=0.05, token_budget=16_384)
    step = PPOStep(make_model("random-qwen2.5-0.5b", DEVICE), config)
    engine = PackedEngine(step.policy.actor)
    random = np.random.default_rng(0)
    prompts = [random.integers(3, 150_000, 160) for _ in range(64)]

    def rollout(new: int) -> Any:
        return engine.generate(prompts, Sampling(max_new_tokens=new, eos_token_ids=(), seed=0))

    both = [profiled(lambda new=new: rollout(new)) for new in (8, 24)]
    steps = 16
    say("model", "decode of 64 rows: wall ms a step", (both[1][0] - both[0][0]) / steps * 1e3)
    say("model", "decode: kernels a step", (both[1][1] - both[0][1]) / steps)
    say("model", "decode: GPU ms a step", (both[1][2] - both[0][2]) / steps * 1e3)
    for name, count, took in both[1][3][:12]:
        say("model", f"decode x{count} {name}", round(took, 3))
    responses = [random.integers(3, 150_000, 350) for _ in range(32)]
    batch = PackedBatch.pack(prompts[:32], responses, truncated=np.ones(32, dtype=bool))
    batch = prepared(step, batch, 0)
    wall, count, total, top = profiled(lambda: step.update(batch))
    say(
        "model",
        f"update of {batch.num_tokens} tokens: wall ms, kernels, GPU ms",
        (
            wall * 1e3,
            count,
            total * 1e3,
        ),
    )
    for name, count, took in top:
        say("model", f"update x{count} {name}", round(took, 3))


def compiled() -> None:
    """Decoder layers under torch.compile, attention apart: what it takes from an update and a
    decoded token at Qwen2.5-0.5B's shape, what it costs at first, and what it does to gradients."""
    import bench_step
    from transformers import AttentionInterface

    from fastppo import PPOConfig, PPOStep
    from fastppo.models import attention, setup
    from fastppo.rollout.engine import Sampling
    from fastppo.rollout.packed import PackedEngine

    def made(precision: str) -> PPOStep:
        config = PPOConfig(
            precision=precision,
            num_minibatches=1,
            kl_coef=0.05,
            token_budget=16_384,
            learning_rate=1e-12,  # gradients before and after are compared
        )
        return PPOStep(bench_step.make_model("random-qwen2.5-0.5b", DEVICE), config)

    options = bench_step.Options(
        sequences=64, prompt_tokens=(64, 256), response_tokens=(32, 512), seed=0
    )
    few = bench_step.Options(
        sequences=8, prompt_tokens=(64, 256), response_tokens=(32, 512), seed=1
    )
    vocab = 151_936
    step = made("bf16")
    batch = bench_step.prepared(step, bench_step.make_batch(options, vocab), 0)
    small = bench_step.prepared(step, bench_step.make_batch(few, vocab), 0)
    engine = PackedEngine(step.policy.actor)
    prompts = [batch.input_ids[i * 160 : i * 160 + 160].cpu().numpy() for i in range(64)]

    def gradient(of: PPOStep) -> Tensor:
        of.accumulate_gradients(small)
        parameters = of.policy.actor.trained()
        found = torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])
        for p in parameters:
            p.grad = None
        return found

    def rollout() -> object:
        return engine.generate(prompts, Sampling(max_new_tokens=32, eos_token_ids=(), seed=0))

    def measure(name: str) -> Tensor:
        start = time.perf_counter()
        found = gradient(step)
        torch.cuda.synchronize()
        say("compiled", f"{name}: first gradient, s", round(time.perf_counter() - start, 2))
        wall, count, total, top = profiled(lambda: step.update(batch))
        best = min(milliseconds(lambda: step.update(batch), 1) for _ in range(3))
        mfu = bench_step.operations(step.policy.actor.model, batch) / best / peak / 1e9
        what = f"{name}: update of {batch.num_tokens} tokens, ms, best ms, kernels, GPU ms, MFU"
        say("compiled", what, (wall * 1e3, best, count, total * 1e3, mfu))
        for kernel, count, took in top[:16]:
            say("compiled", f"{name} x{count} {kernel}", round(took, 3))
        say("compiled", f"{name}: rollout of 64 rows, 32 tokens, ms", milliseconds(rollout, 2))
        return found

    peak = measure_ceilings(DEVICE).bf16_tflops
    plain = measure("plain")
    exact = made("fp32")
    exact.policy.actor.model.load_state_dict(step.policy.actor.model.state_dict())
    truth = gradient(exact)
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.packed_attention))
    for layer in setup.trunk_of(step.policy.actor.model).layers:
        layer.compile(dynamic=True)
    after = measure("compiled")
    for name, x in (("plain", plain), ("compiled", after)):
        gap = float((x - truth).norm() / truth.norm())
        say("compiled", f"{name}: gradient in bf16 from that in fp32", gap)


def cute() -> None:
    """Liger's CuTe kernel of the head for Hopper: log-probability, entropy and all gradients."""
    from liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90 import (
        LigerFusedScaledCrossEntropySM90Function as Peer,
    )

    from fastppo.ops import linear_logprobs

    def at(n: int, h: int, v: int) -> None:
        x, w = normal(n, h).requires_grad_(), (normal(v, h, seed=1) * (2.5 / h**0.5)).detach()
        w = w.requires_grad_()
        targets = torch.randint(v, (n,), device=DEVICE)
        g = normal(n, dtype=torch.float32)

        def ours() -> tuple[Tensor, ...]:
            found = linear_logprobs(x, w, targets)
            return found.logprobs, *torch.autograd.grad(found.logprobs, (x, w), g)

        def peer(entropy: bool) -> tuple[Tensor, ...]:
            found = Peer.apply(x, w, targets, 1.0, -100, 1, entropy)
            nll = found[0] if isinstance(found, tuple) else found
            return -nll, *torch.autograd.grad(nll, (x, w), -g)

        for name, a, b in zip(("logprob", "dX", "dW"), ours(), peer(True), strict=True):
            say(
                "cute",
                f"{n}x{h}x{v} {name} relative difference",
                float((a - b).detach().norm() / a.detach().norm()),
            )
        say("cute", f"{n}x{h}x{v} linear_logprobs ms", round(milliseconds(ours), 3))
        say(
            "cute",
            f"{n}x{h}x{v} Liger CuTe, entropy, ms",
            round(milliseconds(lambda: peer(True)), 3),
        )
        say("cute", f"{n}x{h}x{v} Liger CuTe ms", round(milliseconds(lambda: peer(False)), 3))


CHOICES = {
    f.__name__: f for f in (scans, losses, rows, compiled, products, grouped, decode, model, cute)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CHOICES), metavar="NAME")
    parser.add_argument("--output", default="gpu-choices.json")
    options = parser.parse_args()
    if os.path.exists(options.output):  # of other choices
        with open(options.output, encoding="utf-8") as file:
            RESULTS.update(json.load(file))
    failed: list[str] = []
    for name in options.names:
        RESULTS.pop(name, None)
        start = time.perf_counter()
        try:
            CHOICES[name]()
        except ImportError as error:
            say(name, "missing", str(error).partition("\n")[0])
        except Exception:
            failed.append(name)
            say(name, "failed", traceback.format_exc(limit=3))
        torch.cuda.empty_cache()
        say(name, "seconds", round(time.perf_counter() - start, 1))
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump(RESULTS, file, indent=1)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
