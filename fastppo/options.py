"""Options: fields of a configuration that know their range and when they have an effect.

A configuration is a frozen dataclass that inherits from `Options`, which checks each of its fields
by its type and by what `option` says beside it. A number must be one that a run can compute with:
a normal float32, or one that acts as 0 where 0 is allowed; an int64. Limits are written as they are
read: "≥ 1" or "> 0", which a number must be finite for, an interval such as "(0, 1]", or '= "gae"'
and "≠ None". A condition is the name of a field and limits: "kl_coef > 0".
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import functools
import math
import os
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, SimpleNamespace, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)
"""The smallest normal float32 and the largest: smaller ones act as 0, larger ones as infinity."""
INT64 = 2**63 - 1

KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: ((str, os.PathLike), "a string"),
    NoneType: (NoneType, "None"),
}
"""What is taken for an option of a type, and how it is called."""


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


class _Named(type):
    """Calls a class by the names of its fields only, and says which is nearest to a wrong one."""

    def __call__(cls, *args: Any, **options: Any) -> Any:
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for name in options:
            if name not in known:
                raise TypeError(f"{cls.__name__} has no option {name!r}{nearest(name, known)}")
        return super().__call__(*args, **options)


@dataclass(frozen=True, kw_only=True)
class Options(metaclass=_Named):
    """A configuration whose fields are checked, one by one and then against each other."""

    def __post_init__(self) -> None:
        kind: Any = type(self)
        fields, hints = dataclasses.fields(self), _hints(kind)
        for field in fields:
            self._check_value(field, hints.get(field.name, Any))
        for field in fields:
            self._check_effect(field)

    def _check_value(self, field: dataclasses.Field[Any], hint: Any) -> None:
        name, value = field.name, getattr(self, field.name)
        try:
            value = fit(value, hint)
        except TypeError:
            raise ValueError(f"{name}: expected {described(hint)}, got {shown(value)}") from None
        object.__setattr__(self, name, value)
        said = about(type(self), name)
        if said.get("required") and not value:
            flag = name.replace("_", "-")
            raise ValueError(
                f"{name}: expected a value, got none. Set it in the config file or by --{flag}"
            )
        limits = said.get("limits")
        for part in value if isinstance(value, (tuple, list)) else (value,):
            number = isinstance(part, float) and 0 < abs(part) < math.inf
            acts_as_0 = number and abs(part) < FLOAT32[0] and (not limits or within(0.0, limits))
            if number and not acts_as_0 and not FLOAT32[0] <= abs(part) <= FLOAT32[1]:
                raise ValueError(
                    f"{name}: expected a number from {FLOAT32[0]:.3g} to {FLOAT32[1]:.3g} in size, "
                    f"as float32 has them, got {part!r}"
                )
            if isinstance(part, int) and abs(part) > INT64:
                raise ValueError(f"{name}: expected at most {INT64} in size, got {part!r}")
            if part is not None and limits and not within(part, limits):
                noun = "an integer" if str(field.type).startswith("int") else "a finite number"
                where = f"a number in {limits}" if limits[0] in "[(" else f"{noun} {limits}"
                raise ValueError(f"{name}: expected {where}, got {value!r}")

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


def choices(kind: Any) -> dict[str, tuple[Any, ...]]:
    """The values of every option that has a closed set of them."""

    def literals(hint: Any) -> tuple[Any, ...]:
        if get_origin(hint) is Literal:
            return get_args(hint)
        return tuple(value for part in get_args(hint) for value in literals(part))

    found = {name: literals(hint) for name, hint in _hints(kind).items()}
    return {name: values for name, values in found.items() if values}


def fit(value: Any, hint: Any) -> Any:
    """A value of the type that a hint says, numpy's scalars as Python's own.

    Other types than those of `KINDS`, and tuples and unions of them, are not checked.

    Raises:
        TypeError: it is of another type, or a tuple of another length, or not among the literals.
    """
    parts, origin = get_args(hint), get_origin(hint)
    if origin in (Union, UnionType):
        for part in parts:
            try:
                return fit(value, part)
            except TypeError:
                continue
        raise TypeError
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        hints = parts[:1] * len(value) if ... in parts else parts
        if len(value) != len(hints):
            raise TypeError
        return (tuple if isinstance(value, tuple) else list)(map(fit, value, hints))
    if origin is not Literal and hint not in list(KINDS):
        return value
    if isinstance(value, _loaded("numpy", "generic")):
        value = value.item()
    if origin is Literal:
        taken = any(isinstance(value, type(part)) and value == part for part in parts)
    elif isinstance(value, bool):
        taken = hint is bool
    else:
        device = _loaded("torch", "device") if hint is str else ()
        taken = isinstance(value, (KINDS[hint][0], device))
    if not taken:
        raise TypeError
    return value


def described(hint: Any) -> str:
    """What `fit` takes, in words."""
    parts, origin = get_args(hint), get_origin(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is tuple:
        each = [described(part) for part in parts if part is not ...]
        return f"a tuple, each {each[0]}" if ... in parts else f"a tuple ({', '.join(each)})"
    if origin in (Union, UnionType):
        return " or ".join(map(described, parts))
    return KINDS[hint][1] if hint in list(KINDS) else str(hint)


def shown(value: Any) -> str:
    """A value and its type, on one line."""
    return f"{' '.join(reprlib.repr(value).split())} ({type(value).__name__})"


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not known: the one that was probably meant."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f". Did you mean {near[0]!r}?" if near else ""


def check_kind(name: str, value: Any, kind: type) -> None:
    """Refuse what is not an instance of a kind of configuration."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected a {kind.__name__}, got {shown(value)}")


def _loaded(module: str, name: str) -> Any:
    """A class of a module, none where nobody imported it, so that nothing can be of the class."""
    return getattr(sys.modules.get(module), name, ())


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    """Of the fields whose names can be found from here: a class that is made in a function, or
    imports only for types, has names that cannot."""
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        names = vars(sys.modules[base.__module__]) if base.__module__ in sys.modules else {}
        for name, hint in vars(base).get("__annotations__", {}).items():
            found.pop(name, None)
            one = SimpleNamespace(__annotations__={name: hint})
            with contextlib.suppress(Exception):  # whatever evaluating it raises
                found |= get_type_hints(one, dict(vars(base)), names)
    return found
