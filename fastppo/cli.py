"""The command line: `fastppo train | demo | doctor | profile`.

`train` reads one TOML file and overrides its values by flags: both go through the same parser, so
a value means the same and is checked the same wherever it stands.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastppo.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_USAGE = """usage: fastppo COMMAND [options]

  train    train a language model with PPO    fastppo train --config examples/arithmetic.toml
  demo     watch a tiny model learn, in 15 s  fastppo demo
  doctor   check this machine and a model     fastppo doctor --model MODEL
  profile  what the kernels compile to        fastppo profile --aot

fastppo COMMAND --help lists the options of a command."""

_INTERRUPTED = 130  # the status of a program that Ctrl-C ended: 128 + SIGINT
_PATHS = ("model", "dataset", "eval_dataset", "reward", "ref_model", "value_model")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. What a person can mend is one line on stderr and exit status 2; Ctrl-C is
    one line and 130.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {"train": _train, "demo": _demo, "doctor": _doctor, "profile": _profile}
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] == "--version":
        from fastppo import __version__

        print(f"fastppo {__version__}")
        return 0
    if args[0] not in commands:
        near = difflib.get_close_matches(args[0], commands, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"fastppo: unknown command {args[0]!r}.{hint}\n\n{_USAGE}", file=sys.stderr)
        return 2
    # Threads that wait spin, by default so long that on a shared CPU it costs 20 times the work
    # itself (docs/log.md). GNU OpenMP reads this when torch is loaded, further down.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return commands[args[0]](args[1:])
    except KeyboardInterrupt:
        print(f"\nfastppo {args[0]}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _quiet() -> None:
    """The display is the progress: transformers' own bars would tear it."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _refused(command: str, error: BaseException) -> int:
    print(f"fastppo {command}: {error}", file=sys.stderr)
    return 2


def read_toml(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; paths that exist beside the file are made absolute.

    Raises:
        ValueError: not TOML, or a key that no option has, with the nearest one.
    """
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"--config: expected a TOML file, got {str(path)!r}, which does not exist"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from error
    known = [field.name for field in dataclasses.fields(TrainConfig)]
    for key in settings:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "fastppo train --help lists them"
            raise ValueError(f"{path}: unknown key {key!r}; {hint}")
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
            flags += [f"--{name}", str(value)]
    return flags


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, bool]:
    """The configuration of `fastppo train`, and whether it is a dry run."""
    import tyro

    args = list(argv)
    dry_run = "--dry-run" in args
    args = [arg for arg in args if arg != "--dry-run"]
    settings: dict[str, Any] = {}
    for index, arg in enumerate(args):
        if arg == "--config" or arg.startswith("--config="):
            used = 1 if "=" in arg else 2
            value = arg.partition("=")[2] if used == 1 else "".join(args[index + 1 : index + 2])
            settings = read_toml(Path(value))
            del args[index : index + used]
            break
    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in args if arg[:2] == "--"}
    given |= {name.removeprefix("no_") for name in given}
    kept = {key: value for key, value in settings.items() if key not in given}
    config = tyro.cli(
        TrainConfig,
        prog="fastppo train [--config FILE.toml] [--dry-run]",
        description="Train a language model with PPO. Flags override the file.",
        args=[*as_flags(kept), *args],
    )
    return config, dry_run


def _train(argv: Sequence[str]) -> int:
    try:
        config, dry_run = parse_train(argv)
        _quiet()
        if dry_run:
            from fastppo.dry_run import dry_run as show

            show(config)
            return 0
        from fastppo.train import build_trainer

        trainer = build_trainer(config)
    except (ValueError, TypeError, ImportError, OSError) as error:
        return _refused("train", error)
    from fastppo.rewards import RewardError
    from fastppo.step import NonFiniteError

    try:
        trainer.train()
    except (RewardError, NonFiniteError) as error:
        return _refused("train", error)
    except KeyboardInterrupt:
        print(f"\nfastppo train: interrupted; the run is in {trainer.run_dir}", file=sys.stderr)
        return _INTERRUPTED
    return 0


def _demo(argv: Sequence[str]) -> int:
    import tyro

    from fastppo.demo import demo

    _quiet()
    try:
        tyro.cli(demo, prog="fastppo demo", args=list(argv))
    except ValueError as error:
        return _refused("demo", error)
    return 0


def _doctor(argv: Sequence[str]) -> int:
    import tyro

    from fastppo.doctor import doctor

    _quiet()
    try:
        return tyro.cli(doctor, prog="fastppo doctor", args=list(argv))
    except (ValueError, OSError) as error:
        return _refused("doctor", error)


def _profile(argv: Sequence[str]) -> int:
    import tyro

    from fastppo.profile import profile

    try:
        tyro.cli(profile, prog="fastppo profile", args=list(argv))
    except (ValueError, ImportError) as error:
        return _refused("profile", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
