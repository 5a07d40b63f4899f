"""What of a model can fail to be written, besides the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from fastppo.checkpoint import CheckpointError
from fastppo.checkpoint.run_dir import rehearse_model
from fastppo.models.packed import PackedModel
from fastppo.models.rehearsal import rehearse, write
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.policy import Policy


def test_a_generation_config_that_transformers_refuses_is_saved_as_it_is(tmp_path: Path) -> None:
    model = tiny_model(len(WORDS), seed=0)
    model.generation_config = given = GenerationConfig(temperature=0.6, top_p=0.9, eos_token_id=1)
    with pytest.raises(ValueError, match="do_sample"):
        given.save_pretrained(tmp_path)
    write(model, tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["top_p"], saved["eos_token_id"]) == (0.6, 0.9, 1)
    assert model.generation_config is given and "do_sample" not in saved
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model").generation_config
    assert (again.temperature, again.eos_token_id) == (0.6, 1)


def test_a_tokenizer_that_cannot_be_saved_fails_at_the_start(tmp_path: Path) -> None:
    tokenizer: Any = word_tokenizer()
    tokenizer.init_kwargs["extra"] = object()  # what JSON has no word for
    policy = Policy(tiny_model(len(WORDS), seed=0))
    with pytest.raises(CheckpointError, match="could not be saved after training"):
        rehearse_model(tmp_path / "model", policy.rehearse, tokenizer)
    assert not list(tmp_path.iterdir())
    rehearse_model(tmp_path / "model", policy.rehearse, word_tokenizer())
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_writes_everything_but_weights(tmp_path: Path) -> None:
    model = PackedModel(tiny_model(len(WORDS), seed=0)).model
    (tmp_path / "whole").mkdir()
    rehearse(model, tmp_path / "without")
    write(model, tmp_path / "whole", model.state_dict())
    names = [{p.name for p in (tmp_path / name).iterdir()} for name in ("whole", "without")]
    assert names[0] - names[1] == {"model.safetensors"} and names[1] <= names[0]
