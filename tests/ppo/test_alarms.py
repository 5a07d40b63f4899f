"""Warnings about a policy that runs away: when they come, and what a person finds afterwards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastppo import PPOConfig
from fastppo.checkpoint import verify
from fastppo.checkpoint.format import _render
from fastppo.ppo.alarms import STREAK, Alarms

Command = Callable[..., Any]
CALM = {"approx_kl": 0.1, "kl": 0.1, "entropy": 2.0}


def raised(alarms: Alarms, **figures: float) -> list[str]:
    return [alarm.keep for alarm in alarms.check(CALM | figures)]


@pytest.fixture
def alarms() -> Alarms:
    return Alarms(PPOConfig(kl_warning=1.0, entropy_warning=0.01))


@pytest.mark.parametrize("name", ["approx_kl", "kl"])
def test_a_kl_beyond_the_limit_is_raised_once(name: str, alarms: Alarms) -> None:
    assert raised(alarms) == []
    assert raised(alarms, **{name: 1.0}) == []  # at the limit, not beyond
    assert raised(alarms, **{name: 1.1}) == ["kl"]
    assert raised(alarms, **{name: 5.0}) == []
    assert alarms.raised == ["kl"]
    assert raised(alarms) == [] == alarms.raised
    assert raised(alarms, **{name: math.inf}) == ["kl"]


def test_an_entropy_below_the_limit_is_raised_once(alarms: Alarms) -> None:
    assert raised(alarms, entropy=0.01) == []
    assert raised(alarms, entropy=0.009) == ["entropy"]
    assert raised(alarms, entropy=0.0) == []
    assert raised(alarms, entropy=0.02) == []
    assert raised(alarms, entropy=0.0) == ["entropy"]


def test_each_alarm_is_on_its_own(alarms: Alarms) -> None:
    assert raised(alarms, kl=2.0) == ["kl"]
    assert raised(alarms, kl=2.0, entropy=0.0) == ["entropy"]
    assert raised(alarms, entropy=0.0) == []
    assert raised(alarms, kl=2.0, entropy=0.0) == ["kl"]
    assert alarms.raised == ["kl", "entropy"]


def test_a_message_names_the_worse_figure_and_what_to_do(alarms: Alarms) -> None:
    (alarm,) = alarms.check(CALM | {"approx_kl": 1.5, "kl": 2.25})
    assert alarm.text == (
        "kl = 2.25 nats per token (kl_warning = 1): the policy moved very far. "
        "Lower learning_rate, or set target_kl"
    )
    (alarm,) = alarms.check(CALM | {"entropy": 0.004})
    assert alarm.text.startswith("entropy = 0.004 nats per token (entropy_warning = 0.01)")


def test_figures_that_are_missing_raise_nothing(alarms: Alarms) -> None:
    assert raised(alarms, kl=math.nan, approx_kl=math.nan, entropy=math.nan) == []
    assert raised(alarms, kl=math.nan, approx_kl=2.0) == ["kl"]


def test_0_is_off() -> None:
    off = Alarms(PPOConfig(kl_warning=0.0, entropy_warning=0.0))
    assert raised(off, kl=math.inf, approx_kl=9.0, entropy=-1e-9) == [] == off.raised


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("truncated", {"truncated": 1.0}, {"truncated": 0.9}),
        ("critic", {"explained_variance": -1.1}, {"explained_variance": -0.9}),
    ],
)
def test_a_lack_that_lasts_is_said_once(
    name: str, bad: dict[str, float], good: dict[str, float], alarms: Alarms
) -> None:
    assert [len(alarms.check(CALM | bad)) for _ in range(STREAK + 3)] == [0] * 9 + [1] + [0] * 3
    assert alarms.raised == [name]
    assert alarms.check(CALM | good) == [] and alarms.raised == [] and alarms.streaks == {}
    assert not any(alarms.check(CALM | bad) for _ in range(STREAK - 1))


@pytest.mark.parametrize(
    ("advantage", "scores", "name"),
    [
        ("gae", [1, 1, 1, 1], "flat"),
        ("gae", [1, 1, math.nan, 1], "flat"),
        ("gae", [1, 1, 2, 2], None),
        ("reinforce", [1, 1, 2, 2], None),
        ("grpo", [1, 1, 2, 2], "flat"),  # no two answers to one prompt differ
        ("rloo", [1, math.nan, 2, 2], "flat"),
        ("rloo", [1, 2, 2, 2], None),
        ("grpo", [math.nan] * 4, "unscored"),
    ],
)
def test_scores_that_never_vary_are_said_once(
    advantage: str, scores: list[float], name: str | None
) -> None:
    alarms = Alarms(PPOConfig(advantage=advantage, n_samples=2))  # type: ignore[arg-type]
    given = np.array(scores, np.float32)
    said = [notice.text for _ in range(STREAK + 5) for notice in alarms.check(CALM, given)]
    assert len(said) == (name is not None) and alarms.raised == ([name] if name else [])


def test_many_samples_that_are_not_finite_are_said_at_once(alarms: Alarms) -> None:
    assert raised(alarms, dropped=0.5, unscored=0.0) == []
    assert raised(alarms, dropped=1.0, unscored=0.6) == []
    assert raised(alarms, dropped=0.6, unscored=0.0) == ["dropped"]
    assert raised(alarms, dropped=0.6, unscored=0.0) == []


@pytest.mark.parametrize("old", [False, True], ids=["this version", "without streaks"])
def test_a_streak_goes_on_after_a_resumption(old: bool, project: Path, command: Command) -> None:
    """The alarm comes after ten iterations, six of them in another process."""
    (project / "rewards.py").write_text("def larger(completions): return [1.0] * len(completions)")
    options = ("train", "--config", "run.toml", "--output-dir", "run", "--reward-workers", "0")
    constant = ("--lr-schedule", "constant", "--eval-interval", "0", "--sample-interval", "0")
    done = command(project, *options, *constant, "--num-iterations", "6")
    assert done.status == 0 and "all scores within an iteration were equal" not in done.out
    if old:
        folder = project / "run" / "checkpoints" / "iteration-000006"
        state = json.loads((folder / "state.json").read_text())
        assert state.pop("alarm_streaks") == {"flat": 6}
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        text = (folder / "state.json").read_bytes()
        digest = hashlib.sha256(text).hexdigest()
        manifest["files"]["state.json"] = {"sha256": digest, "size": len(text)}
        del manifest["sha256"]
        (folder / "manifest.json").write_bytes(_render(manifest))
    done = command(project, *options, *constant, "--num-iterations", "12", "--resume")
    assert done.status == 0 and "passed over" not in done.out, done.err
    assert done.out.count("all scores within an iteration were equal") == (not old)


def test_a_run_shows_an_alarm_and_keeps_the_batch(project: Path, command: Command) -> None:
    options = ("--reward-workers", "0", "--num-iterations", "3", "--eval-interval", "0")
    limits = ("--kl-warning", "1e-9", "--entropy-warning", "100")
    done = command(
        project, "train", "--config", "run.toml", "--output-dir", "run", *options, *limits
    )
    assert done.status == 0, done.err
    rows = [json.loads(x) for x in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["approx_kl"] > 1e-9 for row in rows)  # beyond in every iteration, raised once
    dumps = project / "run" / "dumps"
    names = ["iteration-000001-entropy", "iteration-000001-kl"]
    assert sorted(path.name for path in dumps.iterdir()) == names
    for name in ("kl", "entropy"):
        kept = dumps / f"iteration-000001-{name}"
        assert done.out.count(f"nats per token ({name}_warning = ") == 1
        assert f"The batch is kept in {kept}" in done.out
    lines = (project / "run" / "samples.jsonl").read_text().splitlines()
    samples = [row for row in map(json.loads, lines) if row["iteration"] == 1]
    kept = verify(dumps / "iteration-000001-kl")
    assert kept.state["samples"] == samples and len(samples) == 8
    assert kept.groups == ["iteration"]  # no weights: it is for reading
    assert kept.tensors("iteration")["batch/advantages"].isfinite().all()
    assert kept.state["iteration"]["row"]["approx_kl"] == rows[0]["approx_kl"]
