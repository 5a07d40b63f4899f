"""Runs of `fastppo train` as processes on a tiny model, hurt at a chosen place.

The undisturbed run is started as a person starts it. Those that are compared with it are forked
from a process that has imported everything (forked.py): other hashes, no ten seconds of imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import sys
from fastppo.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
# Sends this process a signal at the n-th call of a method, then lets the call go on.
DRIVER = """
import os, signal, sys
module, owner, method, count, signum = sys.argv[1:6]
owner = getattr(__import__(module, fromlist=[owner]), owner)
original, calls = getattr(owner, method), 0
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(count):
        os.kill(os.getpid(), int(signum))
    return original(*args, **kwargs)
setattr(owner, method, counted)
from fastppo.cli.main import main
sys.exit(main(sys.argv[6:]))
"""

TRAIN = ("train", "--config", "run.toml")
ENVIRONMENT = {"COLUMNS": "120", "OMP_NUM_THREADS": "1"}
Train = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """`fastppo train --config run.toml ARGUMENTS` in a project's folder; `at`: module, class,
    method, call, signal."""
    output = [str(tmp_path_factory.mktemp("output") / name) for name in ("stdout", "stderr")]

    def run(
        project: Path, *arguments: str, at: tuple[str, str, str, int, int] | None = None
    ) -> subprocess.CompletedProcess[str]:
        request = {"code": DRIVER if at else PROGRAM, "cwd": str(project), "output": output}
        request["arguments"] = [*map(str, at or ()), *TRAIN, *arguments]
        assert server.stdin is not None and server.stdout is not None
        print(json.dumps(request), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess([], status, *(Path(x).read_text() for x in output))

    with subprocess.Popen(
        [sys.executable, Path(__file__).with_name("forked.py")],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield run


@pytest.fixture(scope="session")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of six iterations at once."""
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("undisturbed") / "project"))
    subprocess.run(
        [sys.executable, "-m", "fastppo", *TRAIN, "--output-dir", "run"],
        cwd=project,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        check=True,
    )
    return project / "run"


TIMES = ("seconds", "tokens_per_second")


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith(TIMES)}


def differences(a: Path, b: Path) -> list[str]:
    """What differs between two finished runs, byte for byte; times and paths may."""
    found = []
    names = {str(p.relative_to(d / "model")) for d in (a, b) for p in (d / "model").rglob("*")}
    listed = [sorted(p.relative_to(d) for p in d.glob("[cd][hu]*/*")) for d in (a, b)]
    if listed[0] != listed[1]:
        found.append("the list of checkpoints and dumps")
    last = f"checkpoints/{max(path.name for path in (a / 'checkpoints').iterdir())}"
    files = [f"model/{name}" for name in sorted(names) if "." in name]
    for name in (
        *files,
        "samples.jsonl",
        f"{last}/policy.safetensors",
        f"{last}/optimizer.safetensors",
        f"{last}/iteration.safetensors",
    ):
        if not (b / name).is_file() or (a / name).read_bytes() != (b / name).read_bytes():
            found.append(name)
    rows = [
        [_without_times(json.loads(x)) for x in (d / "metrics.jsonl").read_text().splitlines()]
        for d in (a, b)
    ]
    if rows[0] != rows[1]:
        found.append("metrics.jsonl")
    states = [json.loads((d / last / "state.json").read_text()) for d in (a, b)]
    for state in states:
        del state["run"]["seconds"]
        for name in ("output_dir", "model", "dataset", "eval_dataset", "reward"):
            state["config"].pop(name, None)
    if states[0] != states[1]:
        found.append("state.json")
    summaries = [_without_times(json.loads((d / "summary.json").read_text())) for d in (a, b)]
    for key in ("eval_before", "eval_after", "reward_first", "reward_last", "rewards"):
        if summaries[0][key] != summaries[1][key]:
            found.append(f"summary.json: {key}")
    return found


@pytest.fixture(scope="session", name="differences")
def _differences() -> Callable[[Path, Path], list[str]]:
    return differences
