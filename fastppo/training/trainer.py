"""What a run drives: any trainer that knows what an iteration is, and its state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastppo.checkpoint import Checkpoint
from fastppo.training.errors import NonFiniteError
from fastppo.training.metrics import PhaseTimer

Row = dict[str, float]
Sample = dict[str, Any]
State = tuple[dict[str, dict[str, Tensor]], dict[str, Any]]
"""Tensors by group and name, and what goes into JSON. The group `iteration`, if there is one, is
what the iteration under way has so far: what a Notice keeps."""


@dataclass(frozen=True)
class Notice:
    """Something a person should see."""

    text: str
    keep: str = ""
    """Name of the dump that the batch is kept in; empty: in none."""


class Trainer(Protocol):
    """What a run drives."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    def iterate(self, iteration: int, timer: PhaseTimer) -> tuple[Row, list[Sample]]:
        """One iteration, counted from 1; what a stopped one had done already is not redone.

        A signal stops a run between two iterations; within one, where this calls
        `interrupts.check`, which belongs between any two pieces of work that take seconds.

        The row has `iteration`, and may have a `reward`, of which more is better: `keep_best` and
        the summary read it. Without one the display shows the first eight figures of the row.
        """

    def evaluate(self) -> dict[str, Any]:
        """Figures on held-out data, `reward` among them; empty without any."""

    def notices(self, row: Row) -> Iterator[Notice]:
        """What an iteration's metrics warn of."""

    def next_iteration(self) -> None:
        """Forget the iteration that is done."""

    @property
    def place(self) -> str:
        """Where in an iteration it is, as a suffix that sorts as time passes; empty between two."""

    def identity(self) -> dict[str, Any]:
        """JSON of what a continuation must have in common with the run."""

    def state(self) -> State:
        """All that an exact continuation needs, in the middle of an iteration too."""

    def failed_step(self, error: NonFiniteError) -> State:
        """`state` as it was before the step, and the tensors `recorded` of what it came to."""

    def load_state(self, checkpoint: Checkpoint) -> None:
        """Go where a checkpoint is, or raise ForeignStateError and change nothing."""

    def summary(self) -> dict[str, Any]:
        """What it adds to summary.json."""

    def rehearse(self, folder: Path) -> int:
        """Fail as `save_model` would at the end, and leave nothing in the folder's place.

        Returns:
            Bytes of the weights that it will write.
        """

    def save_model(self, folder: Path) -> Path:
        """Write the trained model into a new folder."""
