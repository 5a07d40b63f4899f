"""CheckpointStore: what is saved comes back, in the background, pruned, from one process only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo import checkpoint
from fastppo.checkpoint import CheckpointError, CheckpointStore, durable, run_dir, store, verify

MIB = 1 << 20


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    return {"policy": {"w": torch.full((2, 3), float(step))}, "optimizer": {}}


def saved(folder: Path, *steps: int, **options: Any) -> CheckpointStore:
    """A store with checkpoints step-1, step-2, ... in it."""
    made = CheckpointStore(folder / "checkpoints", **options)
    for step in steps:
        made.save(f"step-{step}", tensors(step), {"step": step}, wait=True)
    return made


def names(made: CheckpointStore) -> list[str]:
    return sorted(os.listdir(made.folder))


def newest(made: CheckpointStore) -> str | None:
    found, _ = made.newest()
    return found and found.path.name


# What is saved comes back


def test_every_dtype_shape_and_layout_comes_back(tmp_path: Path) -> None:
    bits = torch.arange(256, dtype=torch.uint8)  # as bf16 and fp32: NaN, infinities, denormals too
    base = torch.arange(12.0).reshape(3, 4)
    group = {
        "bf16": bits.view(torch.bfloat16),
        "fp32": bits.flip(0).view(torch.float32),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.empty(0, 5),
        "transposed": base.T,
        "expanded": torch.ones(1).expand(7),
        "part": base[1:, ::2],
        "shared": base,
        "gradient": torch.ones(2, requires_grad=True),
    }
    made = CheckpointStore(tmp_path / "checkpoints")
    made.save("a", {"policy": group, "none": {}}, {}, wait=True)
    found = verify(made.folder / "a")
    back = found.tensors("policy")
    assert back.keys() == group.keys() and found.tensors("none") == {}
    for name, expected in group.items():
        assert back[name].dtype == expected.dtype and back[name].shape == expected.shape
        x, y = (t.detach().contiguous().flatten().view(torch.uint8) for t in (back[name], expected))
        assert torch.equal(x, y), name


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1 / 3, 1e22, 2.0],
        "integers": [0, -1, 2**63, 10**4000],
        "text": ["", 'a\n"\\\x00\u2028', "\ud800", "𝄞"],
        "nested": {"": {"none": None, "flag": True}},
    }
    made = CheckpointStore(tmp_path / "checkpoints")
    made.save("a", {}, state, wait=True)
    found, passed_over = made.newest()
    assert found is not None and passed_over == []
    assert repr(found.state) == repr(state)  # -0.0 == 0.0, True == 1, 2 == 2.0
    assert found.path == tmp_path / "checkpoints" / "a"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": [1.0, float("nan")]}, r"state\['a'\]\[1\]: .*got nan"),
        ({"a": {"b": -float("inf")}}, r"state\['a'\]\['b'\]: .*got -inf"),
        ({"a": {3: 4}}, r"state\['a'\]: .*got 3"),
        ({"a": (1, 2)}, r"state\['a'\]: .*got \(1, 2\)"),
        ({"a": torch.ones(1)}, r"state\['a'\]: .* or save it as a tensor"),
    ],
)
def test_state_that_would_come_back_different_is_refused(
    tmp_path: Path, state: dict[str, Any], message: str
) -> None:
    made = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=message):
        made.save("a", tensors(1), state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".a", "a/b", "..", "a.partial", "a b", "a\n"])
def test_names_are_plain(tmp_path: Path, name: str) -> None:
    made = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="^name: expected"):
        made.save(name, tensors(1), {})
    with pytest.raises(ValueError, match="^name: expected"):
        made.save("a", {name: {}}, {})
    with pytest.raises(ValueError, match="^score: expected"):
        made.save("a", {}, {}, score=float("nan"))
    with pytest.raises(ValueError, match="keep_last"):
        CheckpointStore(tmp_path, keep_last=0)
    assert list(tmp_path.iterdir()) == []


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a file critic\.safetensors, got \['opti"):
        verify(saved(tmp_path, 1).folder / "step-1").tensors("critic")


def test_nothing_in_a_checkpoint_is_pickled_and_all_files_can_be_read(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    files = sorted((made.folder / "step-1").iterdir())
    assert [f.name for f in files] == [
        *("manifest.json", "optimizer.safetensors", "policy.safetensors", "state.json")
    ]
    assert len({f.stat().st_mode for f in files}) == 1  # safetensors alone would make it 0600
    manifest = json.loads(files[0].read_text())
    assert manifest["format"] == 1 and manifest["name"] == "step-1"


# In the background


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Holds the writer back until it is set."""
    event, original = threading.Event(), store.fmt.write

    def held(*args: Any, **options: Any) -> None:
        assert event.wait(20)
        original(*args, **options)

    monkeypatch.setattr(store.fmt, "write", held)
    return event


