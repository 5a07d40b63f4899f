"""Room on the disk: compared with what the disk under the tests has, and on a disk of a few MiB."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastppo.training.config import RunConfig
from fastppo.training.errors import StartError
from fastppo.training.room import check_room


def check(folder: Path, model: float, checkpoint: float, done: int = 0, **options: Any) -> str:
    """The note on a model and checkpoints of so many times what is free."""
    free = shutil.disk_usage(folder).free
    args = RunConfig(num_iterations=100, **options)
    return "".join(check_room(folder, args, int(model * free), int(checkpoint * free), done))


def test_no_room_for_the_model_and_one_checkpoint(tmp_path: Path) -> None:
    for sizes in ((0.1, 2), (2, 0.1), (0.6, 0.6)):
        with pytest.raises(StartError, match=r"^output_dir: .* a model of \d.* checkpoint of \d"):
            check(tmp_path, *sizes)


def test_room_for_one_checkpoint_is_noted(tmp_path: Path) -> None:
    assert check(tmp_path, 0.1, 0.2) == ""
    assert "3 checkpoints of" in check(tmp_path, 0.1, 0.4)
    assert check(tmp_path, 0.1, 0.4, keep_checkpoints=1) == ""
    assert "4 checkpoints of" in check(tmp_path, 0.1, 0.24, keep_best=1)


def test_what_is_replaced_and_what_never_comes_needs_no_room(tmp_path: Path) -> None:
    assert check(tmp_path, 0.1, 2, save_interval=0) == ""
    assert check(tmp_path, 0.1, 2, save_interval=101) == ""
    assert check(tmp_path, 0.1, 2, done=100) == ""
    assert check(tmp_path, 0.1, 0.4, done=80) == ""  # two more
    old = tmp_path / "checkpoints" / "iteration-000010"
    old.mkdir(parents=True)
    with (old / "policy.safetensors").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).free)  # takes no room
    assert check(tmp_path, 0.1, 0.6) == ""
    with pytest.raises(StartError):
        check(tmp_path, 0.1, 3)


@pytest.mark.slow
def test_a_disk_that_is_too_small(project: Path, private_mounts: tuple[str, ...]) -> None:
    def train(size: str) -> subprocess.CompletedProcess[str]:
        mount = f"mkdir -p run && mount -t tmpfs -o size={size} none run && exec "
        command = f"{sys.executable} -m fastppo train --config run.toml --output-dir run"
        shell = [*private_mounts, "sh", "-c", f"{mount}{command} --save-interval 1"]
        return subprocess.run(shell, cwd=project, capture_output=True, text=True)

    model = (project / "model" / "model.safetensors").stat().st_size
    done = train(str(3 * model))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done
    assert "output_dir: expected room for a model of" in done.stderr
    done = train(str(6 * model))
    assert "checkpoints of" in done.stdout and "will be needed" in done.stdout, done
