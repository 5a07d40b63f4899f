"""Run files are strict JSON, trackers get real data, and phases account for the whole iteration."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from fastppo.checkpoint import CheckpointError
from fastppo.training import metrics
from fastppo.training.metrics import MetricsWriter, PhaseTimer, check_report_to


def strict_lines(path: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def test_rows_are_strict_json_with_null_for_nan_and_infinity(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.log({"iteration": 1, "reward": math.nan, "kl": math.inf, "entropy": -math.inf})
        writer.log({"iteration": np.int64(2), "reward": np.float32(0.5), "kl": torch.tensor(0.25)})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"iteration": 1, "reward": None, "kl": None, "entropy": None},
        {"iteration": 2, "reward": 0.5, "kl": 0.25},
    ]


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.log({"iteration": 1, "reward": 0.0})
        assert len(strict_lines(tmp_path / "metrics.jsonl")) == 1
        writer.samples(1, [{"prompt": "a", "response": "b", "reward": 1.0}])
        assert len(strict_lines(tmp_path / "samples.jsonl")) == 1


def test_samples_keep_every_text_exactly(tmp_path: Path) -> None:
    texts = [
        "two\nlines",
        "\u2028 separator",
        "\x00\x1b[31m",
        "日本語 🎉",
        'quote " and \\',
        "\ud800",
    ]
    rows = [{"prompt": t, "response": t, "reward": None, "extra": [math.nan]} for t in texts]
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.samples(7, rows)
    read = strict_lines(tmp_path / "samples.jsonl")
    assert [row["response"] for row in read] == texts
    assert read[0] == {
        "iteration": 7,
        "prompt": texts[0],
        "response": texts[0],
        "reward": None,
        "extra": [None],
    }


def test_reopening_appends_and_drops_a_line_a_crash_left_unfinished(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.log({"iteration": 1, "reward": 0.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2, "rew')
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.log({"iteration": 2, "reward": 1.0})
    assert [row["iteration"] for row in strict_lines(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "line", [b"", b"\0\0", b'{"iteration": 1', b"[1]", b'{"reward": 1}', b'{"iteration": "\xe9"}']
)
def test_a_line_that_is_no_row_is_named_and_left(tmp_path: Path, line: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"iteration": 1}\n' + line + b"\n")
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 2: expected a JSON object"):
        MetricsWriter(tmp_path, [], {}, "run", last_iteration=3)
    assert file.read_bytes() == before


def test_bad_rows_are_refused_by_name(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        with pytest.raises(ValueError, match="iteration"):
            writer.log({"reward": 1.0})
        with pytest.raises(TypeError, match="'kl'.*'high'"):
            writer.log({"iteration": 1, "kl": "high"})  # type: ignore[dict-item]  # the point
    assert strict_lines(tmp_path / "metrics.jsonl") == []


def test_trackers_that_are_not_installed_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fastppo\[wandb\]'"):
        check_report_to(["wandb"])
    with pytest.raises(TypeError, match=r"\['wandb'\]"):
        check_report_to("wandb")


def test_a_folder_of_runs_is_not_taken_for_the_package(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(ValueError, match="not installed"):
        check_report_to(["trackio"])


@pytest.mark.parametrize("last", [0, 2], ids=["from-the-beginning", "from-the-third"])
@pytest.mark.parametrize("again", [False, True], ids=["rewound", "opened-again"])
def test_tensorboard_shows_a_repeated_iteration_once(
    last: int, again: bool, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def open_writer(last: int) -> MetricsWriter:
        return MetricsWriter(tmp_path, ["tensorboard"], {}, "run", last_iteration=last)

    writer = open_writer(0)
    for iteration in (1, 2, 3, 4):
        writer.log({"iteration": iteration, "reward": 1.0})
    if again:
        writer.close()
        time.sleep(1.01)  # files are read in the order of their names, which hold the second
        writer = open_writer(last)
    else:
        writer.rewind(last)
    for iteration in range(last + 1, 6):
        writer.log({"iteration": iteration, "reward": 2.0})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("reward")]
    assert shown == [(i, 1.0 if i <= last else 2.0) for i in (1, 2, 3, 4, 5)]
    assert [row["reward"] for row in map(json.loads, lines_of(tmp_path))] == [v for _, v in shown]


def lines_of(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


def test_tensorboard_event_files_hold_the_finite_values(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, ["tensorboard"], {"seed": 3, "path": Path("x")}, "run") as writer:
        for iteration in (1, 2, 3):
            kl = math.nan if iteration == 2 else 0.5
            writer.log({"iteration": iteration, "reward/correct": iteration / 4, "kl": kl})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/correct")] == [
        (1, 0.25),
        (2, 0.5),
        (3, 0.75),
    ]
    assert [e.step for e in events.Scalars("kl")] == [1, 3]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"seed": 3' in text


def test_wandb_offline_run_is_written(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsWriter(tmp_path, ["wandb"], {"seed": 3}, "a-name") as writer:
        writer.log({"iteration": 1, "reward": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


class Clock:
    """Seconds that pass only when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_phases_add_up_to_the_wall_time() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for phase in ("rollout", "reward", "update", "rollout"):
        with timer(phase):
            clock.sleep(0.25)
    assert timer.elapsed == 1.0
    assert timer.take() == {
        "seconds_rollout": 0.5,
        "seconds_reward": 0.25,
        "seconds_update": 0.25,
    }
    assert timer.elapsed == 0.0
    assert timer.take() == {}


def test_a_phase_inside_another_is_not_counted_twice_nor_time_outside_any() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    clock.sleep(4.0)
    with timer("update"):
        clock.sleep(0.5)
        with timer("evaluate"):
            clock.sleep(2.0)
        with pytest.raises(RuntimeError, match="'update'"):
            timer.take()
    assert timer.elapsed == 6.5
    assert timer.take() == {"seconds_update": 0.5, "seconds_evaluate": 2.0}


def test_a_phase_that_raises_is_closed_and_counted() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(KeyError), timer("reward"):
        clock.sleep(0.5)
        raise KeyError
    assert timer.take() == {"seconds_reward": 0.5}


def test_the_real_clock_runs() -> None:
    timer = PhaseTimer()
    with timer("pack"):
        time.sleep(0.01)
    assert timer.take()["seconds_pack"] >= 0.01


def test_a_profiler_sees_the_phases() -> None:
    timer = PhaseTimer()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler, timer("advantages"):
        torch.ones(2).sum()
    assert "advantages" in {event.key for event in profiler.key_averages()}


def test_phases_may_be_marked_otherwise() -> None:
    marked: list[str] = []

    @contextmanager
    def mark(phase: str) -> Iterator[None]:
        marked.append(f"open {phase}")
        yield
        marked.append(f"close {phase}")

    timer = PhaseTimer(mark=mark)
    with timer("update"), timer("pack"):
        marked.append("work")
    assert marked == ["open update", "open pack", "work", "close pack", "close update"]


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    row = {"iteration": 1, "reward/a\u2028b\x85c\x1cd": 0.5}
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.log(row)
        assert writer.rows() == [row]
    with MetricsWriter(tmp_path, [], {}, "run", last_iteration=1) as writer:
        assert writer.rows() == [row]
