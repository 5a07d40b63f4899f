"""V-trace targets and advantages on packed sequences (IMPALA, arXiv 1802.01561, section 4.1).

Shapes: N response tokens of B sequences back to back, cu_seqlens (B+1,). For samples of another
policy μ, with ratio = exp(clamp(logprob − behaviour, ±20)), ρ = min(ratio, rho_cap) and
c = λ·min(ratio, c_cap), backwards in each sequence from vs' = V' = bootstrap,

    vs_t = V_t + ρ_t·(r_t + γ·V' − V_t) + γ·c_t·(vs' − V'),    vs' ← vs_t, V' ← V_t
    advantages_t = ρ_t·(r_t + γ·vs' − V_t),    returns = vs

Masked tokens pass vs' and V' through unchanged, as in `gae` with mask_mode "carry". On-policy, with
caps ≥ 1, returns are those of `gae`; the advantages look one step ahead of vs', which for λ = 1 is
what `gae` gives.

On CPU the recurrence runs in C++ in double precision; on CUDA as the scan of `gae`, in as many
launches (fastppo_kernels.vtrace).
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo import _C
from fastppo.ops._checks import (
    check_cu_seqlens,
    check_max_seqlen,
    check_rows,
    check_tensor,
    check_unit_interval,
)
from fastppo.ops._precision import compute_dtype
from fastppo.ops.kl_penalty import LOG_RATIO_LIMIT


class VTrace(NamedTuple):
    """Per-token results, each (N,) float32, constants."""

    advantages: Tensor
    returns: Tensor


def vtrace_reference(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    gae_lambda: float = 1.0,
    rho_cap: float = 1.0,
    c_cap: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
) -> VTrace:
    """The sums of the paper's equation 1, one token at a time: quadratic in the length."""
    advantages, returns = torch.zeros(2, values.shape[0], dtype=torch.float64)
    offsets = cu_seqlens.tolist()
    for i, (start, stop) in enumerate(pairwise(offsets)):
        tokens = [t for t in range(start, stop) if mask is None or bool(mask[t])]
        end = 0.0 if bootstrap is None else float(bootstrap[i])
        v = [*(float(values[t]) for t in tokens), end]
        log_ratio = [float(logprobs[t]) - float(behaviour_logprobs[t]) for t in tokens]
        clamped = torch.tensor(log_ratio, dtype=torch.float64).clamp(
            -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT
        )
        ratio = clamped.exp().tolist()
        rho = [min(x, rho_cap) for x in ratio]
        c = [gae_lambda * min(x, c_cap) for x in ratio]
        r = [float(rewards[t]) for t in tokens]
        vs = [*v[:-1], end]
        for k in range(len(tokens)):
            trace = 1.0
            for j in range(k, len(tokens)):
                vs[k] += trace * rho[j] * (r[j] + gamma * v[j + 1] - v[j])
                trace *= gamma * c[j]
        for k, t in enumerate(tokens):
            advantages[t] = rho[k] * (r[k] + gamma * vs[k + 1] - v[k])
            returns[t] = vs[k]
    dtype = compute_dtype(values)
    return VTrace(advantages.to(dtype), returns.to(dtype))


@torch.library.custom_op(
    "fastppo::vtrace",
    mutates_args=(),
    schema="(Tensor rewards, Tensor values, Tensor logprobs, Tensor behaviour_logprobs, "
    "Tensor cu_seqlens, Tensor? mask, Tensor? bootstrap, float gamma, float gae_lambda, "
    "float rho_cap, float c_cap, SymInt? max_seqlen) -> (Tensor, Tensor)",
)
def _vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    gae_lambda: float,
    rho_cap: float,
    c_cap: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """In C++; tensors of a device without a kernel of its own come to the CPU and go back."""
    host = values.to("cpu").contiguous()
    log_ratio = logprobs.to("cpu", host.dtype) - behaviour_logprobs.to("cpu", host.dtype)
    ratios = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()

    def array(x: Tensor | None, dtype: torch.dtype) -> object:
        return None if x is None else x.to("cpu", dtype).contiguous().numpy()

    advantages, returns = torch.empty_like(host), torch.empty_like(host)
    _C.vtrace(
        advantages.numpy(),
        returns.numpy(),
        array(rewards, host.dtype),
        host.numpy(),
        array(ratios, host.dtype),
        array(cu_seqlens, cu_seqlens.dtype),
        gamma=gamma,
        gae_lambda=gae_lambda,
        rho_cap=rho_cap,
        c_cap=c_cap,
        mask=array(mask, torch.bool),
        bootstrap=array(bootstrap, host.dtype),
    )
    return advantages.to(values.device), returns.to(values.device)


