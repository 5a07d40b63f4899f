"""A model's folder but for the weights, and the one way in which models are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from fastppo.models import setup


def write(model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a transformers model; `state` in place of its state dict.

    transformers refuses to write a changed generation_config with, for example, a temperature but
    no do_sample, as published models have it. It is written as it is: reading it only warns.
    """
    given = getattr(model, "generation_config", None)
    if given is None:
        model.save_pretrained(folder, state_dict=state)
        return
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = given
    given.to_json_file(
        folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"]
    )


def rehearse(model: Any, folder: Path) -> None:
    """Write all of a model but its weights, as saving it will do at the end of a run."""
    if setup.is_peft(model):
        if setup.adapter_is_all(model):
            model.save_pretrained(folder / "adapter", save_embedding_layers=False, state_dict={})
        model = model.get_base_model()
    write(model, folder, {})
