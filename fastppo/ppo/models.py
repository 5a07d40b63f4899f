"""The models of a run: the policy with its adapter, the reference, the critic; given or named."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.models.config import NamedModelConfig
from fastppo.models.loading import load_config, load_model, load_value_model, with_adapter
from fastppo.ppo.config import TrainConfig
from fastppo.training.memory import named
from fastppo.training.seeding import derive_seed

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig


def load_models(
    seed: int,
    model: Any,
    *,
    ref_model: Any = None,
    value_model: Any = None,
    peft_config: PeftConfig | None = None,
) -> tuple[Any, dict[str, Any]]:
    """The policy, and the other models by the name that `PPOStep` has for them.

    Args:
        seed: of the run, and so of the adapter.
        model, ref_model, value_model: a model or the name of one.
        peft_config: of the policy's adapter, if it gets one.

    Raises:
        ValueError: see `load_model` and `load_value_model`.
    """
    with named("loading the models", "Take smaller ones, or a machine with more memory"):
        loaded = load_model(model) if isinstance(model, str) else model
        if peft_config is not None:
            loaded = with_adapter(loaded, peft_config, derive_seed(seed, 0, "adapter"))
        if isinstance(ref_model, (str, Path)):
            ref_model = load_model(str(ref_model), "ref_model")
        if isinstance(value_model, (str, Path)):
            value_model = load_value_model(str(value_model))
    return loaded, {"ref_model": ref_model, "value_model": value_model}


def companion_configs(**models: Any) -> dict[str, Any]:
    """The transformers configuration of each model that is given or named, by its role."""
    configs = {
        role: load_config(str(model), role) if isinstance(model, (str, Path)) else model.config
        for role, model in models.items()
        if isinstance(model, (str, Path)) or hasattr(model, "config")
    }
    return {role: config for role, config in configs.items() if config is not None}


def named_models(config: TrainConfig) -> dict[str, Any]:
    """What a configuration says of the models besides the policy, as `load_models` takes it."""
    return {
        "ref_model": config.ref_model or None,
        "value_model": config.value_model or None,
        "peft_config": lora_config(config) if config.lora_rank else None,
    }


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
