"""What is saved is loaded again, and is what was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fastppo.models.tiny import tiny_model
from fastppo.ppo.policy import Policy

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

IDS = torch.tensor([[3, 5, 8, 2, 11, 7]])


def tied_by_hand() -> Any:
    """The configuration says that they are two."""
    model = tiny_model(13, seed=0)
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def untied_by_hand() -> Any:
    """The configuration says that they are one."""
    model = tiny_model(13, seed=0)
    model.config.tie_word_embeddings = True
    return model


def resized() -> Any:
    model = tiny_model(13, seed=0)
    model.resize_token_embeddings(20, mean_resizing=False)
    return model


def lora(**options: Any) -> Any:
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(tiny_model(13, seed=0), LoraConfig(**config))


def with_norms() -> Any:
    model = lora()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "layernorm" in name)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "plain": lambda: tiny_model(13, seed=0),
    "bf16": lambda: tiny_model(13, seed=0).bfloat16(),
    "tied by hand": tied_by_hand,
    "untied by hand": untied_by_hand,
    "resized": resized,
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "rows": lambda: lora(trainable_token_indices=[3, 4]),
    "embeddings": lambda: lora(modules_to_save=["embed_tokens"]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "norms": with_norms,
}
WITHOUT_ADAPTER = ("pissa", "norms")
"""On the base that they name these adapters are another model."""


def move(policy: Policy) -> None:
    """What training does."""
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.actor_parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=rng))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_saved_is_what_was_trained(kind: str, precision: Any, tmp_path: Path) -> None:
    model = MODELS[kind]()
    policy = Policy(model, precision=precision, reference="none")
    move(policy)
    policy.save(tmp_path)
    policy.restore()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = model.eval()(IDS).logits
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-4, rtol=1e-4)
        if isinstance(model, PeftModel) and kind not in WITHOUT_ADAPTER:
            again = PeftModel.from_pretrained(tiny_model(13, seed=0), tmp_path / "adapter").eval()
            low = {"atol": 0.05, "rtol": 0.05} if precision == "bf16" else {}  # a rounded base
            torch.testing.assert_close(
                again(IDS).logits, expected, **(low or {"atol": 1e-4, "rtol": 0})
            )
    assert (tmp_path / "adapter").exists() == (
        isinstance(model, PeftModel) and kind not in WITHOUT_ADAPTER
    )


def steered(part: Any) -> None:
    """Add a vector to what a layer says: no weight, and nothing that is saved."""

    def steer(module: Any, inputs: Any, out: Tensor) -> Tensor:
        return out + 0.1

    part.register_forward_hook(steer)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_what_is_not_what_was_trained_is_said(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    steered(model.get_submodule(("base_model.model." if kind == "lora" else "") + "model.layers.1"))
    with pytest.raises(ValueError, match=r"^loaded again, .* differ by up to .* rounding allows"):
        Policy(model, reference="none").save(tmp_path)


def test_a_critic_that_is_not_what_was_trained_is_said(tmp_path: Path) -> None:
    critic = tiny_model(13, seed=1)
    policy = Policy(tiny_model(13, seed=0), critic="separate", value_model=critic)
    policy.save(tmp_path / "as it is")
    steered(critic.model.layers[0])
    with pytest.raises(ValueError, match="^loaded again"):
        policy.save(tmp_path / "steered")
    saved = load_file(tmp_path / "as it is" / "critic" / "value_head.safetensors")
    assert set(saved) == {"weight", "bias"}
