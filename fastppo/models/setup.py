"""What is done to a transformers model before PPO trains it.

Find its parts, turn dropout off, choose what trains, set the dtype of every weight, copy it
without copying what never changes. All of it happens in place and before the first forward.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastppo.models.attention import FAMILIES, NAME
from fastppo.options import shown

Precision = Literal["fp32", "bf16"]


def is_peft(model: Any) -> bool:
    """Whether `model` is a `peft.PeftModel`; the check does not import peft."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def check_model(model: Any, name: str) -> None:
    """Refuse what is not a transformers model.

    Raises:
        ValueError: it is something else, called `name` in the message.
    """
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        raise ValueError(
            f"{name}: expected a transformers model, got {shown(model)}. Load it first: "
            "AutoModelForCausalLM.from_pretrained(...)"
        )


def outside_adapter(model: Any) -> list[str]:
    """Names of what trains in a PEFT model and goes on working when its adapter is off."""
    switched = (model.base_model.prefix, "modules_to_save.", "trainable_tokens_")
    return [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not any(part in name for part in switched)
    ]


def is_base_with_fresh_lora(model: Any) -> bool:
    """Whether a model, with its adapter off, is the model as it is now, and stays it in training.

    So it is where nothing but LoRA trains, and every product with its B is 0. Not where the adapter
    has been trained before, or starts from weights that it takes out of the base (PiSSA, OLoRA,
    CorDA, LoftQ), or biases, norms, embeddings or copies of modules train beside it.
    """
    if not is_peft(model) or any(c.peft_type != "LORA" for c in model.peft_config.values()):
        return False
    named = list(model.named_parameters())
    return all("lora_" in name for name, p in named if p.requires_grad) and not any(
        p.any() for name, p in named if "lora_B." in name or "lora_embedding_A." in name
    )


def adapter_is_all(model: Any) -> bool:
    """Whether the adapter of a PEFT model, on the base that it names, is the model: not where the
    base was changed for it (PiSSA and its like), or trains beside it and is not saved with it."""
    plain = (True, False, "gaussian", "eva")
    configs = model.peft_config.values()
    biased = any(getattr(c, "bias", "none") != "none" for c in configs)
    return all(getattr(c, "init_lora_weights", True) in plain for c in configs) and all(
        biased and name.endswith(".bias") for name in outside_adapter(model)
    )


def unwrap(model: Any, name: str) -> Any:
    """The transformers model itself; inside a PEFT model it has the adapters built in.

    Raises:
        ValueError: no transformers model, or an adapter that is not built into the layers, called
            `name` in the message.
    """
    check_model(model, name)
    if not is_peft(model):
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{name}: expected a plain model or a peft.PeftModel, got a model with an adapter "
                "added by transformers' add_adapter. Use peft.get_peft_model instead"
            )
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise ValueError(
            f"{name}: expected an adapter inside the layers such as LoRA, got prompt learning, "
            "whose virtual tokens a packed batch has no place for"
        )
    return model.get_base_model()


def trunk_of(model: Any) -> Any:
    """The decoder without its head."""
    return unwrap(model, "model").base_model


def output_head(model: Any, name: str) -> nn.Linear:
    """The linear layer from hidden states to logits of a transformers model.

    Raises:
        ValueError: there is none, or it is not a plain linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        return head
    found = type(head).__name__ if head is not None else "none"
    raise ValueError(
        f"{name}: expected a causal language model with a plain linear output head, got "
        f"{type(model).__name__} with {found}. Load it by AutoModelForCausalLM, and leave lm_head "
        "out of a LoRA's target_modules and modules_to_save"
    )


def vocabulary(model: Any) -> int:
    """Number of tokens that a model has embeddings of; a PEFT model's may be wrapped."""
    return int(unwrap(model, "model").get_input_embeddings().weight.shape[0])


def disable_dropout(module: nn.Module) -> None:
    """Set every dropout probability to 0, so that train() and eval() compute the same.

    Covers nn.Dropout (LoRA's too) and the `attention_dropout` that attention layers pass on. The
    configuration keeps its values: they are saved as they were.
    """
    parts: list[Any] = list(module.modules())
    for part in parts:
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.0


