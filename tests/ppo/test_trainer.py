"""PPOTrainer from its arguments to the run directory, on a model of two layers and 13 words."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastppo import PPOConfig, PPOTrainer
from fastppo.checkpoint import verify
from fastppo.cli.demo import larger_digit
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

ROWS = [
    {"prompt": f"{a} {b} >", "answer": str(max(a, b))}
    for a in range(10)
    for b in range(10)
    if a != b
]
REQUIRED = (
    *("iteration", "reward", "kl", "entropy", "policy_loss", "value_loss", "approx_kl"),
    *("clipfrac", "explained_variance", "response_length", "truncated", "tokens_per_second"),
    *(f"seconds_{p}" for p in ("rollout", "reward", "pack", "evaluate", "advantages", "update")),
    *("seconds_total", "learning_rate", "kl_coef", "nonfinite_steps", "eos_rate", "unscored"),
)


def has_length_two(completions: list[str], **_: Any) -> list[float]:
    """A second reward: half a point for two words."""
    return [0.5 * float(len(text.split()) == 2) for text in completions]


def config(output_dir: Path | str, **options: Any) -> PPOConfig:
    defaults: dict[str, Any] = {
        "num_iterations": 2,
        "prompts_per_iteration": 16,
        "max_prompt_length": 8,
        "max_response_length": 3,
        "learning_rate": 1e-3,
        "num_minibatches": 2,
        "precision": "fp32",
        "device": "cpu",
    }
    return PPOConfig(output_dir=str(output_dir), **{**defaults, **options})


def make_trainer(output_dir: Path | str, rewards: Any = larger_digit, **options: Any) -> PPOTrainer:
    """Options that PPOTrainer has go there, all others into the configuration."""
    own = ("eval_dataset", "ref_model", "value_model", "peft_config", "reward_weights", "engine")
    arguments = {name: options.pop(name) for name in own if name in options}
    return PPOTrainer(
        options.pop("model", None) or tiny_model(len(WORDS), seed=0),
        rewards,
        options.pop("train_dataset", ROWS[10:]),
        config(output_dir, **options),
        processing_class=options.pop("processing_class", None) or word_tokenizer(),
        **arguments,
    )


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[PPOTrainer, dict[str, Any], Path]:
    """One run with everything on, its summary and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "everything"
    trainer = make_trainer(
        folder,
        [larger_digit, has_length_two],
        reward_weights=[1.0, 0.5],
        eval_dataset=ROWS[:10],
        num_iterations=3,
        eval_interval=2,
        save_interval=2,
        sample_interval=1,
    )
    return trainer, trainer.train(), folder


Finished = tuple[PPOTrainer, dict[str, Any], Path]


def test_the_run_directory_is_complete(finished: Finished) -> None:
    folder = finished[2]
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "report.html"),
        *("reward.png", "model", "checkpoints", ".lock"),
    }
    written = json.loads((folder / "config.json").read_text())
    assert written["prompts_per_iteration"] == 16 and written["gae_lambda"] == 0.95
    assert (folder / "reward.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    report = (folder / "report.html").read_text()
    assert report.startswith("<!doctype html>") and "explained_variance" in report


def test_metrics_have_one_object_per_iteration(finished: Finished) -> None:
    rows = read_lines(finished[2] / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    for row in rows:
        assert not [name for name in REQUIRED if not isinstance(row[name], (int, float))]
        parts = row["reward/larger_digit"] + 0.5 * row["reward/has_length_two"]
        assert row["reward"] == pytest.approx(parts)
        phases = [v for k, v in row.items() if k.startswith("seconds_") and k != "seconds_total"]
        assert sum(phases) == pytest.approx(row["seconds_total"], rel=0.1)
    evaluated = [[name for name in row if name.startswith("eval_")] for row in rows]
    assert not evaluated[0] and not evaluated[2]
    assert "eval_reward" in evaluated[1]


def test_samples_hold_every_response(finished: Finished) -> None:
    samples = read_lines(finished[2] / "samples.jsonl")
    rows = read_lines(finished[2] / "metrics.jsonl")
    assert len(samples) == 3 * 16
    prompts = {row["prompt"]: row["answer"] for row in ROWS[10:]}
    for iteration, row in enumerate(rows, start=1):
        own = [sample for sample in samples if sample["iteration"] == iteration]
        assert sum(s["reward"] for s in own) / 16 == pytest.approx(row["reward"], abs=1e-6)
        assert sum(s["truncated"] for s in own) / 16 == pytest.approx(row["truncated"])
    for sample in samples:
        words = sample["response"].split()
        score = float(words == [prompts[sample["prompt"]]]) + 0.25 * (len(words) == 2)
        assert sample["reward"] == score


def test_the_summary_says_what_happened(finished: Finished) -> None:
    _, summary, folder = finished
    written = json.loads((folder / "summary.json").read_text())
    assert written.items() <= summary.items()
    rewards = [row["reward"] for row in read_lines(folder / "metrics.jsonl")]
    assert summary["rewards"] == pytest.approx(rewards)
    assert summary["eval_before"]["prompts"] == summary["eval_after"]["prompts"] == 10
    assert summary["run_dir"] == str(folder) and summary["model"] == str(folder / "model")
    assert summary["parameters"]["trainable"] > 0


def test_the_saved_model_is_the_trained_one(finished: Finished) -> None:
    trainer, _, folder = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    ids = torch.tensor([tokenizer("3 5 >")["input_ids"]])
    start = tiny_model(len(WORDS), seed=0)
    with torch.no_grad(), trainer.policy.unpacked() as trained:
        torch.testing.assert_close(model(ids).logits, trained(ids).logits)
        assert (model(ids).logits - start(ids).logits).abs().max() > 1e-3
    head = load_file(folder / "model" / "critic" / "value_head.safetensors")
    assert torch.equal(head["weight"], trainer.policy.value_head.weight)
    assert head["weight"].any()
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert checkpoint.name == "iteration-000002"
    earlier = verify(checkpoint).tensors("policy")
    trained = dict(trainer.policy.named_parameters())
    assert earlier.keys() <= trained.keys()
    assert any(not torch.equal(value, trained[name]) for name, value in earlier.items())


def test_an_existing_run_is_refused_and_untouched(finished: Finished, tmp_path: Path) -> None:
    folder = finished[2]
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}
    with pytest.raises(ValueError, match="output_dir: .*not empty"):
        make_trainer(folder)
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")} == before
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="output_dir"):
        make_trainer(file)
    assert file.read_text() == "mine"


