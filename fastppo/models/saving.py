"""A trained model on disk, in the form transformers loads.

    folder/                  the model, for from_pretrained, fp32
    folder/adapter/          the LoRA by itself, where there is one (it is merged in the model) and
                             with the base that it names it is the model
    folder/critic/           value_head.safetensors; with a separate critic also its trunk, for
                             AutoModel.from_pretrained

Frozen layers of a bf16 run are saved as it computed with them, rounded to bf16.

What was written is loaded again on the CPU, and outputs of a few tokens are compared in fp32 with
those of the model that was trained. Merging, and another device, may move them by `ROUNDING`. This
takes one more copy of the model in memory; merging takes one before that.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModel, AutoModelForCausalLM

from fastppo.data.sequences import PackedSequences
from fastppo.models import rehearsal, setup
from fastppo.models.attention import NAME, attention_kwargs
from fastppo.models.loading import VALUE_HEAD, load_whole
from fastppo.models.weights import load_value_head

ROUNDING = 1e-3
"""Of the largest output: TF32 keeps 10 bits."""
TOKENS = 16


def save_pretrained(model: Any, folder: Path) -> None:
    """Write a model; a PEFT model's adapter is merged, and written by itself too.

    Raises:
        ValueError: loaded again, it is not the model that was trained.
    """
    trained = _outputs(setup.unwrap(model, "model"))
    if setup.is_peft(model):
        if setup.adapter_is_all(model):
            model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        merged = _merged_copy(model)
        rehearsal.write(merged, folder, _saved_state(merged))
        del merged
    else:
        rehearsal.write(model, folder, _saved_state(model))
    _check_saved(trained, folder, AutoModelForCausalLM)


def save_critic(trunk: Any, value_head: nn.Module, folder: Path) -> None:
    """Write a value head, and the model whose trunk is the critic's own (None: the actor's).

    Raises:
        ValueError: loaded again, they are not those that were trained.
    """
    critic = folder / "critic"
    critic.mkdir(parents=True, exist_ok=True)
    if trunk is not None:
        merged = setup.trunk_of(_merged_copy(trunk) if setup.is_peft(trunk) else trunk)
        rehearsal.write(merged, critic, _saved_state(merged))
        del merged
        _check_saved(_outputs(setup.trunk_of(trunk)), critic, AutoModel)
    state = {name: v.contiguous() for name, v in value_head.state_dict().items()}
    save_file(state, critic / VALUE_HEAD)
    load_value_head(copy.deepcopy(value_head), critic / VALUE_HEAD)


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
        saved = load_whole(str(file.parent), "folder", AutoModel, dtype=torch.float32)
        setup.trunk_of(trunk).load_state_dict(saved.state_dict())
    load_value_head(value_head, file)


def _outputs(model: Any) -> Tensor:
    """Logits of a language model, hidden states of a trunk: fp32 on the CPU, of one sequence of
    tokens from all over the vocabulary, through whichever attention the model is set to."""
    size = min(TOKENS, getattr(model.config, "max_position_embeddings", TOKENS))
    ids = torch.linspace(0, setup.vocabulary(model) - 1, size).round().to(torch.int32)
    inputs: dict[str, Any] = {"input_ids": ids.long()[None].to(model.device), "use_cache": False}
    if model.config._attn_implementation == NAME:
        batch = PackedSequences.pack([ids.numpy()], [[]], device=model.device)
        inputs |= attention_kwargs(batch, "segments")
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            out = functional_call(model, _float_state(model), (), inputs, tie_weights=False)
    finally:
        model.train(training)
    found: Tensor = out[0]
    return found.float().cpu()


def _check_saved(trained: Tensor, folder: Path, auto_class: Any) -> None:
    """Compare `_outputs` of what was trained and of what was saved.

    Raises:
        ValueError: they differ by more than rounding, or the folder cannot be loaded.
    """
    saved = _outputs(load_whole(str(folder), "saved", auto_class, dtype=torch.float32))
    gap = float("inf") if saved.shape != trained.shape else float((saved - trained).abs().max())
    limit = ROUNDING * float(trained.abs().max())
    if not gap <= limit:
        raise ValueError(
            f"loaded again, the model is not what was trained: outputs differ by up to {gap:.2g}, "
            f"where rounding allows {limit:.2g}. Something of it is not in its weights and its "
            "configuration (a hook, a changed forward, weights tied by hand), or was not merged"
        )


def _merged_copy(model: Any) -> Any:
    """A PEFT model's base with the adapter merged into it, in fp32; `model` is left alone."""
    return copy.deepcopy(model).float().merge_and_unload()


def _saved_state(model: Any) -> dict[str, Tensor]:
    """`_float_state` to be written: what is one weight, but two by the configuration, is two, or
    transformers would write the first alone and draw the second at random."""
    state = _float_state(model)
    if not getattr(model.config, "tie_word_embeddings", False):
        first = {value.data_ptr(): name for name, value in reversed(state.items())}
        state = {k: v if first[v.data_ptr()] == k else v.clone() for k, v in state.items()}
    return state


def _float_state(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with every floating tensor in fp32."""
    state = module.state_dict()
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
