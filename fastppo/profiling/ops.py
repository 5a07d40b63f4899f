"""The ops that `fastppo profile op` knows, and the bytes and operations of a call of each.

Letters as in op_inputs.py; b is the bytes of a logit, a hidden state or a head's weight. Bytes
count each tensor that a call must read or write once; what stays inside the op does not count.
Operations: 2 per multiply-add of a matrix product, 1 per elementary operation on an element.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from fastppo.profiling import op_inputs
from fastppo.profiling.meta import Cost
from fastppo.profiling.op_inputs import Call, Inputs, Size

SIZES = {
    "smoke": Size(N=64, B=4, H=32, V=101),
    "cpu": Size(N=2048, B=32, H=256, V=8192),
    "gpu": Size(N=8192, B=64, H=4096, V=131_072),
}


_CostOf = Callable[[Size, int], tuple[Cost, Cost | None]]


@dataclass(frozen=True)
class Op:
    """One op: which numbers of `Size` it depends on, its inputs, and what a call costs."""

    letters: str
    make: Callable[[Inputs], Call]
    cost: _CostOf
    """(size, b) → forward and backward; None: no backward pass, or one that does nothing."""

    def costs(self, size: Size, dtype: torch.dtype) -> tuple[Cost, Cost | None]:
        """Cost of forward and backward."""
        half = "H" in self.letters and dtype != torch.float32
        forward, backward = self.cost(size, dtype.itemsize)
        return replace(forward, half=half), backward and replace(backward, half=half)


def _per_token(moved: int, flops: int, backward: tuple[int, int] | None = None) -> _CostOf:
    """Costs of an op over N tokens: bytes and operations of each."""

    def cost(size: Size, _: int) -> tuple[Cost, Cost | None]:
        forward = Cost(moved * size.N, flops * size.N)
        return forward, backward and Cost(backward[0] * size.N, backward[1] * size.N)

    return cost


def _packed(moved: int, flops: int) -> _CostOf:
    """The same with the offsets of B sequences, which are read."""

    def cost(size: Size, _: int) -> tuple[Cost, Cost | None]:
        return Cost(moved * size.N + 4 * (size.B + 1), flops * size.N), None

    return cost


def _token_logprobs_cost(size: Size, b: int) -> tuple[Cost, Cost | None]:
    logits = size.N * size.V
    # forward: logits and targets read, logprob and entropy written; 4 statistics are kept.
    # A logit is compared with the maximum, subtracted from, exponentiated and added twice: 8.
    # backward: logits, targets, statistics and two gradients read, a gradient of logits written.
    forward = Cost(b * logits + (8 + 4 * 4) * size.N, 8 * logits)
    return forward, Cost(2 * b * logits + (8 + 4 * 4 + 2 * 4) * size.N, 15 * logits)


def _linear_logprobs_cost(size: Size, b: int) -> tuple[Cost, Cost | None]:
    product = 2 * size.N * size.H * size.V
    operands = b * size.H * (size.N + size.V)
    # forward: one matrix product over hidden and weight, which are read; logits are never kept.
    # backward: logits once more, then the gradients of hidden and weight: 3 products; operands and
    # their gradients.
    forward = Cost(operands + (8 + 4 * 4) * size.N, product)
    return forward, Cost(2 * operands + (8 + 4 * 4 + 2 * 4) * size.N, 3 * product)


def _linear_ppo_loss_cost(size: Size, b: int) -> tuple[Cost, Cost | None]:
    # forward: 3 products, all gradients included; reads operands, targets and three numbers a token
    # (old logprob, advantage, weight), writes the gradients of the operands. backward: hands out.
    moved = 2 * b * size.H * (size.N + size.V) + (8 + 3 * 4) * size.N
    return Cost(moved, 6 * size.N * size.H * size.V), None


def _group_advantages_cost(size: Size, _: int) -> tuple[Cost, Cost | None]:
    # scores and group ids read, advantages written; difference, square, sum, division: 6 a score
    return Cost((4 + 8 + 4) * size.B, 6 * size.B), None


OPS: Mapping[str, Op] = {
    # rewards, values, mask read (9), advantages, returns written (8); γV', γλA and 4 sums
    "gae": Op("NB", op_inputs.gae, _packed(17, 6)),
    # the same with `terminated` for the mask and the values after the end for the offsets
    "gae_classic": Op("NB", op_inputs.gae_classic, _packed(17, 6)),
    # x, mask read (5), the result written (4); two sums, difference, square, product
    "whiten": Op("N", op_inputs.whiten, _per_token(9, 6)),
    # two log-probabilities read, one number written; difference, exp, two sums
    "kl_penalty": Op("N", op_inputs.kl_penalty, _per_token(12, 4)),
    "group_advantages": Op("B", op_inputs.group_advantages, _group_advantages_cost),
    # mask read, weight written; a division
    "loss_weights": Op("NB", op_inputs.loss_weights, _packed(5, 1)),
    # 6 numbers read (logprob, entropy, old, advantage, weight, ref), two gradients written (32);
    # ratio, clips, KL, sums: about 20. backward: both gradients read, multiplied, written
    "ppo_loss": Op("N", op_inputs.ppo_loss, _per_token(32, 20, backward=(16, 2))),
    # 4 numbers read, the gradient written (20); two squares, clip, sums: about 10
    "value_loss": Op("N", op_inputs.value_loss, _per_token(20, 10, backward=(8, 1))),
    "token_logprobs": Op("NV", op_inputs.token_logprobs, _token_logprobs_cost),
    "linear_logprobs": Op("NHV", op_inputs.linear_logprobs, _linear_logprobs_cost),
    "linear_ppo_loss": Op("NHV", op_inputs.linear_ppo_loss, _linear_ppo_loss_cost),
}


def find_op(name: str) -> Op:
    """An op by name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in OPS:
        raise ValueError(f"name: expected one of {', '.join(OPS)}, got {name!r}")
    return OPS[name]


def parse_size(text: str, name: str, default: str) -> Size:
    """The size of an op's inputs.

    Args:
        text: a name of `SIZES`, or numbers such as "N=8192,V=32000"; what they leave out is that of
            `default`. Empty: `default`.
        name: of the op.
        default: a name of `SIZES`.

    Raises:
        ValueError: neither, or a number that the op does not depend on, or that is below 1.
    """
    if not text or text in SIZES:
        return SIZES[text or default]
    letters = find_op(name).letters
    numbers: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"([A-Z])=(\d+)", part.strip())
        if found is None or found[1] not in letters or int(found[2]) < 1:
            expected = ",".join(f"{letter}=NUMBER" for letter in letters)
            raise ValueError(
                f"--size: expected one of {', '.join(SIZES)}, or numbers ≥ 1 for {name} "
                f"({expected}), got {text!r}"
            )
        numbers[found[1]] = int(found[2])
    size = replace(SIZES[default], **numbers)
    if "B" in letters and "N" in letters and size.B > size.N:
        raise ValueError(
            f"--size: expected N ≥ B, so that no sequence is empty, got {size.text(letters)}"
        )
    return size
