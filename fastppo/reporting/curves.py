"""The curves of report.html: what page.html draws as inline SVG, with labels beside it in HTML.

Long runs are drawn through the extremes of short stretches, which keeps the page small and hides no
spike; the page's script reads the drawn points for its tooltip.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.reporting.charts import (
    downsample,
    format_ticks,
    moving_average,
    nice_ticks,
    typical_range,
)
from fastppo.reporting.formatting import Value, finite, numbers

_SMALL = (
    # (row key, name, unit)
    ("kl", "KL to reference", "nats per token"),
    ("entropy", "Entropy", "nats per token"),
    ("approx_kl", "KL of the update", "nats per token, approx_kl"),
    ("clipfrac", "Clipped share", "clipfrac"),
    ("explained_variance", "Explained variance", "of the returns by the critic"),
    ("value_loss", "Value loss", ""),
    ("policy_loss", "Policy loss", ""),
    ("response_length", "Response length", "tokens"),
    ("truncated", "Truncated share", "of responses, at the length limit"),
    ("tokens_per_second", "Tokens per second", ""),
    ("actor_grad_norm", "Actor gradient", "norm before clipping"),
    ("critic_grad_norm", "Critic gradient", "norm before clipping"),
    ("kl_coef", "KL coefficient", ""),
)
_HERO_BUCKETS, _SMALL_BUCKETS = 800, 250  # stretches of a long run; each is drawn by its extremes
_CROWDED = 200  # iterations from which a small curve is drawn with its moving average


@dataclass(frozen=True, slots=True)
class Curve:
    """One plot.

    Args:
        key: of the drawn points in `Curves.data`.
        first, last: known values.
        drawn, over: paths, as (CSS class, SVG path data); those of `over` may leave the frame.
        y: labels, as (percent from the top, text).
        x: labels, as (CSS class, percent from the left, text).
        legend: what the lines are, as (CSS class, colour, text).
    """

    key: str
    name: str
    title: str
    first: float
    last: float
    drawn: list[tuple[str, str]]
    over: list[tuple[str, str]]
    y: list[tuple[str, str]]
    x: list[tuple[str, str, str]]
    legend: list[tuple[str, str, str]]


class Curves:
    """Curves on a common iteration axis, and the numbers behind them for the page's script.

    Args:
        iterations: every iteration that is drawn, in any order; may be empty.
    """

    def __init__(self, iterations: Sequence[int]) -> None:
        self.first = min(iterations, default=0)
        self.last = max(iterations, default=1)
        if self.last == self.first:
            self.last = self.first + 1
        self._series: dict[str, dict[str, list[float]]] = {}

    def x(self, iteration: float) -> float:
        """Horizontal position in 0..1000."""
        return 1000 * (iteration - self.first) / (self.last - self.first)

    def path(self, points: Iterable[tuple[int, float | None]], low: float, high: float) -> str:
        """SVG path data through `points`, `low` at the bottom; a missing value breaks the line."""
        steps, pen_down = [], False
        for iteration, value in points:
            if value is None:
                pen_down = False
                continue
            y = min(9000.0, max(-9000.0, 1000 * (high - value) / (high - low)))
            steps.append(f"{'L' if pen_down else 'M'}{self.x(iteration):.1f} {y:.1f}")
            if not pen_down:
                steps.append("h0")  # a lone point shows as a dot
            pen_down = True
        return "".join(steps)

    def keep(self, key: str, points: Iterable[tuple[int, float | None]]) -> None:
        """Remember the drawn points of `key` for the tooltip."""
        known = [(x, y) for x, y in points if y is not None]
        self._series[key] = {"x": [x for x, _ in known], "y": [_rounded(y) for _, y in known]}

    def data(self, evals: Sequence[tuple[int, float]]) -> dict[str, Any]:
        """What the page's script reads."""
        return {
            "from": self.first,
            "to": self.last,
            "series": self._series,
            "evals": {"x": [x for x, _ in evals], "y": [_rounded(y) for _, y in evals]},
        }

    def ticks(self) -> list[tuple[str, str, str]]:
        """Labels of the iteration axis: both ends, and round numbers clear of them."""
        span = self.last - self.first
        inner = [t for t in nice_ticks(self.first, self.last, 6) if t == int(t)]
        clear = [int(t) for t in inner if self.first + 0.09 * span < t < self.last - 0.09 * span]
        return [*self.ends(), *(("x", f"{self.x(t) / 10:.2f}", f"{t:,}") for t in clear)]

    def ends(self) -> list[tuple[str, str, str]]:
        """Labels of both ends of the iteration axis."""
        return [("x start", "0", f"{self.first:,}"), ("x end", "100", f"{self.last:,}")]


