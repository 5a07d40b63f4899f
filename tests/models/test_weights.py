"""Models on disk that are not whole are refused by name, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification

from fastppo.models.loading import load_model, load_value_model
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.rewards.model import RewardModel

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

State = dict[str, torch.Tensor]
Change = Callable[[State], State]

HEAD, BLOCK = "lm_head.weight", "model.layers.1."
CHANGES: dict[str, tuple[Change, str]] = {
    "half of the layers": (
        lambda s: {k: v for k, v in s.items() if not k.startswith(BLOCK)},
        "lacks weights for model.layers.1.input_layernorm.weight, .* and 6 more: .* random",
    ),
    "a trained head that the class ignores": (
        lambda s: s | {"v_head.summary.weight": torch.ones(1, 64)},
        "has weights that a LlamaForCausalLM does not read: v_head.summary.weight",
    ),
    "layers beyond those of the configuration": (
        lambda s: s | {k.replace("layers.1", "layers.2"): v.clone() for k, v in s.items()},
        "does not read: model.layers.2.input_layernorm.weight, .* and 6 more",
    ),
    "another vocabulary": (
        lambda s: s | {HEAD: torch.ones(14, 64)},
        r"other sizes than its config.json says: lm_head.weight \(14, 64\) and not \(13, 64\)",
    ),
}


def save(folder: Path, model: Any = None, **options: Any) -> Path:
    (model or tiny_model(len(WORDS), seed=0)).save_pretrained(folder, **options)
    word_tokenizer().save_pretrained(folder)
    return folder


def change(folder: Path, how: Change) -> None:
    file = folder / "model.safetensors"
    save_file(how(load_file(file)), file, {"format": "pt"})


def scorer(folder: Path) -> Path:
    config = tiny_model(len(WORDS), seed=0).config
    config.num_labels = 1
    return save(folder, LlamaForSequenceClassification(config))


@pytest.mark.parametrize("load", [load_model, load_value_model])
@pytest.mark.parametrize("case", CHANGES)
def test_weights_that_are_not_those_of_the_model(case: str, load: Any, tmp_path: Path) -> None:
    how, message = CHANGES[case]
    change(save(tmp_path), how)
    role = "value_model" if load is load_value_model else "model"
    with pytest.raises(ValueError, match=f"^{role}: '{tmp_path}' .*{message}"):
        load(str(tmp_path))


@pytest.mark.parametrize("case", [*CHANGES][:3])
def test_a_reward_model_is_whole(case: str, tmp_path: Path) -> None:
    change(scorer(tmp_path), CHANGES[case][0])
    with pytest.raises(ValueError, match=f"^reward model: '{tmp_path}' .*(lacks|does not read)"):
        RewardModel(tmp_path).load()


def test_a_reward_model_that_is_not_finite(tmp_path: Path) -> None:
    change(scorer(tmp_path), lambda s: s | {"score.weight": torch.full((1, 64), torch.nan)})
    with pytest.raises(ValueError, match=r"not finite \(NaN or infinite\) in score.weight"):
        RewardModel(tmp_path).load()


def test_weights_that_no_model_reads_are_harmless(tmp_path: Path) -> None:
    change(
        save(tmp_path / "llama"),
        lambda s: s | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
    )
    old = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
    masks = {"attn.bias": torch.ones(4, 4), "attn.masked_bias": torch.tensor(-1e4)}
    change(
        save(tmp_path / "gpt2", old),
        lambda s: s | {f"transformer.h.0.{name}": mask for name, mask in masks.items()},
    )
    change(scorer(tmp_path / "scorer"), lambda s: s | {HEAD: torch.ones(len(WORDS), 64)})
    for name in ("llama", "gpt2"):
        load_model(str(tmp_path / name))
    load_value_model(str(tmp_path / "scorer"))


def test_a_file_of_weights_that_is_cut_off(tmp_path: Path) -> None:
    file = save(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9000])
    with pytest.raises(ValueError, match=f"^model: '{tmp_path}': {file.name} is damaged"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("forgotten", [False, True], ids=["file", "file and index"])
def test_shards_that_are_not_there(forgotten: bool, tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="100KB")
    lost = sorted(tmp_path.glob("model-*"))[1]
    lost.unlink()
    if forgotten:
        index = tmp_path / "model.safetensors.index.json"
        parsed = json.loads(index.read_text())
        kept = {k: v for k, v in parsed["weight_map"].items() if v != lost.name}
        index.write_text(json.dumps(parsed | {"weight_map": kept}))
    with pytest.raises((ValueError, OSError), match="lacks weights" if forgotten else lost.name):
        load_model(str(tmp_path))


@pytest.mark.parametrize("beside_a_model", [False, True])
def test_an_adapter_is_no_model(beside_a_model: bool, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(len(WORDS), seed=0), lora).save_pretrained(str(tmp_path))
    if beside_a_model:
        save(tmp_path)
    for load in (load_model, load_value_model):
        with pytest.raises(ValueError, match="expected a whole model, .* has an adapter in it"):
            load(str(tmp_path))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"weight": torch.ones(1, 32), "bias": torch.ones(1)}, r"got .*\(1, 32\)"),
        ({"weight": torch.ones(1, 64)}, r"'bias': \(1,\)}, got"),
        ({"weight": torch.full((1, 64), torch.inf), "bias": torch.ones(1)}, "not finite"),
        (None, "damaged or cut off"),
    ],
    ids=["width", "bias", "infinite", "damaged"],
)
def test_a_value_head_of_another_model(head: State | None, message: str, tmp_path: Path) -> None:
    tiny_model(len(WORDS), seed=0).model.save_pretrained(tmp_path)
    file = tmp_path / "value_head.safetensors"
    if head is None:
        file.write_bytes(b"?")
    else:
        save_file(head, file)
    with pytest.raises(ValueError, match=f"^value_model: .*{message}"):
        load_value_model(str(tmp_path))
