"""What stands beside an option: limits, the condition of an effect, the string under it."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import pytest

from fastppo.cli.groups import docstrings
from fastppo.cli.profile import ProfileConfig
from fastppo.options import Options, choices, holds, option, within
from fastppo.ppo.config import PPOConfig, TrainConfig
from fastppo.training.resume import may_differ

MINIMAL: dict[str, Any] = {"model": "m", "dataset": "d.jsonl", "reward": ("r.py:f",)}
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
LIMITED = {name: about for name, f in FIELDS.items() if (about := f.metadata.get("limits"))}
NEEDING = {name: about for name, f in FIELDS.items() if (about := f.metadata.get("only_if"))}
# What makes a condition false that the defaults fulfil; the others are false by default.
BROKEN: dict[str, dict[str, Any]] = {
    'advantage = "gae"': {"advantage": "reinforce"},
    "kl_coef > 0": {"kl_coef": 0.0},
    "reward_workers ≥ 1": {"reward_workers": 0},
    "save_interval ≥ 1": {"save_interval": 0},
    'precision ≠ "fp32"': {"precision": "fp32"},
    'reference = "auto"': {"reference": "copy"},
}


def values_of(name: str) -> tuple[Any, ...]:
    """Values of an option's type, not all of them within its limits."""
    if name in choices(TrainConfig):
        return choices(TrainConfig)[name]
    kind = str(FIELDS[name].type)
    numbers = (-1.0, 0.0, 0.25, 1.0, 3.0, math.inf, math.nan)
    if kind.startswith("tuple[float"):
        return tuple((number, number) for number in numbers)
    return (True, False) if kind == "bool" else ("x",) if kind == "str" else numbers


def is_within(name: str, value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return value is None or all(within(part, LIMITED[name]) for part in parts if name in LIMITED)


def test_every_option_is_limited_or_one_of_a_few_or_a_name() -> None:
    free = FIELDS.keys() - LIMITED.keys() - choices(TrainConfig).keys()
    assert {str(FIELDS[name].type) for name in free} == {"bool", "str", "tuple[str, ...]"}


@pytest.mark.parametrize("name", LIMITED)
def test_limits_admit_the_default_and_refuse_what_is_outside(name: str) -> None:
    assert is_within(name, FIELDS[name].default)
    outside = [value for value in values_of(name) if not is_within(name, value)]
    assert outside
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            TrainConfig(**{**MINIMAL, name: value})


@pytest.mark.parametrize("name", choices(TrainConfig))
def test_an_unknown_word_is_refused(name: str) -> None:
    value = ("nonsense",) if str(FIELDS[name].type).startswith("tuple") else "nonsense"
    with pytest.raises(ValueError, match=f"^{name}: expected one of .*nonsense"):
        TrainConfig(**{**MINIMAL, name: value})


@pytest.mark.parametrize("name", NEEDING)
def test_an_option_whose_condition_fails_is_refused(name: str) -> None:
    field, need = FIELDS[name], NEEDING[name]
    other = next(v for v in values_of(name) if is_within(name, v) and v != field.default)
    broken = BROKEN.get(need, {})
    config = TrainConfig(**MINIMAL, **broken)
    assert not holds(config, need)
    with pytest.raises(ValueError, match=rf"^{name} = .* no effect: it needs {re.escape(need)}"):
        dataclasses.replace(config, **{name: other})


@pytest.mark.parametrize("name", ["model", "dataset", "reward"])
def test_what_is_required_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        TrainConfig(**{**MINIMAL, name: type(MINIMAL[name])()})


def test_every_option_has_a_string_under_it() -> None:
    for kind in (PPOConfig, TrainConfig, ProfileConfig):
        assert docstrings(kind).keys() == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    ("limits", "inside", "outside"),
    [
        ("≥ 1", [1, 2], [0.5, math.inf, math.nan]),
        ("> 0", [1e-9], [0, math.inf, math.nan]),
        ("(0, 1]", [0.5, 1], [0, 1.5]),
        ("[0, 1)", [0, 0.5], [-0.1, 1]),
        ("(1, ∞]", [2, math.inf], [1, math.nan]),
        ('= "a"', ["a"], ["b", None]),
        ("≠ None", [0, ""], [None]),
    ],
)
def test_limits(limits: str, inside: list[Any], outside: list[Any]) -> None:
    assert all(within(value, limits) for value in inside)
    assert not any(within(value, limits) for value in outside)


def test_classes_are_checked_on_their_own_and_together() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Left(Options):
        left: int = option(1, "≥ 1")

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Both(Left):
        right: int = option(0, "≥ 0", only_if="left > 1")

    assert (Both(left=2, right=3).left, Both(left=2, right=3).right) == (2, 3)
    for options, name in (({"left": 0}, "left"), ({"right": -1}, "right"), ({"right": 1}, "right")):
        with pytest.raises(ValueError, match=f"^{name}"):
            Both(**options)


# A user's own configuration


def test_a_class_made_in_a_function_may_have_options_of_types_found_only_there() -> None:
    @dataclasses.dataclass(frozen=True)
    class Local:
        size: int = 1

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(PPOConfig):
        local: Local | None = None

    assert Mine(local=Local(2)).local == Local(2)
    with pytest.raises(ValueError, match="^advantage: expected"):
        Mine(advantage="gea")  # type: ignore[arg-type]


def test_another_default_keeps_limits_condition_and_what_may_differ() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(PPOConfig):
        kl_coef: float = 0.1
        kl_horizon: int = 500
        kl_warning: float = 2.0

    with pytest.raises(ValueError, match="^kl_coef: expected"):
        Mine(kl_coef=-3.0)
    with pytest.raises(ValueError, match="^kl_horizon = 7 would have no effect"):
        Mine(kl_horizon=7)
    assert "kl_warning" in may_differ(Mine())


@pytest.mark.parametrize("name", ["learning_rate", "gamma", "advantage", "num_iterations"])
def test_none_is_no_value_where_none_is_foreseen(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a value, got None"):
        PPOConfig(**{name: None})
    assert PPOConfig(critic_lambda=None, critic=None).critic_lambda is None
