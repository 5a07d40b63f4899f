"""Roads of input: what is read is what was given, or it is refused by name. Every file is real."""

from __future__ import annotations

import datetime
import decimal
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from fastppo.data.prompts import PromptDataset
from fastppo.data.sources import load_records
from fastppo.models.tiny import word_tokenizer

pandas: Any = pytest.importorskip("pandas")
ROWS = [{"prompt": "1 2 >", "answer": 2}, {"prompt": "3 >", "answer": 3}]
CHAT = [
    {"prompt": [{"role": "user", "content": "1 2"}]},
    {"prompt": [{"role": "user", "content": "3"}]},
]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start from there."""
    monkeypatch.chdir(tmp_path)


def brief(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return rows | {"prompt": [f"0 {prompt}" for prompt in rows["prompt"]]}


def test_a_transform_is_what_is_trained_on() -> None:
    data = datasets.Dataset.from_list(ROWS).with_transform(brief)
    assert load_records(data) == [data[0], data[1]]
    assert [row["prompt"] for row in load_records(data)] == ["0 1 2 >", "0 3 >"]
    plain = datasets.Dataset.from_list(ROWS)
    plain.set_transform(brief)
    assert load_records(plain)[1]["prompt"] == "0 3 >"


@pytest.mark.parametrize("form", ["numpy", "torch", "pandas", "arrow"])
def test_a_format_changes_no_value(form: str) -> None:
    assert load_records(datasets.Dataset.from_list(ROWS).with_format(form)) == ROWS
    assert load_records(datasets.Dataset.from_list(CHAT).with_format(form)) == CHAT


@pytest.mark.parametrize("rows", [ROWS, CHAT], ids=["plain", "chat"])
def test_tables_are_read_by_rows(rows: list[dict[str, Any]]) -> None:
    frame = pandas.DataFrame(rows)
    assert load_records(frame) == rows
    assert load_records(pyarrow.Table.from_pylist(rows)) == rows
    assert load_records(np.array(rows, dtype=object)) == rows
    frame.to_parquet("x.parquet")
    back = pandas.read_parquet("x.parquet")  # lists come back as arrays
    assert load_records(back) == load_records("x.parquet") == rows


def test_what_may_have_no_end_is_refused_with_what_to_do() -> None:
    def endless() -> Iterator[dict[str, Any]]:
        while True:
            yield ROWS[0]

    stream = datasets.IterableDataset.from_generator(endless)
    for source, kind in ((stream, "IterableDataset"), (endless(), "generator")):
        with pytest.raises(TypeError, match=f"iterable of type {kind}, .*no end; give a list of"):
            load_records(source)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be-mark"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.jsonl.gz", "x.csv.gz"])
def test_a_byte_order_mark_says_the_encoding(name: str, encoding: str) -> None:
    text = '{"prompt": "é"}\r\n\r\n{"prompt": "b"}' if "jsonl" in name else "prompt\r\né\r\nb\r\n"
    if encoding == "utf-16-be-mark":
        data = b"\xfe\xff" + text.encode("utf-16-be")
    else:
        data = text.encode(encoding)
    Path(name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert load_records(name) == [{"prompt": "é"}, {"prompt": "b"}]


def test_content_in_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "1 "}, {"type": "text", "text": "2", "image": None}]
    for content in (parts, tuple(parts), np.array(parts, dtype=object)):
        (record,) = load_records([{"prompt": [{"role": "user", "content": content}]}])
        assert record["prompt"] == CHAT[0]["prompt"]
    for part, kind in (({"type": "image", "url": "x"}, "image"), ({"type": "text"}, "text")):
        with pytest.raises(TypeError, match=rf"row 0: .*prompt\[0\] .*a part of type '{kind}'"):
            load_records([{"prompt": [{"role": "user", "content": [*parts, part]}]}])


def test_columns_of_other_trainers_say_what_to_do() -> None:
    messages = [*CHAT[0]["prompt"], {"role": "assistant", "content": "2"}]
    with pytest.raises(ValueError, match=r"got columns messages; .*before the answer.*\[:-1\]"):
        load_records([{"messages": messages}])
    with pytest.raises(ValueError, match=r"give the text, .*: tokenizer.decode\(input_ids\)"):
        load_records([{"input_ids": [1, 2]}])
    for ids in ([1, 2], np.array([1, 2])):
        with pytest.raises(TypeError, match="row 0: prompt is token ids; give the text"):
            load_records([{"prompt": ids}])


def test_images_are_carried_as_they_are_stored() -> None:
    pillow: Any = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    pillow.new("RGB", (4, 4)).save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    rows = [{"prompt": "1 >", "image": stored}]
    data = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    assert load_records(data) == rows
    data.save_to_disk("folder")
    data.to_parquet("x.parquet")
    assert load_records("folder") == load_records("x.parquet") == rows


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "x.jsonl",
            b'\n{"prompt": "a", "prompt": "b"}',
            r"line 2: the key 'prompt' is there twice",
        ),
        ("x.json", b'[{"prompt": "a", "m": {"k": 1, "k": 2}}]', r"x.json: the key 'k' is there tw"),
        ("x.jsonl", b'{"prompt": "a", "x": ' + b"[" * 200_000, r"line 1: .* nested too deeply"),
        ("x.json", b"[" * 200_000, r"x.json: .* nested too deeply"),
        ("x.jsonl", b'{"prompt": "a", "x": ' + b"1" * 5000 + b"}", r"line 1: .*limit .* digits"),
        ("x.jsonl.gz", b"no", r"x.jsonl.gz is not a readable gzip file"),
        (
            "x.jsonl.gz",
            gzip.compress(b'{"prompt": "a"}', mtime=0)[:-9],
            r"not a readable gzip file",
        ),
        ("x.jsonl", '{"prompt": "a"}'.encode("utf-16")[:-1], r"must be UTF-8 text"),
        ("x.gz", gzip.compress(b"", mtime=0), r"has the ending '.gz', expected a .jsonl"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(name: str, data: bytes, message: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as info:
        load_records(name)
    assert name in str(info.value) and "\n" not in str(info.value)


def test_a_parquet_column_that_is_there_twice_is_refused() -> None:
    table = pyarrow.table([["a"], [1], [2]], names=["prompt", "x", "x"])
    pyarrow.parquet.write_table(table, "x.parquet")
    with pytest.raises(
        ValueError, match=r"not a readable .*: Multiple matches for .*x.* in prompt: string$"
    ):
        load_records("x.parquet")


def test_a_folder_of_files_names_one() -> None:
    Path("folder/data").mkdir(parents=True)
    Path("folder/data/train.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(ValueError, match=r"or name one of its files, such as data/train.jsonl"):
        load_records("folder")


def test_odd_values_reach_the_columns_and_have_one_digest() -> None:
    """Decimals, times, NaN, a NUL, long integers: what a reward gets is what was written."""
    rows = [
        {
            "prompt": "1 >",
            "price": decimal.Decimal("1.10"),
            "when": datetime.datetime(2026, 1, 2, 3, 4, 5, 678),
            "day": datetime.date(2026, 1, 2),
            "raw": b"\x00\xff",
            "nul": "a\x00b",
        }
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "x.parquet")
    assert load_records("x.parquet") == rows
    one, two = (PromptDataset(source, word_tokenizer()) for source in ("x.parquet", rows))
    assert one.identity == two.identity
    Path("x.jsonl").write_text(
        '{"prompt": "1 >", "x": NaN, "y": 12345678901234567890123, "z": "\\u0000"}'
    )
    (record,) = load_records("x.jsonl")
    assert (
        np.isnan(record["x"]) and record["y"] == 12345678901234567890123 and record["z"] == "\x00"
    )
    assert json.dumps(PromptDataset("x.jsonl", word_tokenizer()).identity)