@_vtrace.register_kernel("cuda")
def vtrace_triton(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    cu_seqlens: Tensor,
    mask: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float,
    gae_lambda: float,
    rho_cap: float,
    c_cap: float,
    max_seqlen: int | None,
) -> tuple[Tensor, Tensor]:
    """One or two launches, no host sync."""
    from fastppo_kernels.vtrace import vtrace_fwd

    return vtrace_fwd(
        rewards,
        values,
        logprobs,
        behaviour_logprobs,
        cu_seqlens,
        gamma=gamma,
        gae_lambda=gae_lambda,
        rho_cap=rho_cap,
        c_cap=c_cap,
        limit=LOG_RATIO_LIMIT,
        mask=mask,
        bootstrap=bootstrap,
        max_seqlen=max_seqlen,
    )


@_vtrace.register_fake
def _(rewards: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(values), torch.empty_like(values)


def vtrace(
    rewards: Tensor,
    values: Tensor,
    logprobs: Tensor,
    behaviour_logprobs: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    gae_lambda: float = 1.0,
    rho_cap: float = 1.0,
    c_cap: float = 1.0,
    mask: Tensor | None = None,
    bootstrap: Tensor | None = None,
    max_seqlen: int | None = None,
) -> VTrace:
    """Off-policy corrected advantages and value targets.

    Args:
        rewards, values: (N,) floating: reward of each token, value of the state before it.
        logprobs, behaviour_logprobs: (N,) floating, nats, under the policy being trained and under
            the one that sampled.
        cu_seqlens: (B+1,) int offsets of the sequences; empty sequences are fine.
        gamma, gae_lambda: discount γ and λ, in [0, 1].
        rho_cap, c_cap: ρ̄ and c̄ of the paper, > 0; infinity: no cap.
        mask: (N,) bool, False for tokens to pass over, which may hold NaN; None: all count.
        bootstrap: (B,) value of the state after the last token; None: all 0.
        max_seqlen: a length that no sequence exceeds, in tokens, as in `gae`; None: N.

    Returns:
        VTrace(advantages, returns), (N,) float32 without gradient; both 0 at masked tokens.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or range; on CPU, malformed cu_seqlens.
    """
    check_tensor("values", values, ("N",))
    given = {"rewards": rewards, "logprobs": logprobs, "behaviour_logprobs": behaviour_logprobs}
    for name, x in given.items():
        check_rows(name, x, values)
    check_cu_seqlens(cu_seqlens, values.shape[0], values.device)
    check_unit_interval("gamma", gamma)
    check_unit_interval("gae_lambda", gae_lambda)
    for name, cap in (("rho_cap", rho_cap), ("c_cap", c_cap)):
        if not cap > 0:
            raise ValueError(f"{name}: expected a number > 0, got {cap}")
    if mask is not None:
        check_tensor("mask", mask, (values.shape[0],), (torch.bool,), values.device)
    if bootstrap is not None:
        num_sequences = cu_seqlens.shape[0] - 1
        check_tensor("bootstrap", bootstrap, (num_sequences,), device=values.device)
        bootstrap = bootstrap.detach()
    check_max_seqlen(max_seqlen, cu_seqlens)
    v = values.detach().to(compute_dtype(values))
    rows = rewards.detach(), v, logprobs.detach(), behaviour_logprobs.detach()
    numbers = float(gamma), float(gae_lambda), float(rho_cap), float(c_cap)
    return VTrace(*_vtrace(*rows, cu_seqlens, mask, bootstrap, *numbers, max_seqlen))
