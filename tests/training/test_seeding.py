"""Counter-based randomness: a function of (seed, step, purpose) and of nothing else."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastppo.training.seeding import derive_seed, generator


def test_every_argument_changes_the_seed() -> None:
    found = {
        derive_seed(seed, step, purpose)
        for seed in range(4)
        for step in range(50)
        for purpose in ("rollout", "minibatches/0", "minibatches/1")
    }
    assert len(found) == 4 * 50 * 3
    assert all(0 <= value < 2**63 for value in found)


def test_the_parts_of_the_key_do_not_run_together() -> None:
    assert derive_seed(1, 11, "x") != derive_seed(11, 1, "x")
    assert derive_seed(1, 1, "1/x") != derive_seed(1, 11, "x")


@pytest.mark.slow
def test_the_seed_is_the_same_in_every_process() -> None:
    """Python's own hash of a string would not be."""
    program = (
        "from fastppo.training.seeding import derive_seed; print(derive_seed(7, 3, 'rollout'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "123"},
    )
    assert int(done.stdout) == derive_seed(7, 3, "rollout")


def test_the_values_never_change() -> None:
    """A run can be repeated by a later version only if these numbers stay what they are."""
    assert derive_seed(0, 0, "rollout") == 9115654955644857358


def test_the_global_generators_are_neither_used_nor_moved() -> None:
    random_before, numpy_before = random.getstate(), np.random.get_state()[1].copy()
    torch_before = torch.get_rng_state()
    first = torch.rand(4, generator=generator(1, 2, "order"))
    torch.manual_seed(999)
    second = torch.rand(4, generator=generator(1, 2, "order"))
    torch.set_rng_state(torch_before)
    assert torch.equal(first, second)
    assert random.getstate() == random_before
    assert np.array_equal(np.random.get_state()[1], numpy_before)
