"""What every command says in the same way."""

from __future__ import annotations

import sys


def quiet() -> None:
    """The display is the progress: transformers' own bars would tear it."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def refused(command: str, why: object) -> int:
    """One line on stderr, and the exit status of what a person can mend."""
    print(f"fastppo {command}: {why}", file=sys.stderr)
    return 2
