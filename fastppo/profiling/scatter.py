"""The roofline as a picture: operations per byte against operations per second, both logarithmic.

page.html draws roofs as SVG stretched to its width, dots and labels as HTML on top of it, so that
dots stay round and text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastppo.profiling.analysis import Kernel
from fastppo.profiling.meta import Ceilings
from fastppo.profiling.names import amount, duration, percent, short_name
from fastppo.profiling.roofline import attainable_tflops, ridge

_DOTS = 150  # kernels drawn, the longest first
_LABELS = 6  # of them with their names


@dataclass(frozen=True, slots=True)
class _Axes:
    """Decades of both axes."""

    left: int
    right: int
    bottom: int
    top: int

    def x(self, intensity: float) -> float:
        """0 at the left, 1 at the right."""
        return (math.log10(intensity) - self.left) / (self.right - self.left)

    def y(self, tflops: float) -> float:
        """0 at the top, 1 at the bottom."""
        return (self.top - math.log10(tflops)) / (self.top - self.bottom)


class Dot(NamedTuple):
    """A kernel in one phase: what its tip says, and where it stands, as CSS."""

    phase: str
    facts: list[str]
    style: str


class Label(NamedTuple):
    """Text on the picture, with its CSS class and place; `phase`: of the kernel that it names."""

    kind: str
    style: str
    text: str
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Roofline:
    """What the section shows.

    Args:
        share: of the kernels' time, in dots.
        beyond: whether a dot is above its roof.
        grid, roofs: SVG path data.
    """

    share: float
    beyond: bool
    grid: str
    roofs: list[str]
    dots: list[Dot]
    labels: list[Label]


def roofline(kernels: Sequence[Kernel], ceilings: Ceilings | None) -> Roofline | None:
    """None where no ceiling or no kernel that computes is known."""
    drawn = [k for k in kernels if k.bytes and k.flops and k.tflop_s and k.roofline is not None]
    drawn = drawn[:_DOTS]
    if ceilings is None or not drawn:
        return None
    axes = _axes(drawn, ceilings)
    largest = max(kernel.share for kernel in drawn)
    roofs, labels = _roofs(axes, ceilings)
    return Roofline(
        share=sum(kernel.share for kernel in drawn),
        beyond=any((kernel.roofline or 0.0) > 1 for kernel in drawn),
        grid=_grid(axes),
        roofs=roofs,
        dots=[_dot(kernel, axes, largest) for kernel in drawn],
        labels=[*labels, *_names(drawn, axes, largest), *_ticks(axes)],
    )


def _intensity(kernel: Kernel) -> float:
    return (kernel.flops or 0.0) / (kernel.bytes or 1.0)


def _axes(kernels: Sequence[Kernel], ceilings: Ceilings) -> _Axes:
    """Decades around all dots and both ridges."""
    xs = [_intensity(k) for k in kernels] + [ridge(ceilings, half) * 3 for half in (True, False)]
    ys = [0.8 * (k.tflop_s or 1.0) for k in kernels]
    ys += [1.1 * ceilings.bf16_tflops, 1.1 * ceilings.fp32_tflops]
    left, right = math.floor(math.log10(min(xs))), math.ceil(math.log10(max(xs)))
    top = math.ceil(math.log10(max(ys)))
    bottom = max(math.floor(math.log10(min(ys))), top - 8)  # what is slower stands at the edge
    return _Axes(max(left, right - 8), right, bottom, top)


def _grid(axes: _Axes) -> str:
    columns = [(d - axes.left) / (axes.right - axes.left) for d in range(axes.left, axes.right + 1)]
    rows = [(axes.top - d) / (axes.top - axes.bottom) for d in range(axes.bottom, axes.top + 1)]
    lines = [f"M{1000 * at:.1f} 0v1000" for at in columns]
    return "".join(lines + [f"M0 {1000 * at:.1f}h1000" for at in rows])


def _roofs(axes: _Axes, ceilings: Ceilings) -> tuple[list[str], list[Label]]:
    """Paths, and what is written on them."""
    paths, labels = [], []
    halves = (True, False) if ceilings.bf16_tflops != ceilings.fp32_tflops else (False,)
    for half in halves:
        name, peak = ("bf16", ceilings.bf16_tflops) if half else ("fp32", ceilings.fp32_tflops)
        points = [10.0**axes.left, ridge(ceilings, half), 10.0**axes.right]
        path = "L".join(
            f"{1000 * axes.x(each):.1f} "
            f"{1000 * axes.y(attainable_tflops(each, ceilings, half)):.1f}"
            for each in points
        )
        paths.append(f"M{path}")
        style = f"right:4px;top:{100 * axes.y(peak):.2f}%"
        labels.append(Label("roof-name", style, f"{name} {amount(peak * 1e12, 'FLOP/s')}"))
    # Beside the middle of the slope, above it, where no dot can be.
    start = max(10.0**axes.left, 10.0**axes.bottom * 1e3 / ceilings.copy_gb_s)
    middle = math.sqrt(start * max(ridge(ceilings, half) for half in halves))
    height = middle * ceilings.copy_gb_s / 1e3
    style = f"left:{100 * axes.x(middle):.2f}%;top:{100 * axes.y(height):.2f}%"
    memory = f"memory {amount(ceilings.copy_gb_s * 1e9, 'B/s')}"
    return paths, [*labels, Label("roof-name slope", style, memory)]


def _dot(kernel: Kernel, axes: _Axes, largest: float) -> Dot:
    x, y = _place(kernel, axes)
    facts = [
        kernel.name,
        f"{kernel.phase}, {kernel.calls:,} calls, {duration(kernel.total_us)}",
        f"{percent(kernel.share)} of the kernels' time, {percent(kernel.roofline)} of the roofline",
        f"{amount(1e12 * (kernel.tflop_s or 0), 'FLOP/s')}, "
        f"{amount(1e9 * (kernel.gb_s or 0), 'B/s')}, {_intensity(kernel):.3g} FLOP/B",
    ]
    style = f"left:{100 * x:.2f}%;top:{100 * y:.2f}%;--size:{_size(kernel, largest):.1f}px"
    return Dot(kernel.phase, facts, style)


def _place(kernel: Kernel, axes: _Axes) -> tuple[float, float]:
    """Position in 0..1, brought back to the edge from outside it."""
    x, y = axes.x(_intensity(kernel)), axes.y(kernel.tflop_s or 1.0)
    return min(1.0, max(0.0, x)), min(1.0, max(0.0, y))


def _size(kernel: Kernel, largest: float) -> float:
    """Diameter in pixels."""
    return 7 + 37 * math.sqrt(kernel.share / largest) if largest else 7.0


def _names(kernels: Sequence[Kernel], axes: _Axes, largest: float) -> list[Label]:
    """Names of the longest kernels, as many as have room: some only on a wide screen."""
    narrow = _fitting(kernels, axes, 310, 300)
    names = []
    for index in _fitting(kernels, axes, 1000, 420):
        kernel = kernels[index]
        x, y = _place(kernel, axes)
        beside = _size(kernel, largest) / 2 + 5
        to_left = f"calc(-100% - {beside:.0f}px)"
        style = f"left:{100 * x:.2f}%;top:{100 * y:.2f}%;transform:translate("
        style += f"{to_left if x > 0.5 else f'{beside:.0f}px'},-50%)"
        kind = "dot-name" if index in narrow else "dot-name wide"
        names.append(Label(kind, style, short_name(kernel.name), kernel.phase))
    return names


def _fitting(kernels: Sequence[Kernel], axes: _Axes, width: float, height: float) -> list[int]:
    """Positions of the kernels whose names do not touch on a plot of this many pixels."""
    taken: list[tuple[float, float, float]] = []  # left, right, middle
    chosen = []
    for index, kernel in enumerate(kernels):
        x, y = _place(kernel, axes)
        room = min(0.44 * width, 7 * len(short_name(kernel.name))) + 30
        left = width * x - room if x > 0.5 else width * x
        clear = all(
            abs(height * y - middle) > 18 or left > end or left + room < start
            for start, end, middle in taken
        )
        if clear:
            taken.append((left, left + room, height * y))
            chosen.append(index)
        if len(chosen) == _LABELS:
            break
    return chosen


def _ticks(axes: _Axes) -> list[Label]:
    labels = []
    for decade in range(axes.left, axes.right + 1):
        at = 100 * (decade - axes.left) / (axes.right - axes.left)
        kind = "x end" if decade == axes.right else "x start" if decade == axes.left else "x"
        value = _round(10.0**decade) if decade >= 3 else f"{10.0**decade:g}"
        labels.append(Label(kind, f"left:{at:.2f}%", value))
    for decade in range(axes.bottom, axes.top + 1):
        at = 100 * (axes.top - decade) / (axes.top - axes.bottom)
        labels.append(Label("y", f"top:{at:.2f}%", _round(10.0 ** (decade + 12))))
    return labels


def _round(power_of_ten: float) -> str:
    return amount(power_of_ten, "").strip().replace(".00", "").replace(".0", "")
