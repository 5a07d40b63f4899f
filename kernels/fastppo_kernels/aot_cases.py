"""One launch of every kernel and launch-table entry, by name, for compiling ahead of time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastppo_kernels.aot import record
from fastppo_kernels.aot_scan_cases import scan_launches
from fastppo_kernels.launch import KernelCall
from fastppo_kernels.ppo_loss import ppo_loss
from fastppo_kernels.ppo_math import PPOInputs, PPOKnobs
from fastppo_kernels.ppo_rows import ppo_rows
from fastppo_kernels.token_logprobs import token_logprobs_bwd_out, token_logprobs_fwd
from fastppo_kernels.value_loss import value_loss

ROWS = 32
# One vocabulary per entry of the launch tables; then one that divides by no power of two, in rows
# padded to 16 elements as the linear ops pad theirs.
VOCABS = (1024, 16384, 151936, 50257)
# The losses must not count on a number of tokens that divides by anything.
TOKENS = 65_537


def meta_logits(vocab: int, dtype: torch.dtype, rows: int = ROWS) -> Tensor:
    """(rows, vocab) logits in rows of a multiple of 16 elements."""
    padded = -(-vocab // 16) * 16
    return torch.empty((rows, padded), dtype=dtype, device="meta")[:, :vocab]


def _rows(dtype: torch.dtype = torch.float32, rows: int = ROWS) -> Tensor:
    return torch.empty(rows, dtype=dtype, device="meta")


def _token_logprobs(
    vocab: int, dtype: torch.dtype, options: bool, grad: torch.dtype | None = None
) -> None:
    logits, targets = meta_logits(vocab, dtype), _rows(torch.int64)
    out = logits if grad is None else meta_logits(vocab, grad)
    tau, softcap = (_rows(), 30.0) if options else (1.0, None)
    stats = token_logprobs_fwd(logits, targets, tau, softcap)
    token_logprobs_bwd_out(logits, targets, stats, _rows(), _rows(), tau, softcap, out=out)


def _knobs(options: bool) -> PPOKnobs:
    return PPOKnobs(
        low=0.8,
        high=1.2,
        dual_clip=3.0 if options else float("inf"),
        kl_coef=0.1 if options else 0.0,
        ent_coef=0.01 if options else 0.0,
        is_cap=2.0,
        is_low=0.5,
        is_high=5.0,
        kl=3,
        correction=1 if options else 0,
    )


def _ppo_rows(
    vocab: int, dtype: torch.dtype, options: bool, grad: torch.dtype | None = None
) -> None:
    knobs = _knobs(options)
    ref, rollout = (_rows(), _rows()) if options else (None, None)
    tau, softcap = (_rows(), 30.0) if options else (1.0, None)
    logits, targets = meta_logits(vocab, dtype), _rows(torch.int64)
    out = logits if grad is None else meta_logits(vocab, grad)
    inputs = PPOInputs(_rows(), _rows(), _rows(), ref, rollout)
    ppo_rows(logits, targets, inputs, knobs, tau, softcap, out=out)


def _losses(dtype: torch.dtype, options: bool) -> None:
    x = torch.empty(TOKENS, dtype=dtype, device="meta")
    optional = x if options else None
    ppo_loss(x, optional, PPOInputs(x, x, x, optional, optional), _knobs(options))
    clip, huber = (0.2, 1.0) if options else (None, None)
    value_loss(x, optional, x, x, clip, huber)


def cases() -> dict[str, KernelCall]:
    """Launches by "kernel dtype [vocabulary] [options]"; of scans by "kernel plan [options]"."""
    found: dict[str, KernelCall] = {}

    def add(suffix: str, launcher: Callable[[], object]) -> None:
        for call in record(launcher):
            found[f"{call.kernel.__name__.removesuffix('_kernel')} {suffix}"] = call

    for op in (_token_logprobs, _ppo_rows):
        for vocab in VOCABS:
            add(f"bf16 {vocab}", partial(op, vocab, torch.bfloat16, False))
        add("fp16 151936", partial(op, 151936, torch.float16, False))
        add("fp32 151936", partial(op, 151936, torch.float32, False))
        add("bf16 151936 options", partial(op, 151936, torch.bfloat16, True))
        add("fp32 to bf16 151936", partial(op, 151936, torch.float32, False, torch.bfloat16))
    for suffix, launcher in scan_launches():
        add(suffix, launcher)
    add("fp32", partial(_losses, torch.float32, False))
    add("fp32 options", partial(_losses, torch.float32, True))
    add("bf16 options", partial(_losses, torch.bfloat16, True))
    return found
