"""A reward worker that crashes, then a signal: the continued run is still the undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Train = Callable[..., CompletedProcess[str]]
Differences = Callable[[Path, Path], list[str]]

pytestmark = pytest.mark.slow

# Two of the 25 prompts crash the worker in whichever iteration draws them, and in each evaluation.
# Where a file "now" lies, the crash in a batch of eight asks the trainer to end first, once.
REWARD = """
import os, signal

TRAINER = os.getpid()  # which runs this file; a worker calls the function

def larger(prompts, completions, answer):
    for prompt in prompts:
        if prompt in ("2 3 >", "4 0 >"):
            if os.path.exists("now") and len(prompts) == 8:
                os.remove("now")
                os.kill(TRAINER, signal.SIGTERM)
            os._exit(3)
    return [float(text.split() == [a]) + 0.1 * len(text) for text, a in zip(completions, answer)]
"""
TERM = int(signal.SIGTERM)
IN_AN_EPOCH = ("fastppo.ppo.step", "PPOStep", "_train_minibatch", 23, TERM)
IN_AN_EVALUATION = ("fastppo.rewards", "Rewards", "__call__", 7, TERM)  # that after iteration 4


@pytest.fixture(scope="module")
def whole(template: Path, tmp_path_factory: pytest.TempPathFactory, train: Train) -> Path:
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("whole") / "project"))
    (project / "rewards.py").write_text(REWARD)
    done = train(project, "--output-dir", "run")
    assert done.returncode == 0, done.stderr
    return project / "run"


def lost(run: Path) -> dict[int, int]:
    """Iteration → lost samples."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    failed = [sample for sample in samples if "failure" in sample]
    assert all("exit code 3" in sample["failure"] for sample in failed)
    return {i: sum(s["iteration"] == i for s in failed) for i in range(1, 7)}


@pytest.mark.parametrize(
    "at",
    [IN_AN_EPOCH, IN_AN_EVALUATION, None],
    ids=["signal-in-an-epoch", "signal-in-an-evaluation", "signal-with-the-crash"],
)
def test_crash_signal_and_resumption(
    at: tuple[str, str, str, int, int] | None,
    whole: Path,
    project: Path,
    train: Train,
    differences: Differences,
) -> None:
    counts = lost(whole)
    assert sum(counts.values()) >= 3 and any(counts[i] for i in (1, 2, 3))
    (project / "rewards.py").write_text(REWARD)
    if at is None:
        (project / "now").touch()
    hurt = train(project, "--output-dir", "run", at=at)
    assert hurt.returncode == 128 + TERM, hurt.stderr
    assert not (project / "now").exists()
    resumed = train(project, "--resume", "run")
    assert resumed.returncode == 0, resumed.stderr
    assert differences(whole, project / "run") == []
    assert lost(project / "run") == counts
