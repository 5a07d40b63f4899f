"""Options: fields of a configuration that know their range and when they have an effect.

A configuration is a frozen dataclass that inherits from `Options`, which checks each of its fields
by what `option` says beside it. Limits are written as they are read: "≥ 1" or "> 0", which a number
must be finite for, an interval such as "(0, 1]", or '= "gae"' and "≠ None". A condition is the name
of a field and limits: "kl_coef > 0".
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


def option(
    default: T,
    limits: str = "",
    *,
    required: bool = False,
    only_if: str = "",
    may_differ: bool | str = False,
) -> T:
    """A field of a configuration.

    Args:
        default: its default.
        limits: of a number, or of each in a tuple; None is always within them.
        required: an empty value is refused.
        only_if: the condition without which it has no effect; another value than the default is
            refused where it does not hold.
        may_differ: between a run and its continuation; or the condition for that.
    """
    said = {"limits": limits, "required": required, "only_if": only_if, "may_differ": may_differ}
    return dataclasses.field(default=default, metadata=said)


@dataclass(frozen=True, kw_only=True)
class Options:
    """A configuration whose fields are checked, one by one and then against each other."""

    def __post_init__(self) -> None:
        fields, allowed = dataclasses.fields(self), choices(type(self))
        for field in fields:
            self._check_value(field, allowed.get(field.name))
        for field in fields:
            self._check_effect(field)

    def _check_value(self, field: dataclasses.Field[Any], allowed: tuple[Any, ...] | None) -> None:
        name, value = field.name, getattr(self, field.name)
        said = about(type(self), name)
        if said.get("required") and not value:
            raise ValueError(f"{name}: expected a value, got none. Set it in the config file")
        limits = said.get("limits")
        if value is None and (limits or allowed) and "None" not in str(field.type):
            raise ValueError(f"{name}: expected a value, got None")
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if part is not None and limits and not within(part, limits):
                noun = "an integer" if str(field.type).startswith("int") else "a finite number"
                where = f"a number in {limits}" if limits[0] in "[(" else f"{noun} {limits}"
                raise ValueError(f"{name}: expected {where}, got {value!r}")
            if part is not None and allowed and part not in allowed:
                raise ValueError(
                    f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}"
                )

    def _check_effect(self, field: dataclasses.Field[Any]) -> None:
        value, need = getattr(self, field.name), about(type(self), field.name).get("only_if")
        if need and value != field.default and not holds(self, need):
            raise ValueError(
                f"{field.name} = {value!r} would have no effect: it needs {need}. "
                f"Remove it or set {need}"
            )


def about(kind: type, name: str) -> Mapping[str, Any]:
    """What `option` said of a field; a class that gives it another default says nothing new."""
    fields = (vars(base).get("__dataclass_fields__", {}).get(name) for base in kind.__mro__)
    return next((field.metadata for field in fields if field and field.metadata), {})


def within(value: Any, limits: str) -> bool:
    """Whether a value is within limits (see above)."""
    sign, bound = limits[0], limits[1:].strip()
    if sign in "=≠":
        return bool((value == ast.literal_eval(bound)) is (sign == "="))
    if sign in "≥>":
        return within(value, f"{'[' if sign == '≥' else '('}{bound}, ∞)")
    low, high = (float(end.replace("∞", "inf")) for end in bound[:-1].split(","))
    above = low <= value if sign == "[" else low < value
    return bool(above and (value <= high if bound[-1] == "]" else value < high))


def holds(config: Options, condition: str) -> bool:
    """Whether a condition (see above) holds for a configuration."""
    name, limits = condition.split(" ", 1)
    return within(getattr(config, name), limits)


def choices(kind: type[Options]) -> dict[str, tuple[Any, ...]]:
    """The values of every option that has a closed set of them."""

    def literals(hint: Any) -> tuple[Any, ...]:
        if get_origin(hint) is Literal:
            return get_args(hint)
        return tuple(value for part in get_args(hint) for value in literals(part))

    found = {name: literals(hint) for name, hint in _hints(kind).items()}
    return {name: values for name, values in found.items() if values}


def _hints(kind: type) -> dict[str, Any]:
    """Of a class, or of its nearest base whose names can all be found from here: a class that is
    made in a function, or imports only for types, has names that cannot."""
    for base in kind.__mro__:
        try:
            return get_type_hints(base)
        except NameError:
            continue
    return {}
