"""Saving a checkpoint on a CPU: what a step waits for, what the writer does, what a start reads.

    python -m pytest bench/bench_checkpoint.py --benchmark-sort=name

The tensors have the shapes of SmolLM2-135M with AdamW's two moments: the last 6 layers (63.7 M fp32
values) and all of it (403.5 M). `save` is the snapshot, on the way of the training loop; `write` is
the thread after it, up to the rename and the deletion of an older checkpoint; `verify` hashes every
byte and maps the tensors. Files are written below pytest's --basetemp.

Bytes are those of the checkpoint's tensors, counted once. `longest_pause` is in seconds: how long,
at most, a thread that sleeps half a millisecond at a time was kept from running meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.checkpoint import CheckpointStore

H, KV, MLP, VOCABULARY = 576, 192, 1536, 49_152
LAYER = ((H, H), (KV, H), (KV, H), (H, H), (MLP, H), (MLP, H), (H, MLP), (H,), (H,))
SIZES = {"6 layers": LAYER * 6, "all layers": (*LAYER * 30, (VOCABULARY, H), (H,))}

torch.set_num_threads(1)

Tensors = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=SIZES)
def tensors(request: pytest.FixtureRequest) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = SIZES[request.param]
    groups = {"policy": 1, "optimizer": 2}  # values per weight
    return {
        group: {
            f"{i}.{k}": torch.empty(shape).uniform_(generator=generator)
            for i, shape in enumerate(shapes)
            for k in range(count)
        }
        for group, count in groups.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    made = CheckpointStore(tmp_path / "checkpoints", keep_last=1)
    yield made
    made.close()


def record(benchmark: Any, tensors: Tensors, what: str) -> int:
    size = sum(t.nbytes for group in tensors.values() for t in group.values())
    benchmark.group = f"{what}, {size / 1e6:.0f} MB"
    benchmark.extra_info["bytes"] = size
    benchmark.extra_info["torch"] = torch.__version__
    return size


def finish(benchmark: Any, size: int) -> None:
    benchmark.extra_info["MB_per_s"] = round(size / 1e6 / benchmark.stats.stats.median)


def test_save(benchmark: Any, store: CheckpointStore, tensors: Tensors) -> None:
    size = record(benchmark, tensors, "save")
    rounds = iter(range(9))
    benchmark.pedantic(
        lambda: store.save(f"step-{next(rounds)}", tensors, {}),
        setup=store.wait,
        rounds=5,
        warmup_rounds=1,
    )
    finish(benchmark, size)


def test_write(benchmark: Any, store: CheckpointStore, tensors: Tensors) -> None:
    size = record(benchmark, tensors, "write")
    rounds, pauses = iter(range(9)), []

    def write() -> None:
        writer, before = store._writer, time.perf_counter()
        while writer.is_alive():
            time.sleep(0.0005)
            now = time.perf_counter()
            pauses.append(now - before)
            before = now

    benchmark.pedantic(
        write,
        setup=lambda: store.save(f"step-{next(rounds)}", tensors, {}),
        rounds=5,
        warmup_rounds=1,
    )
    finish(benchmark, size)
    benchmark.extra_info["longest_pause"] = max(pauses)
    assert store.newest()[0].path.name == "step-5"


def test_verify(benchmark: Any, store: CheckpointStore, tensors: Tensors) -> None:
    size = record(benchmark, tensors, "verify")
    store.save("step-1", tensors, {}, wait=True)

    def load() -> Tensors:
        found, _ = store.newest()
        return {group: found.tensors(group) for group in tensors}

    loaded = benchmark.pedantic(load, rounds=5, warmup_rounds=1)
    finish(benchmark, size)
    for group, members in tensors.items():
        assert all(torch.equal(loaded[group][name], x) for name, x in members.items())
