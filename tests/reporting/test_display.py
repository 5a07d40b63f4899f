"""The display fits its width, prints plain lines where there is no terminal, and trusts no text."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from fastppo.reporting.charts import downsample, moving_average, nice_ticks, plot, sparkline
from fastppo.reporting.display import Display
from fastppo.reporting.formatting import first_and_last, format_number, shorten, visible


def row(iteration: int, **values: Any) -> dict[str, Any]:
    figures = {
        "reward": 1 - 1 / iteration,
        "kl": 0.01 * iteration,
        "entropy": 2 / iteration,
        "clipfrac": 0.1,
        "explained_variance": -195.0 if iteration == 1 else 0.5,
        "response_length": 7.5,
        "truncated": 0.25,
        "tokens_per_second": 12345.0,
        "seconds_rollout": 2.0,
        "seconds_update": 1.0,
        "seconds_total": 4.0,
    }
    return {"iteration": iteration, **figures, **values}


def piped(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def terminal(width: int, height: int = 30) -> Console:
    size = {"width": width, "height": height}
    return Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", **size)


def output(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(display: Display, console: Console) -> list[str]:
    """The live panel as lines of text."""
    with console.capture() as capture:
        console.print(display._panel)
    return re.sub(r"\x1b\[[0-9;]*m", "", capture.get()).splitlines()


def test_without_a_terminal_one_plain_line_an_iteration() -> None:
    console = piped()
    with Display(12, console=console) as display:
        for iteration in range(1, 13):
            display.update(row(iteration))
    lines = output(console).splitlines()
    assert len(lines) == 12
    assert lines[2].startswith(
        "[ 3/12]  reward 0.667  kl 0.030  entropy 0.667  clipfrac 0.100  ev 0.500  length 7.50  "
        "truncated 25.0%  tok/s 12,345  4.0 s (rollout 50%, update 25%, other 25%)  "
    )
    assert lines[2].endswith(" left") and not lines[11].endswith(" left")
    assert "\x1b" not in output(console)


def test_missing_and_null_figures_are_dashes() -> None:
    console = piped()
    with Display(2, console=console) as display:
        display.update({"iteration": 1, "reward": None, "kl": math.nan})
        display.finish({})
    assert "reward –  kl –" in output(console)


@pytest.mark.parametrize("width", [80, 120, 50])
@pytest.mark.parametrize("rows", [0, 1, 2, 300])
def test_the_panel_never_wraps_and_keeps_its_height(width: int, rows: int) -> None:
    console = terminal(width)
    display = Display(300, title="a title " * 30, console=console)
    for iteration in range(1, rows + 1):
        display.update(row(iteration))
    lines = drawn(display, console)
    assert {cell_len(line) for line in lines} == {width}
    if rows:
        assert len(lines) == (26 if width >= 80 else 28)
    text = "\n".join(lines)
    assert f"iteration {rows}/300" in text
    if rows and width >= 80:
        names = [
            "reward",
            "KL",
            "entropy",
            "clipfrac",
            "truncated",
            "tokens/s",
            "rollout",
            "update",
        ]
        assert all(name in text for name in (*names, "explained var", "response len", "elapsed"))


def test_the_panel_fits_a_small_terminal() -> None:
    console = terminal(80, height=16)
    display = Display(3, console=console)
    display.update(row(1))
    assert len(drawn(display, console)) < 16


def test_a_terminal_gets_the_live_panel_and_the_final_one() -> None:
    console = terminal(80)
    with Display(2, console=console) as display:
        display.update(row(1))
        display.message("a message")
        display.update(row(2))
        display.finish(
            {
                "eval_before": {"accuracy": 0.89},
                "eval_after": {"accuracy": 0.96, "prompts": 81},
                "seconds": 192.0,
                "run_dir": "runs/x",
                "report": "runs/x/report.html",
            }
        )
    text = output(console)
    for expected in ("iteration 2/2", "a message", "89.0 % → 96.0 %", "81 held-out prompts"):
        assert expected in text
    assert "2 in 3 min 12 s" in text and "runs/x/report.html" in text
    assert "\x1b[?25h" in text  # the cursor is shown again


def test_markup_and_control_characters_in_samples_have_no_effect() -> None:
    console = terminal(80)
    display = Display(1, console=console)
    response = "[bold red]x[/bold red] [link=file:///etc]y[/link] \x1b[2J\x07\rZ\n\u202e\x9b31m"
    display.samples(1, [{"prompt": "[/]", "response": response, "reward": 1.0, "truncated": True}])
    display.message("[red]as it is[/red] \x1b[2J")
    text = output(console)
    assert "\x1b[2J" not in text and "\x07" not in text and "\r" not in text
    assert "\u202e" not in text and "\x9b" not in text
    assert "]8;" not in text  # no hyperlink
    plain = piped(200)
    Display(1, console=plain).samples(1, [{"prompt": "[/]", "response": response, "reward": 0}])
    for part in ("[/]", "[bold red]x[/bold red]", "[link=file:///etc]y[/link]", r"\x1b[2J\x07\rZ⏎"):
        assert part in output(plain)
    assert "[red]as it is[/red]" in text


@pytest.mark.parametrize("width", [80, 120])
def test_sample_tables_shorten_long_text_and_fit(width: int) -> None:
    console = piped(width)
    messages = [{"role": "user", "content": "Say it."}]
    rows = [
        {"prompt": "p" * 5000, "response": "begin " + "w " * 5000 + "end", "reward": -0.5},
        {"prompt": messages, "response": "", "reward": None},
    ]
    Display(1, console=console).samples(3, rows)
    lines = output(console).splitlines()
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) < 20
    assert "samples of iteration 3" in lines[0]
    text = output(console)
    assert "begin" in text and "end" in text and "…" in text and "Say it." in text


def test_ascii_output_can_always_be_encoded() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), width=60)
    with Display(3, title="modèle", console=console) as display:
        display.samples(1, [{"prompt": "é\n\ud800", "response": "日本 🎉", "reward": None}])
        display.update(row(1, kl=None))
        display.message("→ é")
        display.finish({"eval_before": {"reward": 0.1}, "eval_after": {}, "run_dir": "café"})
        console.print(display._panel)
    console.file.flush()
    assert b"\\u65e5" in raw.getvalue() and b"caf\\xe9" in raw.getvalue()


def test_plot_golden() -> None:
    expected = """\
