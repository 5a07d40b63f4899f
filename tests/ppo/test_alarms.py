"""Warnings about a policy that runs away: when they come, and what a person finds afterwards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastppo import PPOConfig
from fastppo.checkpoint import verify
from fastppo.ppo.alarms import Alarms

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
