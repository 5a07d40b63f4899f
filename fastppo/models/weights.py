"""Whether what was loaded is what is there: no weight random, left over or not finite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias|position_ids)$")
"""Weights in files of old that no model reads: they follow from its configuration."""


def check_weights(model: Any, info: Mapping[str, Any], name: str, role: str) -> None:
    """Refuse a model that is not, weight for weight, what its files hold.

    Args:
        model: as `from_pretrained` returned it.
        info: its `output_loading_info`.
        name: what it was loaded from.
        role: what errors call it.

    Raises:
        ValueError: weights that are missing, left over, or of another size.
    """
    kind = type(model).__name__
    if other := sorted(info["mismatched_keys"]):
        sizes = [f"{key} {tuple(got)} and not {tuple(own)}" for key, got, own in other]
        raise ValueError(
            f"{role}: {name!r} has weights of other sizes than its config.json says: "
            f"{_some(sizes)}. The two are not of one save: copy it again"
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{role}: {name!r} lacks weights for {_some(missing)}: they would be random. Use a "
            f"folder saved from a {kind}"
        )
    unread = sorted(key for key in info["unexpected_keys"] if not _HARMLESS.search(key))
    if model.get_output_embeddings() is None:  # a language model's head is nothing to a scorer
        unread = [key for key in unread if not key.startswith("lm_head.")]
    if unread:
        raise ValueError(
            f"{role}: {name!r} has weights that a {kind} does not read: {_some(unread)}. Use a "
            "folder saved from one; if they are to be left out, load it by from_pretrained and "
            "pass the model, or save it again"
        )


def check_finite(weights: Iterable[tuple[str, Tensor]], name: str) -> None:
    """Refuse weights, by their names, that are NaN or infinite; `name` is what has them.

    Raises:
        ValueError: there are some.
    """
    if bad := not_finite(dict(weights)):
        raise ValueError(
            f"{name} has weights that are not finite (NaN or infinite) in {_some(bad)}: nothing "
            "could be learned from them. Use what was saved before they broke"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those with NaN or infinity in them: one pass over all, one copy to the host."""
    import torch

    given = {n: t.detach() for n, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not given:
        return []
    largest = torch._foreach_norm(list(given.values()), ord=torch.inf)
    device = largest[0].device
    finite = torch.stack([norm.to(device, torch.float32) for norm in largest]).isfinite().tolist()
    return [name for name, good in zip(given, finite, strict=True) if not good]


def load_value_head(head: Any, file: Path) -> None:
    """Put a saved value head into one.

    Raises:
        ValueError: it is damaged, or of another width.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"value_model: {str(file)!r} is damaged or cut off ({error})") from error
    sizes, expected = (
        {key: tuple(value.shape) for key, value in state.items()}
        for state in (saved, head.state_dict())
    )
    if sizes != expected:
        raise ValueError(
            f"value_model: expected a value head of {expected}, got {sizes} in {str(file)!r}. It "
            "is of another model"
        )
    check_finite(saved.items(), f"value_model: {str(file)!r}")
    head.load_state_dict(saved)


def _some(names: list[str]) -> str:
    """The first three, and how many more."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
