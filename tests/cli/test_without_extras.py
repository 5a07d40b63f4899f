"""A run from TOML, JSON lines and CSV where no optional package can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer

EXTRAS = ("datasets", "pyarrow", "pandas", "peft", "tensorboard", "wandb", "trackio", "gguf")
TOML = """
model = "model"
dataset = "prompts.jsonl"
eval_dataset = "held_out.csv"
reward = ["rewards.py:length"]
num_iterations = 1
prompts_per_iteration = 4
max_response_length = 3
num_minibatches = 1
output_dir = "run"
device = "cpu"
"""
PROGRAM = f"""
import sys
for name in {EXTRAS}:
    sys.modules[name] = None  # importing it raises ImportError
from fastppo.cli.main import main
assert main(["train", "--config", "run.toml"]) == 0
for name in ("x.parquet", "folder"):
    assert main(["train", "--config", "run.toml", "--dry-run", "--dataset", name]) == 2
"""


@pytest.mark.slow
def test_text_files_need_no_extra_and_the_others_name_it(tmp_path: Path) -> None:
    tiny_model(len(WORDS), seed=0).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a} 9 >"} for a in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held_out.csv").write_text("prompt\n1 9 >\n")
    (tmp_path / "rewards.py").write_text(
        "def length(completions): return list(map(len, completions))"
    )
    (tmp_path / "run.toml").write_text(TOML)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["eval_after"]
    errors = [line for line in done.stderr.splitlines() if line]
    assert len(errors) == 2, done.stderr
    for error, package in zip(
        errors, ("x.parquet needs pyarrow", "folder needs datasets"), strict=True
    ):
        assert package in error and "pip install 'fastppo[datasets]'" in error
