"""Whether two data sets are the same, and where they differ: digests of what was given.

A digest is over text that is the same in every process. What has no such text (an address in a
`repr`, the order of a set) never makes a difference.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

_ENCODED = ("prompt", "chat_template_kwargs")  # read by the trainer itself
_BLOCKS = 64  # digests of a column at most: up to so many rows each is told apart
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]+")
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)


def stable_text(value: Any) -> str:
    """ASCII text of a value that is equal for equal values, in every process.

    A list, a tuple and an array of the same values are equal, and so are NaNs. An object counts by
    its type and attributes, and where it has none by its `repr` without addresses.
    """
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return ascii(str.__str__(value))  # of a subclass, numpy's among them, too
    if isinstance(value, float):
        return str(float(value))
    if isinstance(value, int):
        return hex(value)  # decimal digits have a limit
    if isinstance(value, bytes):
        return f"b{value.hex()}"
    if isinstance(value, Mapping):
        pairs = sorted(f"{stable_text(key)}:{stable_text(x)}" for key, x in value.items())
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, AbstractSet):
        return f"set({','.join(sorted(map(stable_text, value)))})"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(stable_text, value))}]"
    if isinstance(value, _NAMED):
        return ascii(getattr(value, "__qualname__", value.__name__))
    if callable(getattr(value, "tolist", None)):  # arrays and scalars of numpy and torch
        return stable_text(value.tolist())
    kind = type(value).__qualname__
    if attributes := getattr(value, "__dict__", None):
        return f"{kind}({stable_text(attributes)})"
    return f"{kind}({_ADDRESS.sub('', repr(value))!a})"


def digests(values: Sequence[Any]) -> list[str]:
    """Digests of equally long stretches of a column, at most `_BLOCKS`."""
    size = _stretch(len(values))
    return [_digest(values[i : i + size]) for i in range(0, len(values), size)]


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], read: Callable[[str], bool]
) -> tuple[str, str]:
    """What differs between two data sets.

    Args:
        theirs, ours: each a `PromptDataset.identity`.
        read: whether a reward function reads a column.

    Returns:
        What makes it another training, and what only should be known; empty where nothing does.
    """
    rows = ours["rows"]
    if theirs["rows"] != rows:
        return f"there are {theirs['rows']} prompts there and {rows} here", ""
    there, here = theirs["columns"], ours["columns"]
    for name in sorted({*there, *here}, key=lambda name: (name != "prompt", name)):
        if there.get(name) == here.get(name) or not (name in _ENCODED or read(name)):
            continue
        if name not in there or name not in here:
            return f"the column {name!r} is only {'there' if name in there else 'here'}", ""
        return f"{name!r} of {_first(there[name], here[name], rows)} differs", ""
    if theirs["tokenizer"] != ours["tokenizer"]:
        return "the tokenizer has another vocabulary or chat template", ""
    if theirs["tokens"] == ours["tokens"]:
        return "", ""
    first = _first(theirs["tokens"], ours["tokens"], rows)
    found = f"prompts are encoded to other tokens, the first in {first}"
    return ("", found) if ours["conversational"] else (found, "")


def _stretch(rows: int) -> int:
    return max(1, -(-rows // _BLOCKS))


def _first(theirs: Sequence[str], ours: Sequence[str], rows: int) -> str:
    """The first rows that differ, as precisely as it is known."""
    size = _stretch(rows)
    start = size * next(i for i, x in enumerate(ours) if x != theirs[i])
    return f"row {start}" if size == 1 else f"rows {start} to {min(start + size, rows) - 1}"


def _digest(values: Sequence[Any]) -> str:
    digest = hashlib.sha256()
    for value in values:
        try:
            text = stable_text(value)
        except RecursionError:  # nested too deeply, or in itself
            text = type(value).__qualname__
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:12]


def earlier_digest(ids: Sequence[np.ndarray], columns: Mapping[str, Sequence[Any]]) -> str:
    """What older checkpoints have in place of an identity; empty where it cannot be made."""
    digest = hashlib.sha256()
    for row in ids:
        digest.update(np.int32(row.size).tobytes() + row.tobytes())
    try:
        digest.update(json.dumps(columns, sort_keys=True, default=repr).encode())
    except (TypeError, ValueError, RecursionError):
        return ""
    return digest.hexdigest()
