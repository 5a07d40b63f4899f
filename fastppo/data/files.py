"""Records from files: JSON lines, CSV, Parquet, folders of Hugging Face data sets.

Every error names the file and the line or row (rows count from 0, lines from 1).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, Any]
"""Where it is, for errors ("x.jsonl, line 3"), and the record."""

FORMS = (
    "a .jsonl, .json, .csv (each also .gz) or .parquet file, a dataset folder written by "
    "save_to_disk ('folder' or 'folder#split'), a list of dicts, a table or a datasets.Dataset"
)
_LONGEST_VALUE = 1 << 30  # characters of a CSV value; left alone, csv refuses documents of 131,073
_MARKS = {  # the longer ones first: that of UTF-32 begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_path(spec: str) -> list[Row]:
    """The records of a file or folder; "#split" chooses a split of a folder.

    Raises:
        ValueError: no such file, a form that is not known, broken contents.
        ImportError: Parquet or a dataset folder without the `datasets` extra installed.
    """
    path = Path(spec).expanduser()
    split: str | None = None
    if "#" in spec and not path.exists():
        folder, _, split = spec.rpartition("#")
        path = Path(folder).expanduser()
    if not path.exists():
        raise ValueError(f"dataset {spec!r}: no file or folder {path.absolute()}; give {FORMS}")
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
    ending = Path(path.stem if path.suffix.lower() == ".gz" else path).suffix.lower()
    if ending not in readers:
        raise ValueError(f"dataset {spec!r} has the ending {path.suffix!r}, expected {FORMS}")
    return readers[ending](path)


def _text(path: Path) -> str:
    """The text of a file, decompressed, in the encoding of its byte-order mark or UTF-8."""
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a readable gzip file: {error}") from error
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8-sig")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}; convert it") from error


def _read_json(path: Path) -> list[Row]:
    """JSON lines, or one JSON array of objects."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    if text.lstrip().startswith("["):
        records = _parsed(text, str(path))
        return [(f"{path}, row {i}", record) for i, record in enumerate(records)]
    rows: list[Row] = []
    # Only "\n" ends a line: splitlines() would cut at characters that JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append((where, _parsed(line, where, "; write one JSON object per line")))
    return rows


def _parsed(text: str, where: str, hint: str = "") -> Any:
    """The value of a JSON text, in which no key of an object may be lost to a second one."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = "" if hint else f", line {error.lineno}"
        raise ValueError(
            f"{where}{line}: not valid JSON ({error.msg} at column {error.colno}){hint}"
        ) from error
    except RecursionError:
        raise ValueError(f"{where}: values are nested too deeply; flatten them") from None
    except ValueError as error:  # a key that is there twice, an integer of too many digits
        raise ValueError(f"{where}: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice; rename or remove one")
    return found


def _read_csv(path: Path) -> list[Row]:
    rows: list[Row] = []
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
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


def _read_parquet(path: Path) -> list[Row]:
    parquet = _optional("pyarrow.parquet", str(path))
    try:
        records: list[Any] = parquet.read_table(path).to_pylist()
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's derive from these
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable Parquet file: {reason}") from error
    return [(f"{path}, row {i}", record) for i, record in enumerate(records)]


def _read_dataset_folder(path: Path, split: str | None) -> list[Row]:
    datasets = _optional("datasets", str(path))
    try:
        dataset = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        known = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".gz")
        files = sorted(str(x.relative_to(path)) for x in path.rglob("*") if x.suffix in known)
        hint = f"name one of its files, such as {files[0]}" if files else f"give {FORMS}"
        raise ValueError(
            f"{path} is not a Hugging Face dataset folder ({error}); write it with "
            f"dataset.save_to_disk, or {hint}"
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


def _optional(module: str, source: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"reading {source} needs {module.partition('.')[0]}, which is not installed: "
            "pip install 'fastppo[datasets]'"
        ) from error
