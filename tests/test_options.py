"""What stands beside an option: limits, the condition of an effect, the string under it."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from decimal import Decimal
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from fastppo.cli.groups import docstrings
from fastppo.cli.profile import ProfileConfig
from fastppo.options import Options, choices, described, holds, option, within
from fastppo.ppo.config import PPOConfig, TrainConfig
from fastppo.ppo.step import PPOStep
from fastppo.ppo.trainer import PPOTrainer
from fastppo.rewards.limits import RewardLimits
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
    if kind.startswith("int"):
        return (-1, 0, 1, 3)
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


NUMERIC = {n for n in LIMITED if "int" in str(FIELDS[n].type) or "float" in str(FIELDS[n].type)}


@pytest.mark.parametrize("name", sorted(NUMERIC))
def test_a_number_that_the_run_cannot_compute_with_is_refused(name: str) -> None:
    """1e-50 is 0 in float32, 1e39 infinity; an integer beyond int64 fits no tensor."""
    kind = str(FIELDS[name].type)
    tiny = () if within(0.0, LIMITED[name]) else (1e-50,)
    for value in (*tiny, 1e39, -1e39) if "float" in kind else (2**63, 10**30):
        given = (value, value) if kind.startswith("tuple") else value
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            TrainConfig(**{**MINIMAL, name: given})


def test_what_would_divide_by_nothing_or_leave_no_token_is_refused() -> None:
    for name, value in (("min_p", 1.0), ("missing_eos_score", math.inf)):
        with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
            TrainConfig(**{**MINIMAL, name: value})


@pytest.mark.parametrize("name", choices(TrainConfig))
def test_an_unknown_word_is_refused(name: str) -> None:
    value = ("nonsense",) if str(FIELDS[name].type).startswith("tuple") else "nonsense"
    with pytest.raises(ValueError, match=f"^{name}: expected .*one of .*nonsense"):
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
    with pytest.raises(ValueError, match=f"^{name}: .* in the config file or by --{name}$"):
        TrainConfig(**{**MINIMAL, name: type(MINIMAL[name])()})


@pytest.mark.parametrize("kind", [PPOConfig, TrainConfig, ProfileConfig, RewardLimits])
def test_a_misspelt_option_names_the_nearest(kind: type[Options]) -> None:
    name = dataclasses.fields(kind)[-1].name
    wrong = f"{name[:2]}_{name[2:]}"
    with pytest.raises(TypeError, match=f"^{kind.__name__} has no option {wrong!r}.*{name!r}"):
        kind(**{wrong: 1})
    with pytest.raises(TypeError, match=f"^{kind.__name__} has no option 'x'$"):
        kind(x=1)


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


# Types: what every option takes and refuses follows from its annotation

HINTS = get_type_hints(TrainConfig)
INTEGERS = (1, 7, np.int64(7), np.int32(1))
SAMPLES: dict[Any, tuple[Any, ...]] = {
    bool: (True, False, np.bool_(True)),
    int: INTEGERS,
    float: (*INTEGERS, 0.5, np.float32(0.5), np.float64(0.5)),
    str: ("x", "1e-3", "false", np.str_("x"), Path("x"), torch.device("cpu")),
    type(None): (None,),
}
STRANGE = (b"1", 1j, {}, {1}, object(), int, Decimal(2), np.array([1, 2]), np.array(1), [[1]])
TENSORS = (torch.tensor(1), torch.tensor([0.5, 0.5]))
MANY = [*itertools.chain(*SAMPLES.values()), [], [1], (0.5,), *STRANGE, *TENSORS]


def samples(hint: Any) -> list[Any]:
    """Values of an annotation's type; a new sort of annotation needs its line here."""
    parts, origin = get_args(hint), get_origin(hint)
    if hint in SAMPLES:
        return [*SAMPLES[hint]]
    if origin is Literal:
        return [*parts]
    if origin in (Union, UnionType):
        return [value for part in parts for value in samples(part)]
    assert origin is tuple, hint
    count = len(parts) if ... not in parts else 3
    rows = [(value,) * count for value in samples(parts[0])]
    return [*rows, *map(list, rows)] + ([(), []] if ... in parts else [])


