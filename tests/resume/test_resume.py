"""`fastppo train --resume`: which run and which checkpoint; what is refused, what untouched."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo import PPOConfig, PPOStep
from fastppo.checkpoint import verify
from fastppo.cli.main import main
from fastppo.models.tiny import WORDS, tiny_model
from fastppo.ppo import state
from fastppo.ppo.config import TrainConfig
from fastppo.training import resume
from fastppo.training.resume import may_differ

Train = Callable[..., "subprocess.CompletedProcess[str]"]
Differences = Callable[[Path, Path], list[str]]

Command = Callable[..., Any]

SHORT = ("--lr-schedule", "constant", "--reward-workers", "0", "--sample-interval", "0")


def train_in(project: Path, *arguments: str) -> int:
    """The status of `fastppo train --config run.toml ...` in a project's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        return main(["train", "--config", "run.toml", *SHORT, *arguments])


@pytest.fixture(name="command")
def train_command(command: Command) -> Command:
    """`fastppo train --config run.toml ...` in a project's folder, and what it says."""

    def run(project: Path, *arguments: str) -> Any:
        return command(project, "train", "--config", "run.toml", *SHORT, *arguments)

    return run


@pytest.fixture(scope="module")
def base(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run of six iterations and one of three that are the same."""
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("base") / "project"))
    for name, count in (("six", "6"), ("three", "3")):
        assert train_in(project, "--output-dir", name, "--num-iterations", count) == 0
    return project


@pytest.fixture
def three(base: Path) -> Path:
    """A copy of the run of three iterations, in the same project."""
    return Path(shutil.copytree(base / "three", base / f"three-{len(list(base.iterdir()))}"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def damage(checkpoint: Path, file: str = "policy.safetensors") -> None:
    """Change one bit of one byte."""
    data = bytearray((checkpoint / file).read_bytes())
    data[len(data) // 2] ^= 1
    (checkpoint / file).write_bytes(data)


# Which checkpoint


def test_a_damaged_one_is_passed_over_with_its_reason(
    undisturbed: Path, train: Train, differences: Differences
) -> None:
    run = Path(shutil.copytree(undisturbed, undisturbed.parent / "damaged"))
    damage(run / "checkpoints" / "iteration-000006")
    done = train(run.parent, "--resume", "damaged")
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace("\n", "")
    reason = "policy.safetensors is damaged, or of another one: its SHA-256 differs"
    assert f"passed over checkpoint iteration-000006: {reason}" in text
    assert f"resumed from {run / 'checkpoints' / 'iteration-000005'}" in text
    assert differences(undisturbed, run) == []


def test_without_a_valid_one_nothing_is_touched(three: Path, command: Command) -> None:
    damage(three / "checkpoints" / "iteration-000003", "state.json")
    damage(three / "checkpoints" / "iteration-000002", "manifest.json")
    before = contents(three)
    done = command(three.parent, "--resume", three.name, "--num-iterations", "6")
    assert done.status == 2 and contents(three) == before
    assert "iteration-000003: state.json is damaged" in done.err
    assert "iteration-000002: manifest.json is damaged" in done.err
    assert "Start a new run in another output_dir" in done.err and done.err.count("\n") == 1


def test_a_named_checkpoint_is_continued(
    three: Path, base: Path, command: Command, differences: Differences
) -> None:
    """What the run had beyond it goes: `--resume` would take it for the newest."""
    named = three / "checkpoints" / "iteration-000002"
    arguments = ("--num-iterations", "6", "--resume", str(named))
    done = command(base, *arguments)
    assert done.status == 0, done.err
    assert f"resumed from {named}" in done.out
    assert differences(base / "six", three) == []
    damaged = three / "checkpoints" / "iteration-000005"
    damage(damaged)
    done = command(base, "--num-iterations", "6", "--resume", str(damaged))
    assert done.status == 2 and "iteration-000005 is not a valid checkpoint" in done.err


# Which run


def test_more_iterations_of_a_constant_learning_rate(
    three: Path, base: Path, command: Command, differences: Differences
) -> None:
    before = (three / "model" / "model.safetensors").read_bytes()
    done = command(base, "--resume", three.name, "--num-iterations", "6")
    assert done.status == 0, done.err
    assert differences(base / "six", three) == []
    assert (three / "model" / "model.safetensors").read_bytes() != before


def test_more_iterations_of_a_falling_learning_rate_are_refused(
    project: Path, command: Command
) -> None:
    arguments = ("--lr-schedule", "linear")
    assert command(project, "--output-dir", "r", "--num-iterations", "1", *arguments).status == 0
    done = command(project, "--resume", "r", "--num-iterations", "2", *arguments)
    assert done.status == 2 and "num_iterations: 1 → 2" in done.err


def test_a_bare_resume_takes_the_latest_run(project: Path, command: Command) -> None:
    done = command(project, "--resume")
    assert done.status == 2 and "below runs/, found none" in done.err
    for name in ("b", "a"):
        arguments = ("--output-dir", f"runs/{name}", "--num-iterations", "1")
        assert command(project, *arguments).status == 0
    (project / "runs" / "c").mkdir()  # has nothing to continue
    done = command(project, "--resume", "--num-iterations", "2")
    assert done.status == 0, done.err
    assert f"resumed from {project / 'runs' / 'a' / 'checkpoints' / 'iteration-000001'}" in done.out
    rows = (project / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["iteration"] for row in rows] == [1, 2]


def test_one_command_starts_and_continues(project: Path, command: Command) -> None:
    arguments = ("--resume", "--output-dir", "run", "--num-iterations")
    started = command(project, *arguments, "1")
    assert started.status == 0 and "resumed" not in started.out
    continued = command(project, *arguments, "2")
    assert continued.status == 0, continued.err
    assert "resumed from" in continued.out and "iteration-000001" in continued.out


def test_a_run_that_never_saved_starts_again(
    project: Path, command: Command, differences: Differences
) -> None:
    """As kill -9 leaves it: some rows, one of them half written, and no checkpoint."""
    assert command(project, "--output-dir", "whole", "--num-iterations", "2").status == 0
    shutil.copytree(project / "whole", project / "run")
    for name in ("checkpoints", "model"):
        shutil.rmtree(project / "run" / name)
    with (project / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rew')
    done = command(project, "--resume", "run", "--num-iterations", "2")
    assert done.status == 0, done.err
    assert "no checkpoint had been saved: the run starts from the beginning" in done.out
    assert [d for d in differences(project / "whole", project / "run") if "summary" not in d] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--resume", "missing"), "a run directory or a checkpoint in one, got 'missing'"),
        (("--resume", "six/checkpoints/iteration-000001"), "which does not exist"),
        (("--resume", "six", "--output-dir", "three"), "output_dir: expected the run that is"),
        (("--resume", "model"), "resume: expected the folder of a run"),
        (("--resume", "--output-dir", "model"), "resume: expected the folder of a run"),
        (("--resume", "six", "three"), "--resume: expected one value, got six three"),
        (("--output-dir", "six"), "which is not empty"),
    ],
)
def test_folders_that_are_refused(
    arguments: tuple[str, ...], message: str, base: Path, command: Command
) -> None:
    before = contents(base)
    done = command(base, *arguments)
    assert (done.status, done.out) == (2, "") and message in done.err
    assert contents(base) == before


def test_the_same_folder_named_twice_is_fine(three: Path, base: Path, command: Command) -> None:
    arguments = ("--resume", str(three), "--output-dir", three.name, "--num-iterations", "3")
    assert command(base, *arguments).status == 0


HELD = """
import os, time

def larger(completions):
    until = time.monotonic() + 30
    while not os.path.exists("go") and time.monotonic() < until:
        time.sleep(0.01)
    return [1.0 for _ in completions]
"""


@pytest.mark.slow
def test_a_second_process_is_refused_while_the_first_one_trains(
    project: Path, command: Command
) -> None:
    (project / "rewards.py").write_text(HELD)
    arguments = ("train", "--config", "run.toml", *SHORT, "--num-iterations", "1")
    first = subprocess.Popen(
        [sys.executable, "-m", "fastppo", *arguments, "--output-dir", "run"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        lock, until = project / "run" / ".lock", time.monotonic() + 120
        while not (lock.is_file() and lock.stat().st_size):
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        second = command(project, "--resume", "run", "--num-iterations", "1")
        (project / "go").touch()
        output, _ = first.communicate(timeout=120)
    finally:
        first.kill()
    assert second.status == 2
    assert f"run' is in use by process {first.pid} on " in second.err
    assert first.returncode == 0, output
    assert command(project, "--resume", "run", "--num-iterations", "2").status == 0


# Whether it is the run's own


def other_model(base: Path) -> tuple[str, ...]:
    tiny_model(len(WORDS), seed=1).save_pretrained(base / "weights")
    shutil.copy(base / "model" / "tokenizer.json", base / "weights")
    shutil.copy(base / "model" / "tokenizer_config.json", base / "weights")
    return ("--model", "weights")


def other_shapes(base: Path) -> tuple[str, ...]:
    return ("--train-layers", "1")


def other_prompts(base: Path) -> tuple[str, ...]:
    lines = (base / "prompts.jsonl").read_text().splitlines(keepends=True)
    (base / "fewer.jsonl").write_text("".join(lines[:-1]))
    return ("--dataset", "fewer.jsonl")


def other_reward(base: Path) -> tuple[str, ...]:
    """The same file and name in the configuration, and another function."""
    text = (base / "rewards.py").read_text().replace("larger", "longer")
    (base / "elsewhere").mkdir(exist_ok=True)
    (base / "elsewhere" / "rewards.py").write_text(f"{text}\nlarger = longer\n")
    return ("--reward", "elsewhere/rewards.py:larger")


@pytest.mark.parametrize(
    ("foreign", "name", "reason"),
    [
        (other_model, "model", "the digest of the frozen and reference parameters is"),
        (other_prompts, "dataset", "there are 25 prompts there and 24 here"),
        (other_reward, "reward", "the reward functions are ['larger'] there and ['longer'] here"),
    ],
)
def test_what_changes_the_training_is_named_and_goes_on_where_it_is_allowed(
    foreign: Callable[[Path], tuple[str, ...]],
    name: str,
    reason: str,
    three: Path,
    base: Path,
    command: Command,
) -> None:
    before = contents(three)
    arguments = ("--resume", three.name, "--num-iterations", "4", *foreign(base))
    done = command(base, *arguments)
    assert (done.status, done.out) == (2, "")
    assert reason in done.err and f"(--allow-changes {name} goes on" in done.err
    assert contents(three) == before
    done = command(base, *arguments, "--allow-changes", name)
    assert done.status == 0, done.err
    assert "not as in the run that is resumed: " in done.out and reason in done.out


def test_another_precision_goes_on_where_it_is_allowed(
    three: Path, base: Path, command: Command
) -> None:
    arguments = ("--resume", three.name, "--num-iterations", "4", "--precision", "bf16")
    done = command(base, *arguments)
    assert done.status == 2 and "precision: 'fp32' → 'bf16'" in done.err
    done = command(base, *arguments, "--allow-changes", "precision")
    assert done.status == 0, done.err
    assert "the precision is fp32 there and bf16 here" in done.out


def test_another_choice_of_what_trains_is_refused(
    three: Path, base: Path, command: Command
) -> None:
    before, allowed = contents(three), ("--allow-changes", "train_layers")
    done = command(base, "--resume", three.name, *other_shapes(base), *allowed)
    assert done.status == 2 and "the frozen and reference parameters" in done.err
    done = command(base, "--resume", three.name, *other_shapes(base), *allowed, "model")
    assert done.status == 2 and "the trained parameters differ" in done.err
    assert contents(three) == before


def test_other_shapes_are_refused_and_change_nothing() -> None:
    config = PPOConfig(kl_coef=0.0, device="cpu", precision="fp32")
    ours, larger = (PPOStep(tiny_model(size, seed=0), config) for size in (13, 14))
    theirs = state.step_tensors(larger)
    before = {name: value.clone() for name, value in state.step_tensors(ours)["policy"].items()}
    counters = {"iteration": 7, "kl_coef": 0.0, "nonfinite_in_a_row": 0, "token_budget": 99}
    with pytest.raises(state.ForeignStateError, match=r"\(14, 64\).* expected \(13, 64\)"):
        state.load_step(ours, counters, theirs["policy"], theirs["optimizer"])
    fewer = {name: value for name, value in before.items() if "value_head" not in name}
    with pytest.raises(state.ForeignStateError, match="value_head.* is not in the checkpoint"):
        state.load_step(ours, counters, fewer, state.step_tensors(ours)["optimizer"])
    assert ours.iteration == 0
    for name, value in state.step_tensors(ours)["policy"].items():
        assert torch.equal(value, before[name])


def test_every_changed_option_is_listed(three: Path, base: Path, command: Command) -> None:
    before = contents(three)
    arguments = ("--resume", three.name, "--num-iterations", "4", "--learning-rate", "0.5")
    changes = ("--gamma", "0.9", "--kl-warning", "5")
    done = command(base, *arguments, *changes)
    assert done.status == 2 and contents(three) == before
    listed = done.err.split("to resume: ")[1].split(". Put")[0].split("; ")
    assert sorted(listed) == ["gamma: 1.0 → 0.9", "learning_rate: 0.001 → 0.5"]
    assert "--allow-changes" in done.err
    done = command(base, *arguments, *changes, "--allow-changes", "gamma")
    assert "learning_rate" in done.err and "gamma" not in done.err
    done = command(base, *arguments, *changes, "--allow-changes", "gamma", "learning-rate")
    assert done.status == 0, done.err
    assert json.loads((three / "config.json").read_text())["learning_rate"] == 0.5


@pytest.mark.parametrize("name", ["learning_rates", "learning-rates"])
def test_an_unknown_name_is_refused(name: str, three: Path, base: Path, command: Command) -> None:
    done = command(base, "--resume", three.name, "--allow-changes", name)
    assert done.status == 2 and "Did you mean 'learning_rate'?" in done.err
    done = command(base, "--output-dir", "new", "--allow-changes", "gamma")
    assert done.status == 2 and "would have no effect" in done.err
    assert not (base / "new").exists()


def test_what_is_safe_to_change_changes_no_number(
    three: Path, base: Path, command: Command, differences: Differences
) -> None:
    changed = {
        **{"sample-interval": "1", "save-interval": "3", "keep-checkpoints": "9", "keep-best": "1"},
        **{"max-nonfinite-steps": "9", "on-nonfinite": "rollback", "kl-warning": "9"},
        **{"entropy-warning": "0", "reward-workers": "1", "reward-timeout": "9"},
        **{
            "reward-memory-gb": "3",
            "reward-max-failure-rate": "0.5",
            "reward-hosts": "example.org",
        },
    }
    assert {name.replace("-", "_") for name in changed} | {
        *("output_dir", "eval_interval", "report_to", "eval_dataset"),  # above, or seen in metrics
        *("token_budget", "gradient_checkpointing", "device"),  # the same up to rounding
        *("model", "ref_model", "value_model", "dataset"),  # whose content is compared
    } == may_differ(TrainConfig(model="m", dataset="d", reward=("r",)))
    flags = [part for name, value in changed.items() for part in (f"--{name}", value)]
    done = command(base, "--resume", three.name, "--num-iterations", "6", *flags)
    assert done.status == 0, done.err
    found = differences(base / "six", three)
    assert set(found) == {"the list of checkpoints and dumps", "state.json"}


def test_a_new_token_budget_is_used(three: Path, base: Path, command: Command) -> None:
    done = command(base, "--resume", three.name, "--num-iterations", "4", "--token-budget", "32")
    assert done.status == 0, done.err
    rows = [json.loads(line) for line in (three / "metrics.jsonl").read_text().splitlines()]
    assert [row["token_budget"] for row in rows] == [16, 16, 16, 32]


def test_other_versions_are_only_noted(
    three: Path, base: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = resume.versions()
    monkeypatch.setattr(resume, "versions", lambda: {**current, "torch": "9.9"})
    done = command(base, "--resume", three.name, "--num-iterations", "4")
    assert done.status == 0, done.err
    assert f"bits may differ: torch {current['torch']} → 9.9" in done.out


# What is kept


def test_the_last_and_the_best_checkpoints_of_a_run_are_kept(
    project: Path, command: Command
) -> None:
    arguments = ("--num-iterations", "6", "--keep-checkpoints", "1", "--keep-best", "2")
    assert command(project, "--output-dir", "run", *arguments).status == 0
    rows = (project / "run" / "metrics.jsonl").read_text().splitlines()
    scores = {
        f"iteration-{row['iteration']:06d}": row.get("eval_reward", row["reward"])
        for row in map(json.loads, rows)
    }
    best = sorted(scores, key=lambda name: (scores[name], name))[-2:]
    kept = {path.name for path in (project / "run" / "checkpoints").iterdir()}
    assert kept == {*best, "iteration-000006"}


def limit_files(size: int) -> Callable[[], None]:
    """For a child: no file larger than so many bytes, as on a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["a-checkpoint", "the-model"])
