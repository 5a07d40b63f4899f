"""Pages from templates: the report's, and the profile's, both of which extend base.html.

Everything that comes from a run (model output, names, configuration) passes through an expression
of a template. There, without being asked for, unprintable characters are shown as escapes and HTML
is escaped.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from fastppo.reporting.formatting import Value, format_number, visible

# Not a PackageLoader, which looks in one folder: in an editable install the package has two.
_TEMPLATES = Path(__file__).parents[1]


def write_page(path: Path, template: str, **values: Any) -> None:
    """Write a page, replacing an older one whole.

    Args:
        template: below fastppo/, such as "reporting/page.html".
    """
    page = _environment().get_template(template).render(values)
    write_whole(path, page.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Write a file in one step; what has its name, a link too, is replaced and not written to."""
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as file:
        file.write(data)
    unfinished.replace(path)


def long_text(value: str) -> Markup:
    """Text of several lines, as markup."""
    return escape(visible(value, keep="\n\t"))


def number(value: Value) -> str:
    return minus(format_number(value))


def minus(text: str) -> str:
    return text.replace("-", "−")


def _shown(value: Any) -> Any:
    return value if isinstance(value, Markup) else visible(str(value))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "minus": minus}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment
