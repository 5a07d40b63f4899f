"""What only a GPU can decide: candidates beside what is built, with the answers compared.

    python bench/gpu_choices.py [NAME ...] [--output FILE]

Each choice is tried by itself and prints a few lines; one that fails prints its error, the rest
goes on, and the exit status says so; one that lacks a package says which. Times are medians of CUDA
events over random data, after a warm-up.
"""

from __future__ import annotations

import argparse
import json
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


def model() -> None:
    """Kernels of a decoded token and of an update at Qwen2.5-0.5B's shape, and what they take."""
    import numpy as np
    from bench_step import make_model, prepared
    from torch.profiler import ProfilerActivity, profile

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

    def profiled(
        work: Callable[[], object],
    ) -> tuple[float, int, float, list[tuple[str, int, float]]]:
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


CHOICES = {f.__name__: f for f in (rows, products, grouped, decode, model, cute)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CHOICES), metavar="NAME")
    parser.add_argument("--output", default="gpu-choices.json")
    options = parser.parse_args()
    failed: list[str] = []
    for name in options.names:
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
