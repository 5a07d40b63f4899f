"""One launch of every kernel and launch-table entry, by name, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastppo_kernels.aot import record
from fastppo_kernels.launch import Call
from fastppo_kernels.token_logprobs import token_logprobs_bwd_out, token_logprobs_fwd

ROWS = 32
# One vocabulary per entry of the launch tables; then one that divides by no power of two, in rows
# padded to 16 elements as the linear ops pad theirs.
VOCABS = (1024, 16384, 151936, 50257)


def meta_logits(vocab: int, dtype: torch.dtype) -> Tensor:
    """(ROWS, vocab) logits in rows of a multiple of 16 elements."""
    padded = -(-vocab // 16) * 16
    return torch.empty((ROWS, padded), dtype=dtype, device="meta")[:, :vocab]


def _rows(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(ROWS, dtype=dtype, device="meta")


def _token_logprobs(vocab: int, dtype: torch.dtype, options: bool) -> None:
    logits, targets = meta_logits(vocab, dtype), _rows(torch.int64)
    tau, softcap = (_rows(), 30.0) if options else (1.0, None)
    stats = token_logprobs_fwd(logits, targets, tau, softcap)
    token_logprobs_bwd_out(logits, targets, stats, _rows(), _rows(), tau, softcap, out=logits)


def cases() -> dict[str, Call]:
    """Launches by "kernel dtype vocabulary [options]"."""
    found: dict[str, Call] = {}

    def add(suffix: str, launcher: Callable[[], None]) -> None:
        for call in record(launcher):
            found[f"{call.kernel.__name__.removesuffix('_kernel')} {suffix}"] = call

    for vocab in VOCABS:
        add(f"bf16 {vocab}", lambda v=vocab: _token_logprobs(v, torch.bfloat16, False))  # type: ignore[misc]
    add("fp16 151936", lambda: _token_logprobs(151936, torch.float16, False))
    add("fp32 151936", lambda: _token_logprobs(151936, torch.float32, False))
    add("bf16 151936 options", lambda: _token_logprobs(151936, torch.bfloat16, True))
    return found
