"""Kernels, times and amounts as people read them."""

from __future__ import annotations

import math
import re

from fastppo.reporting.formatting import format_number

_FUNCTOR = re.compile(r"\w*(?:Functor|Op)s?(?:_\w+)?(?=[<,>\s(])")
_PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def short_name(name: str) -> str:
    """A kernel's name without types and namespaces: "vectorized_elementwise_kernel · FillFunctor".

    Operators lose "aten::"; what is not a C++ name stays as it is.
    """
    if name.startswith("autograd::engine::evaluate_function: "):
        return f"autograd: {name.rpartition(': ')[2].rpartition('::')[2]}"
    plain = name.removeprefix("void ").removeprefix("aten::").replace("(anonymous namespace)", "")
    if "<" not in plain or "::" not in plain:
        return plain
    head, _, arguments = plain.partition("<")
    functor = _FUNCTOR.search(arguments)
    return head.rpartition("::")[2] + (f" · {functor[0]}" if functor else "")


def duration(us: float) -> str:
    """µs in the unit that suits: "12.3 µs", "4.56 ms", "7.89 s"."""
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if us >= 0.9995 * size:
            return f"{format_number(max(1.0, us / size))} {unit}"
    return f"{format_number(us)} µs" if us else "0 µs"


def amount(value: float, unit: str) -> str:
    """Three digits and a prefix of 1000: "819 MB", "34.4 GFLOP"."""
    power = min(int(math.log10(max(value, 1.0)) / 3 + 1e-9), len(_PREFIXES) - 2)
    if value < 999.5:
        return f"{value:.0f} {unit}"
    scaled = value / 1000**power
    if scaled >= 999.5:
        power, scaled = power + 1, max(1.0, scaled / 1000)
    return f"{format_number(scaled)} {_PREFIXES[power]}{unit}"


def percent(share: float | None) -> str:
    """A share in 0..1 as whole percent, with a decimal under ten; "–" for None."""
    if share is None:
        return "–"
    return f"{100 * share:.0f} %" if 100 * share >= 9.95 else f"{100 * share:.1f} %"
