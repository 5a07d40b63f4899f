"""Reading, tokenising and ordering prompts. Every file is a real one."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fastppo.data.prompts import PromptDataset
from fastppo.data.sources import load_records
from fastppo.data.text import decode
from fastppo.training.seeding import batch_indices

EXAMPLES = Path(__file__).parents[2] / "examples"
ROWS = [{"prompt": "w1 w2", "answer": 1}, {"prompt": "w3", "answer": 2}]
CHAT_ROWS = [
    {
        "prompt": [{"role": "system", "content": "w0"}, {"role": "user", "content": "w1 w2"}],
        "answer": 3,
    },
    {"prompt": [{"role": "user", "content": "w4"}], "answer": 4},
]
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
SPECIAL = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>", "<bos>"]
ID = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(30))])}


def make_tokenizer(
    template: str | None = CHAT, *, bos: bool = False, eos: bool = False, pad: str = "<pad>"
) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel(ID, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    if bos or eos:
        single = ("<bos> " if bos else "") + "$A" + (" <end>" if eos else "")
        core.post_processor = TemplateProcessing(
            single=single, special_tokens=[("<bos>", ID["<bos>"]), ("<end>", ID["<end>"])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=pad, eos_token="<end>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    return tokenizer


def encoded(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start from there."""
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


# Reading


@pytest.mark.parametrize("rows", [ROWS, CHAT_ROWS], ids=["plain", "chat"])
@pytest.mark.parametrize(
    "form", ["jsonl", "json-array", "parquet", "folder", "folder#split", "list", "dataset"]
)
def test_every_source_gives_the_same_records(tmp_path: Path, form: str, rows: list[Any]) -> None:
    source: Any
    if form == "jsonl":
        write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        source = "x.jsonl"
    elif form == "json-array":
        write(tmp_path / "x.json", json.dumps(rows, indent=1))
        source = "x.json"
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
        source = "x.parquet"
    elif form == "folder":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "x")
        source = "x"
    elif form == "folder#split":
        one = datasets.Dataset.from_list(rows)
        other = datasets.Dataset.from_list(rows[:1])
        datasets.DatasetDict(train=one, test=other).save_to_disk(tmp_path / "x")
        source = "x#train"
    elif form == "list":
        source = rows
    else:
        source = datasets.Dataset.from_list(rows)
    assert load_records(source) == rows


def test_csv_values_are_strings(tmp_path: Path) -> None:
    file = write(tmp_path / "x.csv", '\ufeffprompt,answer\r\n"a, ""b""\nc",007\r\n\r\nd,\r\n')
    assert load_records(file) == [
        {"prompt": 'a, "b"\nc', "answer": "007"},
        {"prompt": "d", "answer": ""},
    ]


