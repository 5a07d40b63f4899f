"""One checkpoint on disk: a folder that is complete and unchanged, or refused with the reason.

    NAME/policy.safetensors     tensors, one file per group
    NAME/state.json             everything else, strict JSON
    NAME/manifest.json          written last

The manifest holds the version of this format, the checkpoint's name and score, whether it is an
extra one, size and SHA-256 of every other file, and the SHA-256 of all that. It is valid in one
spelling only, the one `_render` gives, so that any change of it is noticed; the name is in it so
that a copy under another name is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastppo.checkpoint.durable import sync, write_file

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = ".safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or read: which one, why, and what to do."""


class InvalidError(Exception):
    """Why a folder is not a valid checkpoint; names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of which every byte has been verified.

    Attributes:
        path: its folder.
        state: what state.json holds.
    """

    path: Path
    state: dict[str, Any]

    @property
    def groups(self) -> list[str]:
        """Names of the groups of tensors in it."""
        return [path.stem for path in sorted(self.path.glob(f"*{TENSORS}"))]

    @contextlib.contextmanager
    def understood(self) -> Iterator[None]:
        """Around what reads the state: content of another shape, in a file that is whole, is a
        CheckpointError that names the file. A ValueError goes through where it is of a subclass.
        """
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if isinstance(error, ValueError) and type(error) is not ValueError:
                raise
            raise CheckpointError(
                f"{self.path / STATE} is not the state of a run that this version can read: "
                f"{type(error).__name__}: {error}. Use another checkpoint"
            ) from error

    def tensors(self, name: str) -> dict[str, Tensor]:
        """One group of tensors, such as "policy", on the CPU.

        Raises:
            CheckpointError: there is no such group, or it cannot be read any more.
        """
        if name not in self.groups:
            raise CheckpointError(
                f"{self.path}: expected a file {name}{TENSORS}, got {self.groups}. "
                "Resume with the configuration that the checkpoint was saved with"
            )
        try:
            return load_file(self.path / f"{name}{TENSORS}")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path / name}{TENSORS} cannot be read: {error}. Use another checkpoint"
            ) from error


def verify(path: Path) -> Checkpoint:
    """Read a checkpoint, hashing every byte of it.

    Raises:
        CheckpointError: it is not valid; the message says which file and why.
    """
    path = Path(os.path.abspath(path))
    try:
        return read(path, path.name)
    except InvalidError as reason:
        raise CheckpointError(
            f"{path} is not a valid checkpoint: {reason}. Use another one, or remove this one"
        ) from reason


def encode_state(state: Mapping[str, Any]) -> bytes:
    """The content of state.json, which reads back as exactly the same values.

    Raises:
        ValueError: a value that JSON does not give back as it was (a number that is not finite, a
            tuple, a key that is not a string, ...), with the place where it stands.
    """
    values = dict(state)
    _check_json(values, "state")
    return json.dumps(values, allow_nan=False).encode()


def write(
    folder: Path,
    name: str,
    tensors: dict[str, dict[str, Tensor]],
    state: bytes,
    *,
    score: float | None,
    extra: bool,
) -> None:
    """Write a checkpoint called `name` into the new folder `folder`; it is on the disk at the end.

    Args:
        tensors: contiguous, on the CPU. Emptied on the way, to give their memory back early.
        state: from `encode_state`.
        score, extra: see `CheckpointStore.save`.
    """
    folder.mkdir()
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o666
    for group in list(tensors):
        path = folder / f"{group}{TENSORS}"
        save_file(tensors.pop(group), path)
        path.chmod(mode)  # safetensors makes files that only their owner can read
        sync(path)
    write_file(folder / STATE, state)
    # Read again rather than hashed on the way: this checks what has been written, not what should
    # have been.
    files = {path.name: _fingerprint(path) for path in sorted(folder.iterdir())}
    about = {"name": name, "score": score, "extra": extra}
    manifest = {"format": FORMAT, **about, "files": files}
    write_file(folder / MANIFEST, _render(manifest))
    sync(folder)


def read(path: Path, name: str) -> Checkpoint:
    """The checkpoint in the folder `path`, which was saved as `name`.

    Raises:
        InvalidError: the reason, of any kind, why it cannot be used.
    """
    files = read_manifest(path, name)["files"]
    try:
        present = {entry.name for entry in os.scandir(path)} - {MANIFEST}
        for file in sorted(files.keys() ^ present):
            raise InvalidError(
                f"{file} {'is missing' if file in files else 'does not belong to it'}"
            )
        for file, expected in files.items():
            size = (path / file).stat().st_size
            if size != expected["size"]:
                raise InvalidError(f"{file} has {size} bytes, expected {expected['size']}")
            if _fingerprint(path / file) != expected:
                raise InvalidError(f"{file} is damaged, or of another one: its SHA-256 differs")
        state = json.loads((path / STATE).read_bytes())
    except OSError as error:
        raise InvalidError(f"{error.filename}: {error.strerror}") from error
    except (ValueError, RecursionError):
        raise InvalidError(f"{STATE} is damaged: not JSON") from None
    if not isinstance(state, dict):
        raise InvalidError(f"{STATE} is damaged: not an object")
    return Checkpoint(path, state)


def read_manifest(path: Path, name: str) -> dict[str, Any]:
    """The manifest of the checkpoint in `path`, saved as `name`, without hashing the other files.

    Raises:
        InvalidError: it is missing, damaged or foreign, or something in the folder is not a file.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            raise InvalidError("is not a folder" if os.path.lexists(path) else "does not exist")
        entries = {entry.name: entry for entry in os.scandir(path)}
        if MANIFEST not in entries:
            raise InvalidError(f"{MANIFEST} is missing")
        for file, entry in sorted(entries.items()):
            if not entry.is_file(follow_symlinks=False):
                raise InvalidError(f"{file} is a folder, a link or something else than a file")
        data = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise InvalidError(f"{error.filename}: {error.strerror}") from error
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidError(f"{MANIFEST} is damaged: not JSON") from None
    if not isinstance(manifest, dict):
        raise InvalidError(f"{MANIFEST} is damaged: not an object")
    if manifest.get("format") != FORMAT:
        raise InvalidError(f"{MANIFEST} is of format {manifest.get('format')!r}, expected {FORMAT}")
    if data != _render({key: value for key, value in manifest.items() if key != "sha256"}):
        raise InvalidError(f"{MANIFEST} is damaged: its SHA-256 differs")
    if manifest.get("name") != name:
        other = manifest.get("name")
        raise InvalidError(f"{MANIFEST} is that of {other!r}: it was renamed or copied")
    score, files = manifest.get("score"), manifest.get("files")
    if not (
        (score is None or isinstance(score, float))
        and isinstance(manifest.get("extra"), bool)
        and isinstance(files, dict)
        and STATE in files
        and all(isinstance(file, dict) and "size" in file for file in files.values())
    ):
        raise InvalidError(f"{MANIFEST} is damaged: it does not say what belongs to it")
    return manifest


def _render(manifest: dict[str, Any]) -> bytes:
    """The only valid spelling of a manifest, with its own SHA-256 added."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=2) + "\n").encode()


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return {"sha256": digest.hexdigest(), "size": size}


def _check_json(value: Any, place: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{place}: expected keys that are strings, got {key!r}")
            _check_json(item, f"{place}[{key!r}]")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_json(item, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place}: expected a finite number, got {value}")
    elif not (value is None or isinstance(value, (str, int, float))):
        raise ValueError(
            f"{place}: expected a dict, list, str, number, bool or None, got {value!r}. "
            "Convert it, or save it as a tensor"
        )
