"""PPO update, packed (fastppo) against padded (transformers + log_softmax), on the same rollouts.

    python bench/bench_step.py [--model MODEL] [--sequences 32] [--repeats 5]
    python bench/bench_step.py --model random-qwen2.5-0.5b --sequences 64 --prompt-tokens 64 256 \
        --response-tokens 32 512 --rows 16 --token-budget 16384 --decode-rows 64 256

Prompts of 8–64 and responses of 4–64 tokens, uniformly mixed, unless told otherwise. The padded
form is how PPO trainers on transformers lay a batch out: prompts padded on the left, responses on
the right, one forward over the rectangle, logits of the response columns, log_softmax, gather,
losses, backward, AdamW. It comes twice: with the head on every column (TRL's PPOTrainer), and on
response columns only.

Before anything is timed, loss and gradients of all forms are compared in fp32. Timed forms take
turns (A B C A B C …); the figures are medians, and tokens are real tokens: pads count for nobody.
MFU is the operations of real tokens over what the device's large products reach here. The other
phases of a fastppo iteration (rollout, scoring, packing, evaluation) are timed apart. The last line
is the result as JSON.
"""

from __future__ import annotations

import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from torch import Tensor

from fastppo import PackedBatch, PPOConfig, PPOStep, __version__
from fastppo.models.loading import load_model
from fastppo.profiling.ceilings import measure_ceilings
from fastppo.rewards import Rewards
from fastppo.rollout.engine import Sampling
from fastppo.rollout.packed import PackedEngine
from fastppo.training.device import describe, resolve_device
from fastppo.training.optim import apply_step, grad_norm, make_adamw

