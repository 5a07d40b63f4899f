"""The live panel of a run: progress and time left, figures with their history, time by phase,
reward curve.

Every line is built to the terminal's width, so nothing wraps and the panel keeps its height from
one iteration to the next. On a terminal without Unicode everything is drawn in ASCII.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.text import Text

from fastppo.reporting.charts import plot, sparkline
from fastppo.reporting.formatting import (
    Value,
    finite,
    format_clock,
    format_number,
    format_percent,
    phase_seconds,
    shorten,
    visible,
)

MAX_WIDTH = 120
ACCENT = "cyan"
Figure = tuple[str, str, str, Callable[[Value], str]]
"""Row key, name in the panel, name in a plain line, format."""
_FIGURES: tuple[Figure, ...] = (  # two columns, the left one first
    ("reward", "reward", "reward", format_number),
    ("kl", "KL", "kl", format_number),
    ("entropy", "entropy", "entropy", format_number),
    ("clipfrac", "clipfrac", "clipfrac", format_number),
    ("explained_variance", "explained var", "ev", format_number),
    ("response_length", "response len", "length", format_number),
    ("truncated", "truncated", "truncated", format_percent),
    ("tokens_per_second", "tokens/s", "tok/s", format_number),
)
_PHASE_STYLES = ("blue", "yellow", "bright_black", "cyan", "magenta", "green", "red")
_PHASE_GLYPHS = "━─═"  # told apart without colour


class RunPanel:
    """What is known of a run of `num_iterations` iterations, drawn as a rich renderable or as a
    line.

    Args:
        num_iterations: iterations of the whole run.
        title: shown in the panel's border.
        console: where it will be drawn; decides on colour and characters.
    """

    def __init__(self, num_iterations: int, title: str, console: Console) -> None:
        self.rows: list[Mapping[str, Value]] = []
        self.start = time.monotonic()
        self._times: list[float] = []  # of each row
        self._total = num_iterations
        self._title = title
        self._color = console.color_system is not None
        self._encoding = console.encoding
        self.ascii_only = not console.encoding.lower().startswith("utf")
        self._body: tuple[tuple[int, int, int], list[Text]] | None = None

    def add(self, row: Mapping[str, Value]) -> None:
        """Take in an iteration's metrics row."""
        self.rows.append(dict(row))
        self._times.append(time.monotonic())

    def restore(self, rows: Sequence[Mapping[str, Value]]) -> None:
        """Take in the rows of an earlier part of the run, in place of all others."""
        self.rows.clear()
        self._times.clear()
        at = time.monotonic() - sum(row.get("seconds_total") or 0.0 for row in rows)
        for row in rows:
            at += row.get("seconds_total") or 0.0
            self.rows.append(dict(row))
            self._times.append(at)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = min(options.max_width, MAX_WIDTH), console.height
        key = (len(self.rows), width, height)
        if self._body is None or self._body[0] != key:  # only the clock changes between rows
            self._body = (key, self._build(width - 4, height))
        yield self.framed("fastppo", width, self._progress(width - 4), *self._body[1])

    def framed(self, word: str, width: int, *parts: object) -> Panel:
        """`parts` in a frame whose border carries `word` and the title."""
        heading = f"{word} · {visible(self._title)}" if self._title else word
        title = Text(self.encodable(heading), style="bold")
        return Panel(Group(*parts), title=title, title_align="left", width=width)  # type: ignore[arg-type]  # all renderables

    @property
    def figures(self) -> tuple[Figure, ...]:
        """What is shown of a row: PPO's figures, or the first of another trainer's own."""
        if not self.rows or "reward" in self.rows[-1]:
            return _FIGURES
        names = [n for n in self.rows[-1] if n != "iteration" and not n.startswith("seconds_")]
        return tuple((n, n, n, format_number) for n in names[: len(_FIGURES)])

    def history(self) -> list[Value]:
        """The first figure of each row: the reward, where there is one."""
        return [row.get(key) for key, *_ in self.figures[:1] for row in self.rows]

    def curve(
        self, width: int, height: int, *, span: int | None = None, plain: bool = False
    ) -> Text:
        """The curve of `history` over `span` iterations (all so far by default); `plain` draws it
        in ASCII.
        """
        braille = not (plain or self.ascii_only)
        drawn = plot(self.history(), width, height, first=self._first(), span=span, braille=braille)
        return Text(drawn, style=ACCENT, no_wrap=True, overflow="crop")

    def plain_line(self) -> str:
        """The last row's figures on one line."""
        row, width = self.rows[-1], len(str(self._total))
        parts = [f"[{self._done():>{width}}/{self._total}]"]
        for key, _, name, show in self.figures:
            parts.append(f"{name} {show(row.get(key)).replace(' %', '%')}")
        seconds = phase_seconds([row])
        total = sum(seconds.values())
        shares = [
            f"{p} {100 * s / total:.0f}%" for p, s in seconds.items() if s >= 0.005 * total > 0
        ]
        if shares:
            parts.append(f"{total:.1f} s ({', '.join(shares)})")
        if self._done() < self._total:
            parts.append(f"{format_clock(self._time_left())} left")
        return self.encodable("  ".join(parts))

    def encodable(self, text: str) -> str:
        """`text` with what the console cannot encode escaped: lone surrogates, and on ASCII much
        more.
        """
        if self.ascii_only:
            for sign, plain in (("→", "->"), ("–", "-"), ("…", "..."), ("·", "-")):
                text = text.replace(sign, plain)
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)

    def _build(self, width: int, height: int) -> list[Text]:
        """The panel below its progress line."""
        if not self.rows:
            return [Text("waiting for the first iteration", style="dim")]
        lines = [Text(), *self._grid(width), Text(), *self._phases(width)]
        room = min(13, height - len(lines) - 6)  # progress, borders, heading, and one free row
        room -= (room + 1) % 2  # an odd height leaves rows that ticks divide evenly
        if room >= 5 and width >= 16 and finite(self.history()):
            curve = self.curve(width, room, span=self._span())
            lines += [Text(), Text(self.figures[0][1], style="dim"), curve]
        return lines

    def _progress(self, width: int) -> Text:
        done = self._done()
        left = Text(f"iteration {done}/{self._total}  ")
        right = Text(f"  {format_clock(time.monotonic() - self.start)} elapsed")
        if self.rows and done < self._total:
            right.append(f", {format_clock(self._time_left())} left")
        room = max(0, width - len(left) - len(right))
        filled = min(room, round(room * done / max(1, self._total)))
        full, empty = "#." if self.ascii_only else "━━" if self._color else "━ "
        bar = Text(full * filled, style=ACCENT)
        bar.append(empty * (room - filled), style="bright_black")
        return _line(left, bar, right)

    def _grid(self, width: int) -> list[Text]:
        narrow = width < 66
        cell, half = width if narrow else (width - 3) // 2, (len(self.figures) + 1) // 2
        cells = []
        for key, name, _, show in self.figures:
            history = [row.get(key) for row in self.rows]
            line = Text(f"{shorten(name, 13):<14}", style="dim")
            line.append_text(
                Text(f"{self.encodable(show(history[-1])):>9}  ", style="not dim bold")
            )
            room = max(1, cell - len(line))
            spark = sparkline(history, room, ascii_only=self.ascii_only)
            style = ACCENT if key == self.figures[0][0] else "blue"
            line.append_text(Text(f"{spark:<{room}}", style=f"not dim {style}"))
            cells.append(line)
        if narrow:
            return [_line(text) for text in cells]
        pairs = itertools.zip_longest(cells[:half], cells[half:], fillvalue=Text())
        return [_line(a, "   ", b) for a, b in pairs]

    def _phases(self, width: int) -> list[Text]:
        """A bar whose parts are the shares of time per phase over the run, and its legend."""
        seconds = phase_seconds(self.rows)
        total = sum(seconds.values())
        if not total:
            return []
        bar, legend = Text("time  "), Text("      ")
        bar.stylize("dim")
        room, done, filled = width - 6, 0.0, 0
        for i, (phase, spent) in enumerate(seconds.items()):
            done += spent
            end = round(done / total * room)
            style = _PHASE_STYLES[min(i, len(_PHASE_STYLES) - 1)]
            glyph = "=" if self.ascii_only else _PHASE_GLYPHS[0 if self._color else i % 3]
            bar.append(glyph * (end - filled), style=style)
            filled = end
            share = f" {100 * spent / total:.0f} %  "
            if spent >= 0.005 * total and len(legend) + len(phase) + len(share) <= width + 2:
                legend.append(phase, style=style).append(share)
        return [_line(bar), _line(legend)]

    def _first(self) -> int:
        return int(self.rows[0].get("iteration") or 1)

    def _done(self) -> int:
        return int(self.rows[-1].get("iteration") or len(self.rows)) if self.rows else 0

    def _span(self) -> int:
        """Iterations on the x axis: the rest of the run, halved while under half would be
        filled.
        """
        span = max(1, self._total - self._first() + 1)
        while span >= 64 and span // 2 >= len(self.rows):
            span //= 2
        return span

    def _time_left(self) -> float:
        """Seconds to the end at the pace of the last ten rows, counted down between rows."""
        recent = self._times[-11:]
        if len(recent) > 1:
            pace = (recent[-1] - recent[0]) / (len(recent) - 1)
        else:
            pace = self.rows[-1].get("seconds_total") or recent[0] - self.start
        since = time.monotonic() - recent[-1]
        return max(0.0, pace * (self._total - self._done()) - since)


def _line(*parts: Text | str) -> Text:
    line = Text.assemble(*parts)
    line.no_wrap, line.overflow = True, "crop"
    return line
