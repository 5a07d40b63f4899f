"""Rollouts: from prompts in token ids to responses in token ids.

engine.py    what an engine is: prompts and `Sampling` in, `Rollouts` out
packed.py    the engine that needs nothing but the policy's own modules
sampler.py   one token a step for each row
"""

from fastppo.rollout.engine import Engine, Rollouts, Sampling

__all__ = ["Engine", "Rollouts", "Sampling"]
