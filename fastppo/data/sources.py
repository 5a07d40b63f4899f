"""Records from wherever they are: files (files.py), tables and lists.

Whatever the source, the result is a list of dicts that all have the same keys, among them `prompt`.
Every error names the file and the line or row (rows count from 0, lines from 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastppo.data.files import FORMS, Row, read_path

_TABLES = {  # of datasets, pyarrow, polars, numpy and pandas
    "to_list": (),
    "to_pylist": (),
    "to_dicts": (),
    "tolist": (),
    "to_dict": ("records",),
}
_HINTS = {
    "messages": "a prompt is the messages before the answer that is to be learned: messages[:-1]",
    "conversations": "a prompt is a list of messages {'role': ..., 'content': ...}",
    "input_ids": "give the text, which is encoded here: tokenizer.decode(input_ids)",
}


def load_records(source: Any) -> list[dict[str, Any]]:
    """Reads records with a `prompt` from a file, a folder or memory.

    A record that lacks a column which others have gets None there. CSV values stay strings, so a
    reward function that compares numbers has to convert them.

    Args:
        source: a path to JSON lines (or a JSON array), CSV or Parquet; the folder of a Hugging Face
            dataset, with "#split" for one that has splits; or a list of dicts, a datasets.Dataset
            (with its transform, if it has one), or a table of pandas, pyarrow or polars.

    Returns:
        New dicts, all with the same keys; at least one.

    Raises:
        ValueError: no such file, a form that is not known, broken contents, no records, no `prompt`
            column, an empty prompt.
        TypeError: a source, a record or a prompt of the wrong type.
        ImportError: Parquet or a dataset folder without the `datasets` extra installed.
    """
    if isinstance(source, (str, Path)):
        name, rows = str(source), read_path(str(source))
    else:
        name, rows = f"the dataset ({type(source).__name__})", _read_memory(source)
    if not rows:
        raise ValueError(f"{name} must hold at least one record, got an empty dataset")
    columns: dict[str, None] = {}  # keeps the order in which columns appear
    for where, record in rows:
        if not isinstance(record, Mapping):
            raise TypeError(
                f"{where} must be a record with named columns, got {type(record).__name__}"
            )
        for key in record:
            if not isinstance(key, str):
                raise TypeError(f"{where}: column names must be strings, got {key!r}")
        columns.update(dict.fromkeys(record))
    if "prompt" not in columns:
        hint = next((_HINTS[name] for name in columns if name in _HINTS), "")
        raise ValueError(
            f"{name} must have a 'prompt' column, got columns {', '.join(columns) or '(none)'}; "
            f"{hint or 'rename the one that holds the prompts'}"
        )
    found = []
    for where, record in rows:
        if "prompt" not in record:
            raise ValueError(f"{where} has no 'prompt', got columns {', '.join(record)}")
        prompt = _checked_prompt(where, record["prompt"])
        found.append({name: record.get(name) for name in columns} | {"prompt": prompt})
    return found


def _listed(value: Any) -> Any:
    """A list in place of an array, as pandas has them, or a tuple."""
    value = value.tolist() if callable(getattr(value, "tolist", None)) else value
    return list(value) if isinstance(value, tuple) else value


def _checked_prompt(where: str, prompt: Any) -> str | list[Any]:
    """A prompt whose messages have text as content."""
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where}: prompt is an empty string; remove the record")
        check_text(where, "prompt", prompt)
        return prompt
    prompt = _listed(prompt)
    if not isinstance(prompt, list):
        raise TypeError(
            f"{where}: prompt must be a string or a list of chat messages "
            f"{{'role': ..., 'content': ...}}, got {type(prompt).__name__}: {str(prompt)[:80]!r}"
        )
    if not prompt:
        raise ValueError(f"{where}: prompt is an empty list of messages; remove the record")
    if all(isinstance(part, int) for part in prompt):
        raise TypeError(f"{where}: prompt is token ids; {_HINTS['input_ids']}")
    messages = []
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"{where}: prompt[{index}] must be a message {{'role': str, 'content': str}}, "
                f"got {str(message)[:80]}"
            )
        content = _listed(message.get("content"))
        if isinstance(content, list):
            content = _joined(where, index, content)
            message = {**message, "content": content}
        if not isinstance(content, str) and not message.get("tool_calls"):
            raise TypeError(
                f"{where}: the content of prompt[{index}] must be a string (only text is "
                f"supported), got {type(content).__name__}"
            )
        check_text(where, f"the content of prompt[{index}]", content or "")
        messages.append(message)
    return messages


def _joined(where: str, index: int, parts: list[Any]) -> str:
    """The text of a content that is given as parts {"type": "text", "text": ...}."""
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise TypeError(
                f"{where}: the content of prompt[{index}] must be a string or parts of text (only "
                f"text is supported), got a part of type {kind!r}"
            )
    return "".join(part["text"] for part in parts)


def check_text(where: str, what: str, text: str) -> None:
    """Refuse text that no tokenizer takes."""
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {what} has half of a surrogate pair at character {error.start}, as of a cut "
            "emoji, which no tokenizer takes; mend the text or remove the record"
        ) from None


def _read_memory(source: Any) -> list[Row]:
    if isinstance(source, Mapping):
        # datasets.DatasetDict is one, and so is a table of columns.
        raise TypeError(
            f"dataset must be {FORMS}, got a {type(source).__name__} with the keys "
            f"{', '.join(map(str, source))}; pass one of its splits, or one dict per record"
        )
    kind = type(source).__name__
    if isinstance(source, Iterable) and not hasattr(source, "__len__"):
        raise TypeError(
            f"dataset must be {FORMS}, got an iterable of type {kind}, which may have no end; give "
            "a list of what it is to yield, such as list(itertools.islice(dataset, 1000))"
        )
    form = getattr(source, "format", None)
    if isinstance(form, Mapping) and form.get("type") == "custom":  # Dataset.with_transform
        source = [source[i] for i in range(len(source))]
    methods = (name for name in _TABLES if callable(getattr(source, name, None)))
    if method := next(methods, ""):
        source = getattr(source, method)(*_TABLES[method])
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        raise TypeError(f"dataset must be {FORMS}, got an object of type {kind}")
    return [(f"row {i}", record) for i, record in enumerate(source)]
