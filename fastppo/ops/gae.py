"""Generalised advantage estimation on packed sequences (arXiv 1506.02438).

Shapes: N response tokens of B sequences back to back, cu_seqlens (B+1,). Backwards in each
sequence, with A = 0 and V' = bootstrap (0 where the sequence finished) after its last token,

    r_t ← r_t − kl_coef·kl_t + score at the last valid token
    A_t = r_t + γ·V' − V_t + γλ·A_{t+1},   V' ← V_t;      returns = A + V

Masked tokens (tool output inside a response) follow the host's convention, `mask_mode`:
    carry       A and V' pass through unchanged (verl, NeMo-RL, AReaL)
    dense-zero  V ← V·m, r ← r·m, then the plain recurrence on every slot (OpenRLHF)
    none        the plain recurrence on every slot
In every mode masked slots take no KL and no score and come out with advantage 0 and return 0; give
them loss weight 0.

On CPU the recurrence runs in C++, in double precision, one rounding per result; on CUDA as a Triton
scan of affine maps (fastppo_kernels.gae), in one launch where `max_seqlen` says that no sequence is
long, with one more for norm_adv.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastppo import _C
from fastppo.ops._checks import (
    check_choice,
    check_cu_seqlens,
    check_discount,
    check_max_seqlen,
    check_rows,
    check_tensor,
)
from fastppo.ops._precision import compute_dtype
from fastppo.ops._segments import segment_ids
from fastppo.ops.whiten import EPS, whiten_reference

MaskMode = Literal["carry", "dense-zero", "none"]
MASK_MODES = ("carry", "dense-zero", "none")


class GAE(NamedTuple):
    """Per-token results, each (N,) float32, constants."""

    advantages: Tensor
    returns: Tensor


def gae_reference(
    rewards: Tensor | None,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask: Tensor | None = None,
    mask_mode: MaskMode = "carry",
    bootstrap: Tensor | None = None,
    returns_lambda: float | Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    scores: Tensor | None = None,
    norm_adv: bool = False,
) -> GAE:
    """A Python loop over tokens."""
    n, num_sequences = values.shape[0], cu_seqlens.shape[0] - 1
    offsets = cu_seqlens.tolist()
    m = [True] * n if mask is None else mask.tolist()
    end = [0.0] * num_sequences if bootstrap is None else bootstrap.tolist()
    r = [0.0] * n if rewards is None else rewards.tolist()
    v = values.tolist()
    for i, (start, stop) in enumerate(pairwise(offsets)):
        valid = [t for t in range(start, stop) if m[t]]
        for t in valid:
            r[t] -= 0.0 if kl is None else kl_coef * float(kl[t])
        if valid and scores is not None:
            r[valid[-1]] += float(scores[i])

    def per_sequence(x: float | Tensor, i: int) -> float:
        return float(x[i]) if isinstance(x, Tensor) else x

    def advantages(lambdas: float | Tensor) -> Tensor:
        out = [0.0] * n
        for i, (start, stop) in enumerate(pairwise(offsets)):
            g, lam = per_sequence(gamma, i), per_sequence(lambdas, i)
            adv, next_value = 0.0, end[i]
            for t in reversed(range(start, stop)):
                if not m[t] and mask_mode == "carry":
                    continue
                zero = not m[t] and mask_mode == "dense-zero"
                reward, value = (0.0, 0.0) if zero else (r[t], v[t])
                adv = reward + g * next_value - value + g * lam * adv
                next_value = value
                out[t] = adv if m[t] else 0.0
        return torch.tensor(out, dtype=torch.float64)

    adv = advantages(gae_lambda)
    critic = adv if returns_lambda is None else advantages(returns_lambda)
    returns = torch.where(torch.tensor(m, dtype=torch.bool), critic + values.double(), 0.0)
    if norm_adv:
        adv = whiten_reference(adv, mask)
    dtype = compute_dtype(values)
    return GAE(adv.to(dtype), returns.to(dtype))


class _Arguments(NamedTuple):
    """The op's arguments, values in the dtype of the results."""

    values: Tensor
    cu_seqlens: Tensor
    rewards: Tensor | None
    mask: Tensor | None
    bootstrap: Tensor | None
    kl: Tensor | None
    scores: Tensor | None
    discounts: Tensor | None
    """(2 or 3, B) float64: γ, λ and the critic's λ per sequence, in place of the three numbers."""
    gamma: float
    gae_lambda: float
    returns_lambda: float | None
    kl_coef: float
    mask_mode: str
    norm_adv: bool
    max_seqlen: int | None


