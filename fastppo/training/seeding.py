"""Counter-based randomness: every random choice is a function of (seed, step, purpose).

No generator state has to be saved to resume a run, and adding a random choice in one place never
shifts the numbers drawn in another. Nothing here touches the global generators.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed for one purpose at one step.

    Args:
        seed: the run's seed.
        step: the counter the choice belongs to (iteration, epoch of the data, ...).
        purpose: what the choice is for, e.g. "rollout" or "minibatches".
    """
    digest = hashlib.sha256(f"{seed}/{step}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(
    seed: int, step: int, purpose: str, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A torch generator on `device` seeded by `derive_seed(seed, step, purpose)`."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, step, purpose))


def batch_indices(num_prompts: int, batch_size: int, seed: int, iteration: int) -> np.ndarray:
    """Which prompts iteration `iteration` uses.

    Slices an endless stream of fresh permutations of the dataset, one per epoch of the data, so
    every prompt comes once per epoch. A batch may straddle epochs or be larger than the dataset,
    and then hold a prompt more than once.

    Args:
        num_prompts: size of the dataset, ≥ 1.
        batch_size: prompts per iteration, ≥ 1.
        seed: the run's seed.
        iteration: counted from 0.

    Returns:
        (batch_size,) int64 indices into the dataset; the same for the same arguments.
    """
    position = iteration * batch_size
    parts: list[np.ndarray] = []
    wanted = batch_size
    while wanted:
        epoch, offset = divmod(position, num_prompts)
        order = torch.randperm(num_prompts, generator=generator(seed, epoch, "prompt-order"))
        part = order[offset : offset + wanted].numpy()
        parts.append(part)
        position += part.size
        wanted -= part.size
    return np.concatenate(parts)
