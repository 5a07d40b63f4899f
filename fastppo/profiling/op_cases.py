"""Every case by name: what `fastppo bench` compares and `fastppo profile op` takes apart.

They stand here, below both, and not beside the ops: training needs no sizes and no inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from fastppo.profiling import head_cases, token_cases
from fastppo.profiling.case import Case

CASES: Mapping[str, Case] = {case.name: case for case in (*token_cases.CASES, *head_cases.CASES)}


def find_case(name: str) -> Case:
    """A case by name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in CASES:
        raise ValueError(f"name: expected one of {', '.join(CASES)}, got {name!r}")
    return CASES[name]
