"""Memory that runs out once, in each phase of an iteration: the run ends with the same weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from fastppo import PackedBatch, PPOTrainer
from fastppo.models.tiny import WORDS, word_tokenizer
from fastppo.ppo import step, update_metrics
from fastppo.rewards import RewardModel, declare

Runs = Any  # see conftest.py
Out = Callable[..., None]

BUDGET = 64
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Once:
    """Raises at its first call in iteration 2 for which `when` holds."""

    def __init__(self, trainer: PPOTrainer, when: Callable[..., bool] = lambda *_, **__: True):
        self.trainer, self.when, self.done = trainer, when, False

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self.done and self.trainer.run.iterations == 1 and self.when(*args, **kwargs):
            self.done = True
            raise ERROR

    def before(self, patch: pytest.MonkeyPatch, owner: Any, name: str) -> Once:
        """Have it called before a function of `owner`, with the same arguments."""
        original = getattr(owner, name)

        def function(*args: Any, **kwargs: Any) -> Any:
            self(*args, **kwargs)
            return original(*args, **kwargs)

        patch.setattr(owner, name, function)
        return self


def in_rollout(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    """At the second token."""
    return in_a_layer(trainer, lambda cache: cache is not None and cache.decoding)


def in_pack(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return Once(trainer).before(patch, PackedBatch, "pack")


def in_a_layer(trainer: PPOTrainer, when: Callable[..., bool]) -> Once:
    """When `when` holds of the rollout's cache, which is None in other forwards."""
    once = Once(trainer, lambda module, args, kwargs: when(kwargs.get("kv_cache")))
    trainer.policy.actor.model.model.layers[1].register_forward_pre_hook(once, with_kwargs=True)
    return once


