"""A model and a tokenizer small enough to be made on the spot: for the demo, doctor and tests."""

from __future__ import annotations

from typing import Any

import torch

WORDS = ["<pad>", "<eos>", ">", *map(str, range(10))]


def tiny_model(vocab_size: int, seed: int) -> Any:
    """A Llama of two layers with 64 units, randomly initialised; ids 0 and 1 are pad and eos."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def word_tokenizer() -> Any:
    """A tokenizer with one token per word of `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
