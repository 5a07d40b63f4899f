"""Damaged checkpoints and disks that refuse: noticed, named, and the one before is used."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.checkpoint import CheckpointError, CheckpointStore, store, verify

FILES = ("policy.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
TENSOR_FLIPS = 64  # places in a file of tensors, besides its first and last byte


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> CheckpointStore:
    """Checkpoints a and b whose files have the same sizes and different contents."""
    made = CheckpointStore(tmp_path_factory.mktemp("run") / "checkpoints")
    for step, name in enumerate("ab"):
        group = {"w": torch.arange(1000.0) + step}
        values = {"policy": group, "optimizer": {"m": group["w"] / 3}}
        made.save(name, values, {"step": step}, score=float(step), wait=True)
    for file in FILES:
        a, b = ((made.folder / name / file).read_bytes() for name in "ab")
        assert len(a) == len(b) and a != b
    return made


@pytest.fixture
def damaged(two: CheckpointStore, tmp_path: Path) -> CheckpointStore:
    """A copy of `two` to be damaged."""
    shutil.copytree(two.folder, tmp_path / "checkpoints")
    return CheckpointStore(tmp_path / "checkpoints")


def assert_noticed(made: CheckpointStore, reason: str) -> None:
    """b is refused with a reason that has `reason` in it, and a is used."""
    found, passed_over = made.newest()
    assert found is not None and found.path.name == "a" and found.state == {"step": 0}
    assert len(passed_over) == 1 and passed_over[0].startswith("b: ")
    assert reason in passed_over[0]
    with pytest.raises(CheckpointError) as caught:
        verify(made.folder / "b")
    assert str(made.folder / "b") in str(caught.value) and reason in str(caught.value)
    assert "Use another one" in str(caught.value)


def flips(file: str, size: int) -> Iterator[tuple[int, int]]:
    """(byte, bit): all of them in a JSON file, some in a large one."""
    if file.endswith(".json"):
        yield from ((byte, bit) for byte in range(size) for bit in range(8))
        return
    for i in range(TENSOR_FLIPS):
        number = int.from_bytes(hashlib.sha256(f"{file} {i}".encode()).digest()[:8], "big")
        yield number // 8 % size, number % 8
    yield from ((0, 0), (size - 1, 7))


@pytest.mark.parametrize("file", FILES)
def test_one_flipped_bit(damaged: CheckpointStore, file: str) -> None:
    path = damaged.folder / "b" / file
    content = path.read_bytes()
    for byte, bit in flips(file, len(content)):
        flipped = bytearray(content)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=f"checkpoint: {file} "):
            verify(path.parent)
    assert_noticed(damaged, file)
    path.write_bytes(content)
    assert verify(path.parent).state == {"step": 1}


CHANGES: dict[str, Callable[[Path], object]] = {
    "one byte less": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("x")),
    "of the other": lambda path: shutil.copy(path.parents[1] / "a" / path.name, path),
    "link": lambda path: path.symlink_to(path.rename(path.parents[1] / ".real")),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("x")),
    "folder": lambda path: (path.unlink(), path.mkdir()),
    "pipe": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("file", FILES)
def test_a_changed_file(damaged: CheckpointStore, file: str, change: str) -> None:
    CHANGES[change](damaged.folder / "b" / file)
    assert_noticed(damaged, file)


def test_a_truncated_file_is_not_called_damaged(damaged: CheckpointStore) -> None:
    os.truncate(damaged.folder / "b" / "state.json", 5)
    assert_noticed(damaged, "state.json has 5 bytes, expected 11")


@pytest.mark.parametrize("name", ["x", ".hidden", "critic.safetensors", "state.json.bak"])
def test_a_file_too_many(damaged: CheckpointStore, name: str) -> None:
    (damaged.folder / "b" / name).write_text("")
    assert_noticed(damaged, f"{name} does not belong to it")


def test_folders_that_are_no_checkpoints(damaged: CheckpointStore) -> None:
    b = damaged.folder / "b"
    (b / "critic").mkdir()
    assert_noticed(damaged, "critic is a folder, a link or something else than a file")
    shutil.rmtree(b)
    shutil.copytree(damaged.folder / "a", b)
    assert_noticed(damaged, "manifest.json is that of 'a': it was renamed or copied")
    shutil.rmtree(b)
    b.mkdir()
    assert_noticed(damaged, "manifest.json is missing")
    b.rmdir()
    b.symlink_to("a")
    assert_noticed(damaged, "is not a folder")


@pytest.mark.parametrize("content", ["[]", "3", '"format"', "null", "{}", '{"format": true}'])
def test_other_json_as_a_manifest(damaged: CheckpointStore, content: str) -> None:
    (damaged.folder / "b" / "manifest.json").write_text(content)
    assert_noticed(damaged, "manifest.json")


def test_another_version_of_the_format(
    damaged: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as later:
        later.setattr(store.fmt, "FORMAT", 2)
        damaged.save("b", {}, {"step": 1}, wait=True)
        assert verify(damaged.folder / "b").state == {"step": 1}
    assert_noticed(damaged, "manifest.json is of format 2, expected 1")


def test_a_manifest_written_by_hand(damaged: CheckpointStore) -> None:
    """It is readable JSON: an edited one is refused, also where the values agree."""
    path = damaged.folder / "b" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "score": 9.0}, sort_keys=True, indent=2) + "\n")
    assert_noticed(damaged, "manifest.json is damaged: its SHA-256 differs")
    path.write_text(json.dumps(manifest))
    assert_noticed(damaged, "manifest.json is damaged: its SHA-256 differs")


def test_every_one_damaged(damaged: CheckpointStore) -> None:
    (damaged.folder / "a" / "state.json").unlink()
    (damaged.folder / "b" / "policy.safetensors").unlink()
    assert damaged.newest() == (
        None,
        ["b: policy.safetensors is missing", "a: state.json is missing"],
    )


# A disk that refuses

# The comments in it are replaced by statements.
PROGRAM = """
import json, os, resource, subprocess, sys, torch
from pathlib import Path
from fastppo.checkpoint import CheckpointError, CheckpointStore
def values(count):
    return {"policy": {"w": torch.arange(float(count))}}
