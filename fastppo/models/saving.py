"""A trained model on disk, in the form transformers loads.

    folder/                  the model, for from_pretrained, fp32
    folder/adapter/          the LoRA by itself, where there is one (it is merged in the model)
    folder/critic/           value_head.safetensors; with a separate critic also its trunk, for
                             AutoModel.from_pretrained

Frozen layers of a bf16 run are saved as it computed with them, rounded to bf16.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastppo.models import rehearsal, setup
from fastppo.models.loading import DATA_ONLY, VALUE_HEAD


def save_pretrained(model: Any, folder: Path) -> None:
    """Write a model; a PEFT model's adapter is merged, and written by itself too."""
    if setup.is_peft(model):
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        rehearsal.write(_merged_copy(model), folder)
    else:
        rehearsal.write(model, folder, _float_state(model))


def save_critic(trunk: Any, value_head: nn.Module, folder: Path) -> None:
    """Write a value head, and the model whose trunk is the critic's own (None: the actor's)."""
    critic = folder / "critic"
    critic.mkdir(parents=True, exist_ok=True)
    if trunk is not None:
        merged = setup.trunk_of(_merged_copy(trunk) if setup.is_peft(trunk) else trunk)
        merged.save_pretrained(critic, state_dict=_float_state(merged))
    state = {name: v.contiguous() for name, v in value_head.state_dict().items()}
    save_file(state, critic / VALUE_HEAD)


def load_critic(trunk: Any, value_head: nn.Module, folder: Path) -> None:
    """Load what `save_critic` wrote to `folder`.

    Raises:
        ValueError: no critic in the folder, or one inside a PEFT model.
    """
    file = folder / "critic" / VALUE_HEAD
    if not file.is_file():
        raise ValueError(f"folder: expected a saved critic, got no file {file}")
    if trunk is not None:
        if setup.is_peft(trunk):
            raise ValueError(
                "folder: a saved critic cannot be loaded into a PEFT critic, whose adapter is "
                f"merged in it. Pass value_model = load_value_model({str(file.parent)!r})"
            )
        from transformers import AutoModel

        saved = AutoModel.from_pretrained(file.parent, dtype=torch.float32, **DATA_ONLY)
        setup.trunk_of(trunk).load_state_dict(saved.state_dict())
    value_head.load_state_dict(load_file(file))


def _merged_copy(model: Any) -> Any:
    """A PEFT model's base with the adapter merged into it, in fp32; `model` is left alone."""
    return copy.deepcopy(model).float().merge_and_unload()


def _float_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every floating tensor in fp32."""
    state = module.state_dict()
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