@torch.library.custom_op(
    "fastppo::gae",
    mutates_args=(),
    schema="(Tensor values, Tensor cu_seqlens, Tensor? rewards, Tensor? mask, Tensor? bootstrap, "
    "Tensor? kl, Tensor? scores, Tensor? discounts, float gamma, float gae_lambda, "
    "float? returns_lambda, float kl_coef, str mask_mode, bool norm_adv, SymInt? max_seqlen) "
    "-> (Tensor, Tensor)",
)
def _gae(*arguments: Any) -> tuple[Tensor, Tensor]:
    """In C++; tensors of a device without a kernel of its own come to the CPU and go back."""
    given = _Arguments(*arguments)
    host = given.values.to("cpu").contiguous()

    def array(x: Tensor | None, dtype: torch.dtype) -> object:
        return None if x is None else x.to("cpu", dtype).contiguous().numpy()

    factors: tuple[object, ...] = (given.gamma, given.gae_lambda, given.returns_lambda)
    if given.discounts is not None:
        factors = (*given.discounts.cpu().numpy(), None)[:3]
    advantages, returns = torch.empty_like(host), torch.empty_like(host)
    _C.gae(
        advantages.numpy(),
        returns.numpy(),
        host.numpy(),
        array(given.cu_seqlens, given.cu_seqlens.dtype),
        gamma=factors[0],
        gae_lambda=factors[1],
        returns_lambda=factors[2],
        rewards=array(given.rewards, host.dtype),
        mask=array(given.mask, torch.bool),
        mask_mode=given.mask_mode,
        bootstrap=array(given.bootstrap, host.dtype),
        kl=array(given.kl, host.dtype),
        kl_coef=given.kl_coef,
        scores=array(given.scores, host.dtype),
        whiten_eps=EPS if given.norm_adv else None,
    )
    return advantages.to(given.values.device), returns.to(given.values.device)


@_gae.register_kernel("cuda")
def gae_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    """One or two launches, no host sync; one more to whiten, a few to find where scores go among
    masked tokens that are not carried through, and one to round discounts per sequence."""
    from fastppo_kernels.gae import gae_fwd
    from fastppo_kernels.whiten import whiten_from

    x = _Arguments(*arguments)
    values, mask, rewards, scores = x.values, x.mask, x.rewards, x.scores
    if scores is not None and mask is not None and x.mask_mode != "carry":
        count = mask.long().cumsum(0)
        sequence = segment_ids(x.cu_seqlens, mask.shape[0])
        of_sequence = torch.cat([count.new_zeros(1), count])[x.cu_seqlens[1:].long()][sequence]
        placed = torch.where(mask & (count == of_sequence), scores.to(values.dtype)[sequence], 0.0)
        rewards = placed if rewards is None else rewards.to(values.dtype) + placed
        scores = None
    advantages, returns, moments = gae_fwd(
        values,
        x.cu_seqlens,
        gamma=x.gamma,
        gae_lambda=x.gae_lambda,
        returns_lambda=x.returns_lambda,
        rewards=rewards,
        mask=mask,
        mask_mode=x.mask_mode,
        bootstrap=x.bootstrap,
        kl=x.kl,
        kl_coef=x.kl_coef,
        scores=scores,
        discounts=x.discounts,
        max_seqlen=x.max_seqlen,
        with_moments=x.norm_adv,
    )
    if moments is not None:
        valid = None if mask is None else mask.contiguous()
        whiten_from(moments, advantages, valid, out=advantages, eps=EPS)
    return advantages, returns


