"""--help of a configuration: flat flags, each under a heading, that of the class which has it.

tyro makes a heading of each nested dataclass, so the options are nested for it, and for it alone.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
from typing import Annotated, Any, get_type_hints

import tyro

from fastppo.options import Options, choices

MOST_USED = (
    *("model", "dataset", "reward", "output_dir", "num_iterations", "learning_rate"),
    *("prompts_per_iteration", "max_response_length", "kl_coef", "seed"),
)


def grouped(kind: type[Options]) -> Any:
    """A dataclass whose fields are dataclasses: the options of `kind` by heading."""
    hints, texts, allowed = get_type_hints(kind), docstrings(kind), choices(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    owners = {name: c for c in reversed(kind.__mro__) for name in inspect.get_annotations(c)}
    groups: dict[str, list[str]] = {}
    about = {"most used": ""}
    for name in dict.fromkeys([*filter(fields.__contains__, MOST_USED), *fields]):
        title = "most used" if name in MOST_USED else _title(owners[name])
        groups.setdefault(title, []).append(name)
        about.setdefault(title, (owners[name].__doc__ or "").partition("\n")[0])

    def flag(name: str) -> tuple[str, Any, Any]:
        field = fields[name]
        hint = "(required)" if field.metadata.get("required") else ""
        if not hint and field.default not in (None, "", ()):
            hint = "(default: {})"
        conf = tyro.conf.arg(
            prefix_name=False,
            help=texts[name],
            metavar=_metavar(str(field.type), allowed.get(name)),
            help_behavior_hint=hint.format,
        )
        return name, Annotated[hints[name], conf], dataclasses.field(default=field.default)

    return dataclasses.make_dataclass(
        kind.__name__,
        [
            (
                title.replace(" ", "_"),
                Annotated[
                    dataclasses.make_dataclass(title.replace(" ", "_"), map(flag, names)),
                    tyro.conf.arg(name=title, help=about[title]),
                ],
            )
            for title, names in groups.items()
        ],
    )


def flat(parsed: Any) -> dict[str, Any]:
    """The options that an instance of a grouped dataclass holds."""
    return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}


def docstrings(kind: type) -> dict[str, str]:
    """The string under each field of a dataclass, on one line."""
    found = {}
    for cls in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(inspect.getsource(cls)).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in itertools.pairwise(tree.body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
            ):
                found[field.target.id] = " ".join(str(ast.literal_eval(below.value)).split())
    return found


def _title(kind: type) -> str:
    """NamedKLConfig: KL; PolicyLossConfig: policy loss."""
    words = re.findall("[A-Z]+(?![a-z])|[A-Z][a-z]+", kind.__name__)
    kept = [word for word in words if word not in ("Named", "Config")]
    return " ".join(word if word.isupper() else word.lower() for word in kept)


def _metavar(kind: str, allowed: tuple[Any, ...] | None) -> str | None:
    """INT, {a,b}, STR ...: without the "or None" of what may stay unset."""
    if kind == "bool":
        return None
    words = [f"{{{','.join(allowed)}}}"] if allowed else re.findall("int|float|str", kind)
    return " ".join(words if allowed else map(str.upper, words)) + " ..." * ("..." in kind)
