"""bench/end_to_end: what forces lengths, what counts tokens, and fastppo's side as processes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[2] / "bench" / "end_to_end"


@pytest.fixture(scope="module")
def workload():
    """The module that both environments import from its folder."""
    spec = importlib.util.spec_from_file_location("end_to_end_workload", HERE / "workload.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_rows_end_at_their_lengths_and_nowhere_else(workload):
    work = workload.Workload(
        prompts=["a", "b", "c"],
        prompt_lengths=[1, 1, 1],
        response_lengths=[1, 2, 3],
        trunk_parameters=10,
        head_parameters=100,
        eos_token_id=4,
        pad_token_id=0,
    )
    generator = torch.Generator().manual_seed(0)
    ended = []
    for step in range(3):
        scores = torch.randn(3, 6, generator=generator)
        scores[:, [0, 4]] = 9.0  # the likeliest by far
        allowed = workload.force_end(work, scores, torch.arange(3), step)
        ended.append((allowed.argmax(1) == 4).tolist())
        assert allowed[:, 0].isinf().all()
        some = torch.tensor([2, 0])  # what is left of them, in the order of a cache
        assert torch.equal(workload.force_end(work, scores[some], some, step), allowed[some])
        assert torch.equal(allowed[2, [1, 2, 3, 5]], scores[2, [1, 2, 3, 5]])
    # the longest row is cut off by max_new_tokens and has no end token
    assert ended == [[True, False, False], [True, True, False], [True, True, False]]


def test_least_operations_count_real_tokens_alone(workload):
    work = workload.Workload(
        prompts=["a", "b"],
        prompt_lengths=[5, 1],
        response_lengths=[2, 4],
        trunk_parameters=10,
        head_parameters=100,
        eos_token_id=4,
        pad_token_id=0,
        epochs=3,
    )
    trunk, head = 2 * 10 * 12, 2 * 100 * 6
    assert work.flops(shared_trunk=False) == {
        "rollout": trunk + head,
        "evaluation": 3 * trunk + head,
        "update": 3 * 3 * (2 * trunk + head),
    }
    assert work.flops(shared_trunk=True) == {
        "rollout": trunk + head,
        "evaluation": 2 * trunk + head,
        "update": 3 * 3 * (trunk + head),
    }


def test_tokens_are_counted_by_model_and_gradient_mode(workload):
    counter, linear = workload.Counter(), torch.nn.Linear(4, 2)
    counter.watch("model", linear)
    linear(torch.zeros(2, 3, 4))
    with torch.no_grad():
        linear(torch.zeros(5, 4))
    assert counter.take() == {"model, trained": 6, "model": 5}
    assert counter.take() == {}


@pytest.mark.slow
def test_both_critics_of_fastppo_do_the_work_that_was_asked_for(tmp_path):
    command = [sys.executable, HERE / "compare.py", "--skip-peer", "--model", "tiny"]
    command += ["--sequences", "4", "--prompt", "3", "9", "--response", "2", "6"]
    command += ["--mix", "even", "--epochs", "2", "--rounds", "1", "--precisions", "bf16"]
    command += ["--output", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    samples = json.loads((tmp_path / "details.json").read_text())["samples"]
    assert len(samples) == 2
    for name, (sample,) in samples.items():
        tokens, real = sample["tokens"], 24 + 16
        assert sample["real"] == tokens["reference"] == real
        # the sampler's last token of each response goes through no trunk; then the old ones
        assert tokens["policy"] == real - 4 + real
        assert tokens["policy head"] == 16
        assert tokens["policy, trained"] == 2 * real
        assert tokens["heads, trained"] == 2 * 16
        assert tokens.get("critic, trained", 0) == (0 if "shared" in name else 2 * real)
        assert all(wall > 0 for wall, _ in sample["seconds"].values())
    result = json.loads((tmp_path / "end-to-end.json").read_text())
    assert {row["case"] for row in result["rows"]} == {
        *("ppo iteration", "ppo rollout", "ppo evaluation", "ppo update")
    }
