"""How the gradient of a PPO minibatch grows: with tokens, sequence length, share of responses.

A Llama with SmolLM2's proportions and random weights, with a value head on its trunk. B sequences
of S tokens, the last R % of each are the response: T = B·S tokens in all. Equal lengths, so that
transformers on a plain rectangle does no work for padding: what is compared is the head, the loss
and what is kept for the backward pass. fastppo runs with its default token budget (8192 tokens in
one pass), transformers in one pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.profiling.case import Call, Count, Inputs, Outputs, Size

CLIP, VF_COEF = 0.2, 0.5
REFERENCE_TOKENS = 4096
"""Of one pass in float64, which has no fused attention on a GPU and keeps a lot."""
WATCHED = ("lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight")
"""Parameters whose gradients are compared: the last, the first and one in between."""


def make_model(size: Size, device: torch.device) -> Any:
    """H hidden units in heads of 64, or three smaller ones, with a third as many for keys and
    values; L layers; V tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = size["H"]
    head_dim = min(64, hidden // 3)
    config = LlamaConfig(
        vocab_size=size["V"],
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=size["L"],
        num_attention_heads=hidden // head_dim,
        num_key_value_heads=hidden // head_dim // 3,
        max_position_embeddings=65_536,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(), device:  # on a GPU at once: random weights take a CPU seconds
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    b, s, n = size["T"] // size["S"], size["S"], response_length(size)
    per_token = torch.randn(4, b, n, generator=rng, device=device)
    names = ("noise", "advantages", "returns", "values")
    return dict(zip(names, per_token, strict=True)) | {
        "ids": torch.randint(size["V"], (b, s), generator=rng, device=device),
        "value_weight": torch.randn(1, size["H"], generator=rng, device=device) / size["H"],
    }


def response_length(size: Size) -> int:
    """Response tokens of each sequence; at least one token is prompt."""
    return min(size["S"] - 1, max(1, size["S"] * size["R"] // 100))


def old_logprobs(x: Inputs, size: Size) -> Tensor:
    """Near those of a random model, ln(1/V), so that some ratios are clipped and some are not."""
    return 0.1 * x["noise"] - torch.log(torch.tensor(float(size["V"]))).item()


def fastppo(x: Inputs, size: Size) -> Call:
    device, n = x["ids"].device, response_length(size)
    config = PPOConfig(
        device=str(device),
        precision="bf16" if size.dtype == torch.bfloat16 else "fp32",
        reference="none",
        kl_coef=0.0,
        clip_coef=CLIP,
        clip_vloss=CLIP,
        vf_coef=VF_COEF,
    )
    step = PPOStep(make_model(size, device), config)
    value_head = step.policy.value_head
    assert value_head is not None
    value_head.weight.data.copy_(x["value_weight"])
    ids = x["ids"].cpu().to(torch.int32)
    batch = PackedBatch.pack(list(ids[:, :-n]), list(ids[:, -n:]), device=device)
    fields = {name: x[name].reshape(-1) for name in ("advantages", "returns", "values")}
    batch = batch.replace(
        **fields,
        old_logprobs=old_logprobs(x, size).reshape(-1),
        loss_mask=torch.ones(batch.num_responses, dtype=torch.bool, device=device),
    )
    _ = batch.valid_lengths
    parameters = dict(step.policy.actor.model.named_parameters())

    def call() -> Outputs:
        step.drop_gradients()
        metrics, value_loss = step.accumulate_gradients(batch)
        found = {name: parameters[name].grad for name in WATCHED}
        found["value_head.weight"] = value_head.weight.grad
        return {
            "policy loss": metrics[ops.PPO_METRIC_NAMES.index("policy_loss")],
            "value loss": value_loss,
            **{name: grad for name, grad in found.items() if grad is not None},
        }

    return call


def transformers_step(x: Inputs, size: Size, tokens: int | None = None) -> Call:
    """The same in transformers, with the head on the response's columns.

    Args:
        tokens: of one pass, a sequence at least; None: all.
    """
    device, dtype = x["ids"].device, x["advantages"].dtype
    model = make_model(size, device).to(dtype)
    head = x["value_weight"].to(dtype).clone().requires_grad_()
    rows = {name: x[name] for name in ("ids", "advantages", "returns", "values")}
    rows["old"] = old_logprobs(x, size)
    num_sequences = len(rows["ids"])
    per_pass = max(1, (tokens or size["T"]) // size["S"])
    half = size.dtype == torch.bfloat16 and dtype == torch.float32
    parameters = dict(model.named_parameters())

    def losses(part: Inputs) -> Tensor:
        """Of policy and value, means over the part (2,)."""
        ids, n = part["ids"], part["returns"].shape[1]
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            hidden = hidden[:, -n - 1 : -1]
            logits = model.lm_head(hidden)
        logprobs = torch.log_softmax(logits.to(dtype), dim=-1)
        ratio = (logprobs.gather(2, ids[:, -n:, None])[..., 0] - part["old"]).exp()
        a, old, target = part["advantages"], part["values"], part["returns"]
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
        values = (hidden.to(dtype) @ head.T)[..., 0]
        clipped = old + (values - old).clamp(-CLIP, CLIP)
        value = 0.5 * torch.maximum((values - target) ** 2, (clipped - target) ** 2).mean()
        return torch.stack([policy, value])

    def call() -> Outputs:
        model.zero_grad(set_to_none=True)
        head.grad = None
        total = torch.zeros(2, dtype=dtype, device=device)
        for start in range(0, num_sequences, per_pass):
            part = {name: t[start : start + per_pass] for name, t in rows.items()}
            found = losses(part) * (len(part["ids"]) / num_sequences)
            (found[0] + VF_COEF * found[1]).backward()
            total += found.detach()
        return {
            "policy loss": total[0],
            "value loss": total[1],
            "value_head.weight": head.grad,
            **{name: parameters[name].grad for name in WATCHED},
        }

    return call


def trunk_weights(size: Size) -> int:
    """Parameters that every token is multiplied with: q and o, k and v, the three of the MLP."""
    h = size["H"]
    return size["L"] * h * (2 * h + 2 * (h // 3) + 3 * (h * 8 // 3))


def flops(size: Size) -> float:
    """Forward and twice that backward, 2 per multiply-add; causal attention is half a square."""
    h, layers = size["H"], size["L"]
    n = size["T"] // size["S"] * response_length(size)
    trunk = size["T"] * (trunk_weights(size) + layers * size["S"] * h)
    return 6.0 * (trunk + n * h * size["V"])


def weights(size: Size) -> float:
    """Parameters of trunk, embeddings and head."""
    return trunk_weights(size) + 2.0 * size["V"] * size["H"]


SMALL = {"H": 96, "L": 1, "V": 4096}
SMOLLM2 = {"H": 576, "L": 30, "V": 49_152}
TINY = {"H": 192, "L": 1, "V": 256}


def scaling_case(
    name: str, axis: str, cpu: list[dict[str, int]], gpu: list[dict[str, int]]
) -> Benchmark:
    make = partial(Size, torch.float32)
    return Benchmark(
        name=name,
        axis=axis,
        sizes={
            "smoke": [make(**{"T": 128, "S": 32, "R": 50} | TINY | {axis: v}) for v in SMOKE[axis]],
            "cpu": [make(**point, **SMALL) for point in cpu],
            "gpu": [Size(torch.bfloat16, **point, **SMOLLM2) for point in gpu],
        },
        inputs=inputs,
        reference=lambda x, size: transformers_step(x, size, REFERENCE_TOKENS)(),
        providers={
            "fastppo": Provider(prepare=fastppo),
            "transformers": Provider(prepare=transformers_step, note="in one pass"),
        },
        baseline="transformers",
        # weights read forward and backward, gradients written, fp32
        bytes=Count("12·parameters: read twice, gradients written", lambda s: 12 * weights(s)),
        flops=Count("6·(T·(trunk + L·S·H) + N·H·V)", flops),
    )


SMOKE = {"T": (64, 128), "S": (16, 32), "R": (25, 75)}
BENCHMARKS = (
    scaling_case(
        "update_by_tokens",
        "T",
        [{"T": t, "S": 128, "R": 25} for t in (1024, 8192, 65_536)],
        [{"T": t, "S": 512, "R": 50} for t in (1024, 4096, 16_384, 65_536)],
    ),
    scaling_case(
        "update_by_length",
        "S",
        [{"T": 4096, "S": s, "R": 50} for s in (64, 512, 4096)],
        [{"T": 16_384, "S": s, "R": 50} for s in (256, 1024, 4096)],
    ),
    scaling_case(
        "update_by_response_share",
        "R",
        [{"T": 4096, "S": 128, "R": r} for r in (25, 50, 100)],
        [{"T": 16_384, "S": 512, "R": r} for r in (12, 25, 50, 100)],
    ),
)
