"""What the tests of the thirty details share: tiny real models, batches, steps and trainers.

Each file holds some of the details, each as `test_NN_name` with what the detail demands in one
line. They run through PPOStep, PPOTrainer and PackedEngine. The models' weights are ten times
larger than usual: far from uniform, so that every misplaced token shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fastppo.models.tiny import tiny_model, word_tokenizer
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.experience import PackedBatch
from fastppo.ppo.step import PPOStep
from fastppo.ppo.trainer import PPOTrainer

VOCAB, EOS = 37, 2
PROMPTS, RESPONSES = (3, 8, 1, 5, 2), (5, 1, 12, 4, 7)  # lengths in tokens


def build_model(family: str = "llama", seed: int = 0, **options: Any) -> Any:
    """A randomly initialised model whose padding token is its end token."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**shared, **sizes, **options)).eval()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    config = LlamaConfig(**shared, **sizes, tie_word_embeddings=False, **options)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """`make_model(family="llama", seed=0, **config)`."""
    return build_model


@pytest.fixture
def make_batch() -> Callable[..., PackedBatch]:
    """`make_batch(prompts=lengths, responses=lengths, **pack options)`, with random tokens."""

    def make(
        prompts: Sequence[int] = PROMPTS, responses: Sequence[int] = RESPONSES, **options: Any
    ) -> PackedBatch:
        rng = np.random.default_rng(0)
        draw = [[rng.integers(0, VOCAB, n) for n in lengths] for lengths in (prompts, responses)]
        return PackedBatch.pack(*draw, **options)

    return make


@pytest.fixture
def make_step() -> Callable[..., PPOStep]:
    """`make_step(model=None, ref_seed=None, value_std=0.0, **config)`; fp32, one minibatch."""

    def make(
        model: Any = None, *, ref_seed: int | None = None, value_std: float = 0.0, **options: Any
    ) -> PPOStep:
        defaults: dict[str, Any] = {
            "device": "cpu",
            "precision": "fp32",
            "prompts_per_iteration": 8,
            "max_prompt_length": 16,
            "max_response_length": 16,
            "token_budget": 512,
            "num_minibatches": 1,
            "learning_rate": 1e-3,
            "lr_schedule": "constant",
            "kl_coef": 0.0 if ref_seed is None else 0.1,
        }
        step = PPOStep(
            build_model() if model is None else model,
            PPOConfig(**(defaults | options)),
            ref_model=None if ref_seed is None else build_model(seed=ref_seed),
        )
        if value_std:
            torch.manual_seed(3)
            torch.nn.init.normal_(step.policy.value_head.weight, std=value_std)
        return step

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., PPOTrainer]:
    """`make_trainer(reward, **config)`: the demo's words, prompts of 1 to 3 of them, 16 samples."""

    def make(reward: Callable[..., Any], **options: Any) -> PPOTrainer:
        tokenizer = word_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "device": "cpu",
            "precision": "fp32",
            "num_iterations": 2,
            "prompts_per_iteration": 16,
            "max_prompt_length": 4,
            "max_response_length": 6,
            "num_minibatches": 2,
            "token_budget": 64,
            "learning_rate": 1e-3,
            "sample_interval": 0,
        }
        return PPOTrainer(
            tiny_model(13, seed=0),
            reward,
            [{"prompt": p} for p in ("1 >", "2 3 >", "7", "4 5 >", ">")],
            PPOConfig(**(defaults | options)),
            processing_class=tokenizer,
        )

    return make


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], list[tuple[Any, Any]]]:
    """`spy(obj, name)`: the (arguments, result) of every call from now on, which really happens."""

    def record(obj: Any, name: str) -> list[tuple[Any, Any]]:
        calls: list[tuple[Any, Any]] = []
        real = getattr(obj, name)

        def recorded(*args: Any, **kwargs: Any) -> Any:
            result = real(*args, **kwargs)
            calls.append((args, result))
            return result

        monkeypatch.setattr(obj, name, recorded)
        return calls

    return record