def test_save_returns_at_once_with_a_snapshot(tmp_path: Path, gate: threading.Event) -> None:
    made, values, state = saved(tmp_path), tensors(1), {"steps": [1]}
    made.save("step-1", values, state)
    values["policy"]["w"].fill_(9.0)
    values["policy"]["new"] = torch.ones(1)
    state["steps"].append(9)
    made.check()
    assert newest(made) is None
    gate.set()
    made.wait()
    found = verify(made.folder / "step-1")
    assert found.state == {"steps": [1]}
    assert torch.equal(found.tensors("policy")["w"], torch.ones(2, 3))
    assert found.tensors("policy").keys() == {"w"}


def test_one_save_at_a_time(tmp_path: Path, gate: threading.Event) -> None:
    made = saved(tmp_path)
    made.save("step-1", tensors(1), {})
    second = threading.Thread(target=made.save, args=("step-2", tensors(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert len([t for t in threading.enumerate() if t.name == "fastppo-checkpoint"]) == 1
    gate.set()
    second.join(20)
    made.close()
    assert names(made) == ["step-1", "step-2"]
    assert not [t for t in threading.enumerate() if t.name == "fastppo-checkpoint"]


def test_an_error_is_raised_once_and_the_next_save_works(tmp_path: Path) -> None:
    made = saved(tmp_path)
    obstacle = tmp_path / "checkpoints"
    obstacle.write_text("")
    for raised_by in (made.check, made.wait, made.close):
        made.save("step-1", tensors(1), {})
        if raised_by == made.check:
            made._writer.join()
        with pytest.raises(CheckpointError, match="'step-1' could not be saved .*There is no earl"):
            raised_by()
        made.check()
        made.close()
    made.save("step-1", tensors(1), {})
    with pytest.raises(CheckpointError, match="'step-1' could not"):
        made.save("step-2", tensors(2), {})
    obstacle.unlink()
    made.save("step-3", tensors(3), {}, wait=True)
    assert names(made) == ["step-3"]


MEMORY = f"""
import sys, torch
from pathlib import Path
from fastppo.checkpoint import CheckpointStore
def memory(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 1024
values = {{"policy": {{str(i): torch.ones({MIB}) for i in range(32)}}}}  # 128 MiB
store = CheckpointStore(Path(sys.argv[1]), keep_last=1)
store.save("warm", {{"policy": {{"x": torch.ones(10)}}}}, {{}}, wait=True)
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
for name in "abc":
    store.save(name, values, {{}})
store.close()
print(memory("VmHWM") - before, memory("VmRSS") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_copy_in_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path],
        # A tensor's pages go back when it is freed, whatever lies next to it on the heap.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(MIB)},
        capture_output=True,
        text=True,
        check=True,
    )
    peak, left = map(float, done.stdout.split())  # MiB; a thread may leave its 8 MiB of stack
    assert 120 < peak < 128 + 40 and left < 40


@pytest.mark.gpu
def test_a_snapshot_of_cuda_tensors(tmp_path: Path) -> None:
    made = saved(tmp_path)
    x = torch.arange(float(16 * MIB), device="cuda")
    expected = x.cpu()
    made.save("a", {"policy": {"x": x, "t": x.view(4096, 4096).T}}, {})
    x.zero_()
    made.close()
    back = verify(made.folder / "a").tensors("policy")
    assert torch.equal(back["x"], expected)
    assert torch.equal(back["t"], expected.view(4096, 4096).T)


# Which ones stay


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    scores = [0.5, 0.9, None, 0.9, -1.0, 0.1]
    made = saved(tmp_path, keep_last=2, keep_best=2)
    for step, score in enumerate(scores):
        if step == 3:
            made = saved(tmp_path, keep_last=2, keep_best=2)  # scores outlive the process
        made.save(f"step-{step}", tensors(step), {}, score=score, wait=True)
    assert names(made) == ["step-1", "step-3", "step-4", "step-5"]
    made.save("step-6", tensors(6), {}, score=2.0, wait=True)
    assert names(made) == ["step-3", "step-5", "step-6"]


def test_a_run_that_went_back_drops_what_it_had_beyond(tmp_path: Path) -> None:
    """A later resume would take the abandoned ones for the newest."""
    made = saved(tmp_path, keep_last=4, keep_best=1)
    for step in (5, 7, 8, 9):
        made.save(f"step-{step}", tensors(step), {}, score=float(step), wait=True)
    made.save("step-6", tensors(6), {}, score=0.0, wait=True)
    assert names(made) == ["step-5", "step-6"]
    everything = saved(tmp_path / "dumps", 7, 8, 9, 1, keep_last=None)
    assert names(everything) == ["step-1", "step-7", "step-8", "step-9"]


def test_an_extra_one_stays_until_the_next_save(tmp_path: Path) -> None:
    made = saved(tmp_path, 1, 2, 3, keep_last=2)
    for name in ("step-3-extra", "step-3-later"):
        made.save(name, tensors(3), {}, extra=True, wait=True)
        assert names(made) == ["step-2", "step-3", name]
        assert newest(made) == name
        found, passed_over = made.newest(regular_until="step-3")
        assert found is not None and found.path.name == "step-3" and passed_over == []
        found, _ = made.newest(regular_until="step-2-any")
        assert found is not None and found.path.name == "step-2"
    saved(tmp_path, 4, keep_last=2)
    assert names(made) == ["step-3", "step-4"]
    assert made.newest(regular_until="step-1") == (None, [])


def test_an_extra_one_in_place_of_a_regular_one_is_regular(tmp_path: Path) -> None:
    made = saved(tmp_path, keep_last=1, keep_best=1)
    made.save("step-1", tensors(1), {}, score=1.0, wait=True)
    made.save("step-1", tensors(5), {"step": 5}, extra=True, wait=True)
    saved(tmp_path, 2, 3, keep_last=1, keep_best=1)
    assert names(made) == ["step-1", "step-3"]
    assert verify(made.folder / "step-1").state == {"step": 5}
    (tmp_path / "checkpoints" / "step-3" / "manifest.json").write_text("{}")
    made.save("step-3", tensors(3), {}, extra=True, wait=True)  # nothing to take over there
    made.save("step-4", tensors(4), {}, wait=True)
    assert names(made) == ["step-1", "step-4"]


def test_what_is_no_checkpoint_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    made = saved(tmp_path, 1, keep_last=1)
    (made.folder / "step-9").mkdir()
    (made.folder / "step-9" / "model.safetensors").write_text("")
    (made.folder / "step-8").write_text("")
    (made.folder / "step-5").symlink_to("step-2")
    (made.folder / ".keep").mkdir()
    saved(tmp_path, 2, keep_last=1)
    assert names(made) == [".keep", "step-2", "step-5", "step-8", "step-9"]
    found, passed_over = made.newest()
    assert found is not None and found.path.name == "step-2"
    assert passed_over == [
        "step-9: manifest.json is missing",
        "step-8: is not a folder",
        "step-5: is not a folder",
    ]


def test_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    made = saved(tmp_path, 1)
    made.save("step-1", tensors(5), {"step": 5}, wait=True)
    assert names(made) == ["step-1"]
    assert verify(made.folder / "step-1").state == {"step": 5}
    (made.folder / "step-1" / "state.json").unlink()
    made.save("step-1", tensors(6), {"step": 6}, wait=True)
    assert verify(made.folder / "step-1").state == {"step": 6}


def test_a_replacement_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, rename = saved(tmp_path, 1), os.rename

    def failing(source: Path, target: Path) -> None:
        if source.name == ".step-1.partial":
            raise OSError(18, "Invalid cross-device link", str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    made.save("step-1", tensors(2), {"step": 2})
    with pytest.raises(
        CheckpointError, match="step-1 is intact. Choose an output_dir that lies on"
    ):
        made.wait()
    assert names(made) == ["step-1"] and verify(made.folder / "step-1").state == {"step": 1}


# The start after a kill


def test_sweep_removes_leftovers_and_nothing_else(tmp_path: Path) -> None:
    made = saved(tmp_path, 1, 2)
    folder = made.folder
    (folder / "step-2").rename(folder / ".step-2.replaced")  # killed between two renames
    os.makedirs(folder / ".step-3.partial" / "x")
    (folder / ".step-0.removed").mkdir()
    (tmp_path / ".config.json.partial").write_text("{")
    (tmp_path / ".model.partial" / "critic").mkdir(parents=True)
    others = [tmp_path / name for name in ("config.json", ".x", "a.partial", ".lock", ".partial")]
    others += [folder / name for name in (".step-3.partials", ".a b.partial", ".removed", "x")]
    for path in others:
        path.write_text("")
    assert newest(made) == ".step-2.replaced"  # reading alone changes nothing
    assert sorted(made.sweep()) == [
        *(".config.json.partial", ".model.partial"),
        *(".step-0.removed", ".step-2.replaced", ".step-3.partial"),
    ]
    assert made.sweep() == []
    assert all(path.exists() for path in others)
    assert newest(made) == "step-2"
    assert {*names(made)} == {"step-1", "step-2", *(p.name for p in others if p.parent == folder)}


def test_an_empty_start(tmp_path: Path) -> None:
    made = saved(tmp_path)
    assert made.sweep() == [] and made.newest() == (None, [])
    made.check()
    made.close()
    assert list(tmp_path.iterdir()) == []
    message = "checkpoints/a is not a valid checkpoint: does not exist. Use another"
    with pytest.raises(CheckpointError, match=message):
        verify(made.folder / "a")


# Processes

FORKED = """
import os, sys, torch
from pathlib import Path
from fastppo.checkpoint import CheckpointError, CheckpointStore, durable, run_dir, store
original = store.fmt.write
go, asked = os.pipe()
def held(*args, **options):
    os.read(go, 1)
    original(*args, **options)
store.fmt.write = held
made = CheckpointStore(Path(sys.argv[1]))
made.save("a", {"policy": {"x": torch.ones(3)}}, {})
child = os.fork()
if child == 0:
    made.check(); made.wait(); made.close()
    refused = 0
    for write in (lambda: made.save("b", {}, {}), made.sweep):
        try:
            write()
        except CheckpointError as error:
            refused += "forked" in str(error)
    os._exit(refused)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
assert made.newest() == (None, [])
os.write(asked, b"x")
made.close()
print(made.newest()[0].path.name, sorted(os.listdir(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_forked_process_does_not_write(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED, tmp_path / "x"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout == "a ['a']\n"


def test_a_save_is_finished_when_the_program_ends_without_waiting(tmp_path: Path) -> None:
    program = (
        "import sys, torch\nfrom pathlib import Path\nfrom fastppo.checkpoint import *\n"
        "CheckpointStore(Path(sys.argv[1])).save('a', {'p': {'x': torch.ones(10_000_000)}}, {})"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "x"], check=True, timeout=60)
    assert checkpoint.verify(tmp_path / "x" / "a").state == {}


# What reaches the disk, and when


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that write, rename or synchronise, with the path below tmp_path, as they happen."""
    calls: list[str] = []

    def record(module: Any, name: str) -> None:
        original = getattr(module, name)

        def recorded(*args: Any, **options: Any) -> Any:
            path = next((arg for arg in args if isinstance(arg, Path)), None)
            calls.append(name if path is None else f"{name} {path.relative_to(tmp_path)}")
            return original(*args, **options)

        monkeypatch.setattr(module, name, recorded)

    for module, name in (
        *((store.fmt, n) for n in ("save_file", "write_file", "sync")),
        *((store, n) for n in ("sync", "delete")),
        *((run_dir, n) for n in ("write_file", "sync")),
        *((os, n) for n in ("rename", "replace", "write", "fsync")),
    ):
        record(module, name)
    return calls


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, log: list[str]) -> None:
    """A power cut loses what was not synchronised: the order of the calls is what protects."""
    made = saved(tmp_path, 1, 2)
    log.clear()
    made.save("step-3", tensors(3), {}, wait=True)
    partial = "checkpoints/.step-3.partial"
    assert log == [
        f"save_file {partial}/policy.safetensors",
        *(f"sync {partial}/policy.safetensors", "fsync"),
        f"save_file {partial}/optimizer.safetensors",
        *(f"sync {partial}/optimizer.safetensors", "fsync"),
        *(f"write_file {partial}/state.json", "write", "fsync"),
        *(f"write_file {partial}/manifest.json", "write", "fsync"),
        *(f"sync {partial}", "fsync"),
        f"rename {partial}",
        *("sync checkpoints", "fsync"),
        "rename checkpoints/step-1",
        *("sync checkpoints", "fsync"),
        "delete checkpoints/.step-1.removed",
    ]


def test_a_new_folder_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(durable, "sync", synced.append)
    durable.make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]


def test_write_json_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, log: list[str]) -> None:
    checkpoint.write_json(tmp_path / "x.json", {"a": [1, Path("b")]})
    assert log == [
        *("write_file .x.json.partial", "write", "fsync"),
        *("replace .x.json.partial", "sync .", "fsync"),
    ]
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1,\n    "b"\n  ]\n}\n'
