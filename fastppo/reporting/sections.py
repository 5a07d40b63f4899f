"""The other sections of report.html: headline, time by phase, samples, configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
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
    visible,
)
from fastppo.reporting.markup import minus, number, text

_TEXT_LIMIT = 2_000  # characters shown of a prompt or a response
_SAMPLES_LIMIT = 1_000_000  # characters of markup for all samples
_ROWS_LIMIT = 16  # samples of one iteration


def figures(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The headline: reward and greedy evaluation from start to end, iterations, time, speed."""
    items = []
    before, after, meaning = first_and_last([row.get("reward") for row in rows])
    if after is not None:
        change = _change(format_number(before), format_number(after))
        items.append(("Sampled reward", change if len(rows) > 1 else number(after), meaning))
    name, first, last = evaluation_figure(summary.get("eval_before"), summary.get("eval_after"))
    if name:
        prompts = (summary.get("eval_after") or summary.get("eval_before") or {}).get("prompts")
        note = f"on {prompts} held-out prompts" if prompts else "on held-out prompts"
        items.append((name.capitalize(), _change(first, last), f"{note}, before and after"))
    items.append(("Iterations", f"{len(rows):,}", ""))
    seconds = summary.get("seconds") or sum(finite(row.get("seconds_total") for row in rows))
    if seconds:
        items.append(("Time", format_duration(seconds), ""))
    speed = finite(row.get("tokens_per_second") for row in rows)
    if speed:
        items.append(("Tokens per second", format_number(sorted(speed)[len(speed) // 2]), "median"))
    drawn = ""
    for what, value, note in items:
        small = f"<small>{text(note)}</small>" if note else ""
        drawn += f"<div><dt>{text(what)}</dt><dd>{value}{small}</dd></div>"
    return drawn


def phases_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Share of the run's time in each phase, as one bar."""
    seconds = phase_seconds(rows)
    total = sum(seconds.values())
    if not total:
        return ""
    bar, legend = "", ""
    for phase, spent in seconds.items():
        color = f"var(--p{PHASES.index(phase) if phase in PHASES else 6})"
        share = f"{100 * spent / total:.1f} %"
        style = f"flex:{spent / total:.5f} 1 0;background:{color}"
        bar += f'<span style="{style}" title="{text(phase)} {share}"></span>'
        legend += (
            f'<li><i style="background:{color}"></i>{text(phase)} '
            f'<span class="quiet">{share}, {_duration(spent)}</span></li>'
        )
    return f'<h2>Time by phase</h2><div class="bar">{bar}</div><ul class="phases">{legend}</ul>'


def samples_section(read: Callable[[], Iterable[Mapping[str, Any]]]) -> str:
    """Samples of two iterations side by side, the first and the last until others are chosen.

    Args:
        read: yields the rows of samples.jsonl anew at each call; long files are read twice, never
            held.
    """
    sizes: dict[int, list[int]] = {}
    for row in read():
        sizes.setdefault(int(row.get("iteration", 0)), []).append(len(_sample(row)))
    if not sizes:
        return ""
    iterations = sorted(sizes)
    mean = sum(sum(size[:_ROWS_LIMIT]) for size in sizes.values()) / len(sizes)
    count = min(len(iterations), max(2, int(_SAMPLES_LIMIT / mean)))
    shown = sorted(
        {iterations[round(i * (len(iterations) - 1) / max(1, count - 1))] for i in range(count)}
    )
    found: dict[int, list[str]] = {iteration: [] for iteration in shown}
    for row in read():
        rows = found.get(int(row.get("iteration", 0)))
        if rows is not None and len(rows) < _ROWS_LIMIT:
            rows.append(_sample(row))
    head = "<thead><tr><th>Prompt</th><th>Response</th><th>Reward</th></tr></thead>"
    tables = {
        i: f'<table data-iteration="{i}">{head}<tbody>{"".join(rows)}</tbody></table>'
        for i, rows in found.items()
    }
    ends = shown[:1] if len(shown) == 1 else [shown[0], shown[-1]]
    columns = ""
    for end in ends:
        options = "".join(f"<option{' selected' if i == end else ''}>{i}</option>" for i in shown)
        columns += f"<div><label>Iteration <select>{options}</select></label>{tables[end]}</div>"
    store = "".join(tables.values()) if len(shown) > 1 else ""
    return (
        f'<h2>Samples</h2><div class="pair">{columns}</div><div id="samples" hidden>{store}</div>'
    )


def _sample(row: Mapping[str, Any]) -> str:
    prompt = _long_text(prompt_text(row.get("prompt", "")))
    response = _long_text(str(row.get("response", "")))
    cut = " <em>truncated</em>" if row.get("truncated") else ""
    return (
        f"<tr><td><div>{prompt}</div></td><td><div>{response}{cut}</div></td>"
        f"<td>{number(row.get('reward'))}</td></tr>"
    )


def configuration_section(config: Mapping[str, Any]) -> str:
    """The resolved configuration, folded."""
    if not config:
        return ""
    rows = ""
    for key, value in config.items():
        shown = value if isinstance(value, str) else json.dumps(value)
        rows += f"<tr><td>{text(key)}</td><td>{text(shown)}</td></tr>"
    return (
        f"<details><summary>Configuration</summary><table><tbody>{rows}</tbody></table></details>"
    )


def _change(before: str, after: str) -> str:
    return f"<span>{minus(before)} →</span> {minus(after)}"


def _long_text(value: str) -> str:
    return escape(visible(shorten(value, _TEXT_LIMIT), keep="\n\t"))


def _duration(seconds: float) -> str:
    return format_duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"
