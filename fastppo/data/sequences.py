"""Packed sequences: back to back, no padding, one arena and one host-to-device copy.

Letters: B sequences; T tokens, prompt + response of every sequence (what the trunk reads);
N response tokens (what the losses read). Entry i of an (N,) array belongs to the i-th generated
token. `rows[i]` is the place among the T tokens whose hidden state predicts that token.

This is the layout alone, which every trainer needs; what PPO knows of the response tokens is in
ppo/experience.py. The copying and planning is C++ (csrc/) with the GIL released. Nothing here pads;
`from_padded` and `to_padded` are the border to code that does.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo import _C
from fastppo.data.padded import pack_arguments, padded
from fastppo.data.ragged import Int32s, checked_indices, select_layout

_TORCH_DTYPES = {"int32": torch.int32, "float32": torch.float32, "bool": torch.bool}

TokenSequences = Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]] | Sequence[Tensor]
FloatSequences = Sequence[Sequence[float]] | Sequence[NDArray[np.floating[Any]]] | Sequence[Tensor]
BoolSequences = Sequence[Sequence[bool]] | Sequence[NDArray[np.bool_]] | Sequence[Tensor]
Flat = Sequence[int] | Sequence[float] | NDArray[Any] | Tensor
Ints = Sequence[int] | NDArray[np.integer[Any]] | Tensor
Bools = Sequence[bool] | NDArray[np.bool_] | Tensor

Per = Literal["tokens", "responses", "sequences", "offsets"]
"""What a field has one entry for: T, N, B, and B + 1 for the boundaries."""
Kind = Literal["int32", "bool", "float"]

_LAYOUT = ("position_ids", "cu_seqlens", "rows", "cu_responses")
"""Fields that follow from the lengths; all others have data of their own."""

Packed = TypeVar("Packed", bound="PackedSequences")


def packed(per: Per, kind: Kind, *, optional: bool = False) -> Any:
    """A field with one entry for each token, response token or sequence; None by default if
    `optional`.
    """
    about = {"per": per, "kind": kind}
    if optional:
        return dataclasses.field(default=None, metadata=about)
    return dataclasses.field(metadata=about)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSequences:
    """B prompts and their responses, packed. Frozen: `replace` and `select` make new ones.

    Build it with `pack` or `from_padded`. All tensors are on one device.

    Raises:
        ValueError: a field's length or device does not fit the others.
        TypeError: a field is no tensor or has the wrong dtype.
    """

    # T tokens: prompt then response of each sequence, back to back
    input_ids: Tensor = packed("tokens", "int32")
    """(T,) int32 token ids."""
    position_ids: Tensor = packed("tokens", "int32")
    """(T,) int32, restarting at 0 in each sequence."""
    cu_seqlens: Tensor = packed("offsets", "int32")
    """(B+1,) int32, where each sequence starts, then T."""
    cu_seqlens_host: Int32s
    """(B+1,) int32, the same numbers in host memory."""
    max_seqlen: int
    """Tokens in the longest sequence."""

    # N response tokens: generated ones only
    targets: Tensor = packed("responses", "int32")
    """(N,) int32 token ids."""
    rows: Tensor = packed("responses", "int32")
    """(N,) int32 index into the T tokens of the position before each target."""
    cu_responses: Tensor = packed("offsets", "int32")
    """(B+1,) int32, where each response starts, then N."""
    cu_responses_host: Int32s
    """(B+1,) int32, the same numbers in host memory."""
    loss_mask: Tensor | None = packed("responses", "bool", optional=True)
    """(N,) bool, False: no loss, but context for what follows (a tool's token)."""

    _known_lengths: ClassVar[tuple[str, ...]] = (
        "valid_lengths",
    )  # (B,) each, which `select` takes along once they are known

    arena: Tensor | None = dataclasses.field(default=None, repr=False)
    """uint8, the one buffer that the packed fields are views of, while they are."""

    def __post_init__(self) -> None:
        if self.cu_responses_host.shape != self.cu_seqlens_host.shape:
            raise ValueError(
                f"cu_responses_host: expected shape {self.cu_seqlens_host.shape}, as "
                f"cu_seqlens_host, got {self.cu_responses_host.shape}"
            )
        sizes = {
            "tokens": self.num_tokens,
            "responses": self.num_responses,
            "sequences": self.num_sequences,
            "offsets": self.num_sequences + 1,
        }
        for name, field in self._packed_fields().items():
            x: Tensor | None = getattr(self, name)
            if x is not None:
                self._check(name, x, sizes[field["per"]], field["kind"])

    @classmethod
    @functools.cache
    def _packed_fields(cls) -> dict[str, Any]:
        """Name → what `packed` said of it."""
        return {f.name: f.metadata for f in dataclasses.fields(cls) if f.metadata}

    def _check(self, name: str, x: Tensor, size: int, kind: Kind) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{name}: expected a tensor, got {type(x).__name__}. Use torch.as_tensor"
            )
        if x.shape != (size,):
            raise ValueError(f"{name}: expected shape ({size},), got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected a tensor on {self.device}, got {x.device}")
        if kind == "float":
            expected, right = "a floating point dtype", x.dtype.is_floating_point
        else:
            dtype = _TORCH_DTYPES[kind]
            expected, right = str(dtype), x.dtype == dtype
        if not right:
            raise TypeError(f"{name}: expected {expected}, got {x.dtype}")

    @classmethod
    def pack(
        cls: type[Packed],
        prompts: TokenSequences | Flat,
        responses: TokenSequences | Flat,
        *,
        prompt_lengths: Ints | None = None,
        response_lengths: Ints | None = None,
        loss_mask: BoolSequences | Flat | None = None,
        device: torch.device | str = "cpu",
        **more: Any,
    ) -> Packed:
        """Pack B prompts and their responses.

        Arrays (numpy, torch on the CPU, anything with the buffer protocol) are read where they
        are; Python lists work too and are slower.

        Args:
            prompts: B sequences of ≥ 1 token ids; or all of them in one flat sequence.
            responses: B sequences of ≥ 0 token ids; or all of them in one flat sequence.
            prompt_lengths: (B,) for flat prompts, how many tokens each has.
            response_lengths: (B,) for flat responses; then loss_mask is flat as well.
            loss_mask: like responses, bool.
            device: where they go, in one copy (from pinned memory for CUDA).

        Raises:
            TypeError: the element type of a sequence is wrong (floats for tokens, ...).
            ValueError: an empty prompt, a negative length or token id, sizes that do not match,
                or more than 2^31 - 1 tokens in all.
        """
        plan = _C.PackPlan(
            prompts,
            responses,
            prompt_lengths=prompt_lengths,
            response_lengths=response_lengths,
            loss_mask=loss_mask,
            **more,
        )
        if torch.device(device).type == "cuda":
            host = torch.empty(plan.nbytes, dtype=torch.uint8, pin_memory=True)
            plan.fill(host.numpy())
        else:
            host = torch.frombuffer(plan.arena(), dtype=torch.uint8)
        arena = host.to(device, non_blocking=True)
        fields: dict[str, Any] = {}
        for name, (offset, dtype_name, count) in plan.fields.items():
            if name in cls._packed_fields():
                dtype = _TORCH_DTYPES[dtype_name]
                fields[name] = arena[offset : offset + count * dtype.itemsize].view(dtype)
        for name in ("cu_seqlens", "cu_responses"):
            offset, _, count = plan.fields[name]
            in_arena = host.numpy()[offset : offset + 4 * count].view(np.int32)
            # A copy, so that two short arrays do not keep a pinned arena alive.
            fields[name + "_host"] = _read_only(in_arena.copy())
        return cls(**fields, max_seqlen=plan.max_seqlen, arena=arena)

    @classmethod
    def from_padded(
        cls: type[Packed],
        ids: Tensor,
        prompt_mask: Tensor,
        response_mask: Tensor,
        loss_mask: Tensor | None = None,
        *,
        device: torch.device | str | None = None,
        **more: Any,
    ) -> Packed:
        """Pack padded sequences, in the order of their rows; waits for a GPU once.

        Padding may stand anywhere, left, right or between: a place that neither mask has is no
        token. A token that is context but was not generated (a tool's answer in the middle of a
        response) is in `response_mask`, with `loss_mask` False.

        Args:
            ids: (B, L) token ids; this and the masks may be numpy arrays or lists too.
            prompt_mask: (B, L) bool or 0 and 1, the prompt's tokens, at least one in each row.
            response_mask: (B, L) likewise, the tokens after the prompt.
            loss_mask: (B, L) likewise, which of these have a loss; None: all of them.
            device: of the result; None is that of `ids`.
            more: what `pack` takes; an array for each response token is (B, L), a tensor, a numpy
                array or lists. Of a PackedBatch: `truncated` (B,) bool, by default none, and
                `rollout_logprobs` (B, L).

        Raises:
            ValueError: a mask that is missing, of another shape than ids, that overlaps, or with a
                prompt's token after a response's; a row without a prompt.
        """
        ids = torch.as_tensor(ids)
        per_response = [n for n, f in cls._packed_fields().items() if f["per"] == "responses"]
        given = pack_arguments(ids, prompt_mask, response_mask, loss_mask, more, per_response)
        return cls.pack(**given, device=ids.device if device is None else device)

    def to_padded(self, x: Tensor, response_mask: Tensor, fill: float = 0.0) -> Tensor:
        """An (N,) array in the places of the response tokens it belongs to, others `fill`.

        Args:
            x: (N,) on this device.
            response_mask: (B, L), the one that `from_padded` took; it may be a numpy array or
                lists too.
            fill: what the other places have.

        Returns:
            (B, L) in the dtype of x.

        Raises:
            ValueError: the mask or x are of other sequences, told from how many tokens each row
                has; of a mask on a GPU, which is not waited for, from its shape alone.
        """
        return padded(x, response_mask, self.response_lengths, fill)

    @property
    def num_sequences(self) -> int:
        """B."""
        return len(self.cu_seqlens_host) - 1

    @property
    def num_tokens(self) -> int:
        """T, prompt and response tokens."""
        return int(self.cu_seqlens_host[-1])

    @property
    def num_responses(self) -> int:
        """N, response tokens."""
        return int(self.cu_responses_host[-1])

    @property
    def device(self) -> torch.device:
        """The device of every tensor in the batch."""
        return self.input_ids.device

    @property
    def sequence_lengths(self) -> Int32s:
        """(B,) int32 on the host, prompt + response tokens of each sequence."""
        return np.diff(self.cu_seqlens_host)

    @property
    def response_lengths(self) -> Int32s:
        """(B,) int32 on the host, response tokens of each sequence."""
        return np.diff(self.cu_responses_host)

    @functools.cached_property
    def valid_lengths(self) -> Int32s:
        """(B,) int32 on the host, response tokens of each sequence that `loss_mask` lets count.

        Reading the mask makes the host wait for a GPU, once: what `select` takes from this
        batch knows its own.
        """
        if self.loss_mask is None:
            return self.response_lengths
        return self._lengths_where(self.loss_mask)

    def _lengths_where(self, chosen: Tensor) -> Int32s:
        """(B,) how many tokens of each response (N,) bool has chosen."""
        before = np.zeros(self.num_responses + 1, np.int64)
        np.cumsum(chosen.cpu().numpy(), out=before[1:])
        return np.diff(before[self.cu_responses_host]).astype(np.int32)

    @property
    def last_rows(self) -> Tensor:
        """(B,) int32 index into the T tokens of the last token of each sequence."""
        return self.cu_seqlens[1:] - 1

    def replace(self: Packed, **fields: Any) -> Packed:
        """The same batch with some fields changed."""
        return dataclasses.replace(self, **fields)

    def bins(self, token_budget: int) -> list[list[int]]:
        """Bins of whole sequences by best-fit decreasing, for micro-batches of `select`.

        Args:
            token_budget: most prompt + response tokens in a bin.

        Returns:
            Bins in the order they were opened, indices ascending in each; every sequence once.

        Raises:
            ValueError: `token_budget` is below the longest sequence.
        """
        return _C.bins(self.sequence_lengths, token_budget)

    def select(self: Packed, indices: Ints) -> Packed:
        """Whole sequences, in the given order, with every field they have.

        Costs one index computation on the host, one copy of it to the device and one gather per
        field; nothing waits for the device.

        Args:
            indices: (B',) which sequences; repeats are allowed.

        Raises:
            TypeError: `indices` are not integers.
            ValueError: an index is outside 0..B-1.
        """
        host = indices.cpu().numpy() if isinstance(indices, Tensor) else indices
        chosen = checked_indices(host, self.num_sequences)
        layout = select_layout(self.cu_seqlens_host, self.cu_responses_host, chosen)
        joined = torch.from_numpy(np.concatenate(list(layout.values())))
        if self.device.type == "cuda":
            joined = joined.pin_memory()
        joined = joined.to(self.device, non_blocking=True)
        pieces = torch.split_with_sizes(joined, [len(x) for x in layout.values()])
        on_device = dict(zip(layout, pieces, strict=True))

        fields = {name: on_device[name] for name in _LAYOUT}
        for name, field in self._packed_fields().items():
            x: Tensor | None = getattr(self, name)
            if name not in _LAYOUT and x is not None:
                fields[name] = x.index_select(0, on_device[field["per"]])
        selected = self.replace(
            **fields,
            cu_seqlens_host=_read_only(layout["cu_seqlens"]),
            cu_responses_host=_read_only(layout["cu_responses"]),
            max_seqlen=int(np.diff(layout["cu_seqlens"]).max(initial=0)),
            arena=None,
        )
        for name in self._known_lengths:
            if name in vars(self):
                vars(selected)[name] = vars(self)[name][chosen]
        return selected

    def to(self: Packed, device: torch.device | str) -> Packed:
        """The batch on another device: one copy for all fields still in the arena."""
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if device == self.device:
            return self
        arena = None if self.arena is None else self.arena.to(device)
        moved: dict[str, Tensor] = {}
        for field in dataclasses.fields(self):
            x = getattr(self, field.name)
            if not isinstance(x, Tensor) or field.name == "arena":
                continue
            offset = _offset_in(self.arena, x)
            if arena is None or offset is None:
                moved[field.name] = x.to(device)
            else:
                moved[field.name] = arena[offset : offset + x.nbytes].view(x.dtype)
        return self.replace(**moved, arena=arena)

    def unpack(self, x: Tensor | NDArray[Any]) -> list[NDArray[Any]]:
        """Cut an (N,) array into one array per sequence: B views of host memory.

        Raises:
            ValueError: `x` is not (N,).
        """
        host = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
        if host.shape != (self.num_responses,):
            raise ValueError(f"x: expected shape ({self.num_responses},), got {host.shape}")
        cu = self.cu_responses_host.tolist()
        return [host[start:end] for start, end in itertools.pairwise(cu)]


def partition(lengths: Ints, k: int) -> list[list[int]]:
    """Divide sequences among k ranks so that each gets nearly the same number of tokens.

    Karmarkar–Karp: with at least k sequences no rank is left without one.

    Args:
        lengths: (B,) ≥ 0, the cost of each sequence.
        k: ranks, ≥ 1.

    Returns:
        k lists of indices, from the most to the least loaded, ascending in each.

    Raises:
        TypeError: `lengths` or `k` are not integers.
        ValueError: a negative length, or `k` < 1.
    """
    return _C.partition(lengths, k)


def _read_only(x: Int32s) -> Int32s:
    x.flags.writeable = False
    return x


def _offset_in(arena: Tensor | None, x: Tensor) -> int | None:
    """Bytes from the start of the arena to x, or None where x lives elsewhere."""
    if arena is None or x.untyped_storage().data_ptr() != arena.untyped_storage().data_ptr():
        return None
    return x.data_ptr() - arena.data_ptr()
