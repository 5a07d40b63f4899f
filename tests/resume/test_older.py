"""A run that is continued from an older checkpoint takes another course and loses nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

Train = Callable[..., CompletedProcess[str]]
Differences = Callable[[Path, Path], list[str]]


def test_what_came_after_is_set_aside(
    undisturbed: Path, train: Train, differences: Differences, tmp_path: Path
) -> None:
    project = Path(shutil.copytree(undisturbed.parent, tmp_path / "project"))
    run = project / "run"
    metrics = (run / "metrics.jsonl").read_bytes()
    (older, newer) = sorted((run / "checkpoints").iterdir())
    weights = (newer / "policy.safetensors").read_bytes()

    resumed = train(project, "--resume", str(older), "--sample-interval", "0")
    assert resumed.returncode == 0, resumed.stderr
    aside = run / "abandoned-1"
    assert f"what came after it is kept in {aside}" in resumed.stdout.replace("\n", "")
    assert [path.name for path in (aside / "checkpoints").iterdir()] == [newer.name]
    kept = aside / "checkpoints" / newer.name / "policy.safetensors"
    assert kept.read_bytes() == weights
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    # the same course here, as nothing was changed that matters
    assert differences(undisturbed, run) == ["state.json"]  # sample_interval
