"""Long runs: memory, descriptors, threads and processes stay what they were."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="/proc and workers"),
]

# What the process has after each of 400 iterations. The last hundred leak: that has to be seen.
RUN = """
import json, sys, threading
import psutil
from fastppo import PPOConfig, PPOTrainer
from fastppo.cli.demo import larger_digit
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer

folder = sys.argv[1]
rows = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(10) for b in range(10)]
trainer = PPOTrainer(
    tiny_model(len(WORDS), seed=0),
    larger_digit,
    rows,
    PPOConfig(
        output_dir=f"{folder}/run", num_iterations=400, prompts_per_iteration=16,
        max_prompt_length=8, max_response_length=4, num_minibatches=2, learning_rate=1e-4,
        precision="fp32", device="cpu", save_interval=10, sample_interval=20, eval_interval=50,
    ),
    eval_dataset=rows[:20],
    processing_class=word_tokenizer(),
)
process, record, kept, measured = psutil.Process(), trainer.run._record, [], []

def recorded(*arguments):
    record(*arguments)
    trainer.run.store.wait()  # a checkpoint that is being written has a thread and files
    if len(measured) >= 300:
        kept.append(b"x" * 50_000)
    rest = process.num_fds(), threading.active_count(), len(process.children(recursive=True))
    measured.append([process.memory_info().rss, *rest])

trainer.run._record = recorded
trainer.train()
with open(f"{folder}/measured.json", "w") as file:
    json.dump(measured, file)
"""


def measured(code: str, folder: Path) -> Any:
    """The columns of what `code` has measured: rss in bytes, and counts."""
    subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        check=True,
        capture_output=True,
        timeout=600,
    )
    return zip(*json.loads((folder / "measured.json").read_text()), strict=True)


def test_a_long_run_stays_flat(tmp_path: Path) -> None:
    """A run grows by 6 kB an iteration, half of them the rows from which curves are drawn; a leak
    of 50 kB an iteration is seen."""
    rss, *rest = measured(RUN, tmp_path)
    assert len(rss) == 400
    assert rss[299] - rss[99] < 4e6 < rss[399] - rss[299]
    for counts in rest:  # descriptors, threads, processes
        assert len(set(counts[99:])) == 1, counts


# Two workers a batch die: of the batch, and of the sample that is called alone. 150 batches, and
# 50 that leak.
DEATHS = """
import json, os, signal, subprocess, sys, time
import psutil
from fastppo.rewards import RewardLimits, Rewards

folder = sys.argv[1]

def deadly(prompts, completions):
    for prompt in prompts:
        if prompt == "exit":
            os._exit(3)
        if prompt == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "child":
            subprocess.Popen(["sleep", "600"])
            os._exit(0)
        if prompt == "hang":
            time.sleep(600)
    return [1.0] * len(prompts)

process, kept, measured = psutil.Process(), [], []
limits = RewardLimits(timeout=0.3, max_failure_rate=1.0)
with Rewards(deadly, limits=limits) as rewards:
    for batch in range(200):
        how = ("exit", "kill", "child", "hang")[batch % 4 if batch % 20 < 4 else batch % 3]
        scored = rewards(["good", how, "good"], ["x", "y", "z"])
        assert [f.sample for f in scored.failures] == [1], scored
        if batch >= 150:
            kept.append(b"x" * 50_000)
        children = process.children(recursive=True)
        zombies = [child.pid for child in children if child.status() == psutil.STATUS_ZOMBIE]
        measured.append([process.memory_info().rss, process.num_fds(), len(children), len(zombies)])
assert not process.children()
with open(f"{folder}/measured.json", "w") as file:
    json.dump(measured, file)
"""


def test_four_hundred_dead_workers_leave_nothing(tmp_path: Path) -> None:
    rss, descriptors, children, zombies = measured(DEATHS, tmp_path)
    assert len(rss) == 200
    assert rss[149] - rss[49] < 1e6 < rss[199] - rss[149]
    assert set(descriptors) == {descriptors[0]}
    assert set(children) == {2} and set(zombies) == {0}  # a worker and its keeper
