"""From B prompts and responses, as a sampler returns them, to the tensors of a training batch.

fastppo lays everything out in one arena, in C++. numpy does the same in plain array code.
pad_sequence makes the rectangles of a padded trainer: fewer tensors, most of them larger.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastppo.benchmarks.registry import Benchmark, Provider
from fastppo.ppo.experience import PackedBatch
from fastppo.profiling.case import Call, Count, Inputs, Outputs, Size

Array = NDArray[Any]


def inputs(size: Size, device: torch.device, seed: int) -> Inputs:
    """Lengths between half of the mean and one and a half; flat tokens on the host."""
    rng = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, mean in (("prompt", size["P"]), ("response", size["R"])):
        lengths = torch.randint(mean // 2, 3 * mean // 2 + 1, (size["B"],), generator=rng)
        total = int(lengths.sum())
        made[f"{name}_lengths"] = lengths
        made[f"{name}s"] = torch.randint(1, 32_000, (total,), generator=rng, dtype=torch.int32)
    total = made["responses"].numel()
    made["logprobs"] = -torch.rand(total, generator=rng)
    return made


def arrays(x: Inputs) -> tuple[list[Array], list[Array], list[Array]]:
    """Prompts, responses and log-probabilities, one array per sequence."""

    def cut(flat: Tensor, lengths: Tensor) -> list[Array]:
        ends = lengths.cumsum(0)[:-1].numpy()
        return list(
            np.split(flat.float().numpy() if flat.is_floating_point() else flat.numpy(), ends)
        )

    return (
        cut(x["prompts"], x["prompt_lengths"]),
        cut(x["responses"], x["response_lengths"]),
        cut(x["logprobs"], x["response_lengths"]),
    )


def fastppo(x: Inputs, size: Size) -> Call:
    prompts, responses, logprobs = arrays(x)

    def call() -> Outputs:
        batch = PackedBatch.pack(prompts, responses, rollout_logprobs=logprobs)
        assert batch.rollout_logprobs is not None
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "targets": batch.targets,
            "rows": batch.rows,
            "logprobs": batch.rollout_logprobs,
        }

    return call


def numpy_code(x: Inputs, size: Size) -> Call:
    prompts, responses, logprobs = arrays(x)

    def call() -> Outputs:
        pairs = [half for pair in zip(prompts, responses, strict=True) for half in pair]
        before = np.array([len(p) for p in prompts])
        after = np.array([len(r) for r in responses])
        ends = np.cumsum(before + after)
        starts = ends - before - after
        tokens = np.arange(ends[-1], dtype=np.int32)
        offsets = np.cumsum(after) - after
        shift = np.repeat(starts + before - 1 - offsets, after)
        made = {
            "input_ids": np.concatenate(pairs),
            "position_ids": tokens - np.repeat(starts, before + after).astype(np.int32),
            "targets": np.concatenate(responses),
            "rows": (np.arange(after.sum()) + shift).astype(np.int32),
            "logprobs": np.concatenate(logprobs),
        }
        return {name: torch.from_numpy(value) for name, value in made.items()}

    return call


def padded(x: Inputs, size: Size) -> Call:
    prompts, responses, logprobs = arrays(x)

    def call() -> Outputs:
        whole = [
            torch.from_numpy(np.concatenate(pair)) for pair in zip(prompts, responses, strict=True)
        ]
        ids = pad_sequence(whole, batch_first=True, padding_value=-1)
        lp = pad_sequence([torch.from_numpy(p) for p in logprobs], True, float("nan"))
        return {"input_ids": ids, "logprobs": lp}

    return call


def counted(outputs: Outputs, x: Inputs) -> Outputs:
    """Rectangles without their padding."""
    flat = {}
    for name, value in outputs.items():
        pad = value.isnan() if value.is_floating_point() else value == -1
        flat[name] = value[~pad] if value.dim() == 2 else value
    return flat


NOT_MADE = {name: "not needed by a padded model" for name in ("position_ids", "targets", "rows")}
BENCHMARKS = (
    Benchmark(
        name="packing",
        sizes={
            "smoke": [Size(B=8, P=16, R=32)],
            "cpu": [Size(B=128, P=256, R=1792), Size(B=4096, P=32, R=32)],
        },
        inputs=inputs,
        reference=lambda x, size: numpy_code(x, size)(),
        providers={
            "fastppo": Provider(
                prepare=fastppo, torch_memory=False, note="with cu_seqlens and lengths besides"
            ),
            "numpy": Provider(prepare=numpy_code, torch_memory=False),
            "pad_sequence": Provider(prepare=padded, omits=NOT_MADE, torch_memory=False),
        },
        baseline="numpy",
        # per token: id read and written, position written; per response token: id and log-
        # probability read again and written, row written: 12·B·(P + R) + 16·B·R less the ids'
        # second reading, 4 bytes each
        bytes=Count.read("12·B·(P + R) + 16·B·R"),
        flops=Count("none", lambda s: 0.0),
        counted=counted,
    ),
)
