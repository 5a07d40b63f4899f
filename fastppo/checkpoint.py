"""The run directory: created once, never overwritten, every file complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from fastppo.policy import Policy


def new_run_dir(output_dir: str) -> Path:
    """The folder of a new run; empty: runs/<date>-<time> below the current folder.

    Raises:
        ValueError: the folder exists and is not empty. Nothing in it is touched.
    """
    path = Path(output_dir or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"output_dir: expected a folder that does not exist yet, got {str(path)!r}, which is "
            "not empty. Choose another name, or move that one away"
        )
    return path.resolve()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in one step: a reader sees the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def save_model(folder: Path, policy: Policy, tokenizer: Any) -> Path:
    """Save policy, critic and tokenizer as a folder that `from_pretrained` loads.

    The folder appears under its name only when it is complete.

    Args:
        folder: must not exist.
        policy: saved by `Policy.save`: the model at the top, the critic in `critic/`.
        tokenizer: saved beside the model.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        policy.save(partial)
        tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder
