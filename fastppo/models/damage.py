"""What is wrong with a model's folder, in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastppo.options import shown


def reason(error: Exception) -> str:
    """An error of a library, on one line and not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def damaged(folder: Path) -> str:
    """Why the first file of a folder that cannot be read at all cannot; "" where each can."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*")):
        try:
            if file.suffix == ".json":
                json.loads(file.read_bytes())
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
        except Exception as error:
            return f"{file.name} is damaged: {reason(error)}"
    return ""


def check_config(name: str, config: Any) -> None:
    """Refuse a transformers configuration whose sizes are no sizes.

    Raises:
        ValueError: the field.
    """
    for field in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
        value = getattr(config, field, None)
        if value is not None and not (type(value) is int and 0 < value < 2**40):
            raise ValueError(
                f"model: {name!r}: config.json: {field}: expected an integer ≥ 1, got "
                f"{shown(value)}"
            )
    kinds = config.architectures
    if kinds is not None and not (
        isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)
    ):
        raise ValueError(
            f"model: {name!r}: config.json: architectures: expected names, got {shown(kinds)}"
        )
