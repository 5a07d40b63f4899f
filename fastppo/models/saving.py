"""A trained policy on disk, in the form transformers loads.

    folder/                  the model, for AutoModelForCausalLM.from_pretrained, fp32
    folder/adapter/          the LoRA by itself, where there is one (it is merged in the model)
    folder/critic/           value_head.safetensors; with a separate critic also its trunk, for
                             AutoModel.from_pretrained

Frozen layers of a bf16 run are saved as it computed with them, rounded to bf16.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastppo.models import setup as prep
from fastppo.models.loading import DATA_ONLY

if TYPE_CHECKING:
    from fastppo.models.policy import Policy

VALUE_HEAD = "value_head.safetensors"


def save_policy(policy: Policy, folder: Path) -> None:
    """Write the actor and, if there is one, the critic."""
    if prep.is_peft(policy.model):
        policy.model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        _merged_copy(policy.model).save_pretrained(folder)
    else:
        policy.model.save_pretrained(folder, state_dict=_float_state(policy.model))
    if policy.value_head is None:
        return
    critic = folder / "critic"
    critic.mkdir(parents=True, exist_ok=True)
    if policy.critic is not None:
        merged = _merged_copy(policy.critic) if prep.is_peft(policy.critic) else policy.critic
        trunk = prep.trunk_of(merged)
        trunk.save_pretrained(critic, state_dict=_float_state(trunk))
    state = {name: v.contiguous() for name, v in policy.value_head.state_dict().items()}
    save_file(state, critic / VALUE_HEAD)


def load_critic(policy: Policy, folder: Path) -> None:
    """Load the critic that `save_policy` wrote to `folder` into the policy's critic.

    Raises:
        ValueError: no critic in the folder or in the policy, or one inside a PEFT model.
    """
    file = folder / "critic" / VALUE_HEAD
    if policy.value_head is None or not file.is_file():
        got = "critic = 'none'" if policy.value_head is None else f"no file {file}"
        raise ValueError(f"folder: expected a saved critic and a policy with one, got {got}")
    if policy.critic is not None:
        if prep.is_peft(policy.critic):
            raise ValueError(
                "folder: a saved critic cannot be loaded into a PEFT critic, whose adapter is "
                f"merged in it. Pass value_model = AutoModel.from_pretrained({str(file.parent)!r})"
            )
        from transformers import AutoModel

        saved = AutoModel.from_pretrained(file.parent, dtype=torch.float32, **DATA_ONLY)
        prep.trunk_of(policy.critic).load_state_dict(saved.state_dict())
    policy.value_head.load_state_dict(load_file(file))


def _merged_copy(model: Any) -> Any:
    """A PEFT model's base with the adapter merged into it, in fp32; `model` is left alone."""
    return copy.deepcopy(model).float().merge_and_unload()


def _float_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every floating tensor in fp32."""
    state = module.state_dict()
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