@_gae.register_fake
def _(values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(values)


def gae(
    rewards: Tensor | None,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    mask: Tensor | None = None,
    mask_mode: MaskMode = "carry",
    bootstrap: Tensor | None = None,
    returns_lambda: float | Tensor | None = None,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    scores: Tensor | None = None,
    norm_adv: bool = False,
    max_seqlen: int | None = None,
) -> GAE:
    """Advantages and returns of packed sequences.

    Args:
        rewards: (N,) floating, reward of each token; None: only kl and scores reward.
        values: (N,) floating, value of the state before each token.
        cu_seqlens: (B+1,) int offsets of the sequences; empty sequences are fine.
        gamma, gae_lambda: discount γ and λ in [0, 1], each a number or (B,), one per sequence.
        mask: (N,) bool, False for tokens the policy did not choose; None: all count. Values,
            rewards and kl there may be NaN, except values and rewards in mask_mode "none".
        mask_mode: "carry", "dense-zero" or "none", see the module.
        bootstrap: (B,) value of the state after the last token, for truncated sequences; 0 for
            finished ones; None: all 0.
        returns_lambda: λ of the critic's returns when it differs (arXiv 2503.01491); None:
            gae_lambda.
        kl: (N,) floating, nats, from `kl_penalty`; kl_coef·kl is taken off the rewards.
        scores: (B,) floating, reward of a whole sequence, added at its last valid token.
        norm_adv: whiten the advantages as `whiten(advantages, mask)` does; the returns are those of
            the advantages before.
        max_seqlen: a length that no sequence exceeds, in tokens, where the host knows one; None:
            N. Where it is small, one launch fewer on CUDA; a wrong one costs time, not the result.

    Returns:
        GAE(advantages, returns), (N,) float32 without gradient; both 0 at masked tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; on CPU, malformed cu_seqlens.
    """
    check_tensor("values", values, ("N",))
    check_rows("rewards", rewards, values)
    check_rows("kl", kl, values)
    check_cu_seqlens(cu_seqlens, values.shape[0], values.device)
    num_sequences = cu_seqlens.shape[0] - 1
    check_discount("gamma", gamma, num_sequences, values.device)
    check_discount("gae_lambda", gae_lambda, num_sequences, values.device)
    if returns_lambda is not None:
        check_discount("returns_lambda", returns_lambda, num_sequences, values.device)
    if mask is not None:
        check_tensor("mask", mask, (values.shape[0],), (torch.bool,), values.device)
    check_choice("mask_mode", mask_mode, MASK_MODES)
    for name, x in (("bootstrap", bootstrap), ("scores", scores)):
        if x is not None:
            check_tensor(name, x, (num_sequences,), device=values.device)
    check_max_seqlen(max_seqlen, cu_seqlens)
    numbers, discounts = _split_discounts(gamma, gae_lambda, returns_lambda, num_sequences)
    inputs = [None if x is None else x.detach() for x in (rewards, mask, bootstrap, kl, scores)]
    v = values.detach().to(compute_dtype(values))
    choices = float(kl_coef), mask_mode, norm_adv, max_seqlen
    return GAE(*_gae(v, cu_seqlens, *inputs, discounts, *numbers, *choices))


def _split_discounts(
    gamma: float | Tensor,
    gae_lambda: float | Tensor,
    returns_lambda: float | Tensor | None,
    num_sequences: int,
) -> tuple[tuple[float, float, float | None], Tensor | None]:
    """γ, λ and the critic's λ as numbers, or, where one of them is a tensor, stacked."""
    if not (
        isinstance(gamma, Tensor)
        or isinstance(gae_lambda, Tensor)
        or isinstance(returns_lambda, Tensor)
    ):
        critic = None if returns_lambda is None else float(returns_lambda)
        return (float(gamma), float(gae_lambda), critic), None
    factors = [x for x in (gamma, gae_lambda, returns_lambda) if x is not None]
    device = next(x.device for x in factors if isinstance(x, Tensor))
    rows = [
        x.detach().to(torch.float64)
        if isinstance(x, Tensor)
        else torch.full((num_sequences,), x, dtype=torch.float64, device=device)
        for x in factors
    ]
    return (0.0, 0.0, None), torch.stack(rows)