def test_an_empty_folder_is_used_and_no_name_means_the_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(tmp_path, num_iterations=1).train()
    assert (tmp_path / "summary.json").is_file()
    monkeypatch.chdir(tmp_path)
    summary = make_trainer("", num_iterations=1).train()
    assert Path(summary["run_dir"]).parent == tmp_path / "runs"


def without_times(path: Path) -> list[dict[str, Any]]:
    timing = ("seconds_", "tokens_per_second")
    rows = read_lines(path)
    return [{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows]


def test_seeded_runs_are_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(ord(name))  # has no say
        trainer = make_trainer(tmp_path / name, has_length_two, seed=seed, update_epochs=2)
        trainer.train()
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in "abc"]
    assert samples[0] == samples[1] != samples[2]
    metrics = [without_times(tmp_path / name / "metrics.jsonl") for name in "abc"]
    assert repr(metrics[0]) == repr(metrics[1]) != repr(metrics[2])
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    "options",
    [
        {"advantage": "grpo", "n_samples": 4, "prompts_per_iteration": 4},
        {"critic": "separate", "critic_warmup": 1},
        {"value_model": "tiny", "critic": "separate"},
        {"ref_model": "tiny"},
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")},
    ],
    ids=["groups", "separate", "value-model", "ref-model", "lora"],
)
def test_other_shapes_of_a_run(tmp_path: Path, options: dict[str, Any]) -> None:
    companions = {name: tiny_model(len(WORDS), 1) for name in ("ref_model", "value_model")}
    options |= {name: model for name, model in companions.items() if name in options}
    summary = make_trainer(tmp_path / "run", **options).train()
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and all(math.isfinite(row["kl"]) for row in rows)
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    assert model.config.vocab_size == len(WORDS)
    saved = {path.name for path in Path(summary["model"]).iterdir()}
    assert ("adapter" in saved) == ("peft_config" in options)
    assert ("critic" in saved) == (options.get("advantage") != "grpo")
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    if options.get("n_samples"):
        prompts = [sample["prompt"] for sample in samples[:16]]
        assert prompts == [p for p in prompts[::4] for _ in range(4)]
        assert len({sample["response"] for sample in samples[:4]}) > 1  # not four copies


def test_a_new_adapter_starts_from_the_runs_seed(tmp_path: Path) -> None:
    for name in "ab":
        torch.manual_seed(ord(name))  # has no say
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        make_trainer(tmp_path / name, has_length_two, peft_config=lora).train()
    files = [tmp_path / name / "model" / "model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", report_to=("tensorboard",)).train()
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    for name in ("reward", "kl", "explained_variance", "seconds_update"):
        scalars = events.Scalars(name)
        assert [event.step for event in scalars] == [1, 2]
        assert [e.value for e in scalars] == pytest.approx([row[name] for row in rows], rel=1e-5)
