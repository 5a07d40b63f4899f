"""The timer on a GPU: what can be captured into a graph, and what is timed with its launches."""

from __future__ import annotations

import pytest
import torch

from fastppo.benchmarks.clock import LAUNCH_LOOP, Timer, take_turns

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def test_a_call_that_waits_is_timed_with_its_launches_and_harms_nothing() -> None:
    x = torch.randn(100_000, device=DEVICE)
    waits = Timer([lambda: x[x > 0]] * 3, DEVICE, graph=True)
    assert waits.mode == "events" and "no CUDA graph" in waits.note
    captured = Timer([lambda: x * 2] * 3, DEVICE, graph=True)
    assert captured.mode == "graph" and not captured.note
    samples = take_turns({"waits": waits, "captured": captured}, 0.1)
    assert all(seconds > 0 for row in samples.values() for seconds in row)
    assert min(samples["captured"]) < min(samples["waits"])
    torch.cuda.empty_cache()  # asserts inside torch where a capture was left open


def test_a_loop_of_launches_is_not_a_graph() -> None:
    x = torch.zeros(10, device=DEVICE)

    def loop() -> None:
        for _ in range(4000):
            x.add_(1)

    timer = Timer([loop] * 20, DEVICE, graph=True)
    assert timer.mode == "events" and "launches" in timer.note
    assert timer.sample() > LAUNCH_LOOP
