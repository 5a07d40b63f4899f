"""What is saved is finite, and came of at least one optimiser step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastppo.checkpoint import CheckpointError
from fastppo.models.weights import not_finite
from fastppo.training.errors import StopRunError


def check_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Refuse to save weights that are not finite.

    Args:
        tensors: parameters or an optimiser's state, by name.
        what: is saved, for the message.

    Raises:
        CheckpointError: naming the first that is not finite.
    """
    if bad := not_finite(tensors):
        raise CheckpointError(
            f"{what}: expected finite numbers, got NaN or infinity in {bad[0]} ({len(bad)} of "
            f"{len(tensors)} tensors); it was not saved, and what was saved before is as it was. "
            "Lower learning_rate, and --resume with --allow-changes learning-rate"
        )


def check_learned(optimizer: Mapping[str, Tensor], iterations: int) -> None:
    """Refuse to call a run finished in which no optimiser step was taken.

    Args:
        optimizer: the state of the optimisers by name; AdamW's step counts end in `/step`.
        iterations: of the run.

    Raises:
        StopRunError: every step was skipped, or had no sample.
    """
    steps = [float(value) for name, value in optimizer.items() if name.endswith("/step")]
    if steps and not any(steps):
        raise StopRunError(
            f"nothing was learned: expected at least one optimiser step in {iterations} "
            "iterations, got none, and no model was saved. unscored, dropped and nonfinite_steps "
            "in metrics.jsonl say why"
        )
