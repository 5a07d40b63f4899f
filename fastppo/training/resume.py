"""What a run may be continued from: where its checkpoints are, and whether they are its own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastppo.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    lock_run_dir,
    new_run_dir,
    verify,
)
from fastppo.checkpoint.lock import LOCK
from fastppo.options import Options, about, holds, nearest, shown
from fastppo.training.config import RunConfig
from fastppo.training.metrics import check_lines

INPUTS = ("model", "dataset", "reward", "reward_weights")
"""What a trainer is given besides its configuration, as `allow_changes` names it."""


def find_run(resume: bool | str | Path, output_dir: str) -> tuple[Path | None, Path | None]:
    """The run directory to continue, and the checkpoint in it that was asked for by name.

    Args:
        resume: True: the run in `output_dir`, else the one below runs/ that was the last to save a
            checkpoint. A path: a run directory, or one of its checkpoints.
        output_dir: the configuration's.

    Returns:
        (None, None) where `output_dir` has no run yet, so that one command starts and continues.

    Raises:
        ValueError: there is no such run, or `output_dir` is another one.
    """
    if isinstance(resume, bool):
        if output_dir:
            path = Path(output_dir).expanduser().resolve()
            if not path.is_dir() or not any(path.iterdir()):
                return None, None
            _check_run_dir(path)
            return path, None
        folders = (path for path in Path("runs").glob("*/checkpoints") if path.is_dir())
        found = sorted(folders, key=lambda path: path.stat().st_mtime)
        if not found:
            raise ValueError(
                "resume: expected a run with checkpoints below runs/, found none. Name the run's "
                "folder, or set output_dir"
            )
        return found[-1].parent.resolve(), None
    if not isinstance(resume, (str, Path)):
        raise ValueError(f"resume: expected a path, True or False, got {shown(resume)}")
    path = Path(resume).expanduser().resolve()
    named = path if path.parent.name == "checkpoints" else None
    run_dir = path.parent.parent if named else path
    if not run_dir.is_dir() or (named and not named.exists()):
        raise ValueError(
            f"resume: expected a run directory or a checkpoint in one, got {str(resume)!r}, which "
            "does not exist"
        )
    if output_dir and Path(output_dir).expanduser().resolve() != run_dir:
        raise ValueError(
            f"output_dir: expected the run that is resumed, {str(run_dir)!r}, got {output_dir!r}. "
            "Leave output_dir out"
        )
    _check_run_dir(run_dir)
    return run_dir, named


def _check_run_dir(path: Path) -> None:
    """Refuse a folder in which no run has been: a resumed run writes in it."""
    if not (path / LOCK).exists() and not (path / "checkpoints").is_dir():
        raise ValueError(
            f"resume: expected the folder of a run, got {str(path)!r}, which has neither "
            f"checkpoints/ nor {LOCK}"
        )


def find_checkpoint(
    store: CheckpointStore, named: Path | None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, None where none was ever saved, and notes for a person.

    Raises:
        CheckpointError: the named one is not valid, or none is.
    """
    if named is not None:
        return verify(named), []
    checkpoint, problems = store.newest()
    if checkpoint is None and problems:
        raise CheckpointError(
            f"{store.folder}: expected a valid checkpoint to resume from: {'; '.join(problems)}. "
            "Start a new run in another output_dir"
        )
    if checkpoint is None:
        return None, ["no checkpoint had been saved: the run starts from the beginning"]
    return checkpoint, [f"passed over checkpoint {text}" for text in problems]


@dataclass(frozen=True)
class OpenedRun:
    """A run directory and what to continue from in it."""

    run_dir: Path
    found: bool
    """It is not new; it has been locked."""
    store: CheckpointStore
    checkpoint: Checkpoint | None
    notes: list[str]
    """What a person should know about the choice."""


def open_run(
    args: RunConfig,
    resume: bool | str | Path,
    allowed: Sequence[str],
    held: contextlib.ExitStack,
) -> OpenedRun:
    """The run directory of a new run or of one to continue, before any weight is read.

    Args:
        args: the configuration.
        resume: see `find_run`; False for a new run.
        allowed: see `check_config`.
        held: gets the lock of a run that is continued.

    Raises:
        ValueError: see `check_allowed`, `new_run_dir`, `find_run`, `lock_run_dir`, `check_config`.
        CheckpointError: see `find_checkpoint`.
    """
    check_allowed(args, allowed, resume)
    found, named = find_run(resume, args.output_dir) if resume else (None, None)
    run_dir = found or new_run_dir(args.output_dir)
    store = CheckpointStore(
        run_dir / "checkpoints", keep_last=args.keep_checkpoints, keep_best=args.keep_best
    )
    if found is None:
        return OpenedRun(run_dir, False, store, None, [])
    held.enter_context(lock_run_dir(run_dir))
    check_lines(run_dir)
    store.sweep()
    checkpoint, notes = find_checkpoint(store, named)
    if checkpoint is not None:
        for part in ("config", "versions", "run"):
            if not isinstance(checkpoint.state.get(part), dict):
                raise CheckpointError(
                    f"{checkpoint.path}: state.json has no {part!r}, so it is not that of a run. "
                    "Use another checkpoint"
                )
        check_config(checkpoint.state["config"], args, allowed)
        if changed := changed_versions(checkpoint.state["versions"]):
            notes.append(f"other versions than the run was made with, bits may differ: {changed}")
    return OpenedRun(run_dir, True, store, checkpoint, notes)


