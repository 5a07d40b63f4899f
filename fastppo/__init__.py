"""fastppo: PPO for language models with fused ops and no padding.

The public names are loaded on first use, so `import fastppo` costs nothing: torch and transformers
are imported only when something that needs them is touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "PPOConfig": "fastppo.ppo.config",
    "PPOLossConfig": "fastppo.ops",
    "PPOStep": "fastppo.ppo.step",
    "PPOTrainer": "fastppo.ppo.trainer",
    "PackedBatch": "fastppo.ppo.experience",
    "ops": "fastppo.ops",
}

__all__ = ["PPOConfig", "PPOLossConfig", "PPOStep", "PPOTrainer", "PackedBatch", "ops"]

if TYPE_CHECKING:
    from fastppo import ops
    from fastppo.ops import PPOLossConfig
    from fastppo.ppo.config import PPOConfig
    from fastppo.ppo.experience import PackedBatch
    from fastppo.ppo.step import PPOStep
    from fastppo.ppo.trainer import PPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastppo' has no attribute {name!r}; public names: {__all__}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
