"""What a run measures and where it goes: metrics.jsonl, samples.jsonl, trackers, phase times.

Both files hold one JSON object a line (strict JSON: NaN and infinity become null) and are flushed
after each line, so `tail -f` works and a killed run loses at most the line being written.

A metrics row has at least `iteration` (from 1). docs/algorithm.md defines every key of the
trainer's rows; display and report look for reward, kl, entropy, clipfrac, approx_kl, policy_loss,
value_loss, explained_variance, response_length, truncated, actor_grad_norm, critic_grad_norm,
tokens_per_second, seconds_<phase> and, on evaluation iterations, eval_reward.
"""

from __future__ import annotations

import importlib.util
import json
import math
import numbers
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastppo.checkpoint import CheckpointError
from fastppo.checkpoint.durable import own
from fastppo.options import shown
from fastppo.reporting.report import read_metrics
from fastppo.training.config import Tracker


def check_report_to(report_to: Sequence[str]) -> None:
    """Refuse trackers that are not installed, without importing any of them.

    Raises:
        TypeError: `report_to` is a string, not a list of strings.
        ValueError: a package is missing; the message names the extra.
    """
    if isinstance(report_to, str):
        raise TypeError(
            f"report_to must be a list of trackers, got {report_to!r}; write [{report_to!r}]"
        )
    for name in report_to:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # without origin: a folder of runs named like it
            raise ValueError(
                f"report_to has {name!r}, but the package {name!r} is not installed; "
                f"run `pip install 'fastppo[{name}]'` or remove it from report_to"
            )


class _TensorBoard:
    def __init__(self, run_dir: Path, config: Mapping[str, Any], last: int | None) -> None:
        self._folder = str(run_dir / "tensorboard")
        self._writer = self._open(last)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, iteration)
        self._writer.flush()

    def rewind(self, last: int) -> None:
        self._writer.close()
        self._writer = self._open(last)

    def close(self) -> None:
        self._writer.close()

    def _open(self, last: int | None) -> Any:
        """A writer whose events hide all that was written about iterations after `last`."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=None if last is None else last + 1)


class _Run:
    """A wandb or trackio run: both have init(...), log(values, step) and finish()."""

    def __init__(self, module: str, **init: Any) -> None:
        self._run: Any = importlib.import_module(module).init(**init)

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def rewind(self, last: int) -> None:
        """What was sent cannot be taken back; the repeated iterations are shown after it."""

    def close(self) -> None:
        self._run.finish()


class MetricsWriter:
    """Appends metrics and samples to a run directory and forwards the metrics to trackers.

    Args:
        run_dir: folder of the run, made if missing; existing files are appended to (a last line
            that a crash left unfinished is dropped).
        report_to: any of "tensorboard" (written to run_dir/tensorboard), "wandb", "trackio", which
            are installed (`check_report_to`).
        config: the resolved configuration, shown by the trackers.
        run_name: the run's name in wandb and trackio.
        last_iteration: rows of later ones are dropped, which a resumed run writes again; None: no
            row is.
    """

    def __init__(
        self,
        run_dir: Path,
        report_to: Sequence[Tracker],
        config: Mapping[str, Any],
        run_name: str,
        *,
        last_iteration: int | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks: list[_TensorBoard | _Run] = []
        plain = strict(config)
        shared = {"project": "fastppo", "name": run_name, "config": plain}
        for tracker in report_to:
            if tracker == "tensorboard":
                self._sinks.append(_TensorBoard(run_dir, plain, last_iteration))
            elif tracker == "wandb":
                self._sinks.append(_Run("wandb", dir=str(run_dir), **shared))
            else:
                self._sinks.append(_Run("trackio", **shared))
        self._metrics = _open_lines(run_dir / "metrics.jsonl", last_iteration)
        try:
            self._samples = _open_lines(run_dir / "samples.jsonl", last_iteration)
        except BaseException:
            self._metrics.close()
            raise

    def log(self, row: Mapping[str, float | int]) -> None:
        """Write one iteration's row; trackers get its finite values at step `row["iteration"]`.

        Raises:
            ValueError: no `iteration` in the row.
            TypeError: a value is not a number.
        """
        if "iteration" not in row:
            raise ValueError(f"row must have the key 'iteration', got the keys {sorted(row)}")
        clean = {key: _number(key, value) for key, value in row.items()}
        self._metrics.write(_line(clean))
        iteration = int(row["iteration"])
        finite = {k: v for k, v in clean.items() if v is not None and k != "iteration"}
        for sink in self._sinks:
            sink.log(finite, iteration)

    def samples(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled texts, one line each, as {"iteration": iteration, **row}.

        `row` holds prompt (text or chat messages), response (text), reward (float or None), and
        anything else worth keeping; the display and the report also read `truncated` (bool).
        """
        for row in rows:
            self._samples.write(_line({"iteration": int(iteration), **strict(row)}))

    def rows(self) -> list[dict[str, Any]]:
        """Every metrics row written so far, by earlier parts of the run too."""
        return read_metrics(Path(self._metrics.name))

    def rewind(self, last_iteration: int) -> None:
        """Drop what was written about later iterations."""
        for name in ("_metrics", "_samples"):
            file: IO[str] = getattr(self, name)
            file.close()
            setattr(self, name, _open_lines(Path(file.name), last_iteration))
        for sink in self._sinks:
            sink.rewind(last_iteration)

    def sync(self) -> None:
        """Bring both files to the disk."""
        for file in (self._metrics, self._samples):
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files and finish the trackers; a second call does nothing."""
        if self._metrics.closed:
            return
        self._metrics.close()
        self._samples.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class PhaseTimer:
    """Wall seconds per phase of an iteration: `with timer("rollout"): ...`.

    A phase opened inside another one suspends it, so that the phases never count a second twice and
    add up to the iteration.

    Args:
        synchronize: wait for the GPU at both ends of each phase, so that kernels are charged to the
            phase that launched them. Costs a stall per phase; off, a phase is charged with what it
            waits for.
        clock: seconds, never going back.
        mark: makes what is open around each phase, given its name; by default a
            `torch.profiler.record_function` range.
    """

    def __init__(
        self,
        *,
        synchronize: bool = False,
        clock: Callable[[], float] = time.perf_counter,
        mark: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        import torch

        self._mark_phase = mark or torch.profiler.record_function
        self._sync = torch.cuda.synchronize if synchronize and torch.cuda.is_available() else None
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._clock = clock
        self._start = self._mark = clock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Charge the seconds spent inside to `phase`, also when the body raises."""
        self._charge()
        self._open.append(phase)
        self._seconds.setdefault(phase, 0.0)
        try:
            with self._mark_phase(phase):
                yield
        finally:
            self._charge()
            self._open.pop()

    @property
    def elapsed(self) -> float:
        """Wall seconds since the last `take` (or since construction), phases or not."""
        return self._clock() - self._start

    def take(self) -> dict[str, float]:
        """Return {"seconds_<phase>": seconds} since the last call, and start anew.

        Raises:
            RuntimeError: a phase is still open.
        """
        if self._open:
            raise RuntimeError(
                f"take() called inside the phase {self._open[-1]!r}; call it after the phase ends"
            )
        seconds = {f"seconds_{phase}": value for phase, value in self._seconds.items()}
        self._seconds = {}
        self._start = self._mark = self._clock()
        return seconds

    def _charge(self) -> None:
        if self._sync is not None:
            self._sync()
        now = self._clock()
        if self._open:
            self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


