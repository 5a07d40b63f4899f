"""What the other sections of report.html show: headline, time by phase, samples, configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastppo.reporting.formatting import (
    PHASES,
    evaluation_figure,
    finite,
    first_and_last,
    format_duration,
    format_number,
    phase_seconds,
    prompt_text,
    shorten,
)
from fastppo.reporting.markup import long_text

Figure = tuple[str, str, str, str]  # name, value before or "", value, note

_TEXT_LIMIT = 2_000  # characters shown of a prompt or a response
_SAMPLES_LIMIT = 1_000_000  # characters of markup for all samples
_ROWS_LIMIT = 16  # samples of one iteration
_ROW_SIZE = 80  # characters of markup around one sample


def figures(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> list[Figure]:
    """The headline: reward and greedy evaluation from start to end, iterations, time, speed."""
    items = []
    before, after, meaning = first_and_last([row.get("reward") for row in rows])
    if after is not None:
        first = format_number(before) if len(rows) > 1 else ""
        items.append(("Sampled reward", first, format_number(after), meaning))
    name, first, last = evaluation_figure(summary.get("eval_before"), summary.get("eval_after"))
    if name:
        prompts = (summary.get("eval_after") or summary.get("eval_before") or {}).get("prompts")
        note = f"on {prompts} held-out prompts" if prompts else "on held-out prompts"
        items.append((name.capitalize(), first, last, f"{note}, before and after"))
    items.append(("Iterations", "", f"{len(rows):,}", ""))
    seconds = summary.get("seconds") or sum(finite(row.get("seconds_total") for row in rows))
    if seconds:
        items.append(("Time", "", format_duration(seconds), ""))
    speed = sorted(finite(row.get("tokens_per_second") for row in rows))
    if speed:
        items.append(("Tokens per second", "", format_number(speed[len(speed) // 2]), "median"))
    return items


def phases(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Share of the run's time in each phase."""
    seconds = phase_seconds(rows)
    total = sum(seconds.values())
    return [
        {
            "name": phase,
            "color": f"var(--p{PHASES.index(phase) if phase in PHASES else 6})",
            "part": f"{spent / total:.5f}",
            "share": f"{100 * spent / total:.1f} %",
            "time": format_duration(spent) if spent >= 10 else f"{spent:.1f} s",
        }
        for phase, spent in seconds.items()
        if total
    ]


def samples(read: Callable[[], Iterable[Mapping[str, Any]]]) -> dict[int, list[dict[str, Any]]]:
    """Samples by iteration, as many as make a page of a bearable size.

    Args:
        read: yields the rows of samples.jsonl anew at each call; long files are read twice, never
            held.
    """
    sizes: dict[int, list[int]] = {}
    for row in read():
        sample = _sample(row)
        size = _ROW_SIZE + len(sample["prompt"]) + len(sample["response"])
        sizes.setdefault(int(row.get("iteration", 0)), []).append(size)
    if not sizes:
        return {}
    iterations = sorted(sizes)
    mean = sum(sum(size[:_ROWS_LIMIT]) for size in sizes.values()) / len(sizes)
    count = min(len(iterations), max(2, int(_SAMPLES_LIMIT / mean)))
    shown = sorted(
        {iterations[round(i * (len(iterations) - 1) / max(1, count - 1))] for i in range(count)}
    )
    found: dict[int, list[dict[str, Any]]] = {iteration: [] for iteration in shown}
    for row in read():
        rows = found.get(int(row.get("iteration", 0)))
        if rows is not None and len(rows) < _ROWS_LIMIT:
            rows.append(_sample(row))
    return found


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "prompt": long_text(shorten(prompt_text(row.get("prompt", "")), _TEXT_LIMIT)),
        "response": long_text(shorten(str(row.get("response", "")), _TEXT_LIMIT)),
        "truncated": row.get("truncated"),
        "reward": row.get("reward"),
    }


def configuration(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The resolved configuration."""
    return [
        (key, value if isinstance(value, str) else json.dumps(value))
        for key, value in config.items()
    ]