SHAPES: dict[str, dict[str, Any]] = {
    "random-tiny": {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "random-qwen2.5-0.5b": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}
"""Models of random weights, which need no files: the shape of a real one, and one for trying."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured."""

    model: str = "smollm2-135m-instruct"
    """Model of policy and critic (a value head on the shared trunk), or a key of SHAPES."""
    sequences: int = 32
    """Sequences of the update, in one optimiser step."""
    rows: int = 8
    """Sequences in one padded forward pass; fastppo gets as many real tokens on average."""
    prompt_tokens: tuple[int, int] = (8, 64)
    """Shortest and longest prompt."""
    response_tokens: tuple[int, int] = (4, 64)
    """Shortest and longest response."""
    token_budget: int = 0
    """Most tokens in one of fastppo's passes; 0: 70 for each of `rows`, at least 640."""
    new_tokens: int = 32
    """Tokens of each response in the timed rollout, which stops at none."""
    decode_rows: tuple[int, ...] = ()
    """Rollouts of so many rows besides; tokens per second of each are reported."""
    repeats: int = 5
    """Timed rounds; the first round is a warm-up besides."""
    precision: str = "auto"
    """bf16, fp32 or auto, the same for every form."""
    seed: int = 0
    """Of lengths, tokens and advantages."""


class PaddedStep:
    """The same update on padded tensors, written against transformers and torch only."""

    def __init__(self, model: Any, config: PPOConfig, device: torch.device, bf16: bool) -> None:
        self.model, self.config, self.device, self.bf16 = model.to(device), config, device, bf16
        width = model.config.hidden_size
        self.value_head = torch.nn.Linear(width, 1, device=device)
        torch.nn.init.zeros_(self.value_head.weight)
        torch.nn.init.zeros_(self.value_head.bias)
        self.actor = make_adamw(model.parameters(), config)
        self.critic = make_adamw(self.value_head.parameters(), config)

    def layout(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Pad once, outside the timer: (B, context + response) ids, the rest (B, response)."""
        prompts, responses = [], []
        starts, lengths = batch.cu_seqlens_host, batch.response_lengths
        ids = batch.input_ids.cpu().numpy()
        context = max(int(e - s - n) for s, e, n in zip(starts, starts[1:], lengths, strict=False))
        for start, end, n in zip(starts, starts[1:], lengths, strict=False):
            prompts.append(ids[start : end - n])
            responses.append(ids[end - n : end])
        wide = max(map(len, responses))
        size = len(prompts)
        tokens = np.zeros((size, context + wide), dtype=np.int64)
        mask = np.zeros((size, context + wide), dtype=np.int64)
        for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
            tokens[i, context - len(p) : context + len(r)] = np.concatenate([p, r])
            mask[i, context - len(p) : context + len(r)] = 1
        out = {"ids": torch.from_numpy(tokens), "mask": torch.from_numpy(mask)}
        for name in ("old_logprobs", "ref_logprobs", "values", "advantages", "returns"):
            padded = torch.zeros(size, wide)
            for i, row in enumerate(batch.unpack(getattr(batch, name))):
                padded[i, : len(row)] = torch.from_numpy(np.asarray(row))
            out[name] = padded
        return {name: value.to(self.device) for name, value in out.items()} | {
            "context": torch.tensor(context)
        }

    def gradients(self, data: dict[str, Tensor], rows: int, response_only: bool) -> Tensor:
        """Accumulate the gradient over slices of `rows` sequences; returns the loss."""
        c, context = self.config, int(data["context"])
        count = data["mask"][:, context:].sum()
        total = torch.zeros((), device=self.device)
        for first in range(0, len(data["ids"]), rows):
            part = {k: v[first : first + rows] for k, v in data.items() if k != "context"}
            ids, mask = part["ids"], part["mask"]
            wide = ids.shape[1] - context
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                hidden = self.model.base_model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                ).last_hidden_state
                if response_only:
                    hidden = hidden[:, context - 1 : -1]
                    logits = self.model.lm_head(hidden)
                else:
                    logits = self.model.lm_head(hidden)[:, context - 1 : -1]
                    hidden = hidden[:, context - 1 : -1]
            logprobs = torch.log_softmax(logits.float() / c.temperature, dim=-1)
            lp = logprobs.gather(2, ids[:, context:, None])[..., 0]
            values = self.value_head(hidden.float())[..., 0]
            weight = mask[:, context:] / count
            ratio = (lp - part["old_logprobs"]).exp()
            a = part["advantages"]
            pg = torch.maximum(-a * ratio, -a * ratio.clamp(1 - c.clip_coef, 1 + c.clip_coef))
            vl = 0.5 * (values - part["returns"]).square()
            loss = (weight * pg).sum() + c.vf_coef * (weight * vl).sum()
            loss.backward()
            total = total + loss.detach()
            assert logits.shape[1] == wide
        return total

    def update(self, data: dict[str, Tensor], rows: int, response_only: bool) -> None:
        self.gradients(data, rows, response_only)
        optimizers = (self.actor, self.critic)
        norms = [grad_norm(optimizer) for optimizer in optimizers]
        skip = ~torch.stack(norms).isfinite().all()
        apply_step(optimizers, norms, self.config.max_grad_norm, skip)


def make_batch(options: Options, vocab: int) -> PackedBatch:
    """Random tokens of mixed lengths."""
    rng = np.random.default_rng(options.seed)
    prompts, responses = (
        [rng.integers(3, vocab, n) for n in rng.integers(low, high + 1, options.sequences)]
        for low, high in (options.prompt_tokens, options.response_tokens)
    )
    return PackedBatch.pack(prompts, responses, truncated=np.ones(options.sequences, dtype=bool))


def check_equal(options: Options, config: PPOConfig, device: torch.device) -> dict[str, float]:
    """Gradients of both padded forms against fastppo's, in fp32; exits where they differ."""
    model = make_model(options.model, device)
    step = PPOStep(copy.deepcopy(model), config)
    padded = PaddedStep(copy.deepcopy(model), config, device, bf16=False)
    small = replace(options, sequences=6)
    batch = prepared(step, make_batch(small, model.config.vocab_size), options.seed)
    step.accumulate_gradients(batch)
    mine = {n: p.grad for n, p in step.policy.actor.model.named_parameters() if p.grad is not None}
    worst = {}
    for response_only in (False, True):
        padded.model.zero_grad()
        padded.gradients(padded.layout(batch), 3, response_only)
        gaps = []
        for name, parameter in padded.model.named_parameters():
            scale = parameter.grad.abs().max().clamp(min=1e-12)
            gaps.append(float((mine[name] - parameter.grad).abs().max() / scale))
        worst["response columns" if response_only else "all columns"] = max(gaps)
        if max(gaps) > 1e-3:
            raise SystemExit(f"gradients differ by {max(gaps):.2g} of their size: nothing is timed")
    return worst


def prepared(step: PPOStep, batch: PackedBatch, seed: int) -> PackedBatch:
    """Evaluate, then advantages from random scores."""
    scores = np.random.default_rng(seed).random(batch.num_sequences)
    return step.advantages(step.evaluate(batch), scores)


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def phases(step: PPOStep, options: Options, batch: PackedBatch) -> dict[str, float]:
    """Seconds of the parts of an iteration around the update, once warm."""
    prompts = [
        batch.input_ids.cpu().numpy()[s : e - n]
        for s, e, n in zip(
            batch.cu_seqlens_host, batch.cu_seqlens_host[1:], batch.response_lengths, strict=False
        )
    ]
    sampling = Sampling(
        temperature=1.0, max_new_tokens=options.new_tokens, eos_token_ids=(), seed=options.seed
    )
    engine = PackedEngine(step.policy.actor)
    rewards = Rewards([lambda completions, **_: [float(len(c)) for c in completions]])
    texts = [" ".join(map(str, r)) for r in batch.unpack(batch.targets)]
    responses = batch.unpack(batch.targets)
    names = ["x"] * len(texts)
    found = {}
    for name, work in {
        f"rollout ({options.new_tokens} tokens)": lambda: engine.generate(prompts, sampling),
        "scoring": lambda: rewards(names, texts, {}, responses),
        "packing": lambda: PackedBatch.pack(prompts, responses),
        "evaluate (old, ref, values)": lambda: step.evaluate(batch),
        "advantages": lambda: step.advantages(batch, [0.5] * batch.num_sequences),
    }.items():
        work()
        found[name] = statistics.median(timed(work, step.device) for _ in range(3))
    for rows in options.decode_rows:
        many = [prompts[i % len(prompts)] for i in range(rows)]
        engine.generate(many, sampling)
        found[f"rollout of {rows} rows ({options.new_tokens} tokens)"] = statistics.median(
            timed(lambda many=many: engine.generate(many, sampling), step.device) for _ in range(2)
        )
    return found


def rollout_gap(step: PPOStep, options: Options, batch: PackedBatch) -> float:
    """Mean |difference| of log-probabilities, in nats: of the rollout and of `evaluate`."""
    ids, starts = batch.input_ids.cpu().numpy(), batch.cu_seqlens_host
    prompts = [ids[s : s + 16] for s in starts[:-1]]
    sampling = Sampling(max_new_tokens=16, eos_token_ids=(), seed=options.seed)
    rollouts = PackedEngine(step.policy.actor).generate(prompts, sampling)
    packed = PackedBatch.pack(prompts, rollouts.responses, rollout_logprobs=rollouts.logprobs)
    evaluated = step.evaluate(packed)
    assert evaluated.old_logprobs is not None and evaluated.rollout_logprobs is not None
    return float((evaluated.old_logprobs - evaluated.rollout_logprobs).abs().mean())


def make_model(name: str, device: torch.device) -> Any:
    """A model in fp32: loaded, or of random weights."""
    if name not in SHAPES:
        return load_model(name).float()
    torch.manual_seed(0)
    with device:
        return transformers.AutoModelForCausalLM.from_config(
            transformers.Qwen2Config(**SHAPES[name])
        )


def operations(model: Any, batch: PackedBatch) -> float:
    """Of an update, forward and backward, of the batch's tokens: products and causal attention."""
    c = model.config
    layers = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "layers" in n)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    lengths = np.diff(batch.cu_seqlens_host).astype(float)
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * head_dim * (lengths**2).sum()
    head = 2 * batch.num_responses * c.hidden_size * c.vocab_size
    return float(3 * (2 * layers * batch.num_tokens + head + attention))


def main(options: Options) -> None:
    """Check, measure, print."""
    config = PPOConfig(
        precision=options.precision,  # type: ignore[arg-type]  # checked by PPOConfig's users
        num_minibatches=1,
        learning_rate=1e-6,
        kl_coef=0.05,
        lr_schedule="constant",
        token_budget=options.token_budget or max(640, options.rows * 70),
    )
    device = resolve_device("auto")
    step = PPOStep(make_model(options.model, device), config)
    worst = check_equal(options, replace(config, precision="fp32"), device)
    print(f"{describe(device)}, {step.precision}, torch {torch.__version__}")
    for name, gap in worst.items():
        print(f"gradients equal in fp32 ({name}): largest difference {gap:.1e} of the largest")
    padded = PaddedStep(make_model(options.model, device), config, device, step.precision == "bf16")
    batch = prepared(
        step, make_batch(options, step.policy.actor.model.config.vocab_size), options.seed
    )
    data = padded.layout(batch)
    forms = {
        "fastppo, packed": lambda: step.update(batch),
        "padded, head on all columns": lambda: padded.update(data, options.rows, False),
        "padded, head on response columns": lambda: padded.update(data, options.rows, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(options.repeats + 1):
        for name, work in forms.items():
            took = timed(work, device)
            if round_:
                seconds[name].append(took)
    tokens = batch.num_tokens
    share = tokens / data["ids"].numel()
    print(f"{batch.num_sequences} sequences, {tokens} tokens, {batch.num_responses} responses;")
    print(f"{share:.0%} of the padded rectangle is real\n")
    ceilings = measure_ceilings(device)
    peak = ceilings.bf16_tflops if step.precision == "bf16" else ceilings.fp32_tflops
    todo = operations(step.policy.actor.model, batch)
    print(f"{'update':34} {'seconds':>8} {'tokens/s':>9} {'times':>6} {'MFU':>6}")
    base = statistics.median(seconds["fastppo, packed"])
    for name, samples in seconds.items():
        took = statistics.median(samples)
        mfu = todo / took / peak / 1e12
        print(f"{name:34} {took:8.3f} {tokens / took:9.0f} {took / base:6.2f} {mfu:6.1%}")
    around = phases(step, options, batch)
    print("\nother phases (fastppo)")
    for name, took in around.items():
        print(f"{name:34} {took:8.3f}")
    gap = rollout_gap(step, options, batch)
    print(f"log-probabilities of rollout and evaluation differ by {gap:.1e} nats on average")
    result = {
        "bench": "step",
        "fastppo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "hardware": describe(device),
        "precision": step.precision,
        "model": options.model,
        "tokens": tokens,
        "responses": batch.num_responses,
        "real_share": share,
        "seconds": seconds,
        "phases": around,
        "gradient_gap": worst,
        "operations": todo,
        "ceilings": asdict(ceilings),
        "rollout_gap": gap,
        "options": asdict(options),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(Options))
