"""How many launches each scan takes on a GPU, and that no more runs: recorded on meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from fastppo_kernels.launch import first_tensor, recording
from fastppo_kernels.ppo_math import PPOInputs
from fastppo_kernels.scan import LAUNCH

from fastppo.ops.gae import gae_triton
from fastppo.ops.gae_classic import gae_classic_triton
from fastppo.ops.whiten import whiten_triton

N, B = 1 << 20, 64
ALLOCATES = {torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default}


class TorchKernels(TorchDispatchMode):
    """The torch ops that would launch a kernel of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in ALLOCATES and not func.is_view:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def launched(work) -> list[str]:
    """The launches and torch kernels of `work`, in words."""
    with recording() as calls, TorchKernels() as torch_kernels:
        work()
    return [call.kernel.__name__.removesuffix("_kernel") for call in calls] + torch_kernels.seen


def floats(*shape):
    return torch.empty(shape, device="meta")


def bools(*shape):
    return torch.empty(shape, dtype=torch.bool, device="meta")


def offsets():
    return torch.empty(B + 1, dtype=torch.int32, device="meta")


def gae(n=N, hint=None, norm_adv=False, options=False, returns_lambda=None, mode="carry"):
    v, cu = floats(n), offsets()
    given = (None,) * 4
    if options:
        given = bools(n), floats(B), floats(n), floats(B)
    numbers = 0.99, 0.95, returns_lambda, 0.1
    return launched(
        lambda: gae_triton(v, cu, floats(n), *given, None, *numbers, mode, norm_adv, hint)
    )


@pytest.mark.parametrize("options", [False, True])
@pytest.mark.parametrize("returns_lambda", [None, 1.0])
def test_gae(options, returns_lambda):
    more = {"options": options, "returns_lambda": returns_lambda}
    short, beyond = LAUNCH.one_launch, LAUNCH.one_launch + 1
    assert gae(hint=short, **more) == ["gae_fwd"]
    assert gae(hint=beyond, **more) == ["gae_blocks", "gae_fwd"]
    assert gae(hint=None, **more) == ["gae_blocks", "gae_fwd"]
    assert gae(n=short, hint=None, **more) == ["gae_fwd"]  # no sequence can be longer
    assert gae(hint=short, norm_adv=True, **more) == ["gae_fwd", "whiten"]
    assert gae(hint=None, norm_adv=True, **more) == ["gae_blocks", "gae_fwd", "whiten"]


def test_many_blocks_of_moments_take_one_launch_more():
    assert gae(n=4 * N, hint=1, norm_adv=True) == ["gae_fwd", "combine", "whiten"]


@pytest.mark.parametrize("masked", [False, True])
def test_whiten(masked):
    mask = bools(N) if masked else None
    assert launched(lambda: whiten_triton(floats(N), mask, True)) == ["moments", "whiten"]


@pytest.mark.parametrize(("steps", "envs"), [(128, 4096), (2048, 8), (1, 1)])
def test_classic(steps, envs):
    shape = steps, envs
    args = floats(*shape), floats(*shape), floats(envs), bools(*shape)
    for rest in ((None, None), (bools(*shape), floats(*shape))):
        launches = launched(lambda rest=rest: gae_classic_triton(*args, *rest, 0.99, 0.95))
        assert launches == ["gae_classic"]


def test_a_launch_is_on_the_device_of_its_first_tensor():
    x, y = floats(1), floats(2)
    assert first_tensor([3, None, (1, 2), PPOInputs(x, y, y, None, None), y]) is x
    with pytest.raises(ValueError, match="^arguments"):
        first_tensor([3, None, (1, 2)])
