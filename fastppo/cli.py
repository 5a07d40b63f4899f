"""The command line: `fastppo train | replay | export | demo | doctor | profile`.

`train` reads one TOML file and overrides its values by flags: both go through the same parser, so
a value means the same and is checked the same wherever it stands.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastppo.config import TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_USAGE = """usage: fastppo COMMAND [options]

  train    train a language model with PPO    fastppo train --config examples/arithmetic.toml
  replay   run a dumped step again            fastppo replay RUN/dumps/NAME
  export   a checkpoint as a model            fastppo export RUN/checkpoints/NAME FOLDER
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
    commands = {
        "train": _train,
        "replay": _replay,
        "export": _export,
        "demo": _demo,
        "doctor": _doctor,
        "profile": _profile,
    }
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


class Invocation(NamedTuple):
    """What `fastppo train` takes besides the configuration of a run."""

    dry_run: bool
    resume: bool | str  # True: the newest checkpoint of the run in output_dir
    allow_changes: tuple[str, ...]


def _take(args: list[str], flag: str) -> list[str] | None:
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


def _at_most_one(flag: str, values: list[str]) -> str | None:
    if len(values) > 1:
        raise ValueError(f"{flag}: expected one value, got {' '.join(values)}")
    return values[0] if values else None


def parse_train(argv: Sequence[str]) -> tuple[TrainConfig, Invocation]:
    """The configuration of `fastppo train`, and what to do with it."""
    import tyro

    args = list(argv)
    dry_run = _take(args, "--dry-run") is not None
    resume: bool | str = False
    if (values := _take(args, "--resume")) is not None:
        resume = _at_most_one("--resume", values) or True
    allowed = _take(args, "--allow-changes") or []
    settings: dict[str, Any] = {}
    if (values := _take(args, "--config")) is not None:
        settings = read_toml(Path(_at_most_one("--config", values) or ""))
    given = {arg.lstrip("-").partition("=")[0].replace("-", "_") for arg in args if arg[:2] == "--"}
    given |= {name.removeprefix("no_") for name in given}
    kept = {key: value for key, value in settings.items() if key not in given}
    config = tyro.cli(
        TrainConfig,
        prog=(
            "fastppo train [--config FILE.toml] [--dry-run] [--resume [RUN | CHECKPOINT]] "
            "[--allow-changes OPTION ...]"
        ),
        description="Train a language model with PPO. Flags override the file.",
        args=[*as_flags(kept), *args],
    )
    changes = tuple(name.replace("-", "_") for name in allowed)
    return config, Invocation(dry_run, resume, changes)


def _train(argv: Sequence[str]) -> int:
    try:
        config, invocation = parse_train(argv)
    except (ValueError, TypeError, OSError) as error:
        return _refused("train", error)
    from fastppo.checkpoint import CheckpointError
    from fastppo.dry_run import dry_run
    from fastppo.train import build_trainer

    _quiet()
    try:
        if invocation.dry_run:
            dry_run(config)
            return 0
        trainer = build_trainer(
            config, resume=invocation.resume, allow_changes=invocation.allow_changes
        )
    except (ValueError, TypeError, ImportError, OSError, CheckpointError) as error:
        return _refused("train", error)
    from fastppo.interrupts import Interrupted
    from fastppo.rewards import RewardError
    from fastppo.step import NonFiniteError

    try:
        trainer.train()
    except (RewardError, NonFiniteError, CheckpointError, OSError) as error:
        return _refused("train", error)
    except Interrupted as interrupted:
        print(f"fastppo train: interrupted; the run is in {trainer.run_dir}", file=sys.stderr)
        return 128 + interrupted.signum
    return 0


def _replay(argv: Sequence[str]) -> int:
    from fastppo.replay import replay

    return _on_checkpoint("replay", replay, argv)


def _export(argv: Sequence[str]) -> int:
    from fastppo.replay import export

    return _on_checkpoint("export", export, argv)


def _on_checkpoint(command: str, function: Callable[..., int], argv: Sequence[str]) -> int:
    import tyro

    from fastppo.checkpoint import CheckpointError

    _quiet()
    try:
        return tyro.cli(function, prog=f"fastppo {command}", args=list(argv))
    except (ValueError, OSError, CheckpointError) as error:
        return _refused(command, error)


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
