"""`report.html`: a run's curves, times, samples and configuration on one self-contained page.

A pure function of the run directory's files: metrics.jsonl, and where present samples.jsonl,
config.json and summary.json. No resource is loaded from anywhere (the page's own policy forbids
it). Curves are inline SVG stretched to the page's width, with their labels beside them in HTML, so
that text keeps its size from a telephone to a wide screen. Long runs are drawn through the extremes
of short stretches, which keeps the page small and hides no spike. Markup, style and script are in
base.html and page.html.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.options import shown
from fastppo.reporting.curves import Curves, reward_curve, small_curves, smoothed
from fastppo.reporting.formatting import finite
from fastppo.reporting.markup import write_page, write_whole
from fastppo.reporting.sections import configuration, figures, phases, samples

_SAMPLED, _HELD_OUT = "#2a5db0", "#c4561a"


def write_report(run_dir: str | Path) -> Path:
    """Write run_dir/report.html from the run's files, replacing an older one, and return its path.

    Raises:
        FileNotFoundError: run_dir has no metrics.jsonl.
        ValueError: a line of metrics.jsonl or samples.jsonl other than an unfinished last one is
            not JSON.
    """
    run_dir = Path(run_dir)
    rows = _metrics(run_dir)
    config, summary = _optional(run_dir / "config.json"), _optional(run_dir / "summary.json")
    name = str(summary.get("run_name") or run_dir.resolve().name)
    model = Path(str(config.get("model") or summary.get("model_name") or "")).name or name
    evals = _evaluations(rows, summary)
    curves = Curves([int(row["iteration"]) for row in rows] + [x for x, _ in evals])
    reward = reward_curve(rows, evals, curves)
    multiples = small_curves(rows, curves)
    path, texts = run_dir / "report.html", run_dir / "samples.jsonl"
    write_page(
        path,
        "reporting/page.html",
        title=f"{model} · {name}",
        heading=model,
        about=[f"run {name}", summary.get("hardware")],
        figures=figures(rows, summary),
        reward=reward,
        multiples=multiples,
        phases=phases(rows),
        samples=samples(lambda: read_lines(texts)) if texts.exists() else {},
        config=configuration(config),
        data=curves.data(evals),
    )
    return path


def write_curve_png(run_dir: str | Path) -> Path:
    """Draw the reward curve with matplotlib as run_dir/reward.png and return its path.

    Raises:
        FileNotFoundError, ValueError: as `write_report`.
    """
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    rows = _metrics(run_dir)
    evals = _evaluations(rows, _optional(run_dir / "summary.json"))
    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    x = [row["iteration"] for row in rows]
    rewards = [row.get("reward") for row in rows]
    averages, window = smoothed(rewards)
    smooth = np.array(averages, dtype=float)  # NaN where a value is missing
    alpha, marker = 0.35 if len(smooth) else 1.0, "." if len(x) < 2 else ""
    y = np.array(rewards, dtype=float)
    axes.plot(x, y, color=_SAMPLED, alpha=alpha, linewidth=1, marker=marker, label="sampled")
    if len(smooth):
        label = f"mean of {window} iterations"
        axes.plot(x, smooth, color=_SAMPLED, linewidth=1.8, label=label)
    if evals:
        at, held_out = zip(*evals, strict=True)
        axes.plot(at, held_out, "o", color=_HELD_OUT, markersize=5, label="held out, greedy")
        axes.legend(frameon=False)
    axes.set_xlabel("iteration")
    axes.set_ylabel("reward")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#eeebe5", linewidth=0.8)
    axes.set_axisbelow(True)
    path, png = run_dir / "reward.png", io.BytesIO()
    figure.savefig(png, format="png")
    write_whole(path, png.getvalue())
    return path


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON-lines file, in order; a last line that is cut off is left out.

    Raises:
        ValueError: another line is not a JSON object.
    """
    with path.open(encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):  # of 5000 digits, or nested too deeply
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}: line {number} must be a JSON object, got {line[:80]!r}")
            yield row


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl: an iteration, and numbers or None under every other name.

    Raises:
        ValueError: another line.
    """
    rows = []
    for number, row in enumerate(read_lines(path), 1):
        iteration = row.get("iteration")
        if type(iteration) is not int or iteration < 0:
            raise ValueError(f"{path}: line {number} must have an iteration, got {iteration!r}")
        for key, value in row.items():
            if not (value is None or isinstance(value, float) or _is_small(value)):
                got = shown(value)
                raise ValueError(f"{path}: line {number}: {key} must be a number, got {got}")
        rows.append(row)
    return rows


def _is_small(value: Any) -> bool:
    return isinstance(value, int) and abs(value) < 2**63


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics rows by iteration; of rows with the same iteration (a resumed run) the last
    counts.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; run_dir must be the folder of a fastppo run")
    rows = {row["iteration"]: row for row in read_metrics(path)}
    return [rows[iteration] for iteration in sorted(rows)]


def _optional(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object: {error}") from error
    return value if isinstance(value, dict) else {}


def _evaluations(
    rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]
) -> list[tuple[int, float]]:
    """(iteration, greedy held-out reward); the one before training is at the iteration before the
    first.
    """
    found = {int(r["iteration"]): r["eval_reward"] for r in rows if finite([r.get("eval_reward")])}
    if rows:
        first, last = int(rows[0]["iteration"]), int(rows[-1]["iteration"])
        for iteration, key in ((first - 1, "eval_before"), (last, "eval_after")):
            value = (summary.get(key) or {}).get("reward")
            if finite([value]):
                found.setdefault(iteration, value)
    return sorted(found.items())
