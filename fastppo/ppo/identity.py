"""Whether a checkpoint is of the run that goes on from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastppo.data.prompts import PromptDataset
from fastppo.training.errors import ForeignStateError

_TOLD = {  # how a difference is told, and its name in allow_changes
    "precision": ("the precision is", "precision"),
    "reward_names": ("the reward functions are", "reward"),
    "reward_weights": ("the weights of the rewards are", "reward_weights"),
    "frozen": ("the digest of the frozen and reference parameters is", "model"),
}


def check_identity(
    saved: Mapping[str, Any],
    ours: Mapping[str, Any],
    data: PromptDataset | None = None,
    *,
    read: Callable[[str], bool] = lambda column: True,
    allowed: Collection[str] = (),
) -> list[str]:
    """Refuse to continue another run.

    Args:
        saved: what a checkpoint has of its run.
        ours: what the continuation has, by the names of `_TOLD`.
        data: the prompts of the continuation.
        read: whether a reward function reads a column.
        allowed: names of what may differ all the same.

    Returns:
        What differs and is no obstacle.

    Raises:
        ForeignStateError: what differs and changes the training.
    """
    found = [
        (name, f"{said} {saved[key]} there and {ours[key]} here")
        for key, (said, name) in _TOLD.items()
        if key in saved and key in ours and saved[key] != ours[key]
    ]
    if found and found[0][0] == "precision":  # frozen parameters are kept in it
        found = [(name, text) for name, text in found if name != "model"]
    notes = []
    if data is not None:
        refused, noted = data.changed(saved["prompts"], read)
        if refused:
            found.append(("dataset", f"of the training prompts, {refused}"))
        if noted:
            notes.append(f"{noted}, as by a template that writes the date")
    for name, text in found:
        if name not in allowed:
            raise ForeignStateError(f"{text} (--allow-changes {name} goes on all the same)")
    return [
        f"not as in the run that is resumed: {text}" for text in [*(t for _, t in found), *notes]
    ]
