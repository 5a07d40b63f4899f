"""Rollouts: from prompts in token ids to responses in token ids.

engine.py    what an engine is: prompts and `Sampling` in, `Rollouts` out
packed.py    the engine that needs nothing but the model that samples
sampler.py   one token a step for each row
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastppo.rollout.engine import Engine, Rollouts, Sampling

if TYPE_CHECKING:
    from fastppo.rollout.packed import PackedEngine

__all__ = ["Engine", "PackedEngine", "Rollouts", "Sampling"]


def __getattr__(name: str) -> Any:  # on first use: a configuration is checked without torch
    if name == "PackedEngine":
        from fastppo.rollout.packed import PackedEngine

        return PackedEngine
    raise AttributeError(f"module 'fastppo.rollout' has no attribute {name!r}")
