"""Makes a workload's folder: models, tokenizer, prompts of mixed lengths. Needs no model hub.

Models: smollm2-135m-instruct with its weights, or a random one of a shape: qwen2.5-0.5b, tiny. A
random model gets a tokenizer with one word for each id, so that text and tokens go back and forth.
The reward model is the policy's trunk under a random score head.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from workload import Workload

from fastppo.models.loading import load_model, load_tokenizer

Model = Literal["smollm2-135m-instruct", "qwen2.5-0.5b", "tiny"]
Mix = Literal["geometric", "even"]
"""geometric: as many lengths between 8 and 16 tokens as between 32 and 64; even: evenly spaced."""

SHAPES: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {  # https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
        "rope_theta": 1_000_000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def prepare(
    folder: Path, model: Model, sequences: int, prompt: tuple[int, int], response: tuple[int, int],
    mix: Mix, **options: Any,
) -> Workload:  # fmt: skip
    """Write models and workload.

    Args:
        folder: an empty one.
        model: see above.
        sequences: of one iteration.
        prompt: the shortest and longest prompt, in tokens.
        response: likewise, in an order that has nothing to do with the prompts'.
        mix: where the other lengths lie between these.
        options: fields of the workload.
    """
    tokenizer, policy = write_models(folder, model)
    head = policy.get_output_embeddings().weight
    trunk = policy.base_model.num_parameters(exclude_embeddings=True)
    rng = np.random.default_rng(0)
    spread = {"geometric": np.geomspace, "even": np.linspace}
    lengths = [
        rng.permutation(spread[mix](*ends, sequences).round().astype(int)).tolist()
        for ends in (prompt, response)
    ]
    work = Workload(
        prompts=[text_of_length(tokenizer, length, rng) for length in lengths[0]],
        prompt_lengths=lengths[0],
        response_lengths=lengths[1],
        trunk_parameters=trunk,
        head_parameters=head.numel(),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        **options,
    )
    work.save(folder)
    return work


def write_models(folder: Path, model: Model) -> tuple[Any, Any]:
    """Write policy, reward model and tokenizer; returns tokenizer and policy."""
    policy, tokenizer = (
        (load_model(model).float(), load_tokenizer(model)) if model not in SHAPES else random(model)
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    policy.config.pad_token_id = policy.generation_config.pad_token_id = 0
    reward = classifier(policy)
    for name, part in (("policy", policy), ("reward", reward), ("tokenizer", tokenizer)):
        part.save_pretrained(folder / name)
    return tokenizer, policy


def random(shape: str) -> tuple[Any, Any]:
    """A model of a shape with random weights, and a tokenizer whose words are w0, w1, …"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        **SHAPES[shape],
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    vocabulary = {f"w{i}": i for i in range(config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    return Qwen2ForCausalLM(config), tokenizer


def classifier(policy: Any) -> Any:
    """A sequence classifier with one label on a copy of the policy's trunk."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.base_model.load_state_dict(policy.base_model.state_dict())
    scale = config.hidden_size**-0.5  # scores about as large as a reward
    noise = torch.randn(model.score.weight.shape, generator=torch.Generator().manual_seed(0))
    model.score.weight.data.copy_(scale * noise)
    return model


def text_of_length(tokenizer: Any, length: int, rng: np.random.Generator) -> str:
    """Random words that the tokenizer makes `length` tokens of."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(w.lstrip("Ġ") for w in vocabulary if w[1:].isalnum() and w[0] in "Ġw")
    single = [w for w in words if len(w) > 1]
    chosen: list[str] = []
    while len(tokenizer(" ".join(chosen))["input_ids"]) < length:
        candidate = [*chosen, str(rng.choice(single))]
        if len(tokenizer(" ".join(candidate))["input_ids"]) == len(candidate):
            chosen = candidate
    return " ".join(chosen)
