"""Kineto reads this when the first profiler starts; it would tell stderr of each start and stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@pytest.fixture(scope="module", autouse=True)
def _measured_once(ceilings_once: Callable[..., object]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("collect", "op_profile"):
            patch.setattr(f"fastppo.profiling.{module}.measure_ceilings", ceilings_once)
        yield
