"""Rewards: what a completion is worth, from functions and reward models.

A reward function is called as TRL calls it, by keyword, once for the whole batch:

    f(prompts, completions, completion_ids, **dataset_columns) -> list[float | None]

It receives only what its signature names, or everything when it takes **kwargs. It may be async.
None says "I cannot score this sample": the
function is left out of that sample's weighted sum, and a sample that no function scored is NaN,
which the trainer keeps out of the loss. With chat prompts, `prompts` are lists of messages and
`completions` are [{"role": "assistant", "content": text}]; with plain prompts both are strings. The
lists are copies, the messages in them are shared: do not change them.

Functions run in worker processes with limits of time and memory (`RewardLimits`). A sample that a
function cannot score, for an exception, a hang, a crash, a wrong length or type or a score that is
not finite, is a `RewardFailure`: its reward is NaN. More of them than `max_failure_rate` raise
RewardError. What a function says about itself with `declare` decides how often it may be called.

    config                                     the options of a run
    batch                                      several functions together: `Rewards`
    calls → {inline, pool → worker → child}    here, or in a forked process
    keeper, reply                              what ends with a worker; what it answers
    isolation                                  which rows to call a function on next
    functions                                  a function and what its signature asks for
    outcome, failures, limits                  what a call came to; what is accepted
    loading, model, http                       kinds of reward functions
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastppo.rewards.batch import RewardBatch, Rewards
    from fastppo.rewards.failures import RewardError, RewardFailure, RewardUnavailableError
    from fastppo.rewards.http import HTTPReward
    from fastppo.rewards.limits import RewardLimits, declare
    from fastppo.rewards.loading import load_reward_func, resolve_reward
    from fastppo.rewards.model import RewardModel

_HOMES = {
    "batch": ("RewardBatch", "Rewards"),
    "failures": ("RewardError", "RewardFailure", "RewardUnavailableError"),
    "http": ("HTTPReward",),
    "limits": ("RewardLimits", "declare"),
    "loading": ("load_reward_func", "resolve_reward"),
    "model": ("RewardModel",),
}

__all__ = [
    "HTTPReward",
    "RewardBatch",
    "RewardError",
    "RewardFailure",
    "RewardLimits",
    "RewardModel",
    "RewardUnavailableError",
    "Rewards",
    "declare",
    "load_reward_func",
    "resolve_reward",
]


def __getattr__(name: str) -> Any:  # on first use: a configuration is checked without torch
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"fastppo.rewards.{home}"), name)
    raise AttributeError(f"module 'fastppo.rewards' has no attribute {name!r}")