def test_a_csv_value_may_be_a_document(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    file = write(tmp_path / "x.csv", f"prompt,text\na,{'x' * 200_000}\n")
    assert load_records(file) == [{"prompt": "a", "text": "x" * 200_000}]
    assert csv.field_size_limit() == before


def test_json_lines_with_mark_blank_lines_and_odd_separators(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.jsonl", '\ufeff{"prompt": "a\u2028b"}\r\n\n  \n{"prompt": "c", "x": 1}'
    )
    assert load_records(file) == [{"prompt": "a\u2028b", "x": None}, {"prompt": "c", "x": 1}]


def test_records_are_new_dicts() -> None:
    records = load_records(ROWS)
    records[0]["answer"] = 99
    assert ROWS[0]["answer"] == 1


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", '{"prompt": "a"}\n\n{"prompt": }\n', r"x.jsonl, line 3: not valid JSON"),
        (
            "x.jsonl",
            '{"prompt": "a"}\n{"prompt": "b \\ud83d c"}\n',
            r"x.jsonl, line 2: prompt has half of a surrogate pair at character 2",
        ),
        (
            "x.json",
            '[{"prompt": [{"role": "user", "content": "\\ud83d"}]}]',
            r"x.json, row 0: the content of prompt\[0\] has half of a surrogate pair",
        ),
        ("x.json", '[{"prompt": "a"},\n{]', r"x.json, line 2: not valid JSON"),
        ("x.jsonl", '{"prompt": "a"}\n"b"\n', r"x.jsonl, line 2 must be a record .* got str"),
        ("x.jsonl", '{"text": "a", "y": 1}\n', r"must have a 'prompt' column, got columns text, y"),
        (
            "x.jsonl",
            '{"prompt": "a"}\n{"promt": 1}\n',
            r"line 2 has no 'prompt', got columns promt",
        ),
        ("x.jsonl", "\n", r"x.jsonl must hold at least one record"),
        ("x.csv", "", r"x.csv must hold at least one record"),
        ("x.csv", "prompt,b\n", r"x.csv must hold at least one record"),
        (
            "x.csv",
            "prompt,b\na,1\na,1,2\n",
            r"x.csv, line 3: expected 2 values \(prompt, b\), got 3",
        ),
        ("x.csv", "prompt,prompt\na,b\n", r"column names must differ"),
        ("x.csv", 'prompt\n"a\n', r"x.csv, line 2: not valid CSV"),
        ("x.csv", "text\na\n", r"must have a 'prompt' column, got columns text"),
        ("x.parquet", "no", r"x.parquet is not a readable Parquet file"),
        ("x.txt", "a", r"has the ending '.txt', expected a .jsonl"),
        ("x.jsonl", '{"prompt": ""}', r"x.jsonl, line 1: prompt is an empty string"),
        ("x.jsonl", '\n{"prompt": 5}', r"x.jsonl, line 2: prompt must be .* got int: '5'"),
        ("x.jsonl", '{"prompt": null}', r"x.jsonl, line 1: prompt must be .* got NoneType"),
        ("x.jsonl", '{"prompt": []}', r"line 1: prompt is an empty list"),
        ("x.jsonl", '{"prompt": ["a"]}', r"line 1: prompt\[0\] must be a message"),
        (
            "x.jsonl",
            '{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}',
            r"line 1: the content of prompt\[0\] must be .*, got a part of type 'image'",
        ),
        ("x.jsonl", '{"prompt": [{"content": "a"}]}', r"line 1: prompt\[0\] must be a message"),
    ],
)
def test_broken_file_is_refused_by_name_and_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    write(tmp_path / name, text)
    with pytest.raises((ValueError, TypeError), match=message) as info:
        load_records(name)
    assert name in str(info.value)


def test_other_bad_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere.jsonl"):
        load_records("nowhere.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.jsonl must be UTF-8"):
        load_records("latin.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="not a Hugging Face dataset folder"):
        load_records("folder")
    write(tmp_path / "x.jsonl", '{"prompt": "a"}')
    with pytest.raises(ValueError, match=r"'#train' selects a split of a folder"):
        load_records("x.jsonl#train")
    with pytest.raises(ValueError, match="at least one record"):
        load_records([])
    with pytest.raises(TypeError, match="got a dict with the keys prompt"):
        load_records({"prompt": ["a"]})
    with pytest.raises(TypeError, match="an iterable of type generator"):
        load_records(row for row in ROWS)
    with pytest.raises(TypeError, match="column names must be strings, got 3"):
        load_records([{"prompt": "a", 3: 4}])
    with pytest.raises(ValueError, match=r"row 1: prompt is an empty string"):
        load_records([{"prompt": "a"}, {"prompt": ""}])


def test_dataset_splits(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    both = datasets.DatasetDict(train=one, test=one)
    both.save_to_disk(tmp_path / "both")
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(only=one).save_to_disk(tmp_path / "only")
    assert load_records("only") == ROWS
    with pytest.raises(ValueError, match=r"splits train, test; name one: 'both#train'"):
        load_records("both")
    with pytest.raises(ValueError, match=r"splits train, test; it has no 'eval'"):
        load_records("both#eval")
    with pytest.raises(ValueError, match=r"has no splits, got '#train'"):
        load_records("one#train")
    with pytest.raises(TypeError, match=r"DatasetDict with the keys train, test; pass one"):
        load_records(both)


@pytest.mark.parametrize(("name", "module"), [("x.parquet", "pyarrow"), ("x", "datasets")])
def test_missing_optional_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str
) -> None:
    if name == "x":
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / name)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    for loaded in [key for key in sys.modules if key.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, loaded, None)  # import then raises ImportError
    with pytest.raises(ImportError, match=rf"needs {module}.*pip install 'fastppo\[datasets\]'"):
        load_records(name)


