"""`fastppo train`: a TrainConfig becomes a PPOTrainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastppo.models.config import NamedModelConfig
from fastppo.ppo.config import TrainConfig
from fastppo.ppo.trainer import PPOTrainer
from fastppo.rewards import resolve_reward

if TYPE_CHECKING:
    from peft import LoraConfig


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
        ref_model=config.ref_model or None,
        value_model=config.value_model or None,
        peft_config=lora_config(config) if config.lora_rank else None,
        reward_weights=config.reward_weights or None,
        resume_from_checkpoint=resume,
        allow_changes=allow_changes,
    )


def lora_config(config: NamedModelConfig) -> LoraConfig:
    """LoRA (https://arxiv.org/abs/2106.09685) on every linear layer of the trunk, no dropout."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