def test_a_full_disk_ends_the_run_in_one_line(
    last: bool, three: Path, base: Path, command: Command, differences: Differences
) -> None:
    """While a checkpoint is saved, and while the model is at the end."""
    arguments = ["train", "--config", "run.toml", *SHORT, "--resume", three.name]
    arguments += ["--num-iterations", "3" if last else "6"]
    done = subprocess.run(
        [sys.executable, "-m", "fastppo", *arguments],
        cwd=base,
        preexec_fn=limit_files(100_000),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "could not be saved in" in line and "File too large" in line
    assert "Raise the limit on the size of files (ulimit -f)" in line
    if not last:
        assert "checkpoint 'iteration-000004'" in line and "iteration-000003 is intact" in line
    assert not [path for path in three.rglob(".*") if path.name != ".lock"]
    verify(three / "checkpoints" / "iteration-000003")
    resumed = command(base, "--resume", three.name, "--num-iterations", "6")
    assert resumed.status == 0, resumed.err
    assert differences(base / "six", three) == []


@pytest.mark.slow
def test_a_signal_while_a_save_is_under_way(
    project: Path, undisturbed: Path, train: Train, differences: Differences
) -> None:
    at = ("fastppo.checkpoint.store", "CheckpointStore", "_publish", 3, int(signal.SIGTERM))
    hurt = train(project, "--output-dir", "run", at=at)
    assert hurt.returncode == 128 + signal.SIGTERM, hurt.stderr
    names = sorted(path.name for path in (project / "run" / "checkpoints").iterdir())
    assert "iteration-000003" in names and all(not name.startswith(".") for name in names)
    for name in names:
        verify(project / "run" / "checkpoints" / name)
    assert train(project, "--resume", "run").returncode == 0
    assert differences(undisturbed, project / "run") == []


def test_tensorboard_has_every_iteration_once(project: Path, command: Command) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    arguments = ("--report-to", "tensorboard", "--save-interval", "2")
    assert command(project, "--output-dir", "r", "--num-iterations", "3", *arguments).status == 0
    time.sleep(1.1)  # event files are ordered by the second in their name
    done = command(project, "--resume", "r", "--num-iterations", "4", *arguments)
    assert done.status == 0 and "iteration-000002" in done.out
    events = accumulator.EventAccumulator(str(project / "r" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4]
    rows = [json.loads(x) for x in (project / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