1.0 +                                         ****
    |                     **              ****
    |                   **
0.5 +                 **
    |    *************
    |****
0.0 +
    +---------------------------------------------
     1                                           7"""
    assert plot([0.1, 0.4, 0.35, 0.8, None, 0.9, 0.95], 50, 9) == expected


@pytest.mark.parametrize("braille", [False, True], ids=["ascii", "braille"])
@pytest.mark.parametrize(
    "values",
    [[], [None], [0.5], [0.0, 0.0], [1e9, -1e9], [math.nan, 1.0, None, 3.0], list(range(5000))],
    ids=["empty", "null", "one", "constant", "huge", "gaps", "long"],
)
def test_plots_keep_their_size(braille: bool, values: list[Any]) -> None:
    for width, height in ((16, 5), (76, 13), (116, 9)):
        lines = plot(values, width, height, braille=braille).split("\n")
        assert len(lines) == height
        assert max(len(line) for line in lines) <= width


def test_plot_spans_the_run_and_refuses_no_room() -> None:
    lines = plot([0.0, 1.0], 45, 7, span=8).split("\n")
    assert lines[-1].endswith("8")
    assert max(line.rfind("*") for line in lines) < 16
    with pytest.raises(ValueError, match="16 and 5, got 8 and 5"):
        plot([1.0], 8, 5)


def test_sparkline_is_not_flattened_by_one_outlier() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([-1000.0, 0, 1, 2, 3, 4, 5, 6, 7], 9)[1:] == "▁▂▃▄▅▆▇█"
    assert sparkline([2.0, 2.0, None], 5) == "▄▄ "
    assert len(sparkline(list(range(999)), 14)) == 14


def test_downsampling_keeps_extremes_ends_and_gaps() -> None:
    values = [(i, math.sin(i / 50)) for i in range(10_000)]
    values[1234] = (1234, 9.0)
    values[7777] = (7777, -9.0)
    kept = downsample(values, 200)
    assert len(kept) <= 402
    assert {(1234, 9.0), (7777, -9.0), values[0], values[-1]} <= set(kept)
    gap = [(i, None if 200 <= i < 400 else 1.0) for i in range(1000)]
    assert any(y is None for _, y in downsample(gap, 50))


def test_small_helpers() -> None:
    assert nice_ticks(0.16, 0.97) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert moving_average([1.0, None, 3.0, math.nan, 5.0], 3) == [1.0, None, 3.0, None, 5.0]
    assert [format_number(v) for v in (0, 0.1234, 12.34, 12345, 1e-5, math.nan, None)] == [
        *("0.00", "0.123", "12.3", "12,345", "1.0e-5", "–", "–"),
    ]
    assert shorten("abcdefghij" * 5, 20) == "abcdefghija … efghij"
    assert visible("a\tb\n", keep="\t") == "a\tb⏎"
    assert first_and_last([1.0, 1, 1, 0, 0, 2, 2, 2, 2, 2])[:2] == (1.0, 2.0)
    assert first_and_last([None, 0.5, 0.75])[:2] == (0.5, 0.75)
