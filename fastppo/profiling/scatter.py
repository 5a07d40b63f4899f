"""The roofline as a picture: operations per byte against operations per second, both logarithmic.

Roofs are SVG stretched to the page's width; dots and labels are HTML on top of it, so that dots
stay round and text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastppo.profiling.analysis import Kernel
from fastppo.profiling.meta import Ceilings
from fastppo.profiling.names import amount, duration, percent, short_name
from fastppo.profiling.roofline import attainable_tflops, ridge
from fastppo.reporting.markup import text

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


def roofline_section(
    kernels: Sequence[Kernel], ceilings: Ceilings | None, colors: Mapping[str, str], what: str
) -> str:
    """The whole section; "" where no ceiling or no kernel that computes is known.

    Args:
        colors: CSS colour of each phase.
        what: what a dot stands for, such as "a kernel".
    """
    drawn = [k for k in kernels if k.bytes and k.flops and k.tflop_s and k.roofline is not None]
    drawn = drawn[:_DOTS]
    if ceilings is None or not drawn:
        return ""
    axes = _axes(drawn, ceilings)
    largest = max(kernel.share for kernel in drawn)
    dots = "".join(_dot(kernel, axes, largest, colors) for kernel in drawn)
    share = percent(sum(kernel.share for kernel in drawn))
    beyond = any((kernel.roofline or 0.0) > 1 for kernel in drawn)
    note = (
        f"A dot is {what} in one phase, its area its time. On the line it runs as fast as this "
        "device can; left of the bend memory is the limit, right of it arithmetic. The dots are "
        f"{share} of the time; copies and what has no known cost are not among them."
        f"{' Above the line the data came out of a cache.' if beyond else ''}"
    )
    names, ticks = _names(drawn, axes, largest), _ticks(axes)
    return (
        f'<h2>Roofline</h2><figure><figcaption class="note">{note}</figcaption><div class="plot" '
        f'id="roofline">{_roofs(axes, ceilings)}{dots}{names}{ticks}</div></figure>'
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


def _roofs(axes: _Axes, ceilings: Ceilings) -> str:
    grid = "".join(
        f"M{1000 * (d - axes.left) / (axes.right - axes.left):.1f} 0v1000"
        for d in range(axes.left, axes.right + 1)
    ) + "".join(
        f"M0 {1000 * (axes.top - d) / (axes.top - axes.bottom):.1f}h1000"
        for d in range(axes.bottom, axes.top + 1)
    )
    lines, labels = "", ""
    halves = (True, False) if ceilings.bf16_tflops != ceilings.fp32_tflops else (False,)
    for half in halves:
        name, peak = ("bf16", ceilings.bf16_tflops) if half else ("fp32", ceilings.fp32_tflops)
        points = [10.0**axes.left, ridge(ceilings, half), 10.0**axes.right]
        path = "L".join(
            f"{1000 * axes.x(each):.1f} "
            f"{1000 * axes.y(attainable_tflops(each, ceilings, half)):.1f}"
            for each in points
        )
        lines += f'<path class="roof" d="M{path}"/>'
        labels += (
            f'<b class="roof-name" style="right:4px;top:{100 * axes.y(peak):.2f}%">'
            f"{name} {amount(peak * 1e12, 'FLOP/s')}</b>"
        )
    # Beside the middle of the slope, above it, where no dot can be.
    start = max(10.0**axes.left, 10.0**axes.bottom * 1e3 / ceilings.copy_gb_s)
    middle = math.sqrt(start * max(ridge(ceilings, half) for half in halves))
    height = middle * ceilings.copy_gb_s / 1e3
    labels += (
        f'<b class="roof-name slope" style="left:{100 * axes.x(middle):.2f}%;'
        f'top:{100 * axes.y(height):.2f}%">memory {amount(ceilings.copy_gb_s * 1e9, "B/s")}</b>'
    )
    svg = '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
    return f'{svg}<path class="grid" d="{grid}"/>{lines}</svg>{labels}'


def _dot(kernel: Kernel, axes: _Axes, largest: float, colors: Mapping[str, str]) -> str:
    x, y = _place(kernel, axes)
    size = _size(kernel, largest)
    facts = [
        kernel.name,
        f"{kernel.phase}, {kernel.calls:,} calls, {duration(kernel.total_us)}",
        f"{percent(kernel.share)} of the kernels' time, {percent(kernel.roofline)} of the roofline",
        f"{amount(1e12 * (kernel.tflop_s or 0), 'FLOP/s')}, "
        f"{amount(1e9 * (kernel.gb_s or 0), 'B/s')}, {_intensity(kernel):.3g} FLOP/B",
    ]
    tip = "&#10;".join(text(fact) for fact in facts)
    return (
        f'<i tabindex="0" data-phase="{text(kernel.phase)}" data-tip="{tip}" style="left:'
        f"{100 * x:.2f}%;top:{100 * y:.2f}%;--size:{size:.1f}px;"
        f'background:{colors[kernel.phase]}"></i>'
    )


def _place(kernel: Kernel, axes: _Axes) -> tuple[float, float]:
    """Position in 0..1, brought back to the edge from outside it."""
    x, y = axes.x(_intensity(kernel)), axes.y(kernel.tflop_s or 1.0)
    return min(1.0, max(0.0, x)), min(1.0, max(0.0, y))


def _size(kernel: Kernel, largest: float) -> float:
    """Diameter in pixels."""
    return 7 + 37 * math.sqrt(kernel.share / largest) if largest else 7.0


def _names(kernels: Sequence[Kernel], axes: _Axes, largest: float) -> str:
    """Names of the longest kernels, as many as have room: some only on a wide screen."""
    narrow = _fitting(kernels, axes, 310, 300)
    names = ""
    for index in _fitting(kernels, axes, 1000, 420):
        kernel = kernels[index]
        x, y = _place(kernel, axes)
        beside = _size(kernel, largest) / 2 + 5
        to_left = f"calc(-100% - {beside:.0f}px)"
        style = f"left:{100 * x:.2f}%;top:{100 * y:.2f}%;transform:translate("
        style += f"{to_left if x > 0.5 else f'{beside:.0f}px'},-50%)"
        wide = "" if index in narrow else " wide"
        names += (
            f'<b class="dot-name{wide}" data-phase="{text(kernel.phase)}" style="{style}">'
            f"{text(short_name(kernel.name))}</b>"
        )
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


def _ticks(axes: _Axes) -> str:
    labels = ""
    for decade in range(axes.left, axes.right + 1):
        at = 100 * (decade - axes.left) / (axes.right - axes.left)
        end = " end" if decade == axes.right else " start" if decade == axes.left else ""
        value = _round(10.0**decade) if decade >= 3 else f"{10.0**decade:g}"
        labels += f'<b class="x{end}" style="left:{at:.2f}%">{value}</b>'
    for decade in range(axes.bottom, axes.top + 1):
        at = 100 * (axes.top - decade) / (axes.top - axes.bottom)
        labels += f'<b class="y" style="top:{at:.2f}%">{_round(10.0 ** (decade + 12))}</b>'
    return labels + '<b class="unit">FLOP/s</b><b class="unit-x">FLOP per byte</b>'


def _round(power_of_ten: float) -> str:
    return amount(power_of_ten, "").strip().replace(".00", "").replace(".0", "")
