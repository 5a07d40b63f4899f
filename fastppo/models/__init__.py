"""Transformers models on packed sequences: loaded, set up, run, saved.

loading.py     where models come from                attention.py   packed attention
setup.py       what is done to one before it trains  kv_cache.py    keys and values while decoding
policy.py      actor, critic and reference           saving.py      in the form transformers loads
"""

from fastppo.models.loading import find_model, load_config, load_model, load_tokenizer

__all__ = ["find_model", "load_config", "load_model", "load_tokenizer"]
