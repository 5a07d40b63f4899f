"""lock_run_dir: one process per run directory, on real processes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastppo.checkpoint import RunInUseError, lock_run_dir

PROGRAM = """
import os, sys, time
from pathlib import Path
from fastppo.checkpoint import lock_run_dir
{body}
print("ready", flush=True)
sys.stdin.read()
"""
LOCK = "lock = lock_run_dir(Path(sys.argv[1]))"
# What a pool of reward workers is: forked while the lock is held, alive after its holder.
LOCK_AND_FORK = (
    f"{LOCK}\nchild = os.fork()\nif not child:\n    time.sleep(60)\nprint(child, flush=True)"
)


@contextmanager
def running(run_dir: Path, body: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process that has done `body` and waits, and what it printed before "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM.format(body=body), run_dir],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        lines = []
        while (line := process.stdout.readline()) != "ready\n":
            assert line, f"it ended early, after {lines}"
            lines.append(line)
        try:
            yield process, lines
        finally:
            process.kill()


def test_another_process_is_refused_until_the_holder_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, LOCK) as (process, _):
        for _ in range(2):
            with pytest.raises(ValueError) as caught:
                lock_run_dir(tmp_path)
            assert str(caught.value).startswith(
                f"output_dir: {str(tmp_path)!r} is in use by process {process.pid} "
                f"on {socket.gethostname()} since 20"
            )
            assert str(caught.value).endswith("or choose another folder")
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        with lock_run_dir(tmp_path):  # the file is still there
            assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


@pytest.mark.slow
def test_a_forked_process_does_not_keep_it(tmp_path: Path) -> None:
    with running(tmp_path, LOCK_AND_FORK) as (process, (line,)):
        child = int(line)
        try:
            process.send_signal(signal.SIGKILL)
            process.wait(20)
            os.kill(child, 0)  # alive
            lock_run_dir(tmp_path).lock.release()
        finally:
            os.kill(child, signal.SIGKILL)


FORK_AND_LOCK = f"""
{LOCK}
if os.fork() == 0:
    for _ in range(2):
        try:
            {LOCK}
        except ValueError as error:
            print(error, flush=True)
        lock.lock.release()
    os._exit(0)
os.wait()
"""


@pytest.mark.slow
def test_a_forked_process_neither_holds_nor_releases_it(tmp_path: Path) -> None:
    with running(tmp_path, FORK_AND_LOCK) as (process, lines):
        holder = f"in use by process {process.pid} on"
        assert len(lines) == 2 and all(holder in line for line in lines)
        with pytest.raises(ValueError, match=holder):
            lock_run_dir(tmp_path)


def test_twice_in_one_process(tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "run"
    lock = lock_run_dir(run_dir)
    (tmp_path / "link").symlink_to(run_dir)
    for path in (run_dir, tmp_path / "link"):
        with pytest.raises(ValueError, match="is in use by this process. Wait"):
            lock_run_dir(path)
    with lock_run_dir(tmp_path / "other"):
        lock.lock.release()
        lock.lock.release()
    with lock_run_dir(run_dir), pytest.raises(ValueError, match="this process"):
        lock_run_dir(run_dir)
    lock_run_dir(run_dir).lock.release()
    assert os.listdir(run_dir) == [".lock"]


def test_a_new_run_wants_the_folder_for_itself(tmp_path: Path) -> None:
    lock_run_dir(tmp_path, new=True).lock.release()
    lock_run_dir(tmp_path, new=True).lock.release()  # a lock alone is no run
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RunInUseError, match="^output_dir: .* now has metrics.jsonl"):
        lock_run_dir(tmp_path, new=True)
    lock_run_dir(tmp_path).lock.release()  # it is free


def test_a_lock_is_released_on_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock_run_dir(tmp_path):
        raise KeyError
    lock_run_dir(tmp_path).lock.release()


# What .lock may be besides a file of the run's own: other people write to shared folders.


def test_a_fifo_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".lock")
    program = PROGRAM.format(body=LOCK)
    command = [sys.executable, "-W", "ignore", "-c", program, tmp_path]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert done.returncode == 1 and f"{tmp_path}/.lock".encode() in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_refused_and_what_it_leads_to_is_left_alone(tmp_path: Path, exists: bool) -> None:
    other = tmp_path / "other"
    if exists:
        other.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").symlink_to(other)
    before = os.listdir("/dev/fd")
    with pytest.raises(ValueError, match=f"{tmp_path}/run/.lock: expected a file .* symbolic link"):
        lock_run_dir(tmp_path / "run")
    assert len(os.listdir("/dev/fd")) == len(before)
    assert (other.read_text() == "precious") if exists else not other.exists()


def test_a_hard_link_to_another_file_leaves_that_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("precious")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "other", tmp_path / "run/.lock")
    with pytest.raises(ValueError, match=".lock: expected a file .* hard link"):
        lock_run_dir(tmp_path / "run")
    assert (tmp_path / "other").read_text() == "precious"


@pytest.mark.slow
def test_a_copy_of_a_run_by_hard_links_does_not_give_its_lock_away(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    copy.mkdir()
    link = f"os.link({str(run / '.lock')!r}, {str(copy / '.lock')!r})  # cp -al"
    again = f"try: lock_run_dir(Path({str(copy)!r}))\nexcept ValueError as e: print(e, flush=True)"
    with running(run, f"{LOCK}\n{link}\n{again}") as (process, lines):
        assert "hard link" in lines[0]
        for folder in (copy, run):
            with pytest.raises(ValueError, match="hard link"):
                lock_run_dir(folder)
        (copy / ".lock").unlink()
        with pytest.raises(ValueError, match=f"in use by process {process.pid} on"):
            lock_run_dir(run)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, command: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = os.listdir("/dev/fd")
    with monkeypatch.context() as broken:
        broken.setattr(fcntl, "flock", no_locks)
        with pytest.raises(OSError, match=f"No locks available: '{tmp_path}/.lock'"):
            lock_run_dir(tmp_path)
    assert len(os.listdir("/dev/fd")) == len(before)
    lock_run_dir(tmp_path).lock.release()
