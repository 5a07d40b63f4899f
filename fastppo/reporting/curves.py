"""The curves of report.html: inline SVG stretched to the page's width, labels beside it in HTML.

Long runs are drawn through the extremes of short stretches, which keeps the page small and hides no
spike; the page's script reads the drawn points for its tooltip.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastppo.reporting.charts import (
    downsample,
    format_ticks,
    moving_average,
    nice_ticks,
    typical_range,
)
from fastppo.reporting.formatting import (
    Value,
    finite,
)
from fastppo.reporting.markup import minus, number, text

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

    def data(self, evals: Sequence[tuple[int, float]]) -> str:
        """What the page's script reads, as JSON that cannot end a script element."""
        value = {
            "from": self.first,
            "to": self.last,
            "series": self._series,
            "evals": {"x": [x for x, _ in evals], "y": [_rounded(y) for _, y in evals]},
        }
        return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

    def ticks(self) -> str:
        """Labels of the iteration axis: both ends, and round numbers clear of them."""
        span = self.last - self.first
        inner = [t for t in nice_ticks(self.first, self.last, 6) if t == int(t)]
        clear = [int(t) for t in inner if self.first + 0.09 * span < t < self.last - 0.09 * span]
        labels = [f'<b class="x start" style="left:0">{self.first:,}</b>']
        labels += [f'<b class="x" style="left:{self.x(t) / 10:.2f}%">{t:,}</b>' for t in clear]
        return "".join(labels) + f'<b class="x end" style="left:100%">{self.last:,}</b>'

    def ends(self) -> str:
        """Labels of both ends of the iteration axis."""
        return (
            f'<b class="x start" style="left:0">{self.first:,}</b>'
            f'<b class="x end" style="left:100%">{self.last:,}</b>'
        )


def smoothed(values: Sequence[Value]) -> tuple[list[float | None], int]:
    """The moving average over a twentieth of the run and its width; empty for short runs."""
    window = max(5, len(values) // 20 | 1)
    return (moving_average(values, window), window) if len(values) >= 30 else ([], 1)


def reward_section(
    rows: Sequence[Mapping[str, Any]], evals: Sequence[tuple[int, float]], curves: Curves
) -> str:
    """The reward curve: every iteration, the moving average, and held-out evaluations."""
    rewards = [row.get("reward") for row in rows]
    known = finite(rewards)
    if not known:
        return '<h2>Reward</h2><p class="quiet">No iteration has been recorded yet.</p>'
    iterations = [int(row["iteration"]) for row in rows]
    points = downsample(list(zip(iterations, _known(rewards), strict=True)), _HERO_BUCKETS)
    smooth, window = smoothed(rewards)
    values = [*known, *(y for _, y in evals)]
    ticks = nice_ticks(min(values), max(values), 6)
    low, high = ticks[0], ticks[-1]
    curves.keep("reward", points)

    grid = "".join(f"M0 {1000 * (high - t) / (high - low):.1f}h1000" for t in ticks)
    drawn = f'<path class="grid" d="{grid}"/>'
    drawn += f'<path class="{"raw" if smooth else ""}" d="{curves.path(points, low, high)}"/>'
    key = '<span><i style="color:var(--line)"></i>sampled</span>'
    if smooth:
        line = downsample(list(zip(iterations, smooth, strict=True)), _HERO_BUCKETS)
        drawn += f'<path d="{curves.path(line, low, high)}"/>'
        key = (
            '<span><i style="color:var(--faint)"></i>sampled</span>'
            f'<span><i style="color:var(--line)"></i>mean of {window:,} iterations</span>'
        )
    over = f'<path class="dot" d="{curves.path(points, low, high)}"/>' if len(known) == 1 else ""
    if evals:
        dots = "".join(curves.path([point], low, high) for point in evals)
        over += f'<path class="eval" d="{dots}"/>'
        key += '<span><i class="dot" style="color:var(--eval)"></i>held out, greedy</span>'
    labels = "".join(
        f'<b class="y" style="top:{100 * (high - t) / (high - low):.2f}%">{minus(s)}</b>'
        for t, s in zip(ticks, format_ticks(ticks), strict=True)
    )
    return (
        '<h2>Reward by iteration</h2><figure class="hero"><figcaption>'
        f'<span class="key">{key}</span><span class="read"></span></figcaption>'
        f'<div class="plot" data-key="reward" role="img" aria-label="Reward by iteration, '
        f'{number(known[0])} at first, {number(known[-1])} at last">'
        f"{_svg(drawn)}{_svg(over, 'over')}{labels}{curves.ticks()}</div></figure>"
    )


def multiples_section(rows: Sequence[Mapping[str, Any]], curves: Curves) -> str:
    """Small curves of the other metrics; one that was never recorded is left out."""
    functions = sorted({key for row in rows for key in row if key.startswith("reward/")})
    names = [
        (key, key.removeprefix("reward/"), "reward function")
        for key in functions
        if len(functions) > 1
    ]
    charts = [_small(key, name, unit, rows, curves) for key, name, unit in (*names, *_SMALL)]
    drawn = "".join(charts)
    return f'<h2>Training metrics</h2><div class="small">{drawn}</div>' if drawn else ""


def _small(
    key: str, name: str, unit: str, rows: Sequence[Mapping[str, Any]], curves: Curves
) -> str:
    values = _known([row.get(key) for row in rows])
    known = finite(values)
    if not known or (key == "kl_coef" and min(known) == max(known)):
        return ""
    full = [(int(row["iteration"]), value) for row, value in zip(rows, values, strict=True)]
    points = downsample(full, _SMALL_BUCKETS)
    near_low, near_high = typical_range(known)
    ticks = nice_ticks(near_low, near_high, 3)
    low, high = ticks[0], ticks[-1]
    outside = sum(not low <= v <= high for v in known)
    curves.keep(key, points)
    kind = "dot" if len(known) == 1 else "raw" if len(values) > _CROWDED else ""
    path = f'<path class="{kind}" d="{curves.path(points, low, high)}"/>'
    if kind == "raw":
        smooth = zip([x for x, _ in full], smoothed(values)[0], strict=True)
        path += f'<path d="{curves.path(downsample(list(smooth), _SMALL_BUCKETS), low, high)}"/>'
    if low < 0 < high:
        path = f'<path class="zero" d="M0 {1000 * high / (high - low):.1f}h1000"/>' + path
    labels = "".join(
        f'<b class="y" style="top:{100 * (high - t) / (high - low):.2f}%">{minus(s)}</b>'
        for t, s in zip(ticks, format_ticks(ticks), strict=True)
    )
    if outside:
        labels += f'<b class="x" style="left:50%">{outside} off scale</b>'
    title = f"{key}: {unit}" if unit else key
    return (
        f'<figure><figcaption title="{text(title)}"><span>{text(name)}</span>'
        f'<span class="read">{number(known[-1])}</span></figcaption>'
        f'<div class="plot" data-key="{text(key)}" role="img" aria-label="{text(name)}, '
        f'{number(known[0])} at first, {number(known[-1])} at last">'
        f"{_svg(path, 'over' if kind == 'dot' else '')}{labels}{curves.ends()}</div></figure>"
    )


def _svg(content: str, kind: str = "") -> str:
    attribute = f' class="{kind}"' if kind else ""
    box = 'viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true"'
    return f"<svg{attribute} {box}>{content}</svg>"


def _known(values: Sequence[Value]) -> list[float | None]:
    return [float(v) if finite([v]) and v is not None else None for v in values]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
