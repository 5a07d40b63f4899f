"""What nobody foresaw, and text that would act on the terminal: one line each, and nothing raw."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastppo.ppo.step import PPOStep

Command = Callable[..., Any]
EVIL = "\x1b[31m\u202e[red]a\u2028b\x85\x07"
TRAIN = ("train", "--config", "run.toml", "--eval-interval", "0", "--output-dir", "run")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(*_: object) -> None:
        raise TypeError(f"{EVIL}\nand a second line")

    monkeypatch.setattr(PPOStep, "update", update)


@pytest.mark.usefixtures("broken")
def test_an_error_nobody_foresaw_is_one_line(project: Path, command: Command) -> None:
    done = command(project, *TRAIN)
    assert done.status == 1 and done.err.count("\n") == 1 and done.err.isprintable() is False
    assert done.err.rstrip("\n").isprintable()
    assert done.err.startswith("fastppo train: unexpected error, TypeError: \\x1b[31m\\u202e[red]a")
    path = Path(done.err.split("the traceback is in ")[1].strip())
    assert path.parent == project / "run"
    assert "Traceback (most recent call last)" in path.read_text() and EVIL[:5] in path.read_text()


@pytest.mark.usefixtures("broken")
def test_the_traceback_is_shown_to_who_asks(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTPPO_TRACEBACK", "1")
    with pytest.raises(TypeError, match="and a second line"):
        command(project, *TRAIN)


def test_without_a_run_the_traceback_is_a_temporary_file(
    project: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastppo.cli.doctor.op_checks", lambda device: 1 / 0)
    done = command(project, "doctor", "--model", "model")
    assert done.status == 1 and done.err.count("\n") == 1
    assert "unexpected error, ZeroDivisionError: division by zero; the traceback is" in done.err
    path = Path(done.err.split("the traceback is in ")[1].strip())
    assert "op_checks" in path.read_text()
    path.unlink()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate = 'abc'", "abc"),
        ("model = '--help'", "model: expected text, a number"),
        ("seed = 1979-05-27", "seed: expected text, a number"),
        ("[table]\na = 1", "unknown key 'table'"),
        ("num_iterations = " + "1" * 5000, "not valid TOML"),
        ("reward = " + "[" * 5000, "not valid TOML"),
        (f"title = '{EVIL[5:9]}'", "unknown key 'title'"),
    ],
)
def test_a_bad_configuration_is_one_line_that_names_it(
    project: Path, command: Command, line: str, said: str
) -> None:
    name = line.partition(" ")[0]
    kept = (project / "run.toml").read_text().splitlines()
    kept = [old for old in kept if not old.startswith(f"{name} =")]
    (project / "run.toml").write_text("\n".join([*kept, line]))
    done = command(project, "train", "--config", "run.toml", "--dry-run")
    assert done.status == 2 and done.err.count("\n") == 1 and done.err.rstrip("\n").isprintable()
    assert "run.toml" in done.err and said in done.err


def test_text_never_reaches_the_terminal_raw(project: Path, command: Command) -> None:
    (project / "model").rename(project / EVIL)
    (project / "run.toml").write_text((project / "run.toml").read_text().replace("8", "20", 1))
    (project / "prompts.jsonl").write_text('{"prompt": "1 \\u001b[31m[red] >", "answer": "1"}\n')
    arguments = ("train", "--config", "run.toml", "--dry-run", "--model", EVIL)
    done = command(project, *arguments, "--eval-dataset", "prompts.jsonl")
    assert done.status == 0, done.err
    assert (done.out + done.err).isprintable()
    assert "\\x1b[31m\\u202e[red]a\\u2028b\\x85\\x07 (llama)" in done.out
    missing = command(project, "train", "--config", "run.toml", "--model", f"./{EVIL}/x")
    assert missing.status == 2 and missing.err.rstrip("\n").isprintable()
    assert "\\x1b[31m" in missing.err


def test_an_error_of_the_system_names_the_path(project: Path, command: Command) -> None:
    (project / "file").write_text("")
    for folder, said in (
        ("file/run", "file: Not a directory. A file is in the place"),
        ("x" * 300, "File name too long. Choose a shorter name"),
    ):
        done = command(project, *TRAIN[:-1], folder)
        assert done.status == 2 and done.err.count("\n") == 1 and "[Errno" not in done.err
        assert said in done.err and folder.partition("/")[0] in done.err
    assert (project / "file").read_text() == ""
    done = command(project, *TRAIN[:-1], "file")
    assert done.status == 2 and "'file', which is a file" in done.err
    assert not os.path.lexists(project / "runs")
