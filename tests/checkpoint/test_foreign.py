"""What else may be under the names that a run writes to: nothing outside its directory changes."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fastppo.checkpoint import RunInUseError, lock_run_dir, write_json
from fastppo.checkpoint.durable import ForeignFileError, own, write_file
from fastppo.checkpoint.lock import check_in_place
from fastppo.checkpoint.run_dir import FILES, FOLDERS
from fastppo.reporting.report import write_curve_png, write_report
from fastppo.training.metrics import MetricsWriter


def socket_at(path: Path, other: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(path.parent)  # such a name has at most 107 bytes
        listening.bind(path.name)


KINDS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "link": ("a symbolic link", lambda path, other: path.symlink_to(other)),
    "dangling": ("a symbolic link", lambda path, other: path.symlink_to(other.parent / "none")),
    "hard-link": ("(a hard link)", lambda path, other: os.link(other, path)),
    "fifo": ("a FIFO", lambda path, other: os.mkfifo(path)),
    "socket": ("a FIFO, a socket or a device", socket_at),
    "folder": ("a folder", lambda path, other: path.mkdir()),
}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A file outside of the run directory."""
    path = tmp_path / "other"
    path.write_text('{"iteration": 9}\nprecious')
    (tmp_path / "run").mkdir()
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".lock", *FILES])
def test_a_file_that_is_not_the_runs_is_refused_by_name(
    tmp_path: Path, other: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, (what, put) = tmp_path / "run" / name, KINDS[kind]
    put(path, other)
    before = other.read_bytes(), os.lstat(path), len(os.listdir("/dev/fd"))
    with pytest.raises(ForeignFileError) as refused:
        lock_run_dir(tmp_path / "run")
    assert str(refused.value).startswith(f"{path}: expected a file of the run's own, got ")
    assert what in str(refused.value) and "\n" not in str(refused.value)
    assert (other.read_bytes(), os.lstat(path), len(os.listdir("/dev/fd"))) == before
    assert {p.name for p in path.parent.iterdir()} <= {name, ".lock"}
    assert not (tmp_path / "none").exists()
    path.rmdir() if kind == "folder" else path.unlink()
    lock_run_dir(tmp_path / "run").lock.release()  # nothing is locked any more


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo"])
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_the_runs_is_refused_by_name(
    tmp_path: Path, other: Path, name: str, kind: str
) -> None:
    path, outside = tmp_path / "run" / name, tmp_path / "outside"
    outside.mkdir()
    if kind == "file":
        path.write_text("notes")
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(outside if kind == "link" else tmp_path / "none")
    with pytest.raises(ForeignFileError, match=f"{path}: expected a folder of the run's own, got"):
        lock_run_dir(tmp_path / "run")
    assert not list(outside.iterdir()) and os.path.lexists(path)


def test_what_is_not_a_name_of_the_run_may_be_anything(tmp_path: Path, other: Path) -> None:
    (tmp_path / "run" / "notes").symlink_to(other)
    (tmp_path / "run" / "slurm.out").hardlink_to(other)
    (tmp_path / "run" / "dumps").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    lock_run_dir(tmp_path / "link").lock.release()


# Put there after the lock was taken: what opens looks again.


@pytest.mark.parametrize("flags", ["w", "a", "r+"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_opened_for_writing_that_is_not_the_runs(
    tmp_path: Path, other: Path, kind: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path, before = tmp_path / "run" / "x", other.read_bytes()
    KINDS[kind][1](path, other)
    with pytest.raises(ForeignFileError, match=f"{path}: expected a file"):
        open(path, flags, opener=own).close()
    assert other.read_bytes() == before


def test_an_own_file_is_opened_as_without_a_look(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for mode, text, content in (("w", "one", "one"), ("a", "two", "onetwo"), ("w", "3", "3")):
        with open(path, mode, opener=own) as file:
            file.write(text)
        assert path.read_text() == content
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    with pytest.raises(FileNotFoundError):
        open(tmp_path / "none", opener=own).close()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl"])
def test_metrics_do_not_shorten_a_file_elsewhere(tmp_path: Path, other: Path, name: str) -> None:
    (tmp_path / "run" / name).hardlink_to(other)
    before = other.read_bytes()  # its last line has no end, and its first is of a later iteration
    with pytest.raises(ForeignFileError, match=name):
        MetricsWriter(tmp_path / "run", (), {}, "run", last_iteration=1)
    assert other.read_bytes() == before


def test_a_name_for_something_unfinished_is_not_written_through(
    tmp_path: Path, other: Path
) -> None:
    run, before = tmp_path / "run", other.read_bytes()
    (run / "metrics.jsonl").write_text('{"iteration": 1, "reward": 0.5}\n')
    for name in ("config.json", "report.html", "reward.png"):
        (run / f".{name}.partial").symlink_to(other)
        (run / name).symlink_to(other)
    write_json(run / "config.json", {"a": 1})
    write_report(run)
    write_curve_png(run)
    assert other.read_bytes() == before
    for name in ("config.json", "report.html", "reward.png"):
        assert not (run / name).is_symlink() and (run / name).stat().st_size > 5
    (run / "new").symlink_to(tmp_path / "none")
    with pytest.raises(FileExistsError):
        write_file(run / "new", b"x")
    assert not (tmp_path / "none").exists()


# A directory that goes away while it is locked


@pytest.mark.parametrize("how", ["moved", "removed", "replaced"])
def test_a_run_that_was_moved_writes_no_more_where_it_was(tmp_path: Path, how: str) -> None:
    run = tmp_path / "run"
    with lock_run_dir(run):
        lock = os.lstat(run / ".lock")
        check_in_place(run, lock)
        shutil.rmtree(run) if how == "removed" else run.rename(tmp_path / "moved")
        if how == "replaced":
            lock_run_dir(run).lock.release()
        with pytest.raises(RunInUseError, match=f"^output_dir: '{run}' was moved or removed"):
            check_in_place(run, lock)
