"""`fastppo train --dry-run`: what a run would be, without reading a weight."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM

from fastppo.checkpoint import new_run_dir
from fastppo.models.config import NamedModelConfig
from fastppo.models.loading import load_config, load_tokenizer
from fastppo.models.setup import train_last_layers
from fastppo.ppo.config import TrainConfig
from fastppo.ppo.inputs import make_inputs
from fastppo.ppo.models import companion_configs, lora_config
from fastppo.reporting.formatting import visible
from fastppo.reporting.terminal import stdout_console
from fastppo.rewards import resolve_reward
from fastppo.training.device import describe, resolve_device, resolve_precision

GIB = 1024**3


def dry_run(config: TrainConfig, console: Console | None = None) -> None:
    """Print configuration, parameter count, memory estimate and the first prompt; train nothing."""
    console = console or stdout_console()
    model_config = load_config(config.model)
    tokenizer = load_tokenizer(config.model)
    data, held_out, rewards = make_inputs(
        config,
        model_config,
        tokenizer,
        config.dataset,
        config.eval_dataset or None,
        [resolve_reward(spec, allowed_hosts=config.reward_hosts) for spec in config.reward],
        config.reward_weights or None,
        companion_configs(
            ref_model=config.ref_model or None, value_model=config.value_model or None
        ),
    )
    run_dir = new_run_dir(config.output_dir, take=False)
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)

    table = Table(title="configuration", title_justify="left", show_header=False)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        changed = value != field.default
        name = Text(field.name, style="bold" if changed else "dim")
        table.add_row(name, Text(repr(value), style="" if changed else "dim"))
    console.print(table)

    total, trainable = count_parameters(config, model_config)
    console.print(visible(f"model       {config.model} ({model_config.model_type})"))
    console.print(f"device      {describe(device)}, {precision}")
    console.print(f"parameters  {total:,}, of which {trainable:,} are trained")
    console.print(f"prompts     {len(data):,} ({data.num_filtered:,} over the limit left out)")
    console.print(f"held out    {len(held_out) if held_out else 0:,}")
    console.print(visible(f"rewards     {', '.join(rewards.names)}"))
    console.print(visible(f"run         {run_dir}"))
    memory = estimate_memory(config, model_config, total, trainable, precision)
    console.print(f"memory      about {sum(memory.values()) / GIB:.2f} GiB:")
    for purpose, size in memory.items():
        console.print(f"{'':11} {size / GIB:6.2f} {purpose}")
    console.print("\nfirst prompt, as the model will see it:")
    console.print(Text(visible(tokenizer.decode(data.ids[0]), keep="\n"), style="cyan"))
    console.print("\ndry run: nothing was trained and nothing was written")


def count_parameters(config: NamedModelConfig, model_config: Any) -> tuple[int, int]:
    """Number of parameters, and of those that are trained, from meta tensors."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config)
        total = sum(p.numel() for p in model.parameters())
        if config.lora_rank:
            from peft import get_peft_model

            model = get_peft_model(model, lora_config(config))
        elif config.train_layers is not None:
            train_last_layers(model, config.train_layers, "model")
    return total, sum(p.numel() for p in model.parameters() if p.requires_grad)


def estimate_memory(
    config: TrainConfig, model_config: Any, total: int, trainable: int, precision: str
) -> dict[str, int]:
    """Bytes by purpose: exact for what is stored, an estimate for activations.

    A layer keeps about 16 hidden-sized values per token for its backward pass (1 with gradient
    checkpointing): the inputs of its norms and products, and the wider ones inside the MLP.
    """
    width = 2 if precision == "bf16" else 4
    layers = min(model_config.num_hidden_layers, config.train_layers or 10**9)
    per_token = layers * model_config.hidden_size * (1 if config.gradient_checkpointing else 16)
    result = {"parameters": trainable * 4 + (total - trainable) * width}
    if config.ref_model or (config.kl_coef > 0 and not config.lora_rank):
        result["reference"] = (total if config.ref_model else trainable) * width
    result |= {"gradients": trainable * 4, "AdamW": trainable * 8}
    if config.critic_kind == "separate":
        result["separate critic, with gradients and AdamW"] = total * 16
    result["activations (estimate)"] = config.token_budget * per_token * width
    return result
