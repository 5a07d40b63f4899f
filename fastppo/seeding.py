"""Counter-based randomness: every random choice is a function of (seed, step, purpose).

No generator state has to be saved to resume a run, and adding a random choice in one place never
shifts the numbers drawn in another. Nothing here touches the global generators.
"""

from __future__ import annotations

import hashlib

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
