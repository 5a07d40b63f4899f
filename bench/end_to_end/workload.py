"""The work that both sides of the comparison do, and what counts it. Needs neither TRL nor fastppo.

A `Workload` is a folder: `policy/`, `reward/`, `tokenizer/`, and workload.json with prompts,
response lengths and hyperparameters. Both sides read all of it from there. Where lengths are
forced, the sampler's scores pass through `force_end`, so that a response ends where the
workload says and both sides have as many prompt and response tokens in every iteration.

B sequences, L columns of the padded rectangle, V vocabulary.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What PPO does in each iteration. Defaults are TRL's, except where one is named."""

    prompts: list[str]
    prompt_lengths: list[int]
    """Tokens of each prompt."""
    response_lengths: list[int]
    """Tokens of the response in each row, the end token included; the longest have none."""
    eos_token_id: int
    trunk_parameters: int
    """Of one model without embeddings and head: 2 operations each for a token."""
    head_parameters: int
    """Vocabulary times hidden size."""
    pad_token_id: int
    """Not the end token, or TRL would mask ends of turns inside a prompt."""
    epochs: int = 4
    minibatches: int = 1
    learning_rate: float = 3e-6
    temperature: float = 1.0
    """TRL: 0.7."""
    kl_coef: float = 0.05
    clip: float = 0.2
    clip_value: float = 0.2
    vf_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    adam_eps: float = 1e-5
    """transformers: 1e-8."""
    precision: str = "fp32"
    device: str = "cpu"
    seed: int = 1
    stop: Literal["forced", "eos", "never"] = "forced"
    """What ends a response before the longest of `response_lengths`."""
    batch: int = 0
    """Prompts of an iteration, one response each; 0: all of them."""
    train_layers: int | None = None
    """Train the last so many layers and the final norm of policy and critic; None: everything."""
    missing_eos_penalty: float = 0.0
    """Subtracted from the score of a response without an end token. TRL: none."""
    answers: list[int] | None = None
    """The number that is the right answer to each prompt, and 1 its reward; the critic then starts
    at 0. None: the reward model scores, and the critic starts from it."""

    @property
    def max_response_length(self) -> int:
        """Steps of the sampler."""
        return max(self.response_lengths)

    @property
    def episodes(self) -> int:
        """Responses of an iteration."""
        return self.batch or len(self.prompts)

    @property
    def real_tokens(self) -> int:
        """Prompt and response tokens of one iteration."""
        return sum(self.prompt_lengths) + sum(self.response_lengths)

    def flops(self, shared_trunk: bool) -> dict[str, float]:
        """Least operations of each phase, 2 for a multiply-add; attention's products not counted.

        Every real token once through a trunk, every response token once through a head. The
        sampler's log-probabilities are the old ones.
        """
        trunk = 2.0 * self.trunk_parameters * self.real_tokens
        head = 2.0 * self.head_parameters * sum(self.response_lengths)
        critic = 0.0 if shared_trunk else trunk
        return {
            "rollout": trunk + head,
            "evaluation": trunk + head + critic + trunk,  # reference, critic, reward model
            "update": 3 * self.epochs * (trunk + head + critic),
        }

    def save(self, folder: Path) -> None:
        """Write workload.json."""
        (folder / "workload.json").write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> Workload:
        """Read workload.json."""
        return cls(**json.loads((folder / "workload.json").read_text()))


def force_end(work: Workload, scores: Tensor, rows: Tensor, step: int) -> Tensor:
    """Let a row end at its length and nowhere else; padding is never sampled.

    Args:
        scores: (S, V) of the next token.
        rows: (S,) int64, which of the workload's rows these are.
        step: tokens that they have sampled so far.

    Returns:
        Scores with the end token forced or ruled out.
    """
    lengths = torch.tensor(work.response_lengths, device=scores.device)[rows]
    ends = (lengths <= step + 1) & (lengths < work.max_response_length)
    scores = scores.masked_fill(ends[:, None], -torch.inf)
    scores[:, work.pad_token_id] = -torch.inf
    scores[:, work.eos_token_id] = torch.where(ends, 0.0, -torch.inf)
    return scores


class Counter:
    """Tokens that pass through each model, forward only or with a backward pass to follow."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = defaultdict(int)

    def watch(self, name: str, trunk: Any, head: Any = None) -> None:
        """Count the tokens of a trunk, and the rows of its output head."""
        trunk.register_forward_pre_hook(self._hook(name), with_kwargs=True)
        if head is not None:
            head.register_forward_pre_hook(self._hook(f"{name} head"), with_kwargs=True)

    def add(self, name: str, tokens: int) -> None:
        """Count `tokens`, under the gradient mode in force."""
        self.tokens[f"{name}, trained" if torch.is_grad_enabled() else name] += tokens

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        found, self.tokens = dict(self.tokens), defaultdict(int)
        return found

    def _hook(self, name: str) -> Callable[..., None]:
        def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
            first = next(x for x in given if x is not None)
            self.add(
                name, first.numel() if not first.is_floating_point() else first[..., 0].numel()
            )

        return count


class Worker:
    """The worker's end of the line: it says what it did, and waits to be told to go on.

    Messages are lines of JSON on standard output; what anything else prints goes to standard error.
    """

    def __init__(self) -> None:
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **message: Any) -> None:
        """Send one message, with the memory that was needed at most so far, in GB."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            message["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        print(json.dumps(message | {"rss_gb": peak / 1e9}), file=self._out, flush=True)

    def wait(self) -> bool:
        """Until told to do an iteration, or (False) to end."""
        return sys.stdin.readline().strip() == "go"


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
