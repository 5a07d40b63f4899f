"""Sizes are checked against each other before a weight is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastppo import PackedBatch, PPOConfig, PPOStep, PPOTrainer
from fastppo.models.loading import max_positions
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.rewards import RewardModel

PROMPTS = [{"prompt": "1 2 >"}, {"prompt": "3 4 5 >"}]


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def make_trainer(model: Any, folder: Path, tokenizer: Any = None, **models: Any) -> PPOTrainer:
    response = models.pop("max_response_length", 3)
    config = PPOConfig(
        num_iterations=1,
        prompts_per_iteration=2,
        num_minibatches=1,
        max_prompt_length=8,
        max_response_length=response,
        critic="separate" if "value_model" in models else None,
        device="cpu",
        output_dir=str(folder / "run"),
    )
    tokenizer = tokenizer or word_tokenizer()
    return PPOTrainer(model, length, PROMPTS, config, processing_class=tokenizer, **models)


def without_weights(folder: Path, **fields: Any) -> str:
    """A model's folder of a configuration alone: whoever loads it fails with another error."""
    config = tiny_model(len(WORDS), seed=0).config
    config.update({"architectures": ["LlamaForCausalLM"], **fields})
    config.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def test_an_end_token_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ValueError, match="^processing_class: .* '<end>' with id 13 as its eos_tok"):
        make_trainer(without_weights(tmp_path / "model"), tmp_path, tokenizer)
    model = tiny_model(len(WORDS), seed=0)
    model.generation_config.eos_token_id = [1, 99]
    with pytest.raises(ValueError, match="^generation_config: .* of 13, got eos_token_id = 99"):
        make_trainer(model, tmp_path)


@pytest.mark.parametrize("role", ["ref_model", "value_model"])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 12}, "{}: expected the vocabulary of model, 13 tokens, got 12"),
        ({"max_position_embeddings": 5}, "max_response_length = 3: .* than the 5 positions of {}"),
    ],
    ids=["vocabulary", "positions"],
)
def test_a_companion_that_is_too_small(
    role: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = without_weights(tmp_path / "model")
    other = without_weights(tmp_path / "other", **fields)
    with pytest.raises(ValueError, match=message.format(role)):
        make_trainer(model, tmp_path, **{role: other})
    given = tiny_model(len(WORDS), seed=0)
    given.config.update(fields)
    with pytest.raises(ValueError, match=message.format(role)):
        make_trainer(model, tmp_path, **{role: given})


def test_the_dry_run_says_it_too(project: Path, command: Callable[..., Any]) -> None:
    without_weights(project / "small", vocab_size=12)
    done = command(project, "train", "--config", "run.toml", "--dry-run", "--ref-model", "small")
    assert done.status == 2
    assert "ref_model: expected the vocabulary of model, 13 tokens, got 12" in done.err


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0}, 1024),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            256,  # max_position_embeddings is the longer one
        ),
    ],
    ids=["default", "linear", "yarn", "yarn original", "llama3"],
)
def test_scaled_positions_reach_further(
    rope: dict[str, Any], expected: int, tmp_path: Path
) -> None:
    folder = Path(without_weights(tmp_path / "model"))
    file = folder / "config.json"
    saved = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("rope")}
    file.write_text(json.dumps(saved | {"rope_parameters": {"rope_theta": 10000.0, **rope}}))
    assert max_positions(LlamaConfig.from_pretrained(folder)) == expected
    with pytest.raises(ValueError, match=f"than the {expected} positions of model"):
        make_trainer(str(folder), tmp_path, max_response_length=expected - 3)
    with pytest.raises(ValueError, match="no file named"):  # the weights are next
        make_trainer(str(folder), tmp_path, max_response_length=expected - 4)


def test_a_step_on_tokens_beyond_the_head() -> None:
    model = tiny_model(len(WORDS), seed=0)
    model.resize_token_embeddings(20, mean_resizing=False)
    model.lm_head = torch.nn.Linear(64, 16, bias=False)
    step = PPOStep(model, PPOConfig(precision="fp32", device="cpu"))
    step.evaluate(PackedBatch.pack([[3, 4]], [[15]]))
    with pytest.raises(ValueError, match=r"^batch.input_ids: .* vocabulary of 16, got 16"):
        step.evaluate(PackedBatch.pack([[3, 4]], [[16]]))


def test_a_reward_model_with_the_tokenizer_of_another(tmp_path: Path) -> None:
    config = tiny_model(8, seed=0).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    reward = RewardModel(tmp_path)
    assert len(reward(["1"], [" 2"])) == 1
    with pytest.raises(ValueError, match="sample 1 has token 12 .* whose vocabulary is 8"):
        reward(["1", "1"], [" 2", " 9"])
