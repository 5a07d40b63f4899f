"""Which data a run may be resumed with: what changes the training is named, and nothing else is."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers.utils.chat_template_utils as clock

from fastppo import PPOConfig, PPOTrainer
from fastppo.checkpoint import CheckpointError
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.training import interrupts

ROWS = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(4) for b in range(4)]
DATED = (
    "{{ strftime_now('%d') | replace('0', '') }} "
    "{% for m in messages %}{{ m['content'] }} {% endfor %}>"
)


def longer(completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(str(text))) for text in completions]


def blind(completions: list[Any]) -> list[float]:
    return [float(len(str(text))) for text in completions]


def trainer(
    folder: Path, iterations: int, rows: Any = ROWS, reward: Any = longer, **arguments: Any
) -> PPOTrainer:
    """Of a run in `folder`, resumed where it is there."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = DATED
    args = PPOConfig(
        output_dir=str(folder),
        num_iterations=iterations,
        lr_schedule="constant",
        prompts_per_iteration=4,
        max_prompt_length=8,
        max_response_length=3,
        num_minibatches=2,
        kl_coef=0.0,
        learning_rate=1e-3,
        save_interval=1,
        sample_interval=0,
        reward_workers=0,
        device="cpu",
        precision="fp32",
    )
    return PPOTrainer(
        tiny_model(len(WORDS), seed=0),
        reward,
        rows,
        args,
        processing_class=tokenizer,
        resume_from_checkpoint=folder.exists(),
        **arguments,
    )


def set_day(monkeypatch: pytest.MonkeyPatch, day: int) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2026, 11, day)

    monkeypatch.setattr(clock, "datetime", Clock)


def test_a_template_with_the_date_is_only_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": [{"role": "user", "content": str(i)}]} for i in range(8)]
    set_day(monkeypatch, 7)
    trainer(tmp_path / "run", 1, rows).train()
    set_day(monkeypatch, 8)
    assert trainer(tmp_path / "run", 2, rows).train()["iterations"] == 2
    out = capsys.readouterr().out.replace("\n", "")
    assert "prompts are encoded to other tokens, the first in row 0, as by a template" in out


def test_only_what_a_reward_reads_is_compared(tmp_path: Path) -> None:
    trainer(tmp_path / "run", 1, reward=blind).train()
    others = [{**row, "answer": "?", "source": "b"} for row in ROWS]
    assert trainer(tmp_path / "run", 2, others, blind).train()["iterations"] == 2
    others[5] = {**others[5], "prompt": "9 >"}
    with pytest.raises(
        CheckpointError, match="'prompt' of row 5 differs .*--allow-changes dataset"
    ):
        trainer(tmp_path / "run", 3, others, blind).train()
    allowed = trainer(tmp_path / "run", 3, others, blind, allow_changes=["dataset"])
    assert allowed.train()["iterations"] == 3


def test_sets_and_odd_keys_in_a_column_are_resumed(tmp_path: Path) -> None:
    for iterations in (1, 2):
        rows = [{**row, "meta": {1: {"a", "b"}, "x": object()}} for row in ROWS]
        assert trainer(tmp_path / "run", iterations, rows).train()["iterations"] == iterations


def test_other_weights_of_the_rewards_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path / "run", 1, reward_weights=[1.0]).train()
    with pytest.raises(
        CheckpointError, match=r"weights of the rewards are \[1.0\] there and \[2.0\]"
    ):
        trainer(tmp_path / "run", 2, reward_weights=[2.0]).train()
    again = trainer(
        tmp_path / "run", 2, reward_weights=[2.0], allow_changes=["reward_weights", "model"]
    )
    assert again.train()["iterations"] == 2


def old_identity(own: PPOTrainer) -> dict[str, Any]:
    """What checkpoints had before they could say where prompts differ."""
    digest = hashlib.sha256()
    for ids in own.train_data.ids:
        digest.update(np.int32(ids.size).tobytes() + ids.tobytes())
    digest.update(json.dumps(own.train_data.columns, sort_keys=True, default=repr).encode())
    new = PPOTrainer.identity(own)
    return {key: new[key] for key in ("precision", "reward_names", "frozen")} | {
        "prompts": digest.hexdigest()
    }


def test_an_older_checkpoint_is_resumed(tmp_path: Path) -> None:
    old = trainer(tmp_path / "run", 1)
    old.identity = lambda: old_identity(old)  # type: ignore[method-assign]
    old.train()
    with pytest.raises(CheckpointError, match="of the training prompts, their digest is another"):
        trainer(tmp_path / "run", 2, ROWS[:-1]).train()
    assert trainer(tmp_path / "run", 2).train()["iterations"] == 2
    trainer(tmp_path / "whole", 2).train()
    samples = [(tmp_path / name / "samples.jsonl").read_bytes() for name in ("run", "whole")]
    assert samples[0] == samples[1]


def test_an_iteration_under_way_starts_anew_with_other_prompts(tmp_path: Path) -> None:
    """Else responses to the old prompts would be trained on as if they were to the new ones."""

    def interrupted(completions: list[Any], **columns: Any) -> list[float]:
        raise interrupts.Interrupted(15)

    with contextlib.suppress(interrupts.Interrupted):
        trainer(tmp_path / "run", 1, reward=interrupted).train()
    (saved,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert saved.name == "iteration-000000-0000"  # it has the responses
    others = [{**row, "prompt": f"9 {row['prompt']}"} for row in ROWS]
    seen: list[Any] = []

    def watches(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((prompts, completions))
        return [0.0, 1.0, 2.0, 3.0]

    names = ["dataset", "reward"]
    trainer(tmp_path / "run", 1, others, watches, allow_changes=names).train()
    trainer(tmp_path / "whole", 1, others, watches).train()
    assert seen[0] == seen[1] and seen[0][0][0].startswith("9")
