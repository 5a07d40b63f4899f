"""What a run shows while it runs: a live panel in a terminal, one plain line an iteration
elsewhere.

Sample tables and messages scroll above the panel. Text from a model is shown as text: rich markup,
terminal escapes and control characters in it have no effect.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fastppo.reporting.formatting import (
    Value,
    evaluation_figure,
    finite,
    first_and_last,
    format_duration,
    format_number,
    prompt_text,
    shorten,
    visible,
)
from fastppo.reporting.panel import MAX_WIDTH, RunPanel
from fastppo.reporting.terminal import stdout_console


class Display:
    """Shows a run of `num_iterations` iterations; use as a context manager.

    Args:
        num_iterations: iterations of the whole run; `row["iteration"]` counts from 1 to it.
        title: shown in the panel's border (the model, the run's name).
        console: rich console to draw on, by default stdout, which may go away; the live panel is
            used if it is a terminal.
    """

    def __init__(
        self, num_iterations: int, *, title: str = "", console: Console | None = None
    ) -> None:
        self._console = console or stdout_console()
        self._panel = RunPanel(num_iterations, title, self._console)
        self._live: Live | None = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(self._panel, console=self._console, refresh_per_second=2)

    def __enter__(self) -> Display:
        self._panel.start = time.monotonic()
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()

    def restore(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Show these rows of the same run instead of those so far, without printing them."""
        self._panel.restore(rows)

    def update(self, row: Mapping[str, Value]) -> None:
        """Show an iteration's metrics row (keys as in `fastppo.training.metrics`; missing ones are
        dashes).
        """
        self._panel.add(row)
        if self._live is not None:
            self._live.refresh()
        else:
            self._print_line(self._panel.plain_line())

    def samples(self, iteration: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Print sampled texts as a table.

        Args:
            iteration: the iteration that sampled them.
            rows: each with prompt (text or chat messages), response, reward, and truncated (bool).
        """
        if not rows:
            return
        width = min(self._console.width, MAX_WIDTH)
        room = width - 19  # beside the reward column and the borders
        table = Table(
            title=Text(f"samples of iteration {iteration}"),
            title_justify="left",
            box=box.SIMPLE_HEAD,
            width=width,
            pad_edge=False,
        )
        table.add_column("prompt", ratio=1, overflow="fold", style="dim")
        table.add_column("response", ratio=1, overflow="fold")
        table.add_column("reward", justify="right", width=9, overflow="fold")
        for row in rows:
            prompt = self._sampled(prompt_text(row.get("prompt", "")), 2 * room)
            response = self._sampled(str(row.get("response", "")), 2 * room - 14)
            if row.get("truncated"):
                response.append(" [truncated]", style="yellow")
            reward = Text(self._panel.encodable(format_number(row.get("reward"))), style="bold")
            table.add_row(prompt, response, reward)
        self._console.print(table)

    def message(self, text: str) -> None:
        """Print a line of text above the panel, as it is (no markup)."""
        self._print_line(self._panel.encodable(visible(text, keep="\n")))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the live panel and print the final one.

        Args:
            summary: eval_before and eval_after ({"accuracy" or "reward": float, "prompts": int}),
                seconds, and the paths run_dir, report, curve, model; all optional.
        """
        if self._live is not None:
            self._live.transient = True
            self._live.stop()
        width = min(self._console.width, MAX_WIDTH)
        parts: list[Any] = [self._figures(summary)]
        if width >= 20 and finite(self._panel.history()):
            parts += [Text(), self._panel.curve(width - 4, 13, plain=self._live is None)]
        where = Table.grid(padding=(0, 2))
        where.add_column(no_wrap=True, overflow="crop", style="dim")
        where.add_column(overflow="fold", style="bold")
        for key in ("run_dir", "report", "curve", "model"):
            if summary.get(key):
                path = self._panel.encodable(visible(str(Path(summary[key]))))
                where.add_row("written to" if key == "run_dir" else key, Text(path))
        if where.row_count:
            parts += [Text(), where]
        self._console.print(self._panel.framed("finished", width, *parts))

    def _figures(self, summary: Mapping[str, Any]) -> Table:
        rows = self._panel.rows
        lines = []
        name, before, after = evaluation_figure(
            summary.get("eval_before"), summary.get("eval_after")
        )
        if name:
            prompts = (summary.get("eval_after") or {}).get("prompts")
            note = "held-out prompts, before and after"
            lines.append((name, f"{before} → {after}", f"{prompts} {note}" if prompts else note))
        first, last, meaning = first_and_last([row.get("reward") for row in rows])
        if last is not None:
            change = f"{format_number(first)} → {format_number(last)}"
            lines.append(("sampled reward", change, meaning))
        took = format_duration(summary.get("seconds") or time.monotonic() - self._panel.start)
        lines.append(("iterations", f"{len(rows)} in {took}", ""))
        table = Table.grid(padding=(0, 2))
        for style in ("dim", "bold"):
            table.add_column(no_wrap=True, overflow="crop", style=style)
        table.add_column(overflow="fold", style="dim")
        for line in lines:
            table.add_row(*(Text(self._panel.encodable(part)) for part in line))
        return table

    def _sampled(self, text: str, limit: int) -> Text:
        shown = visible(text, newline="\\n" if self._panel.ascii_only else "⏎")
        return Text(self._panel.encodable(shorten(shown, limit)), overflow="fold")

    def _print_line(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
