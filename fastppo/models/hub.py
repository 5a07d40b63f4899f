"""The model hub, asked once and briefly before transformers asks it for each file: where nobody
answers, transformers tries six times each.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterable

from fastppo.models.damage import reason

_SECONDS = 10


def only_cached(name: str, packaged: Iterable[str]) -> bool:
    """Whether a model is in the hub's cache while the hub does not answer; False: it has it.

    Args:
        name: of a model that is no folder.
        packaged: other names that may have been meant.

    Raises:
        ValueError: it is in neither.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        _ask(name)
        return False
    except Exception as error:  # of the network, of its names, of their form
        with contextlib.suppress(ValueError):  # of the form again
            if isinstance(try_to_load_from_cache(name, "config.json"), str):
                return True
        why = f"the hub cannot be asked: {reason(error)}"
        if isinstance(error, RepositoryNotFoundError):
            why = "the hub has no public model of that name"
        near = difflib.get_close_matches(name.lower(), list(packaged), n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Name a folder, a .gguf file or a hub name"
        raise ValueError(f"model: {name!r} is no folder here, and {why}. {hint}") from error


@functools.cache
def _ask(name: str) -> None:
    from huggingface_hub import HfApi

    HfApi().model_info(name, timeout=_SECONDS)
