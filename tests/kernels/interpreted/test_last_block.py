"""The counter behind a reduction in one launch, and what the loss kernels write, interpreted.

Programs run one after the other here, so these tests show the bookkeeping and not a race;
`test_gpu_losses.py` runs launches side by side.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1; run by test_interpreted.py", allow_module_level=True)

import triton
import triton.language as tl
from fastppo_kernels import last_block, ppo_loss, value_loss
from fastppo_kernels.launch import ReductionLaunch
from fastppo_kernels.ppo_math import PPOInputs

from fastppo.ops import PPOLossConfig
from fastppo.ops._cuda import ppo_knobs

SMALL = ReductionLaunch(16, 4, programs=3)
CONFIG = PPOLossConfig(kl_coef=0.1, ent_coef=0.1)
LAUNCHERS = {
    "ppo_loss": lambda x: ppo_loss.ppo_loss(
        *x[:2], PPOInputs(*x[2:]), ppo_knobs(CONFIG), table=SMALL
    ),
    "value_loss": lambda x: value_loss.value_loss(*x[:4], 0.2, None, table=SMALL),
}


def draw(n):
    x = torch.randn(7, n, generator=torch.Generator().manual_seed(0))
    return list(x)


@triton.jit
def who_is_last_kernel(last_ptr, seen_ptr, parts_ptr, arrivals_ptr, num_programs):
    i = tl.program_id(0)
    tl.store(parts_ptr + i, i + 1)
    last = last_block.is_last(arrivals_ptr, num_programs)
    tl.store(last_ptr + i, last.to(tl.int32))
    if last:
        parts = tl.load(parts_ptr + tl.arange(0, 8), mask=tl.arange(0, 8) < num_programs, other=0)
        tl.store(seen_ptr, tl.sum(parts, axis=0))


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_one_program_is_last_and_clears_the_counter(programs):
    counter = last_block.arrival_counter(torch.device("cpu"))
    for _ in range(2):
        last, parts = torch.full((2, programs), -1, dtype=torch.int32)
        seen = torch.zeros(1, dtype=torch.int32)
        who_is_last_kernel[(programs,)](last, seen, parts, counter, programs)
        assert last.tolist() == [0] * (programs - 1) + [1]
        assert int(seen) == programs * (programs + 1) // 2
        assert int(counter[0]) == 0


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_counter_serves_launches_of_any_size(name, monkeypatch):
    expected = {n: LAUNCHERS[name](draw(n)) for n in (100, 5, 33)}
    counter = torch.zeros(4, dtype=torch.int32)
    for module in (ppo_loss, value_loss):
        monkeypatch.setattr(module, "arrival_counter", lambda device: counter)
    for n, before in expected.items():
        after = LAUNCHERS[name](draw(n))
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert counter.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("n", [1, 15, 16, 33])
@pytest.mark.parametrize("name", LAUNCHERS)
def test_nothing_is_written_beside_the_outputs(name, n, monkeypatch):
    watched, allocate = [], torch.Tensor.new_empty

    def new_empty(self, size, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return allocate(self, size, device=device)
        size = (size,) if isinstance(size, int) else tuple(size)
        count = torch.Size(size).numel()
        whole = torch.full((count + 128,), 77.0, dtype=dtype)
        watched.append((whole, count))
        return whole[64 : 64 + count].view(size)

    x = draw(n)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    LAUNCHERS[name](x)
    assert len(watched) >= 4
    for whole, count in watched:
        assert (whole[:64] == 77.0).all()
        assert (whole[64 + count :] == 77.0).all()
        assert (whole[64 : 64 + count] != 77.0).all()


def test_counters_are_one_per_stream_and_one_per_captured_launch():
    counters = last_block.Counters(torch.zeros(4, 4, dtype=torch.int32))
    a, b = counters.of_stream(7), counters.of_stream(8)
    assert a is counters.of_stream(7)
    own = [counters.new(), counters.new()]
    assert len({x.data_ptr() for x in (a, b, *own)}) == 4
    assert all(x.data_ptr() % 16 == a.data_ptr() % 16 for x in own)
    assert counters.new() is None
    assert counters.of_stream(9) is None
    assert counters.of_stream(8) is b