# Tokenising


def test_plain_prompts_are_encoded_with_the_tokenizers_defaults() -> None:
    for bos in (False, True):
        data = PromptDataset(ROWS, make_tokenizer(None, bos=bos))
        first = ["<bos>"] if bos else []
        assert [row.tolist() for row in data.ids] == [
            encoded(" ".join([*first, "w1 w2"])),
            encoded(" ".join([*first, "w3"])),
        ]
        assert all(row.dtype == np.int32 for row in data.ids)
        assert data.prompts == ["w1 w2", "w3"]
        assert data.columns == {"answer": [1, 2]}
        assert not data.conversational
        assert (len(data), data.num_filtered) == (2, 0)


@pytest.mark.parametrize("pad", ["<pad>", "<end>"], ids=["pad", "pad-is-eos"])
def test_chat_prompts_go_through_the_template_once(pad: str) -> None:
    # bos=True: the template writes the special tokens, the tokenizer must not add them again.
    data = PromptDataset(CHAT_ROWS, make_tokenizer(bos=True, pad=pad))
    assert [row.tolist() for row in data.ids] == [
        encoded("<system> w0 <end> <user> w1 w2 <end> <assistant>"),
        encoded("<user> w4 <end> <assistant>"),
    ]
    assert data.conversational
    assert data.prompts == [row["prompt"] for row in CHAT_ROWS]
    assert data.columns == {"answer": [3, 4]}


def test_ids_equal_the_tokenizers_own_apply_chat_template() -> None:
    tokenizer = make_tokenizer()
    data = PromptDataset(CHAT_ROWS, tokenizer)
    for ids, prompt in zip(data.ids, data.prompts, strict=True):
        own = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
        assert ids.tolist() == own["input_ids"]


def test_last_assistant_message_is_continued() -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]},
        CHAT_ROWS[1],
    ]
    data = PromptDataset(rows, make_tokenizer())
    assert data.ids[0].tolist() == encoded("<user> w1 <end> <assistant> w2 w3")
    assert data.ids[1].tolist() == encoded("<user> w4 <end> <assistant>")


def test_select_keeps_order_and_repeats() -> None:
    batch = PromptDataset(ROWS, make_tokenizer(None)).select(np.array([1, 0, 1]))
    assert [row.tolist() for row in batch.ids] == [encoded("w3"), encoded("w1 w2"), encoded("w3")]
    assert batch.prompts == ["w3", "w1 w2", "w3"]
    assert batch.columns == {"answer": [2, 1, 2]}


def test_overlong_prompts_are_refused_or_counted_never_cut() -> None:
    tokenizer = make_tokenizer(None)
    rows = [{"prompt": " ".join(["w1"] * n), "n": n} for n in (2, 5, 3, 4, 6)]
    with pytest.raises(ValueError, match=r"3 of 5 .* row 1 with 5 .*: 6\).* overlong_prompts = "):
        PromptDataset(rows, tokenizer, max_prompt_length=3)
    data = PromptDataset(rows, tokenizer, max_prompt_length=3, overlong_prompts="filter")
    assert data.num_filtered == 3
    assert data.columns == {"n": [2, 3]}
    assert [len(row) for row in data.ids] == [2, 3]
    assert data.prompts == [rows[0]["prompt"], rows[2]["prompt"]]
    assert len(PromptDataset(rows, tokenizer, max_prompt_length=6)) == 5
    with pytest.raises(ValueError, match=r"leaves none of the 5 prompts \(shortest: 2\)"):
        PromptDataset(rows, tokenizer, max_prompt_length=1, overlong_prompts="filter")


