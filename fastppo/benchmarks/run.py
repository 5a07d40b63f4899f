"""A case at one size: inputs, the check of every answer, then time and memory.

The roofline: a call that moves b bytes and does f operations takes at least max(b / rate, f /
peak). The rate is that of a copy: of a large one, or, where that is faster because it stays in a
cache, of one that moves as many bytes as the call, which takes turns with the providers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from fastppo.benchmarks.check import Judge, WrongAnswerError
from fastppo.benchmarks.clock import Timer, peak_memory, rotated_sets, take_turns
from fastppo.benchmarks.registry import Benchmark
from fastppo.benchmarks.results import Row, Status
from fastppo.profiling.case import Call, Inputs, Outputs, Size
from fastppo.profiling.ceilings import measure_ceilings
from fastppo.profiling.meta import Ceilings
from fastppo.profiling.roofline import peak_tflops
from fastppo.training.memory import is_out_of_memory

COPY, CALIBRATION = "copy of as many bytes", "calibration"
LONG_ROUND = 1.0  # seconds, of one sample of everything
IMPOSSIBLE = 1.05  # of the roofline: more is a mistake in the bytes, the operations or the clock


class Roof:
    """The ceilings of a device: the best of every time they were measured in a run."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ceilings = measure_ceilings(device)

    def measure_again(self) -> None:
        """Another process may have been in the way."""
        new, old = measure_ceilings(self.device), self.ceilings
        self.ceilings = Ceilings(
            copy_gb_s=max(new.copy_gb_s, old.copy_gb_s),
            bf16_tflops=max(new.bf16_tflops, old.bf16_tflops),
            fp32_tflops=max(new.fp32_tflops, old.fp32_tflops),
        )

    def floor(self, row: Row, half: bool, copy_seconds: float) -> float:
        """The least seconds of a row's call, given what a copy of as many bytes took."""
        moving = min(row.bytes / (self.ceilings.copy_gb_s * 1e9), copy_seconds)
        return max(moving, row.flops / (peak_tflops(self.ceilings, half) * 1e12))


class _Candidate(NamedTuple):
    """A provider whose answer was right, ready to be timed."""

    first: Call
    timer: Timer


