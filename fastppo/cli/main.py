"""The command line: `fastppo train | replay | export | demo | doctor | profile | bench`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fastppo.cli.output import called, crashed, quiet, refused
from fastppo.options import nearest

_USAGE = """usage: fastppo COMMAND [options]

  train    train a language model with PPO    fastppo train --config examples/arithmetic.toml
  replay   run a dumped step again            fastppo replay RUN/dumps/NAME
  export   a checkpoint as a model            fastppo export RUN/checkpoints/NAME FOLDER
  demo     watch a tiny model learn, in 15 s  fastppo demo
  doctor   check this machine and a model     fastppo doctor --model MODEL
  profile  where the time of a step goes      fastppo profile --config examples/arithmetic.toml
  bench    time every op beside its peers     fastppo bench --sizes smoke

fastppo COMMAND --help lists the options of a command."""

_INTERRUPTED = 130  # the status of a program that Ctrl-C ended: 128 + SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. What a person can mend is one line on stderr and exit status 2, what nobody
    foresaw one line and 1, with the traceback in a file; Ctrl-C is one line and 130.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "train": _train,
        "replay": _replay,
        "export": _export,
        "demo": _demo,
        "doctor": _doctor,
        "profile": _profile,
        "bench": _bench,
    }
    if not args or args[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if args[0] == "--version":
        from fastppo import __version__

        print(f"fastppo {__version__}")
        return 0
    if args[0] not in commands:
        hint = nearest(args[0], commands) or "."
        print(f"fastppo: unknown command {args[0]!r}{hint}\n\n{_USAGE}", file=sys.stderr)
        return 2
    # Threads that wait spin, by default so long that on a shared CPU it costs 20 times the work
    # itself (docs/log.md). GNU OpenMP reads this when torch is loaded, further down.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for number in (0, 1, 2):  # what is opened next would take the place of one that was closed
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name with an accent on a terminal without
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        os.getcwd()
        return commands[args[0]](args[1:])
    except KeyboardInterrupt:
        print(f"\nfastppo {args[0]}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        return _failed(args[0], error)
    finally:
        _let_go_of_stdout()


def _failed(command: str, error: Exception) -> int:
    """One line about an error that the command has no words for."""
    if isinstance(error, FileNotFoundError) and not error.filename:
        try:
            os.getcwd()
        except FileNotFoundError:
            return refused(command, "the current folder has been deleted: cd to another one")
    if isinstance(error, OSError):
        return refused(command, error)
    from fastppo.training.memory import is_out_of_memory

    if is_out_of_memory(error):
        return refused(command, f"out of memory: {error}. Use a smaller model, or free the device")
    return crashed(command, error)


def _let_go_of_stdout() -> None:
    """Flush it; where its reader has gone, Python would complain about that at its end."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):  # io.UnsupportedOperation is both
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(argv: Sequence[str]) -> int:
    from fastppo.cli.train import train

    return train(argv)


def _replay(argv: Sequence[str]) -> int:
    from fastppo.cli.replay import replay

    return _called(replay, argv)


def _export(argv: Sequence[str]) -> int:
    from fastppo.cli.export import export

    return _called(export, argv)


def _demo(argv: Sequence[str]) -> int:
    from fastppo.cli.demo import demo

    return _called(demo, argv)


def _doctor(argv: Sequence[str]) -> int:
    from fastppo.cli.doctor import doctor

    return _called(doctor, argv)


def _profile(argv: Sequence[str]) -> int:
    from fastppo.cli.profile import main as profile

    return profile(argv)


def _bench(argv: Sequence[str]) -> int:
    from fastppo.cli.bench import main as bench

    return bench(argv)


def _called(function: Callable[..., Any], argv: Sequence[str]) -> int:
    """The exit status of a command that is one function, whose arguments are its options."""
    from fastppo.checkpoint import CheckpointError

    name = function.__name__
    quiet()
    try:
        result = called(function, prog=f"fastppo {name}", args=argv)
    except (ValueError, CheckpointError) as error:
        return refused(name, error)
    return result if isinstance(result, int) else 0