def smoothed(values: Sequence[Value]) -> tuple[list[float | None], int]:
    """The moving average over a twentieth of the run and its width; empty for short runs."""
    window = max(5, len(values) // 20 | 1)
    return (moving_average(values, window), window) if len(values) >= 30 else ([], 1)


def reward_curve(
    rows: Sequence[Mapping[str, Any]], evals: Sequence[tuple[int, float]], curves: Curves
) -> Curve | None:
    """The reward: every iteration, the moving average, and held-out evaluations."""
    rewards = [row.get("reward") for row in rows]
    known = finite(rewards)
    if not known:
        return None
    iterations = [int(row["iteration"]) for row in rows]
    points = downsample(list(zip(iterations, numbers(rewards), strict=True)), _HERO_BUCKETS)
    smooth, window = smoothed(rewards)
    values = [*known, *(y for _, y in evals)]
    ticks = nice_ticks(min(values), max(values), 6)
    low, high = ticks[0], ticks[-1]
    curves.keep("reward", points)

    drawn = [("grid", "".join(f"M0 {1000 * (high - t) / (high - low):.1f}h1000" for t in ticks))]
    drawn.append(("raw" if smooth else "", curves.path(points, low, high)))
    legend = [("", "faint" if smooth else "line", "sampled")]
    if smooth:
        line = downsample(list(zip(iterations, smooth, strict=True)), _HERO_BUCKETS)
        drawn.append(("", curves.path(line, low, high)))
        legend.append(("", "line", f"mean of {window:,} iterations"))
    over = [("dot", curves.path(points, low, high))] if len(known) == 1 else []
    if evals:
        over.append(("eval", "".join(curves.path([point], low, high) for point in evals)))
        legend.append(("dot", "eval", "held out, greedy"))
    name, x, y = "Reward by iteration", curves.ticks(), _heights(ticks)
    return Curve("reward", name, "", known[0], known[-1], drawn, over, y, x, legend)


def small_curves(rows: Sequence[Mapping[str, Any]], curves: Curves) -> list[Curve]:
    """Curves of the other metrics; one that was never recorded is left out."""
    functions = sorted({key for row in rows for key in row if key.startswith("reward/")})
    names = [(key, key.removeprefix("reward/"), "reward function") for key in functions]
    shown = (*names, *_SMALL) if len(names) > 1 else _SMALL
    found = [_small(key, name, unit, rows, curves) for key, name, unit in shown]
    return [curve for curve in found if curve is not None]


def _small(
    key: str, name: str, unit: str, rows: Sequence[Mapping[str, Any]], curves: Curves
) -> Curve | None:
    values = numbers([row.get(key) for row in rows])
    known = finite(values)
    if not known or (key == "kl_coef" and min(known) == max(known)):
        return None
    full = [(int(row["iteration"]), value) for row, value in zip(rows, values, strict=True)]
    points = downsample(full, _SMALL_BUCKETS)
    near_low, near_high = typical_range(known)
    ticks = nice_ticks(near_low, near_high, 3)
    low, high = ticks[0], ticks[-1]
    outside = sum(not low <= v <= high for v in known)
    curves.keep(key, points)
    kind = "dot" if len(known) == 1 else "raw" if len(values) > _CROWDED else ""
    drawn = [(kind, curves.path(points, low, high))]
    if kind == "raw":
        smooth = list(zip([x for x, _ in full], smoothed(values)[0], strict=True))
        drawn.append(("", curves.path(downsample(smooth, _SMALL_BUCKETS), low, high)))
    if low < 0 < high:
        drawn.insert(0, ("zero", f"M0 {1000 * high / (high - low):.1f}h1000"))
    drawn, over = ([], drawn) if kind == "dot" else (drawn, [])
    x = curves.ends() + ([("x", "50", f"{outside} off scale")] if outside else [])
    title = f"{key}: {unit}" if unit else key
    return Curve(key, name, title, known[0], known[-1], drawn, over, _heights(ticks), x, [])


def _heights(ticks: Sequence[float]) -> list[tuple[str, str]]:
    low, high = ticks[0], ticks[-1]
    return [
        (f"{100 * (high - t) / (high - low):.2f}", label)
        for t, label in zip(ticks, format_ticks(ticks), strict=True)
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
