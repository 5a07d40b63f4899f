"""A profile is collected from outside: what is traced, what is left alone, what is put back."""

from __future__ import annotations

import gzip
import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastppo import PPOConfig, PPOTrainer
from fastppo.cli.demo import larger_digit
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.profiling import collect
from fastppo.profiling.analysis import analyse
from fastppo.profiling.meta import Meta
from fastppo.profiling.trace import Trace
from fastppo.training import interrupts

STEPS = 2
PHASES = ("rollout", "reward", "pack", "evaluate", "advantages", "update")
ROWS = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(9) for b in range(9)]

Probe = tuple[bool, bool]


class Reward:
    """A reward in this process that reads a tensor, looks around, and may send a signal.

    Args:
        interrupts_at: the call in which SIGINT comes, from 1; 0: never.
    """

    __name__ = "reward"

    def __init__(self, interrupts_at: int = 0) -> None:
        self.interrupts_at = interrupts_at
        self.seen: list[Probe] = []
        """Of each call: whether syncs are counted, and whether operators are traced."""

    def __call__(self, completions: list[str], answer: list[str], **_: Any) -> list[float]:
        counting = _get_current_dispatch_mode() is not None
        self.seen.append((counting, torch.autograd._profiler_enabled()))
        if len(self.seen) == self.interrupts_at:
            os.kill(os.getpid(), signal.SIGINT)
        scores = larger_digit(completions, answer)
        return [torch.tensor(score).item() for score in scores]  # planted


def make_trainer(folder: Path, reward: Callable[..., Any], device: str = "cpu") -> PPOTrainer:
    config = PPOConfig(
        output_dir=str(folder),
        num_iterations=1,
        prompts_per_iteration=16,
        max_prompt_length=8,
        max_response_length=3,
        num_minibatches=4,
        reward_workers=0,
        save_interval=1,
        precision="fp32",
        device=device,
    )
    tokenizer = word_tokenizer()
    model = tiny_model(len(WORDS), seed=0)
    return PPOTrainer(model, reward, ROWS, config, processing_class=tokenizer)


def collected(folder: Path, reward: Reward, device: str = "cpu") -> list[str]:
    """Collect a profile in `folder`; what was said."""
    trainer = make_trainer(folder.parent / "run", reward, device)
    said: list[str] = []
    with trainer.rewards, interrupts.handled():
        collect.collect(trainer, STEPS, folder, said.append)
    return said


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reward, list[str]]:
    """The folder of a profile, the reward that was used and what was said."""
    folder, reward = tmp_path_factory.mktemp("profile") / "out", Reward()
    return folder, reward, collected(folder, reward)


def test_only_the_profile_is_written(profile: tuple[Path, Reward, list[str]]) -> None:
    folder, _, said = profile
    assert sorted(p.name for p in folder.iterdir()) == [collect.META, collect.TRACE]
    assert sorted(p.name for p in folder.parent.iterdir()) == ["out"]  # no run beside it
    assert said == ["warm-up", "counting host syncs", *(f"tracing step {n} of 2" for n in (1, 2))]


def test_nothing_is_installed_outside_its_own_steps(
    profile: tuple[Path, Reward, list[str]],
) -> None:
    warm_up, counted, *traced = profile[1].seen
    assert warm_up == (False, False)
    assert counted == (True, False)
    assert traced == [(False, True)] * STEPS


def test_everything_is_off_afterwards(profile: tuple[Path, Reward, list[str]]) -> None:
    assert _get_current_dispatch_mode() is None
    assert _get_current_function_mode_stack() == []
    assert not torch.autograd._profiler_enabled()


