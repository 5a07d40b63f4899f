"""Transformers models on packed sequences: loaded, set up, run, saved.

packed.py      PackedModel: trunk, head, log-probabilities, decoding
loading.py     where models come from                attention.py   packed attention
setup.py       what is done to one before it trains  kv_cache.py    keys and values while decoding
value_head.py  from hidden states to values          saving.py      in the form transformers loads
weights.py     whether what was loaded is whole
"""

from fastppo.models.loading import (
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    load_value_model,
)

__all__ = ["find_model", "load_config", "load_model", "load_tokenizer", "load_value_model"]
