"""The reference is the model that the run started from, whatever its adapter did to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastppo import PackedBatch, PPOConfig, PPOStep, PPOTrainer
from fastppo.models.tiny import WORDS, word_tokenizer
from fastppo.training.errors import StartError

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(0, len(WORDS), 5) for _ in range(4)]
RESPONSES = [RNG.integers(0, len(WORDS), 7) for _ in range(4)]
UPDATE = PPOConfig(
    num_minibatches=1, update_epochs=2, lr_schedule="constant", learning_rate=1e-2, precision="fp32"
)


def make_base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        attention_bias=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def lora(**options: Any) -> Any:
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return get_peft_model(make_base(), LoraConfig(**config))


def with_norms() -> Any:
    model = lora()
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "layernorm" in name)
    return model


def trained_before() -> Any:
    """As supervised fine-tuning leaves an adapter."""
    model, rng = lora(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=rng))
    return model


COPIED: dict[str, Callable[[], Any]] = {
    "bias=all": lambda: lora(bias="all"),
    "bias=lora_only": lambda: lora(bias="lora_only"),
    "norms": with_norms,
    "modules_to_save": lambda: lora(modules_to_save=["norm"]),
    "token rows": lambda: lora(trainable_token_indices=[3, 4]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "random": lambda: lora(init_lora_weights=False),
    "ia3": lambda: get_peft_model(
        make_base(), IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[])
    ),
    "trained before": trained_before,
}
SWITCHED_OFF: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "dora": lambda: lora(use_dora=True),
    "rslora": lambda: lora(use_rslora=True),
    "embeddings": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
}


def own_logprobs(model: Any) -> Tensor:
    """(28,) float64 by transformers itself, before anything is packed."""
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        ids = torch.tensor(np.concatenate([prompt, response]))[None]
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
        found.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("kind", [*COPIED, *SWITCHED_OFF])
def test_the_reference_stays_the_model_at_the_start(kind: str) -> None:
    model = (COPIED | SWITCHED_OFF)[kind]()
    start = own_logprobs(model)
    step = PPOStep(model, UPDATE)
    reference = step.policy.reference
    assert reference is not None and step.policy.reference_is_start
    assert (reference.model is model) == (kind in SWITCHED_OFF)
    for moved in (False, True, True):
        batch = step.evaluate(PackedBatch.pack(PROMPTS, RESPONSES))
        assert batch.ref_logprobs is not None and batch.old_logprobs is not None
        assert (batch.ref_logprobs.double() - start).abs().max() < 1e-4
        assert ((batch.old_logprobs.double() - start).abs().max() > 1e-3) == moved
        step.update(step.advantages(batch, [1.0, 0.0, 0.5, 2.0]))


@pytest.mark.parametrize("kind", ["bias=all", "norms"])
def test_an_adapter_that_cannot_be_switched_off_is_no_reference(kind: str) -> None:
    config = PPOConfig(reference="adapter")
    with pytest.raises(ValueError, match="^reference: 'adapter' .* outside the adapter train too"):
        PPOStep(COPIED[kind](), config)


def make_trainer(model: Any, folder: Path, **options: Any) -> PPOTrainer:
    config = {
        "num_iterations": 2,
        "prompts_per_iteration": 4,
        "num_minibatches": 2,
        "max_prompt_length": 8,
        "max_response_length": 3,
        "sample_interval": 0,
        "save_interval": 1,
        "precision": "fp32",
        "device": "cpu",
        "output_dir": str(folder),
    }
    resume = options.pop("resume", False)
    return PPOTrainer(
        model,
        length,
        [{"prompt": f"{a} {b} >"} for a in range(3) for b in range(3)],
        PPOConfig(**(config | options)),
        processing_class=word_tokenizer(),
        resume_from_checkpoint=resume,
    )


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("make", "reference", "text"),
    [
        (lora, "auto", "the model as it starts, which is the base without the adapter"),
        (trained_before, "auto", "a frozen copy of the model as it starts"),
        (trained_before, "adapter", "which need not be the model as it starts"),
        (make_base, "auto", "a frozen copy of the model as it starts"),
    ],
)
def test_a_run_says_what_its_reference_is(
    make: Any, reference: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(make(), tmp_path / "run", reference=reference, num_iterations=1).train()
    shown = capsys.readouterr().out.replace("\n", " ")
    assert "reference: " in shown and text in shown


def test_an_adapter_trained_before_resumes_bit_for_bit(tmp_path: Path) -> None:
    make_trainer(trained_before(), tmp_path / "whole").train()
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    first = tmp_path / "again" / "checkpoints" / "iteration-000001"
    make_trainer(trained_before(), tmp_path / "again", resume=first).train()
    files = [tmp_path / run / "model" / "model.safetensors" for run in ("whole", "again")]
    whole, again = (load_file(file) for file in files)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_a_run_whose_reference_is_not_its_start_stops(tmp_path: Path) -> None:
    model = make_base()

    def noise(module: Any, _: Any, out: Tensor) -> Tensor:  # NEFTune's hook, left by a trainer
        return out + 0.5 * torch.randn_like(out) if module.training else out

    model.get_input_embeddings().register_forward_hook(noise)
    trainer = make_trainer(model, tmp_path / "run")
    with pytest.raises(StartError, match=r"^reference: before the first update a frozen copy .*"):
        trainer.train()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_policy_that_is_not_finite_stops_before_anything_is_sampled(tmp_path: Path) -> None:
    model = make_base()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    trainer = make_trainer(model, tmp_path / "run")
    with pytest.raises(
        StartError, match=r"the policy has .* not finite .* in model.lm_head.weight"
    ):
        trainer.train()
    assert trainer.current.rollouts is None
