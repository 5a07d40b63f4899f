"""The checkpoints of a run: saved in the background, pruned, found again after a crash.

A checkpoint is written under a hidden name and renamed when all of it is on the disk. Hidden names
say what a killed process was doing:

    .NAME.partial     being written
    .NAME.replaced    making room for a new one of the same name; the old one, valid until then
    .NAME.removed     being deleted
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.checkpoint import format as fmt
from fastppo.checkpoint.durable import advice, delete, make_folder, sync
from fastppo.checkpoint.format import Checkpoint, CheckpointError, InvalidError
from fastppo.checkpoint.run_dir import leftovers

NAME = "[A-Za-z0-9_-]+"
HIDDEN = re.compile(rf"\.({NAME})\.(partial|replaced|removed)")


class CheckpointStore:
    """The folder `checkpoints` of a run directory.

    Names of checkpoints sort in the order of time. The process that saves or sweeps has the run
    directory locked (`lock_run_dir`); `newest` only reads.

    Args:
        folder: run_dir / "checkpoints". Made by the first save.
        keep_last: so many of the newest stay, at least 1; the one just saved always does, and what
            sorts after it, left from a run that went back, never. None: nothing is removed.
        keep_best: so many of those with the highest score stay besides.
    """

    def __init__(self, folder: Path, *, keep_last: int | None = 2, keep_best: int = 0) -> None:
        if (keep_last is not None and keep_last < 1) or keep_best < 0:
            raise ValueError(
                f"keep_last, keep_best: expected at least 1 and 0, got {keep_last} and {keep_best}"
            )
        self.folder = folder
        self.keep_last = keep_last
        self.keep_best = keep_best
        self._pid = os.getpid()
        self._writer: threading.Thread | None = None
        self._error: CheckpointError | None = None

    def save(
        self,
        name: str,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        *,
        score: float | None = None,
        extra: bool = False,
        wait: bool = False,
    ) -> None:
        """Copy everything to host memory, return, and write it to disk in a thread.

        One copy exists at a time: a save that is still being written is waited for. It takes as
        much host memory as `tensors` have bytes, until their files are written. Copies of CUDA
        tensors are pinned; torch rounds each up to a power of two and keeps it for the next save.

        Args:
            name: letters, digits, "-" and "_". A checkpoint of that name is replaced.
            tensors: one file per group. The caller may change them as soon as this returns.
                Tensors that share memory are written separately.
            state: everything else; what JSON gives back exactly.
            score: for keep_best; higher is better.
            extra: besides the regular ones; it stays until the next save only, and `keep_last`
                does not count it. One that replaces a regular one is regular and has its score.
            wait: return when it is on the disk.

        Raises:
            CheckpointError: the save before failed, and this one has not been started; with
                `wait`, this one failed.
            ValueError: a name, score or state that cannot be saved.
        """
        self._check_process()
        for part in (name, *tensors):
            if not re.fullmatch(NAME, part):
                raise ValueError(f"name: expected letters, digits, '-' and '_', got {part!r}")
        if score is not None and not math.isfinite(score):
            raise ValueError(f"score: expected a finite number or None, got {score}")
        content = fmt.encode_state(state)
        self.wait()
        score = None if score is None else float(score)
        writer = threading.Thread(
            target=self._write,
            args=(name, _snapshot(tensors), content, score, extra),
            name="fastppo-checkpoint",
        )
        writer.start()
        self._writer = writer
        if wait:
            self.wait()

    def check(self) -> None:
        """Raise the error of a save that has failed since, once."""
        if self._error is not None and os.getpid() == self._pid:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when everything is on the disk; raises as `check` does."""
        if self._writer is not None and os.getpid() == self._pid:
            self._writer.join()
            self._writer = None
        self.check()

    def close(self) -> None:
        """`wait`, for the end of a run: no error is lost. Nothing else needs to be closed."""
        self.wait()

    def sweep(self) -> list[str]:
        """Clear up after a killed process, here and in the run directory.

        Returns:
            The names of what was half written or half deleted and has been removed, and of old
            checkpoints whose replacement did not come, which have their name again.
        """
        self._check_process()
        self.wait()
        partial = leftovers(self.folder.parent)
        for path in partial:
            delete(path)
        return [*self._clear(), *(path.name for path in partial)]

    def newest(self, *, regular_until: str | None = None) -> tuple[Checkpoint | None, list[str]]:
        """The newest valid checkpoint, if any; "name: reason" for each newer one passed over.

        Args:
            regular_until: look only at regular ones that do not sort after this name.
        """
        passed_over: list[str] = []
        for name, path in sorted(self._found().items(), reverse=True):
            try:
                if regular_until is not None and (
                    name > regular_until or fmt.read_manifest(path, name)["extra"]
                ):
                    continue
                return fmt.read(path, name), passed_over
            except InvalidError as reason:
                passed_over.append(f"{name}: {reason}")
        return None, passed_over

    # In the writer's thread

    def _write(
        self,
        name: str,
        tensors: dict[str, dict[str, Tensor]],
        state: bytes,
        score: float | None,
        extra: bool,
    ) -> None:
        failed = "could not be saved"
        try:
            make_folder(self.folder)
            self._clear()
            if extra:
                score, extra = self._rank(name)
            partial = self._hidden(name, "partial")
            fmt.write(partial, name, tensors, state, score=score, extra=extra)
            self._publish(name, partial)
            failed = "is saved, but older ones could not be removed"
            self._prune(name)
        except Exception as error:
            self._error = self._explained(name, failed, error)

    def _rank(self, name: str) -> tuple[float | None, bool]:
        """Score of an extra checkpoint, and whether it stays one, by what it replaces."""
        with contextlib.suppress(InvalidError):
            manifest = fmt.read_manifest(self.folder / name, name)
            return manifest["score"], manifest["extra"]
        return None, True

    def _publish(self, name: str, partial: Path) -> None:
        replaced = self._hidden(name, "replaced")
        if os.path.lexists(self.folder / name):
            os.rename(self.folder / name, replaced)
        os.rename(partial, self.folder / name)
        sync(self.folder)
        if os.path.lexists(replaced):
            delete(replaced)

    def _prune(self, saved: str) -> None:
        """Remove what neither limit keeps; a folder without a valid manifest is left alone."""
        if self.keep_last is None:
            return
        found = {}
        for name in self._found():
            with contextlib.suppress(InvalidError):
                found[name] = fmt.read_manifest(self.folder / name, name)
        regular = sorted(name for name in found if name <= saved and not found[name]["extra"])
        scores = {name: found[name]["score"] for name in regular}
        scored = [name for name in regular if scores[name] is not None]
        best = sorted(scored, key=lambda name: (scores[name], name), reverse=True)
        keep = {saved, *regular[-self.keep_last :], *best[: self.keep_best]}
        removed = [self._hidden(name, "removed") for name in sorted(found.keys() - keep)]
        for name, hidden in zip(sorted(found.keys() - keep), removed, strict=True):
            os.rename(self.folder / name, hidden)
        if removed:
            sync(self.folder)  # no power cut shows a half deleted one under its name
        for hidden in removed:
            delete(hidden)

    def _clear(self) -> list[str]:
        """Finish or undo what was begun under hidden names; nothing else is touched."""
        names = []
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if match := HIDDEN.fullmatch(path.name):
                final = self.folder / match[1]
                if match[2] == "replaced" and not os.path.lexists(final):
                    os.rename(path, final)
                else:
                    delete(path)
                names.append(path.name)
        if names:
            sync(self.folder)
        return names

    def _explained(self, name: str, failed: str, error: Exception) -> CheckpointError:
        """The error for the caller, after clearing up; the disk may refuse that, too."""
        last = None
        with contextlib.suppress(OSError):
            self._clear()
        with contextlib.suppress(OSError):
            last, _ = self.newest()
        intact = f"{last.path.name} is intact" if last else "There is no earlier checkpoint"
        explained = CheckpointError(
            f"checkpoint {name!r} {failed} in {self.folder}: {error}. {intact}. {advice(error)}"
        )
        explained.__cause__ = error
        return explained

    # Names and processes

    def _found(self) -> dict[str, Path]:
        """Everything that could be a checkpoint: its name and where it is."""
        paths = list(self.folder.iterdir()) if self.folder.is_dir() else []
        found = {path.name: path for path in paths if not path.name.startswith(".")}
        for path in paths:
            match = HIDDEN.fullmatch(path.name)
            if match and match[2] == "replaced":
                found.setdefault(match[1], path)
        return found

    def _hidden(self, name: str, doing: str) -> Path:
        return self.folder / f".{name}.{doing}"

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise CheckpointError(
                f"{self.folder}: this process was forked from the one that writes here "
                f"({self._pid}). Save from that one"
            )


def _snapshot(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies in host memory, contiguous, that nothing else refers to."""
    copies = {
        group: {name: _host_copy(tensor.detach()) for name, tensor in members.items()}
        for group, members in tensors.items()
    }
    for device in {t.device for members in tensors.values() for t in members.values() if t.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def _host_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor; of a CUDA tensor, one that is complete after a synchronisation."""
    if tensor.is_cuda:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return copy.copy_(tensor, non_blocking=True)
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
