"""Bytes and operations of fastppo's ops: the one place for their formulas. It needs no torch.

Bytes: every input read once, every result written once; what stays inside the op, such as logits
or statistics of rows, does not count. Operations: 2 per multiply-add of a matrix product, 1 per
elementary operation on an element; what an implementation does a second time does not count.

Letters: N tokens (rows of a head) in B sequences, or B sequences of T tokens; E environments, H
hidden size, V vocabulary; itemsize is that of matrices. Everything per token is float32, a mask or
an end is one byte, offsets are int32, ids and targets int64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


def evaluate(formula: str, letters: Mapping[str, float]) -> float:
    """A formula such as "2·(N + V)·H·itemsize" with numbers for its letters."""
    return float(eval(formula.replace("·", "*"), {"__builtins__": {}}, dict(letters)))


class Work(NamedTuple):
    """What one call must do: formulas of the bytes it reads and writes, and of its operations."""

    reads: str
    writes: str
    operations: str

    def bytes(self, letters: Mapping[str, float]) -> float:
        """Read and written."""
        return evaluate(self.reads, letters) + evaluate(self.writes, letters)

    def flops(self, letters: Mapping[str, float]) -> float:
        """Operations."""
        return evaluate(self.operations, letters)


class OpWork(NamedTuple):
    """What an op must do.

    Args:
        forward: in a call.
        backward: for the gradients after it. None: nothing, or next to nothing, because the
            forward pass has made them.
        both: in one call of both. None: as forward.
    """

    forward: Work
    backward: Work | None = None
    both: Work | None = None


def _gae(reads: str) -> OpWork:
    # r, V, mask, offsets; A, R. δ = r + γV' − V: 3; A = δ + γλA: 2; R = A + V: 1
    return OpWork(forward=Work(f"{reads}·B·T + 4·(B + 1)", "8·B·T", "6·B·T"))


WORK: Mapping[str, OpWork] = {
    "gae": _gae("8"),
    "gae_carry": _gae("9"),
    "gae_dense_zero": _gae("9"),
    "gae_classic": OpWork(
        # r, V, end, the values after the last step; A, R. As gae, and two products with 1 − end
        forward=Work("9·T·E + 4·E", "8·T·E", "8·T·E"),
    ),
    "group_advantages": OpWork(
        # score, id; advantage. Two sums, a difference, its square, ε, a quotient
        forward=Work("12·B", "4·B", "6·B"),
    ),
    "whiten": OpWork(
        # x, mask; the result. Two sums, a difference, its square, a product, a choice by the mask
        forward=Work("5·N", "4·N", "6·N"),
    ),
    "kl_penalty": OpWork(
        # two log-probabilities; one number. k3 = exp(d) − d − 1, d a difference
        forward=Work("8·N", "4·N", "4·N"),
    ),
    "loss_weights": OpWork(
        # mask, offsets; weight, a quotient
        forward=Work("N + 4·(B + 1)", "4·N", "N"),
    ),
    "ppo_loss": OpWork(
        # logprob, entropy, old, advantage, weight, ref; two gradients, made in the forward pass.
        # ratio 3, its branches 5, KL 5, sum 4, gradients 8; transcendentals count as one
        forward=Work("24·N", "8·N", "25·N"),
        # both gradients, multiplied with the one that comes in
        backward=Work("8·N", "8·N", "2·N"),
    ),
    "value_loss": OpWork(
        # v, v_old, R, w; the gradient, made in the forward pass.
        # two errors squared 5, clip 3, larger one and sum 4, gradient 3
        forward=Work("16·N", "4·N", "15·N"),
        backward=Work("4·N", "4·N", "N"),
    ),
    "token_logprobs": OpWork(
        # logits, targets; log-probability and entropy of a row. A logit is compared with the
        # maximum, subtracted from, exponentiated, multiplied and added twice
        forward=Work("N·V·itemsize + 8·N", "8·N", "8·N·V"),
        # logits, targets and two gradients of a row; the gradient of the logits
        backward=Work("N·V·itemsize + 16·N", "N·V·itemsize", "15·N·V"),
        # logits are read twice: the gradients come in when all rows have been there once
        both=Work("2·N·V·itemsize + 24·N", "N·V·itemsize + 8·N", "23·N·V"),
    ),
    "linear_logprobs": OpWork(
        # hidden, weight, targets; log-probability and entropy of a row. Logits need not be in
        # memory; one product makes them
        forward=Work("(N + V)·H·itemsize + 8·N", "8·N", "2·N·H·V"),
        # hidden, weight, targets, one gradient of a row; dX and dW, a product each. Who makes
        # the logits again does 2·N·H·V more
        backward=Work("(N + V)·H·itemsize + 12·N", "(N + V)·H·itemsize", "4·N·H·V"),
        both=Work("(N + V)·H·itemsize + 12·N", "(N + V)·H·itemsize + 8·N", "6·N·H·V"),
    ),
    "linear_ppo_loss": OpWork(
        # hidden, weight, targets, and old logprob, advantage, weight of a row; both gradients,
        # made in the forward pass. Logits, dX, dW: who makes the logits again does 8·N·H·V
        forward=Work("(N + V)·H·itemsize + 20·N", "(N + V)·H·itemsize", "6·N·H·V"),
    ),
}
