"""Options of a run from one TOML file, whose values flags override.

Both go through the same parser, so a value means the same and is checked the same wherever it
stands.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastppo.cli.output import parsed
from fastppo.options import Options, shown
from fastppo.ppo.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Config = TypeVar("Config", bound=Options)

_PATHS = ("model", "dataset", "eval_dataset", "reward", "ref_model", "value_model")


def parse_config(
    kind: type[Config], argv: Sequence[str], *, prog: str, description: str, ignored: str = ""
) -> Config:
    """A configuration from the file after --config, if any, and the flags that override it.

    Args:
        kind: of configuration.
        argv: of the command line.
        prog, description: for --help.
        ignored: a key of the file that says nothing about this configuration.
    """
    from fastppo.cli.groups import flat, grouped

    args, settings, path = list(argv), {}, ""
    if (values := take(args, "--config")) is not None:
        path = at_most_one("--config", values) or ""
        settings = read_toml(Path(path), kind)
    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in args if arg[:2] == "--"}
    given |= {name.removeprefix("no_") for name in given} | {ignored}
    kept = {key: value for key, value in settings.items() if key not in given}
    flags = [*as_flags(kept), *args]
    try:
        made = parsed(grouped(kind), prog=prog, description=description, args=flags)
        return kind(**flat(made))
    except ValueError as error:
        raise ValueError(f"{path}, with the flags: {error}" if path else str(error)) from error


def read_toml(path: Path, kind: type[Options] = TrainConfig) -> dict[str, Any]:
    """The settings of a TOML file; paths that exist beside the file are made absolute.

    Args:
        path: of the file.
        kind: of configuration that it is for.

    Raises:
        ValueError: not TOML, or a key that no option has, with the nearest one.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"--config: expected a TOML file, got {str(path)!r}, which does not exist"
        ) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of 5000 digits, too deep
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    known = [field.name for field in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "fastppo train --help lists them"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
        values = settings[key] if isinstance(settings[key], list) else [settings[key]]
        for value in values:
            if not isinstance(value, (str, int, float)) or str(value).startswith("--"):
                raise ValueError(
                    f"{path}: {key}: expected text, a number, true, false or a list of these, got "
                    f"{shown(value)}"
                )
    for key in filter(settings.__contains__, _PATHS):
        value = settings[key]
        many = isinstance(value, list)
        found = [_beside(path.parent, str(v)) for v in (value if many else [value])]
        settings[key] = found if many else found[0]
    return settings


def _beside(folder: Path, value: str) -> str:
    """`value` made absolute where it names a file beside the configuration."""
    for mark in (":", "#"):
        name, separator, rest = value.partition(mark)
        if name and (folder / name).exists():
            return f"{(folder / name).resolve()}{separator}{rest}"
    return value


def as_flags(settings: dict[str, Any]) -> list[str]:
    """TOML settings as the flags that say the same."""
    flags: list[str] = []
    for key, value in settings.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")
    return flags


def take(args: list[str], flag: str) -> list[str] | None:
    """Remove `flag` and the values after it from `args`; None where it is not there."""
    for index, arg in enumerate(args):
        if arg == flag:
            end = next((i for i in range(index + 1, len(args)) if args[i][:2] == "--"), len(args))
            values = args[index + 1 : end]
        elif arg.startswith(f"{flag}="):
            values, end = [arg.partition("=")[2]], index + 1
        else:
            continue
        del args[index:end]
        return values
    return None


def at_most_one(flag: str, values: list[str]) -> str | None:
    if len(values) > 1:
        raise ValueError(f"{flag}: expected one value, got {' '.join(values)}")
    return values[0] if values else None