def check_lines(run_dir: Path) -> None:
    """Refuse a run whose metrics or samples cannot be continued, before anything is changed.

    Raises:
        CheckpointError: a line that is no JSON object with an iteration, or metrics whose values
            are no numbers.
    """
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run_dir / name).exists():
            if not (run_dir / name).is_file():
                raise CheckpointError(f"{run_dir / name} is not a file. Move it away")
            _kept(run_dir / name, None)
    try:
        if (run_dir / "metrics.jsonl").exists():
            read_metrics(run_dir / "metrics.jsonl")
    except ValueError as error:
        raise CheckpointError(f"{error}. Mend the line, or take it out") from error


def _kept(path: Path, last_iteration: int | None) -> int:
    """Bytes before the first line that is about a later iteration or has no end."""
    kept = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                iteration = whole(json.loads(line), "iteration")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise CheckpointError(
                    f"{path}, line {number}: expected a JSON object with an iteration, got "
                    f"{line[:60]!r}. Mend the line, or take it out"
                ) from error
            if last_iteration is not None and iteration > last_iteration:
                break
            kept += len(line)
    return kept


def _open_lines(path: Path, last_iteration: int | None) -> IO[str]:
    """Open for appending, line-buffered, after dropping a last line without its newline and all
    from the first line on that is about a later iteration.
    """
    if path.exists():
        with open(path, "rb+", opener=own) as file:
            file.truncate(_kept(path, last_iteration))
    # A lone surrogate cannot be encoded; backslashreplace writes \udXXX, which is JSON's own escape
    # for it.
    return open(
        path,
        "a",
        encoding="utf-8",
        errors="backslashreplace",
        newline="\n",
        buffering=1,
        opener=own,
    )


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def _number(key: str, value: Any) -> float | int | None:
    """A row's value as int, finite float, or None for NaN and infinity."""
    if isinstance(value, numbers.Integral):  # bool and numpy integers too
        return int(value)
    if isinstance(value, (str, bytes)):
        raise TypeError(f"row[{key!r}] must be a number, got {value!r}")
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"row[{key!r}] must be a number, got {type(value).__name__}") from error
    return number if math.isfinite(number) else None


def strict(value: Any) -> Any:
    """The same value in JSON's own types, with None for NaN and infinity; unknown objects become
    text.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else None
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return str(value)


def to_json(value: Any) -> Any:
    """The same value with numbers that JSON has no word for as text: "nan", "inf", "-inf"."""
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that `to_json` wrote."""
    return {k: float(value) if isinstance(value, str) else value for k, value in values.items()}


def whole(values: Mapping[str, Any], name: str) -> int:
    """A number ≥ 0 that counts something, of a saved state.

    Raises:
        LookupError, TypeError: there is none under that name.
    """
    value = values[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"{name}: expected an integer ≥ 0, got {shown(value)}")
    return value


def mean(scores: NDArray[Any] | Sequence[float]) -> float:
    """The mean of what was scored; NaN, without numpy's warning, where nothing was."""
    given = np.asarray(scores)
    scored = given[~np.isnan(given)]
    return float(scored.mean()) if scored.size else math.nan
