"""Keys and values of sequences that are being written, one token each at a time, none padded.

A pass over T tokens, packed or one for each sequence, is one row of the model, so that its layers
see T tokens and nothing else:

    cache = KVCache(lengths, device)
    ...                              # the prompts' pass: T = sum of lengths
    cache.advance()                     # the next pass has one token of each sequence: T = S
    ...
    order = cache.drop(finished)     # which sequences are left, and in which order

Shapes: S sequences alive, C the capacity of each, Hq query heads, Hkv key/value heads (Hq a
multiple of Hkv), D head dimension.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

_ROOM = 64
"""Least number of positions added to the capacity at a time, so that most steps allocate nothing.
"""


class KVCache:
    """What attention reads and `packed_attention` hands over, layer by layer.

    Args:
        lengths: tokens of each prompt, (S,), each at least 1.
        device: of the model.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        self.device = device
        self.decoding = False
        """Whether the pass has one token of each sequence, and not the prompts."""
        host = torch.from_numpy(lengths)
        starts = host.cumsum(0) - host
        # of each token of the pass: its sequence, and its position there
        sequences = torch.arange(len(host)).repeat_interleave(host)
        places = torch.arange(len(sequences)) - starts.repeat_interleave(host)
        self._sequences, self._places = sequences.to(device), places.to(device)
        self._last = (starts + host - 1).to(device)
        # of each sequence, with the tokens of the pass, on the host and on the device
        self._lengths, self._lengths_device = lengths, host.to(device)
        self._capacity = _rounded_up(int(lengths.max()) + _ROOM)
        self._stores: list[Tensor] = []  # for each layer (2, S or more, Hkv, C, D)
        self._mask: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """(T,) int64: the position of each token of the pass in its sequence."""
        return self._places

    @property
    def last(self) -> Tensor:
        """(S,) int64: where in the pass each sequence has its last token."""
        return self._last

    def advance(self) -> None:
        """Begin a pass of one more token for each sequence."""
        self.decoding = True
        self._places, self._lengths_device = self._lengths_device, self._lengths_device + 1
        self._lengths = self._lengths + 1
        if len(self._sequences) != len(self._lengths):
            self._sequences = torch.arange(len(self._lengths), device=self.device)
        self._last = self._sequences
        longest = int(self._lengths.max())
        if longest > self._capacity:
            self._grow(longest)
        # a multiple of 8 positions, which fused kernels want
        seen = torch.arange(_rounded_up(longest), device=self.device)
        hidden = seen >= self._lengths_device[:, None]
        self._mask = self._stores[0].new_zeros(hidden.shape).masked_fill_(hidden, -torch.inf)

    def drop(self, finished: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Forget sequences; the last ones alive move into their places.

        Args:
            finished: (S,), which; not all.

        Returns:
            For each place that is left, the place until now of the sequence that it has from now.
        """
        alive = np.flatnonzero(~finished)
        holes, moved = np.flatnonzero(finished[: len(alive)]), alive[alive >= len(alive)]
        order = np.arange(len(alive))
        order[holes] = moved
        to, source, kept = (torch.from_numpy(x).to(self.device) for x in (holes, moved, order))
        if len(holes):
            for store in self._stores:
                store[:, to] = store[:, source]
        self._lengths, self._lengths_device = self._lengths[order], self._lengths_device[kept]
        return order

    def write(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (1, Hkv, T, D) of the tokens of the pass, in the value's dtype:
        under autocast, norms make fp32 of keys that attention would round at every step."""
        if layer == len(self._stores):
            shape = (2, len(self._lengths), value.shape[1], self._capacity, value.shape[3])
            # zero: what is masked has weight 0, and 0 x NaN is NaN
            self._stores.append(value.new_zeros(shape))
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
            (1, S, Hq, D) in the value's dtype.
        """
        assert self._mask is not None
        count, seen = self._mask.shape
        key, value = self._stores[layer][:, :count, :, :seen]  # (S, Hkv, seen, D)
        # the query heads that share keys are the rows of one product
        grouped = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))
        out = F.scaled_dot_product_attention(  # (S, Hkv, Hq / Hkv, D)
            grouped.to(key.dtype), key, value, attn_mask=self._mask[:, None, None], scale=scale
        )
        return out.flatten(1, 2)[None]

    def _grow(self, longest: int) -> None:
        """Room for `longest` tokens and more, of the sequences alive alone."""
        self._capacity = _rounded_up(longest + max(_ROOM, longest // 4))
        for layer, old in enumerate(self._stores):
            _, _, heads, capacity, dim = old.shape
            new = old.new_zeros((2, len(self._lengths), heads, self._capacity, dim))
            new[..., :capacity, :] = old[:, : len(self._lengths)]
            self._stores[layer] = new


def _rounded_up(length: int) -> int:
    return -(-length // 8) * 8