def archive(run_dir: Path, checkpoint: Checkpoint) -> Path | None:
    """Move checkpoints that are newer than the one to continue from out of the run's way.

    They and copies of metrics and samples go to run_dir/abandoned-N, because the run is about to
    take another course from there.

    Returns:
        That folder, None where there is nothing newer.
    """
    folder = checkpoint.path.parent
    newer = [path for path in folder.glob("[!.]*") if path.name > checkpoint.path.name]
    if not newer:
        return None
    names = (run_dir / f"abandoned-{number}" for number in itertools.count(1))
    archived = next(path for path in names if not os.path.lexists(path))
    (archived / folder.name).mkdir(parents=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run_dir / name).exists():
            shutil.copy2(run_dir / name, archived / name)
    for path in sorted(newer, reverse=True):  # a crash in between leaves none newer than the rest
        path.rename(archived / folder.name / path.name)
    return archived


def plain_config(args: Options) -> dict[str, Any]:
    """The configuration as it comes back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(args), default=str))
    return plain


def check_config(saved: Mapping[str, Any], args: Options, allowed: Iterable[str] = ()) -> None:
    """Refuse to continue a run with another configuration.

    Args:
        saved: `plain_config` of the run.
        args: the configuration of the continuation.
        allowed: fields that the caller wants to change although the result then differs from that
            of an uninterrupted run.

    Raises:
        ValueError: every field that differs, may not differ by itself, and is not allowed to.
    """
    current, names = plain_config(args), _defaults(args)
    free = {*may_differ(args), *allowed}
    before = {name: saved.get(name, default) for name, default in names.items()}
    changed = [
        f"{name}: {before[name]!r} → {current[name]!r}"
        for name in names
        if name not in free and _compared(name, current[name]) != _compared(name, before[name])
    ]
    if changed:
        raise ValueError(
            f"the configuration is not that of the run to resume: {'; '.join(changed)}. Put the "
            "old values back, or name the fields in allow_changes (--allow-changes) to continue "
            "with the new ones"
        )


def may_differ(args: Options) -> set[str]:
    """Options that may differ between a run and its continuation: they decide what is watched, kept
    or survived, or how the same gradient is computed, or say where something is whose content is
    compared.
    """
    names = [field.name for field in dataclasses.fields(args)]
    found = {name: about(type(args), name).get("may_differ") for name in names}
    return {n for n, when in found.items() if when is True or (when and holds(args, when))}


def _compared(name: str, value: Any) -> Any:
    """A reward is the same file and function in whatever folder."""
    listed = name == "reward" and isinstance(value, list)
    return [Path(str(spec)).name for spec in value] if listed else value


def check_allowed(args: Options, allowed: Sequence[str], resume: bool | str | Path) -> None:
    """Refuse `allowed` where it means nothing.

    Raises:
        ValueError: a name that no option has, or names without `resume`.
    """
    names = list({**_defaults(args), **dict.fromkeys(INPUTS)})
    if unknown := [name for name in allowed if name not in names]:
        raise ValueError(
            f"allow_changes: expected names of options, got {', '.join(unknown)}"
            f"{nearest(unknown[0], names)}"
        )
    if allowed and not resume:
        raise ValueError(
            f"allow_changes = {', '.join(allowed)} would have no effect: it needs resume"
        )


def _defaults(args: Options) -> dict[str, Any]:
    """The name of every option and its default, as it comes back from JSON."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    plain: dict[str, Any] = json.loads(json.dumps(defaults, default=str))
    return plain


def versions() -> dict[str, str]:
    """Versions that the bits of a result depend on."""
    packages = ("fastppo", "torch", "transformers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def changed_versions(saved: Mapping[str, str]) -> str:
    """What is installed in another version than the run was made with; empty where nothing is."""
    current = versions()
    return ", ".join(
        f"{name} {saved[name]} → {current[name]}"
        for name in current
        if name in saved and saved[name] != current[name]
    )