def test_the_trace_is_a_chrome_trace_of_the_traced_steps(
    profile: tuple[Path, Reward, list[str]],
) -> None:
    document = json.loads(gzip.decompress((profile[0] / collect.TRACE).read_bytes()))
    events = document["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for span in spans:
        assert isinstance(span["name"], str) and span["dur"] >= 0 and span["ts"] > 0
        assert {"pid", "tid"} <= span.keys()
    ranges = Counter(span["name"] for span in spans if span.get("cat") == "user_annotation")
    assert {name: ranges[name] for name in PHASES} == dict.fromkeys(PHASES, STEPS)
    assert ranges["fastppo::step"] == STEPS
    products = [span for span in spans if span["name"] == "aten::mm"]
    assert products and all(len(span["args"]["Input Dims"]) >= 2 for span in products)


def test_phases_add_up_to_the_wall_time(profile: tuple[Path, Reward, list[str]]) -> None:
    folder = profile[0]
    meta = Meta.load(folder / collect.META)
    analysis = analyse(Trace.load(folder / collect.TRACE), meta)
    wall = sum(step.wall_us for step in meta.steps) / 1e6
    named = sum(phase.seconds for phase in analysis.phases if phase.name != "other") * STEPS
    assert len(meta.steps) == STEPS
    assert named == pytest.approx(wall, rel=0.03)
    assert {phase.name for phase in analysis.phases} >= {*PHASES, "ref", "values", "optimiser"}


def test_a_planted_item_and_the_update_are_in_the_list_of_syncs(
    profile: tuple[Path, Reward, list[str]],
) -> None:
    meta = Meta.load(profile[0] / collect.META)
    lines = Path(__file__).read_text().splitlines()
    (planted,) = [sync for sync in meta.syncs if sync.phase == "reward"]
    assert planted.file.endswith("test_collect.py")
    assert lines[planted.line - 1].endswith("# planted") and planted.count == 16
    (update,) = [sync for sync in meta.syncs if sync.phase == "update"]
    assert (update.file, update.count) == (
        "fastppo/ppo/update_metrics.py",
        1,
    )  # for 4 optimiser steps
    assert not [sync for sync in meta.syncs if sync.phase in ("evaluate", "advantages", "pack")]


def test_meta_says_what_was_profiled(profile: tuple[Path, Reward, list[str]]) -> None:
    meta = Meta.load(profile[0] / collect.META)
    assert not meta.is_cuda and "CPU" in meta.device and meta.memory_snapshot is None
    assert meta.versions["torch"] == torch.__version__
    assert meta.ceilings is not None
    assert min(meta.ceilings.copy_gb_s, meta.ceilings.fp32_tflops, meta.ceilings.bf16_tflops) > 0


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_traced(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with pytest.raises(interrupts.Interrupted):
        collected(folder, Reward(interrupts_at=4))  # in the second traced step
    meta = Meta.load(folder / collect.META)
    assert len(meta.steps) == 2 and meta.steps[1].wall_us < meta.steps[0].wall_us
    analysis = analyse(Trace.load(folder / collect.TRACE), meta)
    calls = {phase.name: phase.calls for phase in analysis.phases}
    assert analysis.steps == 2
    assert calls["reward"] == 1 and calls["update"] == 0.5  # the second one never got there
    assert [sync for sync in meta.syncs if sync.phase == "update"]
    assert not torch.autograd._profiler_enabled()


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_before_anything_is_traced_leaves_nothing(tmp_path: Path, call: int) -> None:
    with pytest.raises(interrupts.Interrupted):
        collected(tmp_path / "out", Reward(interrupts_at=call))
    assert not list((tmp_path / "out").iterdir())
    assert _get_current_dispatch_mode() is None and _get_current_function_mode_stack() == []


def test_marks_know_the_innermost_phase_and_forget_it_when_work_fails() -> None:
    marks = collect.Marks(torch.device("cpu"))
    with pytest.raises(ZeroDivisionError), marks("update"):
        with marks("pack"):
            assert marks.phase == "pack"
        assert marks.phase == "update"
        _ = 1 / 0
    assert marks.phase == "other"


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_memory_are_recorded(tmp_path: Path) -> None:
    before = torch.cuda.get_sync_debug_mode()
    collected(tmp_path / "out", Reward(), "cuda")
    meta = Meta.load(tmp_path / "out" / collect.META)
    analysis = analyse(Trace.load(tmp_path / "out" / collect.TRACE), meta)
    assert (tmp_path / "out" / collect.MEMORY).stat().st_size > 0
    assert analysis.kernels and analysis.launches and analysis.idle is not None
    assert sum(sync.count for sync in meta.syncs if sync.phase == "update") == 1
    assert torch.cuda.get_sync_debug_mode() == before
    assert not torch._C._cuda_isHistoryEnabled()
