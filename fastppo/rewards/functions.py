"""A reward function as it is called: by keyword, with the columns that its signature asks for."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastppo.rewards.limits import Declaration, declaration_of
from fastppo.rewards.model import RewardModel

RewardFunction = Callable[..., Any]


@dataclass(frozen=True)
class BoundFunction:
    """A reward function, its display name, what its signature asks for and what was declared."""

    call: RewardFunction
    name: str
    required: tuple[str, ...]
    accepted: frozenset[str] | None  # None: takes **kwargs, so everything
    declared: Declaration

    @classmethod
    def of(cls, func: RewardFunction, name: str) -> BoundFunction:
        declared = declaration_of(func)
        try:
            parameters = inspect.signature(func).parameters.values()
        except (TypeError, ValueError):  # some builtins have no signature
            return cls(func, name, (), None, declared)
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise TypeError(
                f"reward function {name!r} must take its arguments by keyword, got positional-only "
                "parameters; remove the '/' from its signature"
            )
        everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
        required = tuple(p.name for p in named if p.default is p.empty)
        accepted = None if everything else frozenset(p.name for p in named)
        return cls(func, name, required, accepted, declared)

    @property
    def model(self) -> RewardModel | None:
        """The reward model behind the function, if it is one."""
        func = self.call
        while isinstance(func, functools.partial):
            func = func.func
        func = getattr(func, "__self__", func)
        return func if isinstance(func, RewardModel) else None

    def arguments(
        self, provided: Mapping[str, Sequence[Any]], rows: Sequence[int]
    ) -> dict[str, list[Any]]:
        """The part of `provided` that the function takes, as fresh lists of these rows."""
        wanted = provided if self.accepted is None else self.accepted & provided.keys()
        return {name: [provided[name][row] for row in rows] for name in wanted}
