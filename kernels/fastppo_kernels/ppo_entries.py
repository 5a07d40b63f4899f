"""What the loss kernels make of one token: the one list of the PPO metrics and of their order.

Needs neither torch nor Triton: `fastppo.ops` reads the names here on every machine.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class PPOTerms(NamedTuple):
    """The gradients of one token's loss, then its entries: the loss, the metrics that are summed
    over the tokens, and those that are maximised."""

    logprob_grad: Any
    entropy_grad: Any
    loss: Any
    num_tokens: Any
    policy_loss: Any
    kl_loss: Any
    clipfrac: Any
    clipfrac_low: Any
    clipfrac_high: Any
    clipfrac_dual: Any
    approx_kl: Any
    old_approx_kl: Any
    entropy: Any
    ratio: Any
    ratio_squared: Any
    ref_kl: Any
    logprob_diff: Any
    rollout_kl: Any
    is_weight: Any
    is_clipfrac: Any
    ratio_max: Any
    logprob_diff_max: Any


FIRST_ENTRY = 2
ENTRIES = PPOTerms._fields[FIRST_ENTRY:]
SUMS = tuple(name for name in ENTRIES if not name.endswith("_max"))
