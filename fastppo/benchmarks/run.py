"""Runs cases: inputs, the check of every answer, then time and memory.

The roofline: a call that moves b bytes and does f operations takes at least max(b / rate, f /
peak). The rate is that of a copy: of a large one, or, where that is faster because it stays in a
cache, of one that moves as many bytes as the call, which takes turns with the providers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from fastppo.benchmarks.check import Judge, WrongAnswerError
from fastppo.benchmarks.clock import Timer, peak_memory, rotated_sets, take_turns
from fastppo.benchmarks.registry import Call, Case, Inputs, Size
from fastppo.benchmarks.results import Row, Status
from fastppo.device import is_out_of_memory
from fastppo.profiling.ceilings import measure_ceilings
from fastppo.profiling.meta import Ceilings
from fastppo.profiling.roofline import peak_tflops

COPY, CALIBRATION = "copy of as many bytes", "calibration"
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


@dataclass
class _Candidate:
    """A provider whose answer was right, ready to be timed."""

    row: Row
    first: Call
    timer: Timer


def run_case(
    case: Case, size: Size, roof: Roof, budget: float, seed: int = 0
) -> tuple[list[Row], list[float]]:
    """Measure every provider of a case at one size.

    Args:
        roof: of the device to run on. Its ceilings are measured again where a row beats them.
        budget: seconds for the timed rounds.
        seed: of the inputs.

    Returns:
        A row per provider and one of the copy, and the samples of the calibration.
    """
    device = roof.device
    blank = Row(
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
    sets = rotated_sets(int(blank.bytes), device)
    inputs = [case.inputs(size, device, seed + i) for i in range(sets)]
    judge = Judge(case, size, inputs[0])
    rows: dict[str, Row] = {}
    candidates: dict[str, _Candidate] = {}
    for name in dict.fromkeys((case.baseline, *case.providers)):  # the baseline sets the limit
        made = _candidate(case, size, replace(blank, provider=name), judge, inputs, device)
        if isinstance(made, Row):
            rows[name] = made
        else:
            candidates[name] = made
    copies = [copy_of_as_many_bytes(int(blank.bytes), device) for _ in range(sets)]
    timers = {name: candidate.timer for name, candidate in candidates.items()}
    timers[COPY] = Timer(copies, device, case.launch_bound)
    timers[CALIBRATION] = Timer([_calibration(device)], device)
    samples = take_turns(timers, budget)
    copy_seconds = min(samples[COPY])
    for name, candidate in candidates.items():
        rows[name] = _measured(candidate, samples[name], judge)
    rows = {name: rows[name] for name in case.providers}
    rows[COPY] = replace(
        blank,
        provider=COPY,
        seconds=tuple(samples[COPY]),
        mode=timers[COPY].mode,
        flops=0.0,
        flops_formula="none",
    )
    half = size.dtype == torch.bfloat16
    finished = [_with_floor(row, roof, half, copy_seconds) for row in rows.values()]
    if any(map(_too_fast, finished)):
        roof.measure_again()
        finished = [_with_floor(row, roof, half, copy_seconds) for row in finished]
    return [_refuse_impossible(row) for row in finished], samples[CALIBRATION]


def _candidate(
    case: Case,
    size: Size,
    row: Row,
    judge: Judge,
    inputs: Sequence[Inputs],
    device: torch.device,
) -> _Candidate | Row:
    """Prepare and check a provider; a row that says so where it cannot or must not be timed."""
    provider = case.providers[row.provider]
    if (reason := provider.missing(device)) is not None:
        return replace(row, status="missing", note=reason)
    omitted = (f"without {name}: {why}" for name, why in provider.omits.items())
    row = replace(row, note="; ".join(filter(None, (provider.note, *omitted))))
    try:
        calls = [provider.prepare(x, size) for x in inputs]
        error = judge.check(row.provider, calls[0]())
        row = replace(row, error=error, allowed=judge.limit(row.provider))
        if provider.torch_memory:
            row = replace(row, peak_bytes=peak_memory(calls[0], device))
        return _Candidate(row, calls[0], Timer(calls, device, case.launch_bound))
    except WrongAnswerError as problem:
        return replace(row, status="wrong", note=str(problem), allowed=judge.limit(row.provider))
    except Exception as problem:  # whatever a peer raises is its row, not the end of the run
        status: Status = "out of memory" if is_out_of_memory(problem) else "failed"
        text = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return replace(row, status=status, note=text)


def _measured(candidate: _Candidate, samples: Sequence[float], judge: Judge) -> Row:
    timer = candidate.timer
    notes = "; ".join(filter(None, (candidate.row.note, timer.note)))
    row = replace(candidate.row, seconds=tuple(samples), mode=timer.mode, note=notes)
    try:  # once more, because a call may have changed its inputs
        judge.check(row.provider, candidate.first())
    except WrongAnswerError as problem:
        return replace(row, status="wrong", note=f"after timing: {problem}")
    return row


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
    numel, width = (1 << 26, 4096) if device.type == "cuda" else (1 << 21, 384)
    source, matrix = torch.randn(numel, device=device), torch.randn(width, width, device=device)
    target, product = torch.empty_like(source), torch.empty_like(matrix)

    def work() -> None:
        target.copy_(source)
        torch.mm(matrix, matrix, out=product)

    return work
