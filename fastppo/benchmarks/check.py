"""Is a provider's answer right? Asked before it is timed, and once more afterwards.

An answer's error is the largest over its results of ‖out − ref‖ / ‖ref‖ and of max |out − ref| /
max |ref|, against float64. A provider may err twice as much as plain torch does in the same dtype,
plus a hair; plain torch itself is held to a fixed limit. NaN never passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.benchmarks.registry import Benchmark, in_float64
from fastppo.profiling.case import Inputs, Outputs, Size

HAIR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-3}
BASELINE_LIMIT = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 5e-2}


class Error(NamedTuple):
    """The worst result of an answer, and how far off it is."""

    result: str
    size: float


class WrongAnswerError(Exception):
    """An answer is off by more than is allowed; it is not timed."""


class Judge:
    """Knows the right answer of a case for one set of inputs.

    Args:
        case, size, inputs: of it; the baseline's answer is to be checked first.
    """

    def __init__(self, case: Benchmark, size: Size, inputs: Inputs) -> None:
        self._case, self._size, self._inputs = case, size, inputs
        self._expected = self._counted(case.reference(in_float64(inputs), size))
        self._baseline: float | None = None

    def _counted(self, outputs: Outputs) -> Outputs:
        counted = self._case.counted
        return outputs if counted is None else counted(outputs, self._inputs)

    def limit(self, name: str) -> float:
        """The error that a provider is allowed."""
        provider = self._case.providers[name]
        if provider.tolerance is not None:
            return provider.tolerance
        if name == self._case.baseline or self._baseline is None:
            return BASELINE_LIMIT[self._size.dtype]
        return 2 * self._baseline + HAIR[self._size.dtype]

    def check(self, name: str, outputs: Outputs) -> float:
        """The error of a provider's answer.

        Raises:
            WrongAnswerError: it is larger than the limit, or a result is missing.
        """
        omitted = self._case.providers[name].omits
        expected = {k: v for k, v in self._expected.items() if k not in omitted}
        error = largest_error(self._counted(outputs), expected)
        if not error.size <= (limit := self.limit(name)):
            raise WrongAnswerError(
                f"{error.result}: error {error.size:.2g} against float64, at most {limit:.2g} "
                "allowed"
            )
        if name == self._case.baseline:
            self._baseline = error.size
        return error.size


def largest_error(outputs: Outputs, expected: Outputs) -> Error:
    """The error of an answer.

    Raises:
        WrongAnswerError: a result is missing, or has another shape.
    """
    worst = Error("", 0.0)
    for name, ref in expected.items():
        if name not in outputs:
            raise WrongAnswerError(f"result {name!r} is missing")
        out = outputs[name]
        if out.shape != ref.shape:
            raise WrongAnswerError(
                f"{name}: expected shape {tuple(ref.shape)}, got {tuple(out.shape)}"
            )
        size = _distance(out.detach().double(), ref.double())
        if not size <= worst.size:  # NaN is the worst
            worst = Error(name, size)
    return worst


def _distance(out: Tensor, ref: Tensor) -> float:
    if not ref.numel():
        return 0.0
    gap, tiny = out - ref, torch.finfo(torch.float64).tiny
    norm = gap.norm() / ref.norm().clamp(min=tiny)
    largest = gap.abs().max() / ref.abs().max().clamp(min=tiny)
    return float(torch.maximum(norm, largest))  # NaN if one of them is
