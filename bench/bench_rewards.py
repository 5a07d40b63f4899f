"""What a worker adds to a reward call: 32 short completions, and 512 of 1 kB.

    python -m pytest bench/bench_rewards.py --benchmark-sort=mean

Baseline: the same function called in this process. The function is trivial, so all that is measured
is fastppo's: arguments, checks, and with a worker pickling, two trips through a socket and a change
of process. Requirement: the median of `worker` is at most 1 ms above that of `direct` for 32.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastppo.rewards import RewardLimits, Rewards

BATCHES = {"32 of 10 B": (32, 10), "512 of 1 kB": (512, 1000)}


def first(completions: list[str]) -> list[float]:
    return [float(text[0]) for text in completions]


@pytest.mark.parametrize("form", ["direct", "worker"])
@pytest.mark.parametrize("batch", BATCHES)
def test_call(benchmark, batch: str, form: str) -> None:
    count, size = BATCHES[batch]
    prompts = [f"prompt {i}" for i in range(count)]
    texts = [str(i % 10) * size for i in range(count)]
    benchmark.group = f"reward call, {batch}"
    benchmark.extra_info["bytes"] = count * size  # of completions, one way
    with Rewards(first, limits=RewardLimits(workers=int(form == "worker"))) as rewards:
        result = benchmark.pedantic(
            rewards, (prompts, texts), rounds=300, iterations=1, warmup_rounds=10
        )
    np.testing.assert_array_equal(result.scores, np.arange(count) % 10)
