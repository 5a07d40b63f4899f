"""`fastppo train`: a TrainConfig becomes a PPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence

from fastppo.ppo.config import TrainConfig
from fastppo.ppo.models import named_models
from fastppo.ppo.trainer import PPOTrainer
from fastppo.rewards import resolve_reward


def build_trainer(
    config: TrainConfig, *, resume: bool | str = False, allow_changes: Sequence[str] = ()
) -> PPOTrainer:
    """A trainer with its model loaded and everything in the configuration checked.

    Args:
        config: the run.
        resume, allow_changes: see `PPOTrainer`.

    Raises:
        ValueError, TypeError, ImportError, OSError: what a person can mend, named.
    """
    return PPOTrainer(
        config.model,
        [resolve_reward(spec, allowed_hosts=config.reward_hosts) for spec in config.reward],
        config.dataset,
        config,
        eval_dataset=config.eval_dataset or None,
        reward_weights=config.reward_weights or None,
        resume_from_checkpoint=resume,
        allow_changes=allow_changes,
        **named_models(config),
    )
