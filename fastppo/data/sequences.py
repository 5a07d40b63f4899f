"""Packed batches: sequences back to back, no padding, one arena and one host-to-device copy.

Letters: B sequences; T tokens, prompt + response of every sequence (what the trunk reads);
N response tokens (what the losses read). Entry i of an (N,) array belongs to the i-th generated
token: its log-probability given everything before it, and the value of the state before it.
`rows[i]` is the place among the T tokens whose hidden state predicts that token.

The copying and planning is C++ (csrc/) with the GIL released. Nothing here pads.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo import _C
from fastppo.data.ragged import Int32s, checked_indices, select_layout

_TORCH_DTYPES = {"int32": torch.int32, "float32": torch.float32, "bool": torch.bool}

# Fields with data of their own (all others follow from the lengths), by what selects from them.
_GATHERED = {
    "input_ids": "tokens",
    "truncated": "sequences",
    "bootstrap": "sequences",
    "targets": "responses",
    "loss_mask": "responses",
    "rollout_logprobs": "responses",
    "old_logprobs": "responses",
    "ref_logprobs": "responses",
    "values": "responses",
    "rewards": "responses",
    "advantages": "responses",
    "returns": "responses",
    "weights": "responses",
}
_INT32 = ("input_ids", "position_ids", "cu_seqlens", "targets", "rows", "cu_responses")
_BOOL = ("truncated", "loss_mask")

TokenSequences = Sequence[Sequence[int]] | Sequence[NDArray[np.integer[Any]]] | Sequence[Tensor]
FloatSequences = Sequence[Sequence[float]] | Sequence[NDArray[np.floating[Any]]] | Sequence[Tensor]
BoolSequences = Sequence[Sequence[bool]] | Sequence[NDArray[np.bool_]] | Sequence[Tensor]
Flat = Sequence[int] | Sequence[float] | NDArray[Any] | Tensor
Ints = Sequence[int] | NDArray[np.integer[Any]] | Tensor
Bools = Sequence[bool] | NDArray[np.bool_] | Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """B prompts and their responses, packed. Frozen: `replace` and `select` make new batches.

    Build it with `pack`. All tensors are on one device; the optional ones are None until someone
    computes them.

    Raises:
        ValueError: a field's length or device does not fit the others.
        TypeError: a field has the wrong dtype.
    """

    # T tokens: prompt then response of each sequence, back to back
    input_ids: Tensor  # (T,) int32 token ids
    position_ids: Tensor  # (T,) int32, restarting at 0 in each sequence
    cu_seqlens: Tensor  # (B+1,) int32, where each sequence starts, then T
    cu_seqlens_host: Int32s  # (B+1,) int32, the same numbers in host memory
    max_seqlen: int  # tokens in the longest sequence
    # N response tokens: generated ones only
    targets: Tensor  # (N,) int32 token ids
    rows: Tensor  # (N,) int32 index into the T tokens of the position before each target
    cu_responses: Tensor  # (B+1,) int32, where each response starts, then N
    cu_responses_host: Int32s  # (B+1,) int32, the same numbers in host memory
    truncated: Tensor  # (B,) bool, the response hit the length limit: told, never inferred
    loss_mask: Tensor | None = None  # (N,) bool, False: no loss (tool's token, unscored sample)
    rollout_logprobs: Tensor | None = None  # (N,) fp32 nats, the engine's, at its temperature
    old_logprobs: Tensor | None = None  # (N,) fp32 nats, of the policy before the update
    ref_logprobs: Tensor | None = None  # (N,) fp32 nats, of the reference policy
    values: Tensor | None = None  # (N,) fp32, the critic's value of the state before each token
    rewards: Tensor | None = None  # (N,) fp32, per token
    advantages: Tensor | None = None  # (N,) fp32
    returns: Tensor | None = None  # (N,) fp32, what the critic is trained towards
    weights: Tensor | None = None  # (N,) fp32, mask and normaliser of the loss
    bootstrap: Tensor | None = None  # (B,) fp32, value after the last token, 0 where finished
    # uint8, the one buffer that the packed fields are views of, while they are
    arena: Tensor | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        count = {
            "tokens": self.num_tokens,
            "responses": self.num_responses,
            "sequences": self.num_sequences,
        }
        sizes = {name: count[source] for name, source in _GATHERED.items()}
        sizes |= {"position_ids": self.num_tokens, "rows": self.num_responses}
        sizes |= {"cu_seqlens": self.num_sequences + 1, "cu_responses": self.num_sequences + 1}
        if self.cu_responses_host.shape != self.cu_seqlens_host.shape:
            raise ValueError(
                f"cu_responses_host: expected shape {self.cu_seqlens_host.shape}, as "
                f"cu_seqlens_host, got {self.cu_responses_host.shape}"
            )
        for name, size in sizes.items():
            x: Tensor | None = getattr(self, name)
            if x is not None:
                self._check(name, x, size)

    def _check(self, name: str, x: Tensor, size: int) -> None:
        if x.shape != (size,):
            raise ValueError(f"{name}: expected shape ({size},), got {tuple(x.shape)}")
        if x.device != self.device:
            raise ValueError(f"{name}: expected a tensor on {self.device}, got {x.device}")
        if name in _INT32:
            expected, right = "torch.int32", x.dtype == torch.int32
        elif name in _BOOL:
            expected, right = "torch.bool", x.dtype == torch.bool
        else:
            expected, right = "a floating point dtype", x.dtype.is_floating_point
        if not right:
            raise TypeError(f"{name}: expected {expected}, got {x.dtype}")

    @classmethod
    def pack(
        cls,
        prompts: TokenSequences | Flat,
        responses: TokenSequences | Flat,
        *,
        prompt_lengths: Ints | None = None,
        response_lengths: Ints | None = None,
        rollout_logprobs: FloatSequences | Flat | None = None,
        loss_mask: BoolSequences | Flat | None = None,
        truncated: Bools | None = None,
        device: torch.device | str = "cpu",
    ) -> PackedBatch:
        """Pack B prompts and their responses.

        Arrays (numpy, torch on the CPU, anything with the buffer protocol) are read where they
        are; Python lists work too and are slower.

        Args:
            prompts: B sequences of ≥ 1 token ids; or all of them in one flat sequence.
            responses: B sequences of ≥ 0 token ids; or all of them in one flat sequence.
            prompt_lengths: (B,) for flat prompts, how many tokens each has.
            response_lengths: (B,) for flat responses; then rollout_logprobs and loss_mask are
                flat as well.
            rollout_logprobs: like responses, float32 or float64, in nats.
            loss_mask: like responses, bool.
            truncated: (B,) bool; None: no response was cut.
            device: where the batch goes, in one copy (from pinned memory for CUDA).

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
            rollout_logprobs=rollout_logprobs,
            loss_mask=loss_mask,
            truncated=truncated,
        )
        if torch.device(device).type == "cuda":
            host = torch.empty(plan.nbytes, dtype=torch.uint8, pin_memory=True)
            plan.fill(host.numpy())
        else:
            host = torch.frombuffer(plan.arena(), dtype=torch.uint8)
        arena = host.to(device, non_blocking=True)
        fields: dict[str, Any] = {}
        for name, (offset, dtype_name, count) in plan.fields.items():
            dtype = _TORCH_DTYPES[dtype_name]
            fields[name] = arena[offset : offset + count * dtype.itemsize].view(dtype)
        for name in ("cu_seqlens", "cu_responses"):
            offset, _, count = plan.fields[name]
            in_arena = host.numpy()[offset : offset + 4 * count].view(np.int32)
            # A copy, so that two short arrays do not keep a pinned arena alive.
            fields[name + "_host"] = _read_only(in_arena.copy())
        return cls(**fields, max_seqlen=plan.max_seqlen, arena=arena)

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

        Reading the mask makes the host wait for a GPU, once: batches that `select` takes from this
        one know theirs.
        """
        if self.loss_mask is None:
            return self.response_lengths
        return self._lengths_where(self.loss_mask)

    @functools.cached_property
    def driving_lengths(self) -> Int32s:
        """(B,) int32 on the host, those of `valid_lengths` whose advantage is not 0.

        Reading the advantages makes the host wait for a GPU, once, as for `valid_lengths`.
        """
        if self.advantages is None:
            return self.valid_lengths
        driving = self.advantages != 0
        if self.loss_mask is not None:
            driving = driving & self.loss_mask
        return self._lengths_where(driving)

    def _lengths_where(self, chosen: Tensor) -> Int32s:
        """(B,) how many tokens of each response (N,) bool has chosen."""
        before = np.zeros(self.num_responses + 1, np.int64)
        np.cumsum(chosen.cpu().numpy(), out=before[1:])
        return np.diff(before[self.cu_responses_host]).astype(np.int32)

    @property
    def last_rows(self) -> Tensor:
        """(B,) int32 index into the T tokens of the last token of each sequence."""
        return self.cu_seqlens[1:] - 1

    def replace(self, **fields: Any) -> PackedBatch:
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

    def select(self, indices: Ints) -> PackedBatch:
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
        packed = torch.from_numpy(np.concatenate(list(layout.values())))
        if self.device.type == "cuda":
            packed = packed.pin_memory()
        packed = packed.to(self.device, non_blocking=True)
        pieces = torch.split_with_sizes(packed, [len(x) for x in layout.values()])
        on_device = dict(zip(layout, pieces, strict=True))

        fields = {}
        for name, source in _GATHERED.items():
            x: Tensor | None = getattr(self, name)
            fields[name] = None if x is None else x.index_select(0, on_device[source])
        for name in ("position_ids", "cu_seqlens", "rows", "cu_responses"):
            fields[name] = on_device[name]
        selected = self.replace(
            **fields,
            cu_seqlens_host=_read_only(layout["cu_seqlens"]),
            cu_responses_host=_read_only(layout["cu_responses"]),
            max_seqlen=int(np.diff(layout["cu_seqlens"]).max(initial=0)),
            arena=None,
        )
        for name in ("valid_lengths", "driving_lengths"):
            if name in vars(self):
                vars(selected)[name] = vars(self)[name][chosen]
        return selected

    def to(self, device: torch.device | str) -> PackedBatch:
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
