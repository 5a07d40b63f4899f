"""Six iterations at once = three, a signal anywhere, and the rest: byte for byte."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Train = Callable[..., CompletedProcess[str]]
Differences = Callable[[Path, Path], list[str]]

STEP = ("fastppo.ppo.step", "PPOStep")
ENGINE = ("fastppo.rollout.packed", "PackedEngine")
REWARDS = ("fastppo.rewards", "Rewards")
# 6 optimiser steps an iteration: call 22 of _train_minibatch is the 4th of the 4th iteration, in
# its second epoch, 23 the one after it. The evaluations before training and after iterations 2, 4
# and 6 also generate.
KILL = int(signal.SIGKILL)
TERM = int(signal.SIGTERM)
INT = int(signal.SIGINT)
PLACES = {
    "kill-in-an-epoch": ((*STEP, "_train_minibatch", 22, KILL), "iteration-000003"),
    "term-in-an-epoch": ((*STEP, "_train_minibatch", 23, TERM), "iteration-000003-0004"),
    "int-in-a-rollout": ((*ENGINE, "generate", 6, INT), "iteration-000003"),
    "term-in-the-rewards": ((*REWARDS, "__call__", 6, TERM), "iteration-000003-0000"),
    "term-in-the-evaluation": ((*STEP, "_evaluate_bin", 14, TERM), "iteration-000003-0000"),
    "term-in-a-held-out-evaluation": ((*ENGINE, "generate", 7, TERM), "iteration-000003-updated"),
    "term-before-anything": ((*ENGINE, "generate", 1, TERM), "iteration-000000"),
    "kill-in-the-first-iteration": ((*STEP, "_train_minibatch", 3, KILL), None),
}
QUICK = "term-in-an-epoch"


@pytest.mark.parametrize(
    "place", [p if p == QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PLACES]
)
def test_the_diamond(
    place: str, project: Path, undisturbed: Path, train: Train, differences: Differences
) -> None:
    at, saved = PLACES[place]
    hurt = train(project, "--output-dir", "run", at=at)
    signum = at[-1]
    assert hurt.returncode == (-KILL if signum == KILL else 128 + signum), hurt.stderr
    checkpoints = project / "run" / "checkpoints"
    names = [path.name for path in checkpoints.glob("iteration-*")]
    assert max(names, default=None) == saved
    if signum != KILL:
        assert f"saved {checkpoints / saved}" in hurt.stdout.replace("\n", "")
        assert hurt.stderr.splitlines() == [
            f"fastppo train: interrupted; the run is in {project / 'run'}"
        ]
    resumed = train(project, "--resume", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(undisturbed, project / "run") == []
    rows = [json.loads(x) for x in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_runs_without_a_signal_are_the_same(
    undisturbed: Path, project: Path, train: Train, differences: Differences
) -> None:
    """And another seed is not: the comparison sees what differs."""
    other = train(project, "--output-dir", "run", "--seed", "2")
    assert other.returncode == 0
    found = differences(undisturbed, project / "run")
    assert {"model/model.safetensors", "samples.jsonl", "metrics.jsonl", "state.json"} <= {*found}
