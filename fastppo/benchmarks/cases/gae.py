"""GAE: the packed scan against the loops and vectorised forms of other trainers.

Each peer is written from its project's formula, in its layout, on B sequences of T tokens: equal
length, so no padding, which favours them. fastppo reads the same numbers packed. Masks mean
different things in different projects, so each convention is a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo import ops
from fastppo.benchmarks.registry import Call, Case, Count, Inputs, Outputs, Provider, Size
from fastppo.ops.gae import MaskMode

GAMMA, LAMBDA = 0.99, 0.95
SIZES = {
    "smoke": [Size(B=4, T=64)],
    "cpu": [Size(B=64, T=4096), Size(B=64, T=16384), Size(B=4096, T=256), Size(B=65536, T=16)],
    "gpu": [Size(B=64, T=4096), Size(B=64, T=16384), Size(B=4096, T=256), Size(B=65536, T=16)],
}
Padded = Callable[[Tensor, Tensor, Tensor], Tensor]  # rewards, values, mask (B, T) → advantages


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    shape = (size["B"], size["T"])
    rewards, values = torch.randn(2, *shape, generator=rng, device=device)
    mask = torch.rand(shape, generator=rng, device=device) < 0.8
    ends = torch.arange(size["B"] + 1, dtype=torch.int32, device=device) * size["T"]
    return {"rewards": rewards, "values": values, "mask": mask, "cu_seqlens": ends}


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """trl 1.12 experimental/ppo: no mask inside the loop."""
    lastgaelam: float | Tensor = 0.0
    advantages_reversed = []
    gen_length = rewards.shape[1]
    for t in reversed(range(gen_length)):
        nextvalues = values[:, t + 1] if t < gen_length - 1 else 0.0
        delta = rewards[:, t] + GAMMA * nextvalues - values[:, t]
        lastgaelam = delta + GAMMA * LAMBDA * lastgaelam
        advantages_reversed.append(lastgaelam)
    return torch.stack(advantages_reversed[::-1], dim=1)


def verl_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """verl core_algos.compute_gae_advantage_return: masked tokens carry the state."""
    nextvalues: float | Tensor = 0.0
    lastgaelam: float | Tensor = 0.0
    advantages_reversed = []
    for t in reversed(range(rewards.shape[-1])):
        delta = rewards[:, t] + GAMMA * nextvalues - values[:, t]
        lastgaelam_ = delta + GAMMA * LAMBDA * lastgaelam
        nextvalues = values[:, t] * mask[:, t] + (1 - mask[:, t]) * nextvalues
        lastgaelam = lastgaelam_ * mask[:, t] + (1 - mask[:, t]) * lastgaelam
        advantages_reversed.append(lastgaelam)
    return torch.stack(advantages_reversed[::-1], dim=1)


def openrlhf_loop(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """OpenRLHF get_advantages_and_returns: values and rewards zeroed, then the plain loop."""
    return loop(mask * rewards, mask * values, mask)


def deltas(rewards: Tensor, values: Tensor) -> Tensor:
    following = torch.cat([values[:, 1:], values.new_zeros(values.shape[0], 1)], dim=1)
    return rewards + GAMMA * following - values


def torchrl_convolution(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """torchrl _fast_vec_gae: δ convolved with powers of γλ, cut where they fall below 1e-7."""
    delta = deltas(rewards, values)
    decay = GAMMA * LAMBDA
    taps = min(delta.shape[1], math.ceil(math.log(1e-7) / math.log(decay)))
    powers = decay ** torch.arange(taps, dtype=delta.dtype, device=delta.device)
    padded = torch.nn.functional.pad(delta, (0, taps - 1))
    return torch.nn.functional.conv1d(padded[:, None], powers[None, None])[:, 0]


def scipy_lfilter(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """The recurrence as an IIR filter over reversed time."""
    from scipy import signal

    delta = deltas(rewards, values).numpy()[:, ::-1]
    filtered = signal.lfilter([1.0], [1.0, -GAMMA * LAMBDA], delta, axis=1)
    return torch.from_numpy(filtered[:, ::-1].copy())


def padded(function: Padded) -> Callable[[Inputs, Size], Call]:
    """A peer: its mask is of the values' dtype, and returns are A + V."""

    def prepare(x: Inputs, size: Size) -> Call:
        rewards, values, mask = x["rewards"], x["values"], x["mask"].to(x["values"].dtype)

        def call() -> Outputs:
            advantages = function(rewards, values, mask)
            return {"advantages": advantages, "returns": advantages + values}

        return call

    return prepare


def packed(mode: MaskMode) -> Callable[[Inputs, Size], Call]:
    """fastppo, on the same numbers one after the other."""

    def prepare(x: Inputs, size: Size) -> Call:
        rewards, values, mask = (x[name].view(-1) for name in ("rewards", "values", "mask"))
        used = None if mode == "none" else mask
        ends, shape = x["cu_seqlens"], (size["B"], size["T"])

        def call() -> Outputs:
            advantages, returns = ops.gae(
                rewards,
                values,
                ends,
                gamma=GAMMA,
                gae_lambda=LAMBDA,
                mask=used,
                mask_mode=mode,
            )
            return {"advantages": advantages.view(shape), "returns": returns.view(shape)}

        return call

    return prepare


def valid_tokens(outputs: Outputs, x: Inputs) -> Outputs:
    """Advantages and returns at masked tokens are whatever a project leaves there."""
    return {name: out[x["mask"]] for name, out in outputs.items()}


def reference(function: Padded) -> Callable[[Inputs, Size], Outputs]:
    """A loop over tokens in float64, vectorised over sequences."""
    return lambda x, size: padded(function)(x, size)()


def gae_case(name: str, mode: MaskMode, peers: dict[str, Provider], baseline: Padded) -> Case:
    masked = mode != "none"
    return Case(
        name=name,
        sizes=SIZES,
        inputs=inputs,
        reference=reference(baseline),
        providers={"fastppo": Provider(prepare=packed(mode)), **peers},
        baseline=next(iter(peers)),
        # r, V read and A, R written in float32; the mask is one byte
        bytes=Count(
            f"{16 + masked}·B·T: r, V{', mask' if masked else ''} read, A, R written, fp32",
            lambda size: (16 + masked) * size["B"] * size["T"],
        ),
        # δ = r + γV' − V: 3; A = δ + γλA: 2; R = A + V: 1
        flops=Count("6·B·T", lambda size: 6 * size["B"] * size["T"]),
        launch_bound=True,
        counted=valid_tokens if masked else None,
    )


CASES = (
    gae_case(
        "gae",
        "none",
        {
            "TRL loop": Provider(prepare=padded(loop)),
            "torchrl convolution": Provider(
                prepare=padded(torchrl_convolution), note="cuts powers of γλ below 1e-7"
            ),
            "scipy lfilter": Provider(
                prepare=padded(scipy_lfilter),
                needs=("scipy",),
                devices=("cpu",),
                torch_memory=False,
            ),
        },
        loop,
    ),
    gae_case("gae_carry", "carry", {"verl loop": Provider(prepare=padded(verl_loop))}, verl_loop),
    gae_case(
        "gae_dense_zero",
        "dense-zero",
        {"OpenRLHF loop": Provider(prepare=padded(openrlhf_loop))},
        openrlhf_loop,
    ),
)
