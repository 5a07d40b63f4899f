"""The C++ extension: ragged sequences into one arena, token-budget bins, balanced partitions, and
ops on the CPU.

Integers may come as Python lists, tuples, anything with the buffer protocol, or anything with
`__array__` (a torch CPU tensor). Errors are ValueError or TypeError: `name: expected ..., got ...`.
"""

from typing import Any

ALIGNMENT: int
"""Bytes; the address of an arena and the offset of every field in it are multiples of it."""

class Arena:
    """Bytes aligned to `ALIGNMENT`; `numpy.frombuffer` and `torch.frombuffer` view them."""

    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class PackPlan:
    """The checked sizes and the field table of one packed batch; keeps its sources alive.

    Without `prompt_lengths`, `prompts` is a sequence of 1-D integer sequences; with it, one flat
    1-D sequence that the lengths cut. The same holds for `responses`, `rollout_logprobs` (floats)
    and `loss_mask` (bools) with `response_lengths`. `truncated` is one bool per sequence.

    Raises:
        TypeError: a sequence has the wrong element type or is not a sequence.
        ValueError: an empty prompt, a negative length, counts or sizes that do not match, or more
            than 2^31 - 1 tokens in all.
    """

    def __init__(
        self,
        prompts: Any,
        responses: Any,
        *,
        prompt_lengths: Any = None,
        response_lengths: Any = None,
        rollout_logprobs: Any = None,
        loss_mask: Any = None,
        truncated: Any = None,
    ) -> None: ...
    @property
    def num_sequences(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_responses(self) -> int: ...
    @property
    def max_seqlen(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def fields(self) -> dict[str, tuple[int, str, int]]:
        """Name → (offset in bytes, dtype, number of elements), in the order of the offsets."""

    def fill(self, out: Any) -> None:
        """Write the arena into the buffer `out`: writable, ≥ nbytes bytes, aligned to `ALIGNMENT`.

        Raises:
            ValueError: `out` is too small or not aligned, or a token id is outside 0..2^31 - 1.
        """

    def arena(self) -> Arena:
        """A new arena, filled. Raises as `fill` does."""

def bins(lengths: Any, token_budget: int) -> list[list[int]]:
    """Best-fit-decreasing bins: every index once, the sum of lengths in each ≤ token_budget."""

def partition(lengths: Any, k: int) -> list[list[int]]:
    """Karmarkar–Karp: every index once, k parts of nearly equal total length."""

def gae(
    advantages: Any,
    returns: Any,
    values: Any,
    cu_seqlens: Any,
    *,
    gamma: Any,
    gae_lambda: Any,
    returns_lambda: Any = None,
    rewards: Any = None,
    mask: Any = None,
    mask_mode: str = "carry",
    bootstrap: Any = None,
    kl: Any = None,
    kl_coef: float = 0.0,
    scores: Any = None,
    whiten_eps: float | None = None,
) -> None:
    """What `fastppo.ops.gae` says, from contiguous arrays of one element type, that of `values`
    (float32 or float64), into `advantages` and `returns`. γ and λ: numbers or (B,) float64.

    Raises:
        TypeError, ValueError: an array of the wrong type, size or layout, or malformed cu_seqlens.
    """

def gae_classic(
    advantages: Any,
    returns: Any,
    rewards: Any,
    values: Any,
    next_value: Any,
    terminated: Any,
    truncated: Any,
    final_values: Any,
    *,
    gamma: float,
    gae_lambda: float,
) -> None:
    """What `fastppo.ops.gae_classic` says, with the arrays and errors of `gae`, all of them flat:
    steps·envs elements, and envs of them in `next_value`."""

def ppo_loss(
    entries: Any,
    logprob_grad: Any,
    entropy_grad: Any,
    logprobs: Any,
    entropy: Any,
    old_logprobs: Any,
    advantages: Any,
    weights: Any,
    ref_logprobs: Any,
    rollout_logprobs: Any,
    *,
    low: float,
    high: float,
    dual_clip: float,
    kl_coef: float,
    kl: int,
    ent_coef: float,
    correction: int,
    is_cap: float,
    is_low: float,
    is_high: float,
) -> None:
    """What `fastppo.ops.ppo_loss` says, for token-level ratios, from contiguous (N,) arrays of one
    element type, that of `logprobs` (float32 or float64): the loss and PPO_METRIC_NAMES into
    `entries` (20,) float64, and the gradients. May be None: entropy_grad, entropy, ref_logprobs,
    rollout_logprobs. dual_clip: infinity for none. kl: 1, 2 or 3. correction: 0 none, 1 TIS, 2
    IcePop.

    Raises:
        TypeError, ValueError: an array of the wrong type, size or layout.
    """
