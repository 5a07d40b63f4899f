"""Where a command runs: output that goes away, names of nobody, folders that cannot be used."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastppo.checkpoint import new_run_dir
from fastppo.models.loading import load_config, load_model
from fastppo.reporting.display import Display
from fastppo.reporting.terminal import stdout_console

Command = Callable[..., Any]
PROGRAM = str(Path(sys.executable).with_name("fastppo"))
TRAIN = ("train", "--config", "run.toml", "--output-dir", "run")
ROW = {"iteration": 1, "reward": 0.5, "kl": 0.1, "seconds_total": 1.0, "seconds_update": 0.5}


def test_two_runs_in_one_second_have_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = new_run_dir("", take=False)
    assert not (tmp_path / "runs").exists() and shown.parent == tmp_path / "runs"
    taken = [new_run_dir("") for _ in range(5)]
    assert len(set(taken)) == 5 and all(path.is_dir() for path in taken)


def test_a_refused_run_leaves_no_folder(project: Path, command: Command) -> None:
    (project / "model" / "model.safetensors").write_bytes(b"")
    done = command(project, "train", "--config", "run.toml")
    assert done.status == 2 and "model.safetensors is damaged" in done.err
    assert not any((project / "runs").iterdir())


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_nothing(project: Path) -> None:
    with subprocess.Popen(
        [PROGRAM, *TRAIN], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 0 and err.count("\n") == 1 and "stdout cannot be written" in err
    assert (project / "run" / "model").is_dir()
    assert len((project / "run" / "metrics.jsonl").read_text().splitlines()) == 6


@pytest.mark.slow
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-", ">&- 2>&-", "2>/dev/full"])
def test_nothing_to_write_on_ends_nothing(project: Path, redirection: str) -> None:
    line = f"exec {PROGRAM} {' '.join(TRAIN)} {redirection}"
    done = subprocess.run(["sh", "-c", line], cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (project / "run" / "model").is_dir() and "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", ["1", "7", "200"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_width_and_encoding(
    monkeypatch: pytest.MonkeyPatch, columns: str, encoding: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    written = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        with Display(2, title="名前 \x1b[31m") as display:
            display.update(ROW)
            display.samples(1, [{"prompt": "é\x1b[2J", "response": "\u2028名", "reward": 1.0}])
            display.message("\u202e名")
            display.finish({"seconds": 1.0, "run_dir": "/tmp/é\x1b"})
        stdout_console().print("名\ud800")
        sys.stdout.flush()
    text = written.getvalue().decode(encoding)
    assert "\x1b" not in text and "\u202e" not in text and text


@pytest.mark.parametrize("load", [load_config, load_model])
def test_a_hub_name_of_nobody_is_refused_at_once(load: Callable[[str], Any]) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"Did you mean 'smollm2-135m-instruct'\?"):
        load("smollm-135m")
    with pytest.raises(ValueError, match="'no/such' is no folder here, and the hub cannot be ask"):
        load("no/such")
    assert time.monotonic() - started < 5


def test_a_name_in_the_hubs_cache_needs_no_hub(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots").mkdir()
    (project / "model").rename(cached / "snapshots" / "abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load_config("some/model").model_type == "llama"


def test_a_cache_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="cannot be written: Not a directory. Set XDG_CACHE_HOME"):
        load_config("smollm2-135m-instruct")


@pytest.mark.slow
def test_a_current_folder_that_was_deleted(tmp_path: Path) -> None:
    line = f"mkdir gone && cd gone && rmdir ../gone && exec {PROGRAM} demo"
    done = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("fastppo demo: the current folder has been deleted: cd to another one\n")


@pytest.mark.slow
def test_nobodys_home_and_no_temporary_folder(project: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    odd = {"TMPDIR": "/nonexistent", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [PROGRAM, *TRAIN, "--num-iterations", "1", "--save-interval", "0"],
        cwd=project,
        env=environment | odd,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "run" / "summary.json").read_text())["iterations"] == 1