def is_of(value: Any, hint: Any) -> bool:
    """Whether one of the samples has the same value and type."""

    def key(value: Any) -> Any:
        return type(value), [key(v) for v in value] if type(value) in (tuple, list) else repr(value)

    return any(key(value) == key(sample) for sample in samples(hint))


def only_type_refused(name: str, value: Any) -> bool:
    """Whether an option's type is what a value is refused for: its limits may refuse it too."""
    try:
        made = PPOConfig(**{name: value})
    except ValueError as error:
        return f"{name}: expected {described(HINTS[name])}, got " in str(error)
    kept = getattr(made, name)
    parts = kept if isinstance(kept, (tuple, list)) else [kept]
    assert kept == value and type(kept) in (type(value), bool, int, float, str)
    assert not any(isinstance(part, np.generic) for part in parts)
    return False


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PPOConfig)])
def test_an_option_takes_its_type_and_nothing_else(name: str) -> None:
    hint = HINTS[name]
    for value in samples(hint):
        assert not only_type_refused(name, value), value
    wrong = [value for value in MANY if not is_of(value, hint)]
    assert len(wrong) > 20
    for value in wrong:
        assert only_type_refused(name, value), value


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"learning_rate": "1e-3"}, "learning_rate: expected a number, got '1e-3' (str)"),
        ({"update_epochs": 1.5}, "update_epochs: expected an integer, got 1.5 (float)"),
        ({"norm_adv": "false"}, "norm_adv: expected True or False, got 'false' (str)"),
        ({"kl_target": True}, "kl_target: expected a number or None, got True (bool)"),
        (
            {"adam_betas": [0.9]},
            "adam_betas: expected a tuple (a number, a number), got [0.9] (list)",
        ),
        ({"advantage": ["gae"]}, "advantage: expected one of 'gae', 'grpo', 'dr_grpo', 'rloo', "),
        (
            {"report_to": "wandb"},
            "report_to: expected a tuple, each one of 'tensorboard', 'wandb', ",
        ),
        (
            {"reward_hosts": ("a", 1)},
            "reward_hosts: expected a tuple, each a string, got ('a', 1) ",
        ),
    ],
)
def test_what_was_expected_and_what_came_is_said(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        PPOConfig(**options)
    assert str(error.value).startswith(text)


@pytest.mark.parametrize("wrong", [PPOConfig, {}, 0, "args", object(), RewardLimits()])
def test_a_trainer_takes_an_instance_only(wrong: Any) -> None:
    with pytest.raises(ValueError, match="^args: expected a PPOConfig, got "):
        PPOTrainer("unread", print, [], wrong)
    with pytest.raises(ValueError, match="^config: expected a PPOConfig, got "):
        PPOStep(None, wrong)
    with pytest.raises(ValueError, match="^config: expected a PPOConfig, got None"):
        PPOStep(None, None)  # type: ignore[arg-type]


# A user's own configuration


def test_a_hint_that_is_found_only_in_a_function_leaves_the_others_checked() -> None:
    Mode = Literal["a", "b"]  # noqa: N806

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(PPOConfig):
        mode: Mode = "a"
        other: Literal["x", "y"] = "x"
        share: float = option(0.5, "[0, 1]")
        pair: tuple[int, list[str]] = (1, [])
        device: Mode | None = None  # type: ignore[assignment]

    assert Mine(mode="c").mode == "c"  # type: ignore[arg-type]
    assert Mine().device is None  # type: ignore[comparison-overlap]
    for options in ({"other": "z"}, {"share": "1"}, {"share": 2}, {"pair": ("1", [])}):
        with pytest.raises(ValueError, match=f"^{next(iter(options))}: expected "):
            Mine(**options)  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got None"):
        PPOConfig(**{name: None})
    assert PPOConfig(critic_lambda=None, critic=None).critic_lambda is None
