"""Host syncs: found where they are, with their line, and at most one in a PPO update."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastppo import PackedBatch, PPOConfig, PPOStep, ops
from fastppo.models.tiny import WORDS, tiny_model
from fastppo.profiling.meta import Sync
from fastppo.profiling.syncs import SyncCounter

CPU = torch.device("cpu")
ONE = torch.ones(())
MASK = torch.tensor([True, False, True])
LENGTHS = torch.tensor([2, 0, 1])


def planted(x: Tensor) -> float:
    return x.sum().item()


class Doubled(torch.autograd.Function):
    """Reads its gradient in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad if bool((grad > 0).all()) else grad


def counted(work: Callable[[], object], device: torch.device = CPU) -> tuple[Sync, ...]:
    with SyncCounter(device, lambda: "update") as counter:
        work()
    return counter.syncs


def line_of(function: Callable[..., Any], text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    return next(start + i for i, line in enumerate(lines) if text in line)


def test_a_planted_item_is_found_with_its_line() -> None:
    (sync,) = counted(lambda: [planted(ONE) for _ in range(3)])
    assert sync.file.endswith("tests/profiling/test_syncs.py")
    assert sync.line == line_of(planted, ".item()")
    assert (sync.api, sync.function) == ("aten::_local_scalar_dense", "planted")
    assert (sync.phase, sync.count) == ("update", 3)


def test_the_line_is_that_of_a_backward_pass_too() -> None:
    x = torch.ones(3, requires_grad=True)
    (sync,) = counted(lambda: Doubled.apply(x).sum().backward())
    assert (sync.function, sync.line) == ("backward", line_of(Doubled.backward, "bool("))


def test_what_torch_does_itself_counts_for_the_line_that_called_it() -> None:
    def clip() -> None:
        parameter = torch.ones(2, requires_grad=True)
        parameter.grad = torch.ones(2)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)

    (sync,) = counted(clip)
    assert (sync.function, sync.line) == ("clip", line_of(clip, "clip_grad_norm_"))


def test_phases_are_told_apart() -> None:
    phase = ["rollout"]
    with SyncCounter(CPU, lambda: phase[0]) as counter:
        planted(ONE)
        phase[0] = "update"
        planted(ONE)
        planted(ONE)
    assert [(s.phase, s.count) for s in counter.syncs] == [("update", 2), ("rollout", 1)]


@pytest.mark.parametrize(
    "read",
    [
        *(lambda: ONE.item(), lambda: bool(ONE), lambda: int(ONE), lambda: f"{ONE:g}"),
        *(lambda: MASK.tolist(), lambda: MASK.nonzero(), lambda: LENGTHS[MASK]),
        *(lambda: LENGTHS.masked_select(MASK), lambda: LENGTHS.unique()),
        *(lambda: torch.equal(LENGTHS, LENGTHS), lambda: LENGTHS.bincount()),
        lambda: torch.repeat_interleave(LENGTHS),
        lambda: LENGTHS.clone().index_put_((MASK,), LENGTHS[:2]),
    ],
)
def test_every_kind_of_read_counts_once(read: Callable[[], object]) -> None:
    assert sum(sync.count for sync in counted(read)) == 1


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.repeat_interleave(LENGTHS, output_size=3),
        lambda: LENGTHS[LENGTHS],
        lambda: torch.nonzero_static(MASK, size=2),
        lambda: LENGTHS.clone().masked_fill_(MASK, 0),
        lambda: torch.where(MASK, LENGTHS, 0).sum(),
    ],
)
def test_what_does_not_wait_does_not_count(work: Callable[[], object]) -> None:
    assert counted(work) == ()


def test_assigning_one_value_under_a_mask_does_not_wait() -> None:
    def assign() -> None:
        LENGTHS.clone()[MASK] = 7

    assert counted(assign) == ()


def test_checks_of_cpu_tensors_do_not_count() -> None:
    values, cu = torch.randn(5), torch.tensor([0, 2, 5])
    assert counted(lambda: ops.gae(values, values, cu, gamma=1.0, gae_lambda=0.9)) == ()
    total = torch.tensor(5)
    mask = torch.ones(5, dtype=torch.bool)
    weights = lambda: ops.loss_weights(cu, mask, aggregation="token-mean", total=total)  # noqa: E731
    assert counted(weights) == ()


def test_everything_is_restored_also_after_an_error() -> None:
    shown, filters = warnings.showwarning, list(warnings.filters)
    with pytest.raises(ZeroDivisionError):
        counted(lambda: 1 / 0)
    assert _get_current_dispatch_mode() is None
    assert _get_current_function_mode_stack() == []
    assert (warnings.showwarning, list(warnings.filters)) == (shown, filters)


SEQUENCES, BUDGET = 16, 32


def evaluated(device: str = "cpu", **options: Any) -> tuple[PPOStep, PackedBatch]:
    """A step, and a batch with advantages of which some responses do not count."""
    rng = np.random.default_rng(0)
    shape: dict[str, Any] = {"prompts_per_iteration": SEQUENCES, "max_prompt_length": 8}
    shape |= {"max_response_length": 8, "token_budget": BUDGET, "num_minibatches": 2}
    config = PPOConfig(**{**shape, "precision": "fp32", "device": device, **options})
    step = PPOStep(tiny_model(len(WORDS), seed=0), config)
    prompts, responses = (
        [rng.integers(2, len(WORDS), n) for n in rng.integers(1, 8, SEQUENCES)] for _ in range(2)
    )
    batch = step.evaluate(PackedBatch.pack(prompts, responses))
    scores = rng.random(SEQUENCES).astype(np.float32)
    scores[3] = np.nan
    return step, step.advantages(batch, scores, np.arange(SEQUENCES) // 4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 1),
        ({"precision": "bf16"}, 1),
        ({"advantage": "grpo", "n_samples": 4, "kl_in": "loss", "kl_estimator": "k3"}, 1),
        ({"critic": "separate", "num_minibatches": 1, "update_epochs": 2}, 1),
        ({"loss_aggregation": "seq-mean-token-mean", "clip_vloss": 0.2}, 1),
        # whether to stop is asked before every epoch but the first
        ({"update_epochs": 3, "target_kl": 1e9}, 3),
    ],
    ids=["gae", "bf16", "grpo", "separate critic", "seq-mean", "target_kl"],
)
def test_an_update_has_one_host_sync(options: dict[str, Any], expected: int) -> None:
    step, batch = evaluated(**options)
    assert len(batch.bins(BUDGET)) > step.config.num_minibatches  # more passes than steps
    assert "valid_lengths" in vars(batch)  # the mask has been read, which a CPU does not show
    syncs = counted(lambda: step.update(batch))
    assert sum(sync.count for sync in syncs) == expected, syncs
    assert {sync.file for sync in syncs} <= {"fastppo/ppo/update_metrics.py", "fastppo/ppo/step.py"}


@pytest.mark.gpu
def test_on_a_gpu_torch_says_where_it_waits() -> None:
    device = torch.device("cuda")
    x = torch.ones(5, device=device)
    before = torch.cuda.get_sync_debug_mode()
    (sync,) = counted(lambda: planted(x), device)
    assert (sync.api, sync.line) == ("aten::_local_scalar_dense", line_of(planted, ".item()"))
    assert torch.cuda.get_sync_debug_mode() == before
    step, batch = evaluated("cuda")
    step.update(batch)
    assert sum(s.count for s in counted(lambda: step.update(batch), device)) == 1