def last_layers(model: Any, count: int, name: str) -> list[nn.Module]:
    """The last `count` decoder layers and the final norm.

    Raises:
        ValueError: `count` outside 1 ... number of layers, or a PEFT model.
    """
    if is_peft(model):
        raise ValueError(
            f"train_layers: expected None for a PEFT model, got {count}. The adapter decides what "
            "trains; LoraConfig(layers_to_transform=...) limits it to some layers"
        )
    trunk = model.base_model
    layers_name, norm_name = FAMILIES[model.config.model_type]
    layers = getattr(trunk, layers_name)
    if not 1 <= count <= len(layers):
        raise ValueError(
            f"train_layers: expected 1 to {len(layers)}, the layers of {name}, or None for all "
            f"parameters; got {count}"
        )
    return [*layers[-count:], getattr(trunk, norm_name)]


def train_last_layers(model: Any, count: int, name: str) -> None:
    """Freeze everything but `last_layers`, which see."""
    trained = last_layers(model, count, name)
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)


def freeze_outside_trunk(model: Any) -> None:
    """Freeze the heads that a critic does not use."""
    used = {id(p) for p in trunk_of(model).parameters()}
    for p in model.parameters():
        if id(p) not in used:
            p.requires_grad_(False)


def set_precision(module: nn.Module, precision: Precision) -> None:
    """fp32 for every floating weight; under bf16, bf16 for what only bf16 products read.

    Those are the frozen weights of linear layers: autocast would round them to bf16 at every use,
    so storing them rounded changes no result and saves the rounding. Trained weights stay fp32
    masters: an update of 1e-6 vanishes in bf16. Embeddings, a head tied to them, and norms stay
    fp32 because they are read as such.
    """
    from transformers.pytorch_utils import Conv1D

    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    for part in module.modules():
        product = precision == "bf16" and isinstance(part, (nn.Linear, Conv1D))
        for p in part.parameters(recurse=False):
            if p.is_floating_point():
                low = product and not p.requires_grad and id(p) not in embeddings
                p.data = p.data.to(torch.bfloat16 if low else torch.float32)


def copy_trainable(module: Any) -> Any:
    """A copy of `module` with its own trainable parameters that shares the frozen ones."""
    shared = {id(p): p for p in module.parameters() if not p.requires_grad}
    return copy.deepcopy(module, shared)


def enable_checkpointing(model: Any) -> None:
    """Recompute each decoder layer in the backward pass instead of storing its activations."""
    options = {"use_reentrant": False, "preserve_rng_state": False}  # no dropout, no randomness
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:  # the name in transformers 5.17
        model.gradient_checkpointing_enable(options)


class AttentionSwitch:
    """Changes a model between packed attention and the implementation that its owner gave it, last
    of all by `set_attn_implementation` while it was an ordinary model.

    The implementation is a field of the configuration, which models made from one configuration
    share; so every layer first gets a configuration that no model outside reads.
    """

    def __init__(self, model: nn.Module) -> None:
        replaced: dict[int, tuple[Any, Any]] = {}  # by id: the original (kept alive), its copy
        for part in model.modules():
            config = getattr(part, "config", None)
            if hasattr(config, "_attn_implementation"):
                if id(config) not in replaced:
                    replaced[id(config)] = (config, copy.copy(config))
                part.config = replaced[id(config)][1]
        self._configs = [config for _, config in replaced.values()]
        # one that is packed already belongs to another policy, whose own is not known here
        self._own = ["sdpa" for _ in self._configs]

    @property
    def packed(self) -> bool:
        """Which of the two it is."""
        return all(config._attn_implementation == NAME for config in self._configs)

    def set(self, *, packed: bool) -> None:
        """Packed attention, or the model's own."""
        for i, config in enumerate(self._configs):
            if config._attn_implementation != NAME:
                self._own[i] = config._attn_implementation
            config._attn_implementation = NAME if packed else self._own[i]


def head_dim(model: Any) -> int:
    """Dimension of one attention head."""
    config = unwrap(model, "model").config
    size: int | None = getattr(config, "head_dim", None)
    return size or int(config.hidden_size // config.num_attention_heads)


class Rounded:
    """bf16 copies of frozen weights: made once, and again after a weight was loaded or moved."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[tuple[int, int], Tensor]] = {}  # by id: version and copy

    def __call__(self, weight: Tensor) -> Tensor:
        """`weight` in bf16."""
        version = (weight.data_ptr(), weight._version)
        if id(weight) not in self._copies or self._copies[id(weight)][0] != version:
            self._copies[id(weight)] = (version, weight.detach().to(torch.bfloat16))
        return self._copies[id(weight)][1]


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that train."""
    return [p for p in module.parameters() if p.requires_grad]
