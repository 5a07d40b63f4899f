"""A call of each reward function on one made-up sample, before a run costs anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fastppo.rewards.calls import call_functions
from fastppo.rewards.failures import FailureWindow, Losses, RewardFailure, reward_error
from fastppo.rewards.functions import BoundFunction
from fastppo.rewards.limits import RewardLimits
from fastppo.rewards.pool import CAN_FORK, Pool

_LONGEST = 10.0  # seconds
_MISTAKES = (
    *("TypeError", "AttributeError", "NameError", "UnboundLocalError"),
    *("ImportError", "ModuleNotFoundError"),
)
_CHAT = (
    ". Completions are lists of messages, because the prompts are chats: the text is "
    "completion[0]['content']"
)


def try_out(
    functions: Sequence[BoundFunction], provided: Mapping[str, Sequence[Any]], limits: RewardLimits
) -> list[str]:
    """Call the functions in worker processes that end afterwards, so that nothing stays of it.

    Args:
        functions: those that may be called once more than the run needs.
        provided: the columns of one sample.
        limits: of the run; a call takes 10 s at most.

    Returns:
        Notes on what failed but may be the made-up sample's fault.

    Raises:
        RewardError: what is returned is no list of one score, or the code is wrong.
    """
    if not CAN_FORK or not functions:
        return []
    here = limits.workers == 0
    limits = replace(limits, workers=1, timeout=min(limits.timeout, _LONGEST), max_failure_rate=1.0)
    losses = Losses(FailureWindow(), 1.0, provided)
    once = [replace(f, declared=replace(f.declared, retries=0)) for f in functions]
    pool = Pool(limits)
    try:
        call_functions(once, provided, losses, limits, pool)
    except TypeError:
        if here:  # columns that cannot be sent to a process, which this run does not do
            return []
        raise
    finally:
        pool.close()
    for failure in losses.failures:
        if _is_mistake(failure):
            chat = not isinstance(provided["completions"][0], str)
            hint = _CHAT if chat and "list" in failure.message and _raised(failure) else ""
            problem = f"{failure.message}{hint} (in a trial before the run)"
            raise reward_error(failure.function, 0, provided, problem)
    # A function that is called in this process may rely on what a fork does not have.
    return [] if here else [f"{failure} (in a trial on one sample)" for failure in losses.failures]


def _raised(failure: RewardFailure) -> str:
    """The name of the exception, "" where there was none."""
    start, _, rest = failure.message.partition(" ")
    return rest.partition(":")[0] if start == "raised" else ""


def _is_mistake(failure: RewardFailure) -> bool:
    if failure.kind in ("wrong_length", "wrong_type"):
        return True
    # Without a match a pattern gives None: that is the sample, not the code.
    return _raised(failure) in _MISTAKES and "NoneType" not in failure.message


def sample_of(prompt: Any, columns: Mapping[str, Any], ids: np.ndarray) -> dict[str, list[Any]]:
    """The columns of one made-up sample: a prompt of the data with a short answer."""
    text = "4"
    completion = text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
    tokens = [[int(i) for i in ids[-1:]]]
    return {
        **{name: [value] for name, value in columns.items()},
        "prompts": [prompt],
        "completions": [completion],
        "completion_ids": tokens,
    }
