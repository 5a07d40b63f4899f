"""Reward functions by name: "file.py:function", "module:function", a model's folder, a URL."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from fastppo.rewards.http import HTTPReward
from fastppo.rewards.model import RewardModel


def resolve_reward(
    spec: str | Path | Callable[..., Any],
    *,
    allowed_hosts: Sequence[str] = (),
) -> Callable[..., Any]:
    """The reward function that a configuration or a caller means.

    Args:
        spec: a callable (returned as it is), "file.py:function", "module:function", the folder of a
            sequence classifier, which becomes a `RewardModel`, or a URL with http or https, which
            becomes an `HTTPReward`.
        allowed_hosts: hosts that an https URL may name.

    Raises:
        ValueError: nothing is found under that name, or the URL is not allowed.
        TypeError: the name is not a function.
    """
    if not isinstance(spec, (str, Path)):
        if callable(spec):
            return spec
        raise TypeError(
            "reward must be a function, 'file.py:function', 'module:function', a folder or a URL, "
            f"got {spec!r}"
        )
    if str(spec).lower().startswith(("http://", "https://")):
        return HTTPReward(str(spec), allowed_hosts=allowed_hosts)
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return RewardModel(folder)
    if ":" in str(spec):
        return load_reward_func(str(spec))
    hint = ""
    if folder.suffix == ".py":
        hint = f"; name the function too: '{spec}:function'"
    raise ValueError(
        f"reward {str(spec)!r} must be 'file.py:function', 'module:function', the folder of a "
        f"reward model or a URL, got none of them (no folder {folder}){hint}"
    )


def load_reward_func(spec: str) -> Callable[..., Any]:
    """Loads "file.py:function" or "module:function".

    A file is executed once and its functions share it; it can import installed modules, not the
    files beside it. Only name files you trust: loading one runs it.

    Args:
        spec: the name; a path is relative to the current directory.

    Raises:
        ValueError: no such file, module or function, or importing it failed (chained).
        TypeError: the name exists and is not callable.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ValueError(f"reward {spec!r} must be written 'file.py:function' or 'module:function'")
    if place.endswith(".py"):
        module = _load_file(spec, Path(place).expanduser())
    else:
        try:
            module = importlib.import_module(place)
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"reward {spec!r}: importing module {place!r} failed: {type(error).__name__}: "
                f"{error}; for a function in a file of yours write 'file.py:function'"
            ) from error
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if _is_function(key, value, module)]
        near = get_close_matches(name, own, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"reward {spec!r}: {place} has no {name!r}; {hint}Functions there: "
            f"{', '.join(sorted(own)) or 'none'}"
        )
    function = getattr(module, name)
    if not callable(function):
        raise TypeError(
            f"reward {spec!r}: {name!r} must be a function, got {type(function).__name__}"
        )
    return function  # type: ignore[no-any-return]  # callable() narrows Any to nothing useful


def _load_file(spec: str, file: Path) -> ModuleType:
    if not file.is_file():
        there = sorted(path.name for path in file.parent.glob("*.py"))
        near = get_close_matches(file.name, there, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"reward {spec!r}: no file {file.absolute()}; {hint}Python files in that folder: "
            f"{', '.join(there) or 'none'}"
        )
    # The name follows the contents: an edited file is loaded anew, an unchanged one is shared.
    key = hashlib.sha256(str(file.resolve()).encode() + b"\0" + file.read_bytes()).hexdigest()[:12]
    module_name = f"fastppo_reward_{file.stem}_{key}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    module_spec = importlib.util.spec_from_file_location(module_name, file)
    assert module_spec is not None and module_spec.loader is not None  # a .py file has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up there
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ValueError(
            f"reward {spec!r}: running {file.absolute()} failed: {type(error).__name__}: {error}"
        ) from error
    return module


def _is_function(name: str, value: Any, module: ModuleType) -> bool:
    """Whether to offer `name` in an error: public, callable, and defined in this module."""
    return (
        not name.startswith("_")
        and callable(value)
        and not isinstance(value, type)
        and getattr(value, "__module__", None) == module.__name__
    )