folder = Path(sys.argv[1])
# setup
made = CheckpointStore(folder / "checkpoints", keep_last=3)
made.save("good", values(1000), {"step": 1}, wait=True)
before = sorted(str(p) for p in folder.rglob("*"))
# trouble
made.save("bad", values(1_000_000), {"step": 2})
try:
    made.wait()
    message = None
except CheckpointError as error:
    message = str(error)
after = sorted(str(p) for p in folder.rglob("*"))
newest, passed_over = made.newest()
# end
left = made.sweep()
made.save("later", values(1_000_000), {"step": 3}, wait=True)
print(json.dumps({
    "message": message, "clean": before == after, "newest": newest.path.name,
    "passed_over": passed_over, "left": left, "last": made.newest()[0].path.name,
}))
"""


def refused(folder: Path, advice: str, *, before: tuple[str, ...] = (), **parts: str) -> str:
    """Run PROGRAM; the message of the save that failed."""
    program = PROGRAM
    for part, statement in parts.items():
        program = program.replace(f"# {part}\n", f"{statement}\n")
    done = subprocess.run(
        [*before, sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    message = result.pop("message")
    assert result == dict(clean=True, newest="good", passed_over=[], left=[], last="later")
    assert message.startswith(f"checkpoint 'bad' could not be saved in {folder}/checkpoints: ")
    assert message.endswith(f". good is intact. {advice}")
    return str(message)


MOUNT = "subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=6m', 'none', folder], check=True)"


def test_the_limit_on_file_sizes(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, ({}, resource.RLIM_INFINITY))"
    message = refused(
        tmp_path,
        "Raise the limit on the size of files (ulimit -f)",
        trouble=limit.format(1 << 20),
        end=limit.format("resource.RLIM_INFINITY"),
    )
    assert "File too large" in message


def test_a_full_disk(tmp_path: Path, private_mounts: tuple[str, ...]) -> None:
    message = refused(
        tmp_path,
        "Free some space there, then go on",
        before=private_mounts,
        setup=MOUNT,
        trouble="(folder / 'x').write_bytes(bytes(4 << 20)); before.append(str(folder / 'x'))",
        end="(folder / 'x').unlink()",
    )
    assert "No space left on device" in message


def test_a_read_only_file_system(tmp_path: Path, private_mounts: tuple[str, ...]) -> None:
    remount = "subprocess.run(['mount', '-o', 'remount,{}', folder], check=True)"
    message = refused(
        tmp_path,
        "Mount the file system for writing, or choose another output_dir",
        before=private_mounts,
        setup=MOUNT,
        trouble=remount.format("ro"),
        end=remount.format("rw"),
    )
    assert "Read-only file system" in message


def test_a_folder_without_permission() -> None:
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which only its owner may enter
        os.chmod(folder, 0o777)
        message = refused(
            Path(folder),
            "Make the folder writable for this user, or choose another output_dir",
            setup="os.getuid() or os.setuid(65534)  # root may write everywhere",
            trouble="made.folder.chmod(0o555)",
            end="made.folder.chmod(0o755)",
        )
    assert "Permission denied" in message


def test_a_failure_after_the_rename_says_that_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    made.save("a", {}, {}, wait=True)

    def failing(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as broken:
        broken.setattr(store, "delete", failing)
        made.save("b", {}, {})
        with pytest.raises(CheckpointError, match="'b' is saved, but older .* b is intact. Make"):
            made.wait()
    assert made.sweep() == [".a.removed"]
    assert os.listdir(made.folder) == ["b"]


def test_checkpoints_on_another_device(tmp_path: Path) -> None:
    """A link to another file system, as people make where the first one is small."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on another device")
    with tempfile.TemporaryDirectory(dir=shared) as elsewhere:
        (tmp_path / "checkpoints").symlink_to(elsewhere)
        made = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
        (tmp_path / ".config.json.partial").write_text("")
        for name in ("a", "b", "b"):
            made.save(name, {"policy": {"w": torch.ones(3)}}, {}, wait=True)
        assert os.listdir(elsewhere) == ["b"]
        assert made.sweep() == [".config.json.partial"]
        assert verify(made.folder / "b").tensors("policy").keys() == {"w"}


def test_a_rename_across_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = CheckpointStore(tmp_path / "checkpoints")
    made.save("a", {}, {}, wait=True)

    def failing(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    with monkeypatch.context() as broken:
        broken.setattr(os, "rename", failing)
        made.save("b", {}, {})
        with pytest.raises(CheckpointError) as caught:
            made.close()
    assert str(caught.value).endswith(
        "'. a is intact. Choose an output_dir that lies on one file system"
    )
    assert "Invalid cross-device link" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert os.listdir(made.folder) == ["a"]
