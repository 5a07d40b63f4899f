"""The model after training: an ordinary one, however the run ended, and saved by a word."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastppo import PackedBatch, PPOConfig, PPOStep, PPOTrainer
from fastppo.models.loading import load_model
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.training.errors import StopRunError
from fastppo.training.interrupts import Interrupted

IDS = torch.tensor([[3, 5, 2]])
TRAINER = os.getpid()


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def interrupted(completions: list[str]) -> list[float]:
    os.kill(TRAINER, signal.SIGTERM)
    return length(completions)


def make_trainer(model: Any, folder: Path, reward: Any = length, **options: Any) -> PPOTrainer:
    config: dict[str, Any] = {
        "num_iterations": 2,
        "prompts_per_iteration": 4,
        "num_minibatches": 2,
        "max_prompt_length": 8,
        "max_response_length": 3,
        "sample_interval": 0,
        "save_interval": 0,
        "train_layers": 1,
        "device": "cpu",
        "output_dir": str(folder),
    }
    prompts = [{"prompt": f"{a} {b} >"} for a in range(3) for b in range(3)]
    return PPOTrainer(
        model,
        reward,
        prompts,
        PPOConfig(**(config | options)),
        eval_dataset=prompts,
        processing_class=word_tokenizer(),
    )


def check_ordinary(model: Any, attention: str) -> Tensor:
    assert model.config._attn_implementation == attention and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    out: Tensor = model.generate(IDS, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape == (1, 7)
    return out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_model_generates_after_training(precision: str, attention: str, tmp_path: Path) -> None:
    model = tiny_model(len(WORDS), seed=0).eval()
    model.set_attn_implementation(attention)
    trainer = make_trainer(model, tmp_path / "run", precision=precision)
    summary = trainer.train()
    assert trainer.model is model
    generated = check_ordinary(model, attention)
    assert trainer.evaluate() == summary["eval_after"]  # it is packed again where that is needed
    trainer.save_model(str(tmp_path / "mine"))
    for folder in (tmp_path / "mine", summary["model"]):
        saved = load_model(str(folder))
        assert torch.equal(check_ordinary(saved, "sdpa"), generated)
    check_ordinary(model, attention)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_generates_after_an_interruption(precision: str, tmp_path: Path) -> None:
    model = tiny_model(len(WORDS), seed=0).eval()
    trainer = make_trainer(model, tmp_path / "run", interrupted, precision=precision)
    with pytest.raises(Interrupted):
        trainer.train()
    check_ordinary(model, "sdpa")


def test_a_saved_model_that_is_not_the_trained_one_stops_the_run(tmp_path: Path) -> None:
    model = tiny_model(len(WORDS), seed=0).eval()
    model.model.layers[1].register_forward_hook(lambda module, inputs, out: out + 0.1)
    trainer = make_trainer(model, tmp_path / "run")
    with pytest.raises(StopRunError, match=f"{tmp_path}/run/model: loaded again, "):
        trainer.train()
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["iteration-000002"]
    assert not list((tmp_path / "run").glob("*model*"))
    check_ordinary(model, "sdpa")


def test_a_restored_policy_says_how_to_use_it() -> None:
    step = PPOStep(tiny_model(len(WORDS), seed=0), PPOConfig(precision="fp32", device="cpu"))
    batch = PackedBatch.pack([[3, 5, 2]], [[4, 1]])
    before = step.evaluate(batch).old_logprobs
    step.policy.restore()
    with pytest.raises(ValueError, match=r"restore.* Call this inside `with policy.lent\(\)`"):
        step.evaluate(batch)
    with step.policy.lent():
        again = step.evaluate(batch).old_logprobs
    assert before is not None and again is not None and torch.equal(again, before)