class Cell:
    """A case at one size, measured in passes.

    What disturbs a measurement lasts: a pass is a group of samples from another time, of inputs and
    calls that were made anew. Where a round of samples takes longer than `LONG_ROUND`, there is one
    pass: its samples are apart by themselves.

    Args:
        roof: of the device to run on. Its ceilings are measured again where a row beats them.
        seed: of the inputs.

    Attributes:
        rows: of every provider and of the copy, after the first pass.
        calibration: its samples, pass by pass.
        finished: another pass is not wanted.
    """

    def __init__(self, case: Benchmark, size: Size, roof: Roof, seed: int = 0) -> None:
        self.case, self.size = case, size
        self._roof, self._device, self._seed = roof, roof.device, seed
        self._blank = Row(
            case=case.name,
            size=size.text,
            provider="",
            status="ok",
            axis=None if case.axis is None else float(size[case.axis]),
            bytes=float(case.bytes.of(size)),
            bytes_formula=case.bytes.formula,
            flops=float(case.flops.of(size)),
            flops_formula=case.flops.formula,
        )
        # the baseline is the first to be checked: it sets the limit
        names = dict.fromkeys((case.baseline, *case.providers))
        self._rows = {name: self._new_row(name) for name in names}
        self._copy = replace(self._blank, provider=COPY, flops=0.0, flops_formula="none")
        self._judge: Judge | None = None
        self.rows: list[Row] = []
        self.calibration: list[list[float]] = []
        self.finished = False

    def _new_row(self, name: str) -> Row:
        provider = self.case.providers[name]
        row = replace(self._blank, provider=name)
        if (reason := provider.missing(self._device)) is not None:
            return replace(row, status="missing", note=reason)
        omitted = (f"without {result}: {why}" for result, why in provider.omits.items())
        return replace(row, note="; ".join(filter(None, (provider.note, *omitted))))

    def measure(self, budget: float, last: bool = True) -> None:
        """One pass over the providers that were right so far.

        Args:
            budget: seconds for the timed rounds.
            last: no pass follows.
        """
        nbytes = int(self._blank.bytes)
        sets = rotated_sets(nbytes, self._device)
        inputs = [self.case.inputs(self.size, self._device, self._seed + i) for i in range(sets)]
        judge = self._judge or Judge(self.case, self.size, inputs[0])
        candidates: dict[str, _Candidate] = {}
        for name, row in self._rows.items():
            if row.status == "ok" and (made := self._candidate(name, judge, inputs)) is not None:
                candidates[name] = made
        copies = [copy_of_as_many_bytes(nbytes, self._device) for _ in range(sets)]
        timers = {name: candidate.timer for name, candidate in candidates.items()}
        timers[COPY] = Timer(copies, self._device, self.case.launch_bound)
        timers[CALIBRATION] = Timer([_calibration(self._device)], self._device)
        samples = take_turns(timers, budget)
        self.calibration.append(samples[CALIBRATION])
        self._copy = _with_samples(self._copy, timers[COPY], samples[COPY])
        for name, (call, timer) in candidates.items():
            if timer.problem is not None:
                self._rows[name] = _failed(self._rows[name], timer.problem)
                continue
            self._rows[name] = _with_samples(self._rows[name], timer, samples[name])
            self._check_again(name, call, judge)
        self.finished = last or sum(timer.length for timer in timers.values()) > LONG_ROUND
        self._judge = None if self.finished else judge  # float64 results can be large
        self.rows = self._rows_with_floors()

    def fail(self, error: Exception) -> None:
        """Inputs or reference could not be made: one row that says so, and no other pass."""
        row = replace(self._blank, provider="reference", status="failed")
        self.rows = [replace(row, note=f"{type(error).__name__}: {error}")]
        self.calibration, self._judge, self.finished = [], None, True

    @property
    def name(self) -> str:
        """Such as "gae B=64 T=4096 fp32"; unique in a run."""
        return f"{self.case.name} {self.size.text}"

    def _candidate(self, name: str, judge: Judge, inputs: Sequence[Inputs]) -> _Candidate | None:
        """Prepare and check a provider; None, and a row that says why, if it must not be timed."""
        row, provider = self._rows[name], self.case.providers[name]
        try:
            calls = [provider.prepare(x, self.size) for x in inputs]
            error = judge.check(name, calls[0]())
            made = _Candidate(calls[0], Timer(calls, self._device, self.case.launch_bound))
        except WrongAnswerError as problem:
            row = replace(row, status="wrong", note=str(problem), allowed=judge.limit(name))
        except Exception as problem:  # whatever a peer raises is its row, not the end of the run
            row = _failed(row, problem)
        else:
            error = max(error, row.error or 0.0)
            self._rows[name] = replace(row, error=error, allowed=judge.limit(name))
            return made
        self._rows[name] = row
        return None

    def _check_again(self, name: str, call: Call, judge: Judge) -> None:
        """Because a call may have changed its inputs. In the first pass, with its memory."""
        row, answers = self._rows[name], list[Outputs]()
        try:
            if row.peak_bytes is None and self.case.providers[name].torch_memory:
                peak = peak_memory(lambda: answers.append(call()), self._device)
                row = replace(row, peak_bytes=peak)
            else:
                answers.append(call())
            judge.check(name, answers[0])
        except WrongAnswerError as problem:
            row = replace(row, status="wrong", note=f"after timing: {problem}")
        except Exception as problem:  # such as no memory left
            row = _failed(row, problem)
        self._rows[name] = row

    def _rows_with_floors(self) -> list[Row]:
        half = self.size.half
        rows = [*(self._rows[name] for name in self.case.providers), self._copy]
        copy_seconds = min(self._copy.seconds)
        finished = [_with_floor(row, self._roof, half, copy_seconds) for row in rows]
        if any(map(_too_fast, finished)):
            self._roof.measure_again()
            finished = [_with_floor(row, self._roof, half, copy_seconds) for row in finished]
        return [_refuse_impossible(row) for row in finished]


def _failed(row: Row, problem: Exception) -> Row:
    status: Status = "out of memory" if is_out_of_memory(problem) else "failed"
    return replace(row, status=status, note=f"{type(problem).__name__}: {problem}".splitlines()[0])


def _with_samples(row: Row, timer: Timer, samples: Sequence[float]) -> Row:
    """The row with another pass."""
    return replace(
        row,
        seconds=(*row.seconds, *samples),
        passes=(*row.passes, len(samples)),
        mode=timer.mode,
        note="; ".join(filter(None, (row.note, timer.note if not row.seconds else ""))),
    )


def _with_floor(row: Row, roof: Roof, half: bool, copy_seconds: float) -> Row:
    return replace(row, floor=roof.floor(row, half, copy_seconds)) if row.seconds else row


def _too_fast(row: Row) -> bool:
    return row.status == "ok" and (row.roofline or 0.0) > IMPOSSIBLE


def _refuse_impossible(row: Row) -> Row:
    if not _too_fast(row):
        return row
    note = f"{row.roofline:.0%} of the roofline: its bytes, its operations or the clock are wrong"
    return replace(row, status="impossible", note=note)


def copy_of_as_many_bytes(nbytes: int, device: torch.device) -> Callable[[], object]:
    """Reads and writes `nbytes` in all."""
    source = torch.randn(max(1, nbytes // 8), device=device)
    return partial(torch.empty_like(source).copy_, source)


def _calibration(device: torch.device) -> Callable[[], object]:
    """A little of both, the same in every run."""
    numel, width = (1 << 26, 4096) if device.type == "cuda" else (1 << 16, 128)
    source, matrix = torch.randn(numel, device=device), torch.randn(width, width, device=device)
    target, product = torch.empty_like(source), torch.empty_like(matrix)

    def work() -> None:
        target.copy_(source)
        torch.mm(matrix, matrix, out=product)

    return work
