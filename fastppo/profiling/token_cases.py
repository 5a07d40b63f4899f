"""The cases of advantages and losses. Letters: N tokens in B sequences, or B sequences of T tokens.

Everything per token is float32, a mask or an end is one byte, offsets are int32, ids int64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastppo import ops
from fastppo.ops.gae import MaskMode
from fastppo.profiling.case import Call, Case, Inputs, Outputs, Prepare, Size
from fastppo.profiling.work import WORK

GAMMA, LAMBDA = 0.99, 0.95
CLIP = 0.2  # of the value loss
PPO_CONFIG = ops.PPOLossConfig(kl_coef=0.05, ent_coef=0.01)
PPO_INPUTS = ("logprobs", "entropy", "old", "advantages", "ref")
VALUE_INPUTS = ("values", "old_values", "returns", "weights")


def _made(
    size: Size, device: torch.device, seed: int, names: Sequence[str], scale: float = 1.0
) -> tuple[dict[str, torch.Tensor], torch.Generator]:
    """Normal numbers (N,) by name, and the generator for what follows."""
    rng = torch.Generator(device).manual_seed(seed)
    rows = scale * torch.randn(len(names), size["N"], generator=rng, device=device)
    return dict(zip(names, rows, strict=True)), rng


# Advantages


def gae_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    shape = (size["B"], size["T"])
    rewards, values = torch.randn(2, *shape, generator=rng, device=device)
    mask = torch.rand(shape, generator=rng, device=device) < 0.8
    ends = torch.arange(size["B"] + 1, dtype=torch.int32, device=device) * size["T"]
    return {"rewards": rewards, "values": values, "mask": mask, "cu_seqlens": ends}


def packed_gae(mode: MaskMode) -> Prepare:
    """(B, T) numbers, one row after the other."""

    def prepare(x: Inputs, size: Size) -> Call:
        rewards, values = x["rewards"].view(-1), x["values"].view(-1)
        mask = None if mode == "none" else x["mask"].view(-1)
        ends, shape = x["cu_seqlens"], (size["B"], size["T"])

        def call() -> Outputs:
            advantages, returns = ops.gae(
                rewards,
                values,
                ends,
                gamma=GAMMA,
                gae_lambda=LAMBDA,
                mask=mask,
                mask_mode=mode,
            )
            return {"advantages": advantages.view(shape), "returns": returns.view(shape)}

        return call

    return prepare


def gae_case(name: str, mode: MaskMode) -> Case:
    large = [Size(B=64, T=4096), Size(B=64, T=16384), Size(B=4096, T=256), Size(B=65536, T=16)]
    return Case(
        name=name,
        sizes={"smoke": [Size(B=4, T=64)], "cpu": large, "gpu": large},
        inputs=gae_inputs,
        prepare=packed_gae(mode),
        work=WORK[name],
    )


def gae_classic_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    shape = (size["T"], size["E"])
    rewards, values = torch.randn(2, *shape, generator=rng, device=device)
    return {
        "rewards": rewards,
        "values": values,
        "next_value": torch.randn(size["E"], generator=rng, device=device),
        "terminated": torch.rand(shape, generator=rng, device=device) < 0.02,
    }


def gae_classic(x: Inputs, size: Size) -> Call:
    names = ("rewards", "values", "next_value", "terminated")
    inputs = [x[name] for name in names]
    return lambda: ops.gae_classic(*inputs, gamma=GAMMA, gae_lambda=LAMBDA)._asdict()


def group_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    b = size["B"]
    return {
        "scores": torch.randn(b, generator=rng, device=device),
        "groups": torch.arange(b, device=device) % (b // size["G"]),
    }


def group_advantages(x: Inputs, size: Size) -> Call:
    return lambda: {"advantages": ops.group_advantages(x["scores"], x["groups"], kind="grpo")}


def whiten_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    made, rng = _made(size, device, seed, ["advantages"])
    mask = torch.rand(size["N"], generator=rng, device=device) < 0.8
    return {"advantages": 3.0 + made["advantages"], "mask": mask}


def whiten(x: Inputs, size: Size) -> Call:
    return lambda: {"whitened": ops.whiten(x["advantages"], x["mask"])}


# Losses


def kl_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    return _made(size, device, seed, ("logprobs", "ref"))[0]


def kl_penalty(x: Inputs, size: Size) -> Call:
    return lambda: {"kl": ops.kl_penalty(x["logprobs"], x["ref"], estimator="k3")}


def loss_weights_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    rng = torch.Generator(device).manual_seed(seed)
    n, b = size["N"], size["B"]
    ends = torch.arange(b + 1, device=device) * n // b  # sequences of nearly equal length
    mask = torch.rand(n, generator=rng, device=device) < 0.8
    return {"cu_seqlens": ends.to(torch.int32), "mask": mask}


def loss_weights(x: Inputs, size: Size) -> Call:
    ends, mask, n = x["cu_seqlens"], x["mask"], size["N"]
    return lambda: {"weights": ops.loss_weights(ends, mask, aggregation="token-mean", total=n)}


def _with_weights(
    size: Size, device: torch.device, seed: int, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Seven tokens in ten count."""
    made, rng = _made(size, device, seed, names, 0.3)
    counts = torch.rand(size["N"], generator=rng, device=device) < 0.7
    return made | {"weights": counts.float() / size["N"]}


