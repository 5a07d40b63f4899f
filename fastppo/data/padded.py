"""Padded arrays at the border: (B, L) with masks into what is packed, and (N,) back into (B, L).

Shapes: B sequences, L columns, N response tokens. `PackedSequences.from_padded` says what the masks
mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def pack_arguments(
    ids: Tensor,
    prompt_mask: Any,
    response_mask: Any,
    loss_mask: Any,
    more: Mapping[str, Any],
    per_response: Sequence[str],
) -> dict[str, Any]:
    """What `PackedSequences.pack` takes, flat, on the host.

    Args:
        ids, prompt_mask, response_mask, loss_mask: of `PackedSequences.from_padded`.
        more: other arguments of `pack`.
        per_response: those of them that may be (B, L).

    Raises:
        ValueError: as `PackedSequences.from_padded`.
    """
    if ids.ndim != 2:
        raise ValueError(f"ids: expected shape (B, L), got {tuple(ids.shape)}")
    prompt = _mask("prompt_mask", prompt_mask, ids)
    response = _mask("response_mask", response_mask, ids)
    counted = None if loss_mask is None else _mask("loss_mask", loss_mask, ids)
    for row in np.flatnonzero(~prompt.any(1))[:1]:
        raise ValueError(f"prompt_mask: expected a token in each row, got none in row {row}")
    for row, column in np.argwhere(prompt & response)[:1]:
        raise ValueError(
            f"response_mask: expected no token of prompt_mask, got one at [{row}, {column}]"
        )
    late = prompt & (np.cumsum(response, 1) > 0)
    for row, column in np.argwhere(late)[:1]:
        raise ValueError(
            f"prompt_mask: expected every token before the response's, got one after it at "
            f"[{row}, {column}]. Put what a tool said into response_mask, with loss_mask False"
        )
    flat = {}
    for name in per_response:
        x = _rectangle(more.get(name))
        if x is not None:
            if x.shape != ids.shape:
                raise ValueError(
                    f"{name}: expected shape {tuple(ids.shape)}, as ids, got {tuple(x.shape)}"
                )
            flat[name] = x.detach().float().cpu().numpy()[response]
    tokens = ids.detach().cpu().numpy()
    return {
        **more,
        **flat,
        "prompts": tokens[prompt],
        "responses": tokens[response],
        "prompt_lengths": prompt.sum(1),
        "response_lengths": response.sum(1),
        "loss_mask": None if counted is None else counted[response],
    }


def padded(x: Tensor, response_mask: Any, lengths: NDArray[np.int32], fill: float) -> Tensor:
    """(B, L): x (N,) where the mask is, `fill` elsewhere.

    Args:
        lengths: (B,) tokens of each response.

    Raises:
        ValueError: as `PackedSequences.to_padded`.
    """
    if x.shape != (lengths.sum(),):
        raise ValueError(f"x: expected shape ({lengths.sum()},), got {tuple(x.shape)}")
    mask = torch.as_tensor(response_mask).to(torch.bool)
    if mask.ndim != 2 or len(mask) != len(lengths):
        raise ValueError(
            f"response_mask: expected shape ({len(lengths)}, L), got {tuple(mask.shape)}"
        )
    if mask.device.type == "cpu":
        found = mask.sum(1).numpy()
        for row in np.flatnonzero(found != lengths)[:1]:
            raise ValueError(
                f"response_mask: expected {lengths[row]} tokens in row {row}, got {found[row]}. It "
                "is what from_padded took as response_mask, not loss_mask, with its rows in this "
                "batch's order"
            )
    mask = mask.to(x.device)
    return x.new_full(mask.shape, fill).masked_scatter(mask, x)


def _mask(name: str, x: Any, ids: Tensor) -> NDArray[np.bool_]:
    if x is None:
        raise ValueError(f"{name}: expected shape (B, L), as ids {tuple(ids.shape)}, got None")
    x = torch.as_tensor(x)
    if x.shape != ids.shape:
        raise ValueError(
            f"{name}: expected shape (B, L), as ids {tuple(ids.shape)}, got {tuple(x.shape)}"
        )
    mask: NDArray[np.bool_] = (x.detach() != 0).cpu().numpy()
    return mask


def _rectangle(x: Any) -> Tensor | None:
    """A two-dimensional tensor, array or list of lists as a tensor; None for all that `pack` is to
    see as it is: flat, ragged or wrong.
    """
    if not isinstance(x, Tensor):
        try:
            x = torch.as_tensor(np.array(x))
        except (TypeError, ValueError, RuntimeError):
            return None
    return x if x.ndim == 2 else None
