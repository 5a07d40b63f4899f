"""Numbers and texts of a run as people read them, in the terminal and in the report.

Pure functions on plain values. A missing value (None, NaN, infinity) is shown as a dash.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence

Value = float | int | None

PHASES = ("rollout", "reward", "pack", "evaluate", "advantages", "update")
"""The trainer's phases in the order they are drawn; others follow in the order they appear."""


def numbers(values: Iterable[Value]) -> list[float | None]:
    """`values`, with None for each that is missing."""
    return [float(v) if v is not None and math.isfinite(v) else None for v in values]


def finite(values: Iterable[Value]) -> list[float]:
    """The finite numbers among `values`."""
    return [v for v in numbers(values) if v is not None]


def format_number(value: Value) -> str:
    """Three significant digits where they matter, thousands grouped; "–" for a missing value."""
    if value is None or not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0.00"
    if size >= 1e7 or size < 5e-4:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{digits}f}"


def format_percent(value: Value) -> str:
    """A share in 0..1 as a percentage with one decimal; "–" for a missing value."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def format_duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 12 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def visible(text: str, *, keep: str = "", newline: str = "⏎") -> str:
    """`text` with every character that is not printable shown as an escape.

    Control characters, terminal escapes, direction overrides and zero-width characters in a model's
    output would otherwise act on the terminal or the page.

    Args:
        keep: unprintable characters to leave as they are.
        newline: what a line break is shown as, unless kept.
    """
    if text.isprintable():
        return text
    out = []
    for char in text:
        if char.isprintable() or char in keep:
            out.append(char)
        else:
            out.append(newline if char == "\n" else char.encode("unicode_escape").decode("ascii"))
    return "".join(out)


def one_line(text: str, limit: int = 2000) -> str:
    """`text` as `visible` shows it, on one line; of a long one the start and the end."""
    return visible(shorten(re.sub(r"\s*[\r\n]\s*", " ", text.strip()), limit))


def prompt_text(prompt: object) -> str:
    """A prompt as text: chat messages become their contents, with roles where there are several."""
    if isinstance(prompt, (list, tuple)) and all(isinstance(m, Mapping) for m in prompt):
        if len(prompt) == 1:
            return str(prompt[0].get("content", ""))
        return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in prompt)
    return str(prompt)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters: the first two thirds and the end, joined by " … "."""
    if len(text) <= limit:
        return text
    head = max(1, (limit - 3) * 2 // 3)
    tail = max(0, limit - 3 - head)
    return text[:head] + " … " + (text[-tail:] if tail else "")


def first_and_last(rewards: Sequence[Value]) -> tuple[float | None, float | None, str]:
    """A run's reward at its start and end, and what those two figures are.

    Means of the first 3 and last 5 iterations where there are at least 8, else the first and the
    last.
    """
    values = finite(rewards)
    if not values:
        return None, None, "no reward yet"
    if len(values) < 8:
        meaning = "first and last iteration" if len(values) > 1 else "one iteration"
        return values[0], values[-1], meaning
    return sum(values[:3]) / 3, sum(values[-5:]) / 5, "mean of the first 3 and last 5 iterations"


def evaluation_figure(
    before: Mapping[str, Value] | None, after: Mapping[str, Value] | None
) -> tuple[str, str, str]:
    """Held-out evaluation before and after, as (name, before, after) ready to show.

    Reads `accuracy` (shown in percent) if either has it, else `reward`; the name is empty if there
    is none.
    """
    before, after = before or {}, after or {}
    for key, show in (("accuracy", format_percent), ("reward", format_number)):
        if key in before or key in after:
            return f"greedy {key}", show(before.get(key)), show(after.get(key))
    return "", "–", "–"


def phase_seconds(rows: Iterable[Mapping[str, Value]]) -> dict[str, float]:
    """Seconds per phase summed over rows, drawn order; time outside every phase is "other"."""
    sums: dict[str, float] = {}
    total = 0.0
    for row in rows:
        for key, value in row.items():
            if not key.startswith("seconds_") or value is None or not math.isfinite(value):
                continue
            if key == "seconds_total":
                total += value
            else:
                phase = key.removeprefix("seconds_")
                sums[phase] = sums.get(phase, 0.0) + value
    ordered = {phase: sums[phase] for phase in (*PHASES, *sums) if phase in sums}
    other = total - sum(ordered.values())
    if other > 0.005 * total:
        ordered["other"] = other
    return ordered


def format_clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
