"""bench/compare_commits.py: what it calls a difference."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

FILE = Path(__file__).parents[2] / "bench" / "compare_commits.py"
ROWS = [
    {"iteration": 1, "reward": 0.1, "kl": 0.0, "seconds_update": 1.0},
    {"iteration": 2, "reward": 0.3, "kl": None, "seconds_update": 1.0},
]


@pytest.fixture(scope="module")
def commits():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("compare_commits", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def write(out, rows=ROWS, weight=0.5, response="3"):
    """A run named "grpo" in the folder `out`, which is returned."""
    (out / "grpo" / "model" / "critic").mkdir(parents=True)
    (out / "grpo" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"iteration": 1, "response": response}
    (out / "grpo" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    state = {"weight": torch.tensor([1.0, weight])}
    save_file(state, out / "grpo" / "model" / "critic" / "value_head.safetensors")
    return out


def changed(**values):
    return [ROWS[0], {**ROWS[1], **values}]


def test_times_may_differ_and_nothing_else(commits, tmp_path, capsys):
    before = write(tmp_path / "before")
    after = write(tmp_path / "after", changed(seconds_update=2.0))
    assert commits.report(before, after, commits.ALLOWED)
    out = capsys.readouterr().out
    assert "every number of 1 scenarios is the same" in out and "seconds* differs" in out


@pytest.mark.parametrize(
    ("hurt", "named"),
    [
        ({"rows": changed(reward=0.30000000000000004)}, "iteration 2, reward: 0.3 before"),
        ({"rows": [{**ROWS[0], "kl": -0.0}, ROWS[1]]}, "iteration 1, kl: 0.0 before, -0.0 after"),
        ({"rows": changed(new=1.0)}, "iteration 2, new: absent before, 1.0 after"),
        ({"rows": ROWS[:1]}, "iteration 2, iteration: 2 before, absent after"),
        ({"weight": 0.5 + 2**-24}, "weights, model/critic/value_head.safetensors:weight"),
        ({"response": "4"}, 'sample 0, response: "3" before, "4" after'),
    ],
)
def test_the_first_difference_is_named(commits, tmp_path, capsys, hurt, named):
    before, after = write(tmp_path / "before"), write(tmp_path / "after", **hurt)
    assert not commits.report(before, after, commits.ALLOWED)
    out = capsys.readouterr().out
    assert f"grpo: {named}" in out and "DIFFER" in out


def test_a_renamed_metric_is_accepted_where_it_is_allowed(commits, tmp_path, capsys):
    rows = [{("kl_ref" if k == "kl" else k): v for k, v in row.items()} for row in ROWS]
    before, after = write(tmp_path / "before"), write(tmp_path / "after", rows)
    assert not commits.report(before, after, commits.ALLOWED)
    out = capsys.readouterr().out
    assert "iteration 1, kl: 0.0 before, absent after; then kl_ref" in out
    assert commits.report(before, after, {**commits.ALLOWED, "kl": "renamed", "kl_ref": "renamed"})


def test_a_scenario_that_failed_on_both_sides_is_not_the_same(commits, tmp_path, capsys):
    sides = [write(tmp_path / side) for side in ("before", "after")]
    for side in sides:
        (side / "grpo.failed").write_text("Traceback\nValueError: no such option\n")
    assert not commits.report(*sides, commits.ALLOWED)
    assert "ValueError: no such option" in capsys.readouterr().out


def test_a_run_that_wrote_nothing_is_not_the_same(commits, tmp_path):
    for side in ("before", "after"):
        (tmp_path / side / "grpo").mkdir(parents=True)
    assert not commits.report(tmp_path / "before", tmp_path / "after", commits.ALLOWED)
    (tmp_path / "empty").mkdir()
    assert not commits.report(tmp_path / "empty", tmp_path / "empty", commits.ALLOWED)