def in_evaluate(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return in_a_layer(trainer, lambda cache: cache is None and not torch.is_grad_enabled())


def in_advantages(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return Once(trainer).before(patch, step, "add_advantages")


def in_minibatches(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    """Where the update cuts the batch, which is the first that it selects."""
    once = Once(trainer, lambda *_: trainer.step.progress is not None)
    return once.before(patch, PackedBatch, "select")


def in_forward(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return in_a_layer(trainer, lambda _: torch.is_grad_enabled() and minibatch(trainer) == 1)


def in_backward(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    """After the gradients of the layers above, and of this one's later tokens, are there."""
    once = Once(trainer, lambda grad: minibatch(trainer) == 1)
    trainer.policy.actor.model.model.layers[0].mlp.up_proj.weight.register_hook(once)
    return once


def in_gradient_norm(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return Once(trainer, lambda _: minibatch(trainer) == 1).before(patch, step, "grad_norm")


def in_the_actors_step(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return Once(trainer).before(patch, trainer.step.actor_optimizer, "step")


def in_the_critics_step(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    """The actor has stepped already."""
    return Once(trainer).before(patch, trainer.step.critic_optimizer, "step")


def in_metrics(trainer: PPOTrainer, patch: pytest.MonkeyPatch) -> Once:
    return Once(trainer).before(patch, update_metrics, "read")


def minibatch(trainer: PPOTrainer) -> int:
    progress = trainer.step.progress
    return -1 if progress is None else progress.minibatch


REPEATED = (
    *(in_pack, in_advantages, in_minibatches, in_the_actors_step, in_the_critics_step),
    in_metrics,
)
SPLIT = (in_rollout, in_evaluate, in_forward, in_backward, in_gradient_norm)


@pytest.fixture(scope="module")
def plain(
    runs_in: Callable[[Path], Runs], state_of: Callable[..., Any], tmp_path_factory: Any
) -> tuple[Runs, dict[str, torch.Tensor]]:
    """A run without a fault, "plain", and where it ends."""
    runs = runs_in(tmp_path_factory.mktemp("plain"))
    trainer = runs("plain", token_budget=BUDGET, critic="separate")
    trainer.train()
    return runs, state_of(trainer)


@pytest.mark.parametrize("phase", [*REPEATED, *SPLIT], ids=lambda phase: phase.__name__)
def test_a_phase_without_memory_is_repeated(
    phase: Callable[..., Once],
    plain: tuple[Runs, dict[str, torch.Tensor]],
    runs: Runs,
    state_of: Callable[..., Any],
    same: Callable[..., bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed, expected = plain
    trainer = runs("hurt", token_budget=BUDGET, critic="separate")
    once = phase(trainer, monkeypatch)
    trainer.train()
    assert once.done
    found = state_of(trainer)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
    assert same(found, expected) or phase in SPLIT
    assert runs.lines("hurt", "samples.jsonl") == undisturbed.lines("plain", "samples.jsonl")
    rows, clean = runs.lines("hurt", "metrics.jsonl"), undisturbed.lines("plain", "metrics.jsonl")
    smaller = phase in SPLIT and phase is not in_rollout
    assert [row["token_budget"] for row in rows] == [64, *([32] if smaller else [64]) * 3]
    assert trainer.engine.max_rows == (8 if phase is in_rollout else None)
    for row, other in zip(rows, clean, strict=True):
        del row["token_budget"], other["token_budget"]
        assert row == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True)


# Rewards


def reward_model() -> RewardModel:
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RewardModel(LlamaForSequenceClassification(config), word_tokenizer())


def test_a_reward_model_without_memory_reads_fewer_samples_at_once(
    runs: Runs, state_of: Callable[..., Any]
) -> None:
    states = []
    for name in ("plain", "hurt"):
        model = reward_model()
        trainer = runs(name, model)
        once = Once(trainer, lambda *_: name == "hurt")  # noqa: B023
        model.load().model.register_forward_pre_hook(once, with_kwargs=True)
        trainer.train()
        assert once.done == (name == "hurt")
        assert model.token_budget < 16_384 or name == "plain"
        assert [row["reward_failures"] for row in runs.lines(name, "metrics.jsonl")] == [0] * 4
        states.append(state_of(trainer))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-6, msg=key)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory")
def test_a_reward_function_without_memory_is_called_again(
    runs: Runs, state_of: Callable[..., Any], same: Callable[..., bool], tmp_path: Path
) -> None:
    """Its worker may map half a GiB and asks for 8, once."""
    states = []
    for name in ("plain", "hurt"):
        calls = tmp_path / f"{name}.calls"

        @declare(idempotent=True)
        def score(completions: list[str], calls: Path = calls, name: str = name) -> list[float]:
            with calls.open("a") as file:
                file.write(".")
            if name == "hurt" and calls.stat().st_size == 2:
                bytearray(8 << 30)
            return [0.1 * len(text) for text in completions]

        trainer = runs(name, score, reward_workers=1, reward_memory_gb=0.5)
        trainer.train()
        assert calls.read_text() == ("....." if name == "hurt" else "....")
        assert [row["reward_failures"] for row in runs.lines(name, "metrics.jsonl")] == [0] * 4
        states.append(state_of(trainer))
    assert same(*states)


# 16 prompts of 200 tokens are 105 MB in each activation of the MLP, and several of them are alive
# at a time: with 300 MB to spare they cannot be had in one pass.
LITTLE_MEMORY = """
import resource, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from fastppo import PPOConfig, PPOTrainer
from fastppo.models.tiny import WORDS, word_tokenizer

def score(completions):
    return [0.1 * len(text) for text in completions]

def run(name):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=8192,
                         num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=256,
                         pad_token_id=0, bos_token_id=None, eos_token_id=1)
    trainer = PPOTrainer(
        LlamaForCausalLM(config),
        score,
        [{"prompt": " ".join(str((i * j) % 10) for j in range(200))} for i in range(16)],
        PPOConfig(output_dir=f"{sys.argv[1]}/{name}", num_iterations=3, prompts_per_iteration=16,
                  max_prompt_length=200, max_response_length=4, num_minibatches=1,
                  token_budget=4096, learning_rate=1e-3, precision="fp32", device="cpu",
                  sample_interval=0, save_interval=0, reward_workers=0),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    return trainer

whole = run("whole")
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
split = run("split")
for a, b in zip(whole.policy.parameters(), split.policy.parameters(), strict=True):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
print("found", split.step.token_budget, split.engine.max_rows)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS and /proc")
def test_a_process_with_little_memory_gets_through(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LITTLE_MEMORY, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    budget, rows = done.stdout.splitlines()[-1].removeprefix("found ").split()
    assert int(budget) in (512, 1024, 2048) and int(rows) in (1, 2, 4, 8)


LIMITED = """
import resource, sys
from fastppo.cli.main import main
import fastppo.ppo.build, fastppo.cli.dry_run, transformers.models.llama.modeling_llama
room = int(float(sys.argv.pop(1)) * 2**20)
mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no limit of address space")
@pytest.mark.parametrize("room", [100, 400])
def test_a_real_limit_while_a_run_is_built_is_one_line(room: int, tmp_path: Path) -> None:
    """A model of 128 MB with its reference, gradients and moments, in less than it needs."""
    shape: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 128}
    config = LlamaConfig(**shape, vocab_size=len(WORDS), num_hidden_layers=2, num_attention_heads=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "d.jsonl").write_text('{"prompt": "1 2 >"}\n')
    (tmp_path / "r.py").write_text("def f(completions): return [1.0] * len(completions)\n")
    options = ("--model", "model", "--dataset", "d.jsonl", "--reward", "r.py:f", "--device", "cpu")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), "train", *options, "--output-dir", "run"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("fastppo train: out of memory while "), line
