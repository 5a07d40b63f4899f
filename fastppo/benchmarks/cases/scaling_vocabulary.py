"""How the head and its loss grow with the vocabulary V, forward and backward: `linear_ppo_loss` at
sizes that differ in V alone.

`torch` keeps (N, V) arrays for the backward pass: logits, log-probabilities, their gradients;
fastppo never has more than a chunk of the logits.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fastppo.benchmarks.cases import linear_ppo_loss
from fastppo.profiling.case import Size

HEAD = linear_ppo_loss.BENCHMARKS[0]

BENCHMARKS = (
    replace(
        HEAD,
        name="head_by_vocabulary",
        axis="V",
        sizes={
            "smoke": [Size(N=64, B=4, H=64, V=v) for v in (256, 1024)],
            "cpu": [Size(N=512, B=4, H=96, V=v) for v in (8192, 32_768, 131_072)],
            "gpu": [
                Size(torch.bfloat16, N=8192, B=8, H=2048, V=v)
                for v in (16_384, 32_768, 65_536, 131_072)
            ],
        },
        providers={name: HEAD.providers[name] for name in ("fastppo", "torch")},
    ),
)
