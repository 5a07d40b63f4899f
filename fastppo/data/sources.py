"""Records from files and data sets: JSON lines, CSV, Parquet, Hugging Face dataset folders, lists.

Whatever the source, the result is a list of dicts that all have the same keys, among them `prompt`.
Every error names the file and the line or row (rows count from 0, lines from 1).
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_LONGEST_VALUE = 1 << 30  # characters of a CSV value; left alone, csv refuses documents of 131,073
_Row = tuple[str, Any]  # where it is, for errors ("x.jsonl, line 3"), and the record

_FORMS = (
    "a .jsonl, .json, .csv or .parquet file, a dataset folder written by save_to_disk "
    "('folder' or 'folder#split'), a list of dicts or a datasets.Dataset"
)


def load_records(source: Any) -> list[dict[str, Any]]:
    """Reads records with a `prompt` from a file, a folder or memory.

    A record that lacks a column which others have gets None there. CSV values stay strings, so a
    reward function that compares numbers has to convert them.

    Args:
        source: a path to JSON lines (or a JSON array), CSV or Parquet; the folder of a Hugging Face
            dataset, with "#split" for one that has splits; or a list of dicts or datasets.Dataset.

    Returns:
        New dicts, all with the same keys; at least one.

    Raises:
        ValueError: no such file, a form that is not known, broken contents, no records, no `prompt`
            column, an empty prompt.
        TypeError: a source, a record or a prompt of the wrong type.
        ImportError: Parquet or a dataset folder without the `datasets` extra installed.
    """
    if isinstance(source, (str, Path)):
        name, rows = str(source), _read_path(str(source))
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
        raise ValueError(
            f"{name} must have a 'prompt' column, got columns {', '.join(columns) or '(none)'}; "
            "rename the one that holds the prompts"
        )
    for where, record in rows:
        if "prompt" not in record:
            raise ValueError(f"{where} has no 'prompt', got columns {', '.join(record)}")
        _check_prompt(where, record["prompt"])
    return [{column: record.get(column) for column in columns} for _, record in rows]


def _check_prompt(where: str, prompt: Any) -> None:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError(f"{where}: prompt is an empty string; remove the record")
        _check_text(where, "prompt", prompt)
        return
    if not isinstance(prompt, list):
        raise TypeError(
            f"{where}: prompt must be a string or a list of chat messages "
            f"{{'role': ..., 'content': ...}}, got {type(prompt).__name__}: {str(prompt)[:80]!r}"
        )
    if not prompt:
        raise ValueError(f"{where}: prompt is an empty list of messages; remove the record")
    for index, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise TypeError(
                f"{where}: prompt[{index}] must be a message {{'role': str, 'content': str}}, "
                f"got {str(message)[:80]}"
            )
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise TypeError(
                f"{where}: the content of prompt[{index}] must be a string (only text is "
                f"supported), got {type(message.get('content')).__name__}"
            )
        _check_text(where, f"the content of prompt[{index}]", message.get("content") or "")


def _check_text(where: str, what: str, text: str) -> None:
    try:
        str(text).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {what} has half of a surrogate pair at character {error.start}, as of a cut "
            "emoji, which no tokenizer takes; mend the text or remove the record"
        ) from None


def _read_path(spec: str) -> list[_Row]:
    path = Path(spec).expanduser()
    split: str | None = None
    if "#" in spec and not path.exists():
        folder, _, split = spec.rpartition("#")
        path = Path(folder).expanduser()
    if not path.exists():
        raise ValueError(f"dataset {spec!r}: no file or folder {path.absolute()}; give {_FORMS}")
    if path.is_dir():
        return _read_dataset_folder(path, split)
    if split is not None:
        raise ValueError(f"dataset {spec!r}: '#{split}' selects a split of a folder, got a file")
    readers = {
        ".jsonl": _read_json,
        ".ndjson": _read_json,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    if path.suffix.lower() not in readers:
        raise ValueError(f"dataset {spec!r} has the ending {path.suffix!r}, expected {_FORMS}")
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}; convert it") from error


def _read_json(path: Path) -> list[_Row]:
    """JSON lines, or one JSON array of objects."""
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}, row {i}", record) for i, record in enumerate(json.loads(text))]
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno})"
            ) from error
    rows: list[_Row] = []
    # Only "\n" ends a line: splitlines() would cut at characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((f"{path}, line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "write one JSON object per line"
            ) from error
    return rows


def _read_csv(path: Path) -> list[_Row]:
    rows: list[_Row] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        before = csv.field_size_limit(_LONGEST_VALUE)  # of the whole process
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise ValueError(f"{path}: column names must differ, got {', '.join(header)}")
            for values in reader:
                where = f"{path}, line {reader.line_num}"
                if not values:
                    continue  # an empty line
                if len(values) != len(header):
                    raise ValueError(
                        f"{where}: expected {len(header)} values ({', '.join(header)}), got "
                        f"{len(values)}; put quotes around values that contain commas"
                    )
                rows.append((where, dict(zip(header, values, strict=True))))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not valid CSV ({error})") from error
        finally:
            csv.field_size_limit(before)
    return rows


def _read_parquet(path: Path) -> list[_Row]:
    parquet = _optional("pyarrow.parquet", str(path))
    try:
        records: list[Any] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's errors derive from these
        raise ValueError(f"{path} is not a readable Parquet file: {error}") from error
    return [(f"{path}, row {i}", record) for i, record in enumerate(records)]


def _read_dataset_folder(path: Path, split: str | None) -> list[_Row]:
    datasets = _optional("datasets", str(path))
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not a Hugging Face dataset folder ({error}); write it with "
            f"dataset.save_to_disk, or give {_FORMS}"
        ) from error
    if isinstance(dataset, Mapping):
        splits = list(dataset)
        if split is None and len(splits) == 1:
            split = splits[0]
        if split not in dataset:
            problem = "name one" if split is None else f"it has no {split!r}"
            raise ValueError(
                f"{path} has the splits {', '.join(splits)}; {problem}: '{path.name}#{splits[0]}'"
            )
        dataset = dataset[split]
    elif split is not None:
        raise ValueError(f"{path} has no splits, got '#{split}'; leave it out")
    return [(f"{path}, row {i}", record) for i, record in enumerate(dataset.to_list())]


def _read_memory(source: Any) -> list[_Row]:
    if isinstance(source, Mapping):
        # datasets.DatasetDict is one, and so is a table of columns.
        raise TypeError(
            f"dataset must be {_FORMS}, got a {type(source).__name__} with the keys "
            f"{', '.join(map(str, source))}; pass one of its splits, or one dict per record"
        )
    if callable(getattr(source, "to_list", None)):  # datasets.Dataset
        source = source.to_list()
    if not isinstance(source, Sequence) or isinstance(source, bytes):
        kind = "an iterable" if isinstance(source, Iterable) else "an object"
        raise TypeError(f"dataset must be {_FORMS}, got {kind} of type {type(source).__name__}")
    return [(f"row {i}", record) for i, record in enumerate(source)]


def _optional(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"reading {source} needs {module.partition('.')[0]}, which is not installed: "
            "pip install 'fastppo[datasets]'"
        ) from error
