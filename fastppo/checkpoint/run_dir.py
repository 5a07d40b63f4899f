"""The run directory: created once, never overwritten, every file complete or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from fastppo.checkpoint.durable import (
    advice,
    delete,
    make_folder,
    refuse_foreign,
    sync,
    sync_tree,
    write_file,
)
from fastppo.checkpoint.format import CheckpointError

FILES = (
    "config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "report.html",
    "reward.png",
)
FOLDERS = ("checkpoints", "dumps", "model", "tensorboard", "wandb")


class Savable(Protocol):
    """A model that writes itself into a folder, in the form transformers loads."""

    def save(self, folder: Path, /) -> None: ...


def new_run_dir(output_dir: str, below: str = "runs", *, take: bool = True) -> Path:
    """The folder of a new run; empty: <below>/<date>-<time> in the current folder, with a number
    behind it where that is taken.

    Args:
        output_dir: the folder; made by the run that locks it.
        below: where a folder without a name lies.
        take: make one without a name, so that no other run gets it.

    Raises:
        ValueError: the folder exists and is not empty. Nothing in it is touched.
        OSError: it cannot be looked into or made.
    """
    if not output_dir:
        folder, name = Path(below).resolve(), f"{datetime.now():%Y%m%d-%H%M%S}"
        return _taken(folder, name) if take else folder / name
    path = Path(os.path.expanduser(output_dir))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        is_what = "not empty" if path.is_dir() else "a file"
        raise ValueError(
            f"output_dir: expected a folder that does not exist yet, got {str(path)!r}, which is "
            f"{is_what}. Choose another name, move that one away, or resume the run in it"
        )
    return path.resolve()


def _taken(folder: Path, name: str) -> Path:
    make_folder(folder)
    path, number = folder / name, 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = folder / f"{name}-{number}"


def check_entries(run_dir: Path) -> None:
    """Refuse a run directory in which a name that a run writes to belongs to something else.

    Raises:
        ForeignFileError: a link, a file with another name, a FIFO, a folder in place of a file.
    """
    for name in FILES:
        refuse_foreign(run_dir / name)
    for name in FOLDERS:
        refuse_foreign(run_dir / name, folder=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step: a reader, and the disk, have the old file or the new one."""
    partial = _partial(path)
    if os.path.lexists(partial):
        delete(partial)
    write_file(partial, (json.dumps(value, indent=2, default=str) + "\n").encode())
    os.replace(partial, path)
    sync(path.parent)


def save_model(folder: Path, policy: Savable, tokenizer: Any) -> Path:
    """Save policy, critic and tokenizer as a folder that `from_pretrained` loads.

    The folder appears under its name only when it is complete.

    Args:
        folder: must not exist.
        policy: what `save` writes: the model at the top, a critic in `critic/`.
        tokenizer: saved beside the model.

    Raises:
        CheckpointError: it could not be written, or, loaded again, is not what was trained; no
            part of it is left.
    """
    with _unfinished(folder, "the model could not be saved") as partial:
        policy.save(partial)
        tokenizer.save_pretrained(partial)
        sync_tree(partial)
        partial.rename(folder)
    sync(folder.parent)
    return folder


def rehearse_model(folder: Path, rehearse: Callable[[Path], None], tokenizer: Any) -> None:
    """Fail as `save_model` would, with all but the weights; nothing of it stays.

    Args:
        folder: of the model, later.
        rehearse: writes a model without its weights.
        tokenizer: what is saved beside it.

    Raises:
        CheckpointError: something of the model or the tokenizer cannot be written.
    """
    with _unfinished(folder, "the model could not be saved after training") as partial:
        rehearse(partial)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(partial)


@contextlib.contextmanager
def _unfinished(folder: Path, failed: str) -> Iterator[Path]:
    """A new folder to write to, of which nothing is left on an error."""
    make_folder(folder.parent)
    partial = _partial(folder)
    if os.path.lexists(partial):
        delete(partial)
    partial.mkdir()
    try:
        yield partial
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{failed} in {folder}: {error}. {advice(error)}") from error


def leftovers(run_dir: Path) -> list[Path]:
    """What a killed process left half written in a run directory."""
    return sorted(run_dir.glob(_partial(Path("*")).name))


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