def ppo_loss_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    return _with_weights(size, device, seed, PPO_INPUTS)


def ppo_loss(x: Inputs, size: Size) -> Call:
    rows = (x["logprobs"], x["old"], x["advantages"], x["weights"])
    more = {"entropy": x["entropy"], "ref_logprobs": x["ref"]}
    return lambda: ops.ppo_loss(*rows, PPO_CONFIG, **more)._asdict()


def value_loss_inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    return _with_weights(size, device, seed, VALUE_INPUTS[:3])


def value_loss(x: Inputs, size: Size) -> Call:
    rows = [x[name] for name in VALUE_INPUTS]
    return lambda: ops.value_loss(*rows, clip=CLIP)._asdict()


CASES = (
    gae_case("gae", "none"),
    gae_case("gae_carry", "carry"),
    gae_case("gae_dense_zero", "dense-zero"),
    Case(
        name="gae_classic",
        sizes={
            "smoke": [Size(T=32, E=4)],
            "cpu": [Size(T=128, E=8), Size(T=128, E=4096)],
            "gpu": [Size(T=128, E=4096), Size(T=2048, E=512)],
        },
        inputs=gae_classic_inputs,
        prepare=gae_classic,
        work=WORK["gae_classic"],
    ),
    Case(
        name="group_advantages",
        sizes={
            "smoke": [Size(B=32, G=4)],
            "cpu": [Size(B=512, G=8), Size(B=4096, G=8)],
            "gpu": [Size(B=4096, G=8)],
        },
        inputs=group_inputs,
        prepare=group_advantages,
        work=WORK["group_advantages"],
    ),
    Case(
        name="whiten",
        sizes={
            "smoke": [Size(N=1000)],
            "cpu": [Size(N=65_536), Size(N=1_048_576)],
            "gpu": [Size(N=65_536), Size(N=1_048_576)],
        },
        inputs=whiten_inputs,
        prepare=whiten,
        work=WORK["whiten"],
    ),
    Case(
        name="kl_penalty",
        sizes={"smoke": [Size(N=1000)], "cpu": [Size(N=65_536)], "gpu": [Size(N=1_048_576)]},
        inputs=kl_inputs,
        prepare=kl_penalty,
        work=WORK["kl_penalty"],
    ),
    Case(
        name="loss_weights",
        sizes={
            "smoke": [Size(N=64, B=4)],
            "cpu": [Size(N=65_536, B=64)],
            "gpu": [Size(N=1_048_576, B=256)],
        },
        inputs=loss_weights_inputs,
        prepare=loss_weights,
        work=WORK["loss_weights"],
    ),
    Case(
        name="ppo_loss",
        sizes={
            "smoke": [Size(N=1000)],
            "cpu": [Size(N=4096), Size(N=65_536)],
            "gpu": [Size(N=65_536), Size(N=1_048_576)],
        },
        inputs=ppo_loss_inputs,
        prepare=ppo_loss,
        leaves=("logprobs", "entropy"),
        work=WORK["ppo_loss"],
    ),
    Case(
        name="value_loss",
        sizes={
            "smoke": [Size(N=1000)],
            "cpu": [Size(N=65_536)],
            "gpu": [Size(N=65_536), Size(N=1_048_576)],
        },
        inputs=value_loss_inputs,
        prepare=value_loss,
        leaves=("values",),
        work=WORK["value_loss"],
    ),
)