def test_what_cannot_be_a_prompt_dataset_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match=r"row 0 is plain, row 2 is chat"):
        PromptDataset([*ROWS, *CHAT_ROWS], tokenizer)
    with pytest.raises(ValueError, match=r"has no chat template; use the instruction"):
        PromptDataset(CHAT_ROWS, make_tokenizer(None))
    for name in ("prompts", "completions", "completion_ids"):
        with pytest.raises(ValueError, match=rf"column '{name}' has a name .* rename"):
            PromptDataset([{"prompt": "w1", name: 1}], tokenizer)
    with pytest.raises(ValueError, match=r"prompt of row 1 has no tokens \('  '\)"):
        PromptDataset([{"prompt": "w1"}, {"prompt": "  "}], tokenizer)


def test_tokenizer_that_ends_prompts_with_eos_is_refused() -> None:
    tokenizer = make_tokenizer(None, eos=True)
    with pytest.raises(ValueError, match=r"ends prompts with its end-of-text token '<end>'"):
        PromptDataset(ROWS, tokenizer)
    written = [{"prompt": "w1 <end>"}]  # the user's own wish
    assert PromptDataset(written, make_tokenizer(None)).ids[0].tolist() == encoded("w1 <end>")


def test_template_that_refuses_a_prompt_names_the_row() -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(ValueError, match=r"refuses the prompt of row 1: no system"):
        PromptDataset(CHAT_ROWS[::-1], make_tokenizer(strict + CHAT))


def test_decode_leaves_special_tokens_out_and_keeps_spaces() -> None:
    tokenizer = make_tokenizer()
    ids = np.array(encoded("w1 w2 <end>"), dtype=np.int32)
    assert decode(tokenizer, ids) == "w1 w2"
    assert decode(tokenizer, []) == ""
    assert decode(make_tokenizer(pad="<end>"), ids) == "w1 w2"


def test_example_data_loads() -> None:
    train = load_records(EXAMPLES / "arithmetic_train.jsonl")
    held_out = load_records(EXAMPLES / "arithmetic_eval.jsonl")
    assert (len(train), len(held_out)) == (65, 16)
    texts = [record["prompt"][-1]["content"] for record in [*train, *held_out]]
    assert len(set(texts)) == 81  # disjoint
    for record in [*train, *held_out]:
        words = record["prompt"][-1]["content"].replace("?", "").split()  # What is A + B ...
        assert record["answer"] == int(words[2]) + int(words[4])


# Order


@given(
    num_prompts=st.integers(1, 40),
    batch_size=st.integers(1, 100),
    seed=st.integers(0, 2**40),
    epochs=st.integers(1, 4),
)
def test_every_epoch_covers_every_prompt_once(
    num_prompts: int, batch_size: int, seed: int, epochs: int
) -> None:
    iterations = -(-num_prompts * epochs // batch_size)
    stream = np.concatenate(
        [batch_indices(num_prompts, batch_size, seed, i) for i in range(iterations)]
    )
    assert stream.dtype == np.int64
    assert stream.size == iterations * batch_size
    for epoch in range(epochs):
        part = stream[epoch * num_prompts : (epoch + 1) * num_prompts]
        assert sorted(part.tolist()) == list(range(num_prompts))


def test_order_is_a_function_of_seed_and_position_only() -> None:
    # The stream does not depend on how it is cut, so neither batch size nor history changes it.
    stream = np.concatenate([batch_indices(10, 1, 7, i) for i in range(60)])
    for size in (3, 4, 10, 15, 60):
        for iteration in reversed(range(60 // size)):
            part = batch_indices(10, size, 7, iteration)
            assert part.tolist() == stream[iteration * size : (iteration + 1) * size].tolist()
    epochs = stream.reshape(6, 10)
    assert len({tuple(row) for row in epochs.tolist()}) == 6  # a fresh permutation each epoch
    assert batch_indices(10, 10, 8, 0).tolist() != epochs[0].tolist()  # another seed
