"""Keys and values of sequences that are being written, one token each at a time, none padded.

A pass over T tokens, packed or one for each sequence, is one row of the model, so that its layers
see T tokens and nothing else:

    cache = KVCache(lengths, device)
    ...                              # the prompts' pass, with attention_kwargs of the packed batch
    cache.step()                     # from here on the tokens of a pass are one per sequence
    order = cache.drop(finished)     # which sequences are left, and in which order

S sequences alive, C the capacity of each, Hq query heads, Hkv key/value heads (Hq a multiple of
Hkv), D head dimension.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_ROOM = 64
"""Positions that a sequence gets when it has filled its own: a reallocation in so many steps."""


class KVCache:
    """What attention reads and `packed_attention` hands over, layer by layer.

    Args:
        lengths: tokens of each prompt, (S,), each at least 1.
        device: of the model.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        self.device = device
        self.decoding = False
        """Whether the tokens of a pass are one per sequence."""
        self._longest = int(lengths.max())
        self._capacity = _rounded_up(self._longest + _ROOM)
        self._stores: list[Tensor] = []  # for each layer (2, S, Hkv, C, D)
        host = torch.from_numpy(lengths)
        self._lengths = host.to(device)  # (S,)
        # of each token of the pass: its sequence, and its place there
        starts = host.cumsum(0) - host
        self._sequences = torch.arange(len(host)).repeat_interleave(host).to(device)
        self._places = (
            torch.arange(int(host.sum())) - starts.repeat_interleave(host)
        ).to(device)  # fmt: skip
        self._mask: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """(T,) int64: the position of each token of the pass in its sequence."""
        return self._places

    def step(self) -> None:
        """Begin a pass of one more token for each sequence."""
        self.decoding = True
        self._places = self._lengths
        self._lengths = self._lengths + 1
        self._longest += 1
        if len(self._sequences) != len(self._places):
            self._sequences = torch.arange(len(self._places), device=self.device)
        if self._longest > self._capacity:
            self._grow()
        # A multiple of 8, as fused kernels want it. What nothing was written to is zero.
        seen = torch.arange(_rounded_up(self._longest), device=self.device)
        hidden = seen >= self._lengths[:, None]
        self._mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)

    def drop(self, finished: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Forget sequences; the last ones alive move into their places.

        Args:
            finished: (S,), which.

        Returns:
            For each place the sequence, by its place until now, that it has from now on.
        """
        left = np.flatnonzero(~finished)
        order = np.arange(len(left))
        holes, moved = np.flatnonzero(finished[: len(left)]), left[left >= len(left)]
        order[holes] = moved
        to, source = (torch.from_numpy(x).to(self.device) for x in (holes, moved))
        if len(holes):
            for store in self._stores:
                store[:, to] = store[:, source]
        self._lengths = self._lengths[torch.from_numpy(order).to(self.device)]
        return order

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (1, Hkv, T, D) of the tokens of the pass."""
        if layer == len(self._stores):
            shape = (2, len(self._lengths), key.shape[1], self._capacity, key.shape[3])
            self._stores.append(key.new_zeros(shape))
        store = self._stores[layer]
        for kept, new in zip(store, (key, value), strict=True):
            kept[self._sequences, :, self._places] = new[0].transpose(0, 1).to(store.dtype)

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attention of one token of each sequence to all of its tokens.

        Args:
            layer: its keys and values have been written.
            query: (1, Hq, S, D).
            scale: factor on q k^T.

        Returns:
            (1, S, Hq, D).
        """
        assert self._mask is not None
        count, seen = self._mask.shape
        key, value = self._stores[layer][:, :count, :, :seen]  # (S, Hkv, seen, D)
        heads = key.shape[1]
        # query heads that share keys are the rows of one product
        grouped = query[0].transpose(0, 1).unflatten(1, (heads, -1))  # (S, Hkv, Hq / Hkv, D)
        mask = self._mask[:, None, None].to(key.dtype)
        out = F.scaled_dot_product_attention(
            grouped.to(key.dtype), key, value, attn_mask=mask, scale=scale
        )
        return out.flatten(1, 2)[None].to(query.dtype)

    def _grow(self) -> None:
        """Room for more tokens, of the sequences alive alone."""
        self._capacity = _rounded_up(self._longest + max(_ROOM, self._longest // 4))
        for layer, old in enumerate(self._stores):
            count = len(self._lengths)
            new = old.new_zeros((2, count, old.shape[2], self._capacity, old.shape[4]))
            new[..., : old.shape[3], :] = old[:, :count]
            self._stores[layer] = new


def _rounded_up(length: int) -> int:
    return -(-length // 8) * 8
