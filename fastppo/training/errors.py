"""Errors that a run knows what to do with; a signal is one of them (interrupts.py)."""

from __future__ import annotations

from typing import Any


class StopRunError(RuntimeError):
    """A run cannot go on, and saves a checkpoint: rewards lost too many samples, for example."""


class StartError(ValueError):
    """What a run starts from is not what it must be. Nothing has been trained."""


class NonFiniteError(RuntimeError):
    """Too many optimiser steps in a row had a loss or a gradient that is not finite.

    `progress` is where the last of them starts; parameters and optimisers are as they were there.
    `recorded` is what that step came to. Both are the trainer's own.
    """

    def __init__(self, message: str, progress: Any, recorded: Any) -> None:
        super().__init__(message)
        self.progress = progress
        self.recorded = recorded


class ForeignStateError(ValueError):
    """A saved state that belongs to another model or run."""
