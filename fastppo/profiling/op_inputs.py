"""Inputs of the ops that `fastppo profile op` knows.

Letters: N response tokens in B sequences, H hidden size, V vocabulary. Everything per token is
float32, ids are int64, offsets int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo import ops


@dataclass(frozen=True)
class Size:
    """How much an op gets to do."""

    N: int
    B: int
    H: int
    V: int

    def text(self, letters: str) -> str:
        """Some of the numbers, as `parse_size` reads them."""
        return ",".join(f"{letter}={getattr(self, letter)}" for letter in letters)


class Call(NamedTuple):
    """One op, ready to run."""

    forward: Callable[[], Sequence[Tensor]]
    """Returns what is differentiated."""
    leaves: Sequence[Tensor] = ()
    """What gets a gradient; none: there is no backward pass."""

    def backward(self, outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the leaves; those of the outputs are 1."""
        return torch.autograd.grad(outputs, self.leaves, [torch.ones_like(x) for x in outputs])


class Inputs:
    """Makes the inputs of an op.

    Args:
        size: of them.
        device: where they go.
        dtype: of matrices.
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self._rng = torch.Generator(device).manual_seed(0)

    def per_token(self, count: int = 1) -> list[Tensor]:
        """(N,) float32 each."""
        shape = (count, self.size.N)
        return list(torch.randn(shape, generator=self._rng, device=self.device))

    def matrix(self, rows: int, columns: int) -> Tensor:
        """In `dtype`, with rows of length about 1, as a leaf."""
        x = torch.randn(rows, columns, generator=self._rng, device=self.device)
        return (x / math.sqrt(columns)).to(self.dtype).requires_grad_()

    def mask(self) -> Tensor:
        """(N,) bool, all true: what rows are left out is another question than what one costs."""
        return torch.ones(self.size.N, dtype=torch.bool, device=self.device)

    def weights(self) -> Tensor:
        """(N,) float32, the mean over all tokens."""
        return torch.full((self.size.N,), 1.0 / self.size.N, device=self.device)

    def targets(self) -> Tensor:
        """(N,) int64 token ids."""
        n, v = self.size.N, self.size.V
        return torch.randint(v, (n,), generator=self._rng, device=self.device)

    def cu_seqlens(self) -> Tensor:
        """(B+1,) int32, sequences of nearly equal length."""
        ends = torch.arange(self.size.B + 1, dtype=torch.int64) * self.size.N // self.size.B
        return ends.to(device=self.device, dtype=torch.int32)


def gae(x: Inputs) -> Call:
    (rewards, values), cu, mask = x.per_token(2), x.cu_seqlens(), x.mask()
    return Call(lambda: ops.gae(rewards, values, cu, gamma=0.99, gae_lambda=0.95, mask=mask))


def gae_classic(x: Inputs) -> Call:
    steps, environments = x.size.N // x.size.B, x.size.B
    shape = (steps, environments)
    rewards, values = (t[: steps * environments].view(shape) for t in x.per_token(2))
    ends = torch.zeros(shape, dtype=torch.bool, device=x.device)
    after = values[0].clone()
    inputs = (rewards, values, after, ends)
    return Call(lambda: ops.gae_classic(*inputs, gamma=0.99, gae_lambda=0.95))


def whiten(x: Inputs) -> Call:
    (advantages,), mask = x.per_token(), x.mask()
    return Call(lambda: (ops.whiten(advantages, mask),))


def kl_penalty(x: Inputs) -> Call:
    logprobs, ref = x.per_token(2)
    return Call(lambda: (ops.kl_penalty(logprobs, ref, estimator="k3"),))


def group_advantages(x: Inputs) -> Call:
    scores = torch.linspace(0, 1, x.size.B, device=x.device)
    groups = torch.arange(x.size.B, device=x.device) // 4
    return Call(lambda: (ops.group_advantages(scores, groups, kind="grpo"),))


def loss_weights(x: Inputs) -> Call:
    cu, mask, total = x.cu_seqlens(), x.mask(), x.size.N
    return Call(lambda: (ops.loss_weights(cu, mask, aggregation="token-mean", total=total),))


def ppo_loss(x: Inputs) -> Call:
    logprobs, entropy, old, advantages, ref = x.per_token(5)
    leaves = (logprobs.requires_grad_(), entropy.requires_grad_())
    config = ops.PPOLossConfig(kl_coef=0.05, ent_coef=0.01)
    inputs = (logprobs, old, advantages, x.weights(), config)

    def forward() -> tuple[Tensor]:
        return (ops.ppo_loss(*inputs, entropy=entropy, ref_logprobs=ref).loss,)

    return Call(forward, leaves)


def value_loss(x: Inputs) -> Call:
    values, old, returns = x.per_token(3)
    inputs = (values.requires_grad_(), old, returns, x.weights())
    return Call(lambda: (ops.value_loss(*inputs, clip=0.2).loss,), (values,))


def token_logprobs(x: Inputs) -> Call:
    logits, targets = x.matrix(x.size.N, x.size.V), x.targets()
    return Call(lambda: ops.token_logprobs(logits, targets), (logits,))


def linear_logprobs(x: Inputs) -> Call:
    hidden, weight = x.matrix(x.size.N, x.size.H), x.matrix(x.size.V, x.size.H)
    targets = x.targets()
    return Call(lambda: ops.linear_logprobs(hidden, weight, targets), (hidden, weight))


def linear_ppo_loss(x: Inputs) -> Call:
    hidden, weight = x.matrix(x.size.N, x.size.H), x.matrix(x.size.V, x.size.H)
    old, advantages = x.per_token(2)
    inputs = (hidden, weight, x.targets(), old, advantages, x.weights(), ops.PPOLossConfig())
    live = x.size.N
    return Call(lambda: (ops.linear_ppo_loss(*inputs, num_live=live).loss,), (hidden, weight))
