"""Kill −9 processes that save checkpoints, and look at what they left; for test_checkpoint_kill.py.

    python tests/checkpoint/killer.py every FOLDER           at each operation on the disk
    python tests/checkpoint/killer.py random FOLDER COUNT    at random moments

The processes are forked from this one, which has no other threads, so that each takes milliseconds
and not the seconds of importing torch. Prints one JSON object; `complaints` should be empty.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastppo.checkpoint import CheckpointError, CheckpointStore, store, verify, write_json

OPERATIONS = (
    *((os, name) for name in ("mkdir", "open", "write", "fsync", "chmod", "rename", "replace")),
    *((os, name) for name in ("unlink", "rmdir")),
    (builtins, "open"),
    (store.fmt, "save_file"),
)


# What is saved: a step, with tensors and state that tell which one it is


def save(made: CheckpointStore, name: str, step: int, *, size: int = 100, **options: Any) -> None:
    groups = ("policy", "optimizer")
    tensors = {group: {"x": torch.full((size,), float(step))} for group in groups}
    made.save(name, tensors, {"step": step}, **options)


def newest_step(made: CheckpointStore) -> int:
    """The step in the newest checkpoint, 0 for none; an AssertionError where its parts differ."""
    found, _ = made.newest()
    if found is None:
        return 0
    step: int = found.state["step"]
    for group in ("policy", "optimizer"):
        assert set(found.tensors(group)["x"].tolist()) == {step}, f"{found.path}: mixed"
    return step


def contents(run_dir: Path) -> dict[str, str]:
    """Every file and folder name with, for a valid checkpoint, its manifest; the rest is named."""
    found = {}
    for path in sorted(run_dir.iterdir()):
        if path.name != "checkpoints":
            found[path.name] = path.read_text()
            continue
        for entry in sorted(path.iterdir()):
            try:
                verify(entry)
                found[f"checkpoints/{entry.name}"] = (entry / "manifest.json").read_text()
            except CheckpointError as error:
                found[f"checkpoints/{entry.name}"] = f"NOT VALID: {error}"
    return found


# Every operation


def store_of(run_dir: Path, **options: Any) -> CheckpointStore:
    return CheckpointStore(run_dir / "checkpoints", **options)


def no_checkpoint(run_dir: Path) -> None:
    """A run directory with one file."""
    write_json(run_dir / "config.json", "old")


def one(run_dir: Path) -> None:
    no_checkpoint(run_dir)
    save(store_of(run_dir), "a", 1, wait=True)


def three(run_dir: Path) -> None:
    no_checkpoint(run_dir)
    for step, name in enumerate("abc", 1):
        save(store_of(run_dir, keep_last=3), name, step, wait=True, score=-step)


def killed_before(run_dir: Path) -> None:
    """Leftovers of every kind; a has made room for a replacement that did not come."""
    one(run_dir)
    folder = run_dir / "checkpoints"
    for name in (".b.partial", ".0.removed"):
        shutil.copytree(folder / "a", folder / name)
    (folder / ".b.partial" / "manifest.json").unlink()
    (folder / "a").rename(folder / ".a.replaced")
    (run_dir / ".config.json.partial").write_text("{")


# name: (what is there, what is done, the newest step before and after)
Action = Callable[[Path], object]
SCENARIOS: dict[str, tuple[Action, Action, tuple[int, int]]] = {
    "first": (no_checkpoint, lambda d: save(store_of(d), "a", 1, wait=True), (0, 1)),
    "next": (one, lambda d: save(store_of(d), "b", 2, wait=True), (1, 2)),
    "prune": (
        three,
        lambda d: save(store_of(d, keep_last=1, keep_best=1), "d", 4, wait=True),
        (3, 4),
    ),
    "replace": (one, lambda d: save(store_of(d), "a", 2, wait=True), (1, 2)),
    "sweep": (killed_before, lambda d: store_of(d).sweep(), (1, 1)),
    "replace, unswept": (killed_before, lambda d: save(store_of(d), "a", 2, wait=True), (1, 2)),
    "write_json": (one, lambda d: write_json(d / "config.json", "new"), (1, 1)),
}


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(number: int, halfway: bool) -> None:
    """Let this process kill itself before its operation `number`, or halfway through it."""
    count = 0

    def counted(module: Any, name: str) -> Callable[..., Any]:
        original = getattr(module, name)

        def operation(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count != number:
                return original(*args, **options)
            if halfway and name == "write":
                original(args[0], args[1][: len(args[1]) // 2])
            elif halfway:
                original(*args, **options)
                if name == "save_file":
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
            return kill_self()

        return operation

    for module, name in OPERATIONS:
        setattr(module, name, counted(module, name))


def every(folder: Path, scenario: str) -> dict[str, Any]:
    prepare, act, steps = SCENARIOS[scenario]
    template, finished, trial = folder / "template", folder / "finished", folder / "trial"
    template.mkdir(parents=True)
    prepare(template)
    shutil.copytree(template, finished)
    act(finished)
    store_of(finished).sweep()
    expected = contents(finished)
    complaints, kills, halfway, number = [], 0, False, 1
    while True:
        shutil.copytree(template, trial)
        child = os.fork()
        if child == 0:
            kill_at(number, halfway)
            act(trial)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        killed = status == -signal.SIGKILL
        kills += killed
        try:
            look(trial, act, steps if killed else steps[1:], expected)
        except AssertionError as error:
            complaints.append(f"operation {number}, halfway {halfway}, status {status}: {error}")
        shutil.rmtree(trial)
        if not killed:
            break
        number, halfway = number + halfway, not halfway
    return {"operations": number - 1, "kills": kills, "status": status, "complaints": complaints}


def look(run_dir: Path, act: Action, steps: tuple[int, ...], expected: dict[str, str]) -> None:
    """What must hold after a kill, after the next start, and when it has done the work again."""
    made = store_of(run_dir)
    step = newest_step(made)
    assert step in steps, f"newest {step}, expected one of {steps}"
    config = json.loads((run_dir / "config.json").read_text())
    assert config in ("old", "new"), config
    made.sweep()
    assert newest_step(made) == step, f"sweep made {newest_step(made)} of {step}"
    bad = {n: v for n, v in contents(run_dir).items() if "/." in n or n[0] == "." or "NOT" in v}
    assert not bad, f"left behind: {bad}"
    act(run_dir)
    made.sweep()
    assert contents(run_dir) == expected, f"after a new start: {sorted(contents(run_dir))}"


# Random moments


def save_for_ever(run_dir: Path, report: int) -> None:
    made = store_of(run_dir, keep_last=2, keep_best=1)
    made.sweep()
    step = newest_step(made)
    while True:
        step += 1
        save(made, f"step-{step:06d}", step, size=50_000, score=step % 7)
        os.write(report, f"{step - 1} ".encode())  # that one is on the disk


def at_random(folder: Path, count: int) -> dict[str, Any]:
    folder.mkdir()
    generator = random.Random(count)
    made = store_of(folder, keep_last=2, keep_best=1)
    complaints, interrupted, durable = [], 0, 0
    for number in range(count):
        receive, report = os.pipe()
        child = os.fork()
        if child == 0:
            save_for_ever(folder, report)
        os.close(report)
        time.sleep(generator.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with open(receive) as reports:
            durable = max([durable, *map(int, reports.read().split())])
        try:
            step = newest_step(made)
            assert step >= durable, f"newest {step}, but {durable} was on the disk"
            interrupted += bool(made.sweep())
            assert newest_step(made) == step, "sweep changed the newest"
            found = contents(folder)
            bad = {name: value for name, value in found.items() if "/." in name or "NOT" in value}
            assert not bad and len(found) <= 5, f"left behind: {bad or sorted(found)}"
        except AssertionError as error:
            complaints.append(f"kill {number}: {error}")
    return {"interrupted": interrupted, "saved": durable, "complaints": complaints}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, place, *counts = sys.argv[1:]
    if mode == "every":
        print(json.dumps({name: every(Path(place, name), name) for name in SCENARIOS}))
    else:
        print(json.dumps(at_random(Path(place), int(counts[0]))))
