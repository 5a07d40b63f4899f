"""Text and numbers as markup. Everything that comes from a run (model output, names, configuration)
passes through `text`, which shows unprintable characters as escapes and escapes HTML.
"""

from __future__ import annotations

from html import escape

from fastppo.reporting.formatting import (
    Value,
    format_number,
    visible,
)


def text(value: str) -> str:
    return escape(visible(str(value)))


def number(value: Value) -> str:
    return minus(format_number(value))


def minus(text: str) -> str:
    return text.replace("-", "−")
