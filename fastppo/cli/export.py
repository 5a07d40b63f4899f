"""`fastppo export`: a checkpoint as a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from fastppo.checkpoint import save_model, verify
from fastppo.cli.output import out
from fastppo.cli.replay import load_step
from fastppo.models.loading import load_tokenizer


def export(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    folder: Annotated[Path, tyro.conf.Positional],
    model: str = "",
) -> int:
    """Write the policy of a checkpoint as a model that AutoModelForCausalLM.from_pretrained loads.

    Args:
        checkpoint: RUN/checkpoints/NAME.
        folder: where to; must not exist.
        model: the model the run started from, where its configuration does not name one.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ValueError: no model is named, or the folder exists.
    """
    if folder.exists():
        raise ValueError(f"folder: expected a name that is free, got {str(folder)!r}")
    step, _, name = load_step(verify(checkpoint), model)
    out(f"written to {save_model(folder, step.policy, load_tokenizer(name))}")
    return 0
