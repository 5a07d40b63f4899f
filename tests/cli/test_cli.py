"""The program `fastppo`, as a process of its own, on a model of two layers in a folder."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, GPT2Config

import fastppo
from fastppo.cli.doctor import Check, step_checks
from fastppo.cli.main import main
from fastppo.models.loading import load_model
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo.config import PPOConfig
from fastppo.ppo.step import PPOStep

PROGRAM = str(Path(sys.executable).with_name("fastppo"))
CHECKS = (
    *("weights are finite", "log-probabilities ≤ 0", "ratio = 1", "KL to the reference = 0"),
    *("packed = one sequence", "packed = transformers' own", "sampler = trainer"),
    *("tokens are in the vocabulary", "saved and loaded = the model"),
    *("linear_logprobs =", "entropy =", "linear_ppo_loss =", "gae ="),
)
TOML = """
model = "model"
dataset = "prompts.jsonl"
reward = ["rewards.py:larger"]
num_iterations = 2
prompts_per_iteration = 8
max_prompt_length = 8
max_response_length = 3
num_minibatches = 2
learning_rate = 1e-3
output_dir = "run"
device = "cpu"
precision = "fp32"
"""
REWARD = """
def larger(completions, answer):
    return [float(text.split() == [a]) for text, a in zip(completions, answer)]
"""

Run = Callable[..., subprocess.CompletedProcess[str]]
Call = Callable[..., tuple[str, str]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its tokenizer."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(len(WORDS), seed=0).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def project(tmp_path: Path, weights: Path) -> Path:
    """A folder with a model, prompts, a reward and a configuration that names them."""
    shutil.copytree(weights, tmp_path / "model")
    rows = [{"prompt": f"{a} 9 >", "answer": "9"} for a in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "run.toml").write_text(TOML)
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`fastppo ARGUMENTS` in tmp_path, which may print neither warnings nor tracebacks."""

    def call(*arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [PROGRAM, *arguments],
            cwd=tmp_path,
            env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr
        return done

    return call


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """The same without a process of its own, for what needs none: its stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def within(*arguments: str, status: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        assert main(arguments) == status
        return capfd.readouterr()

    return within


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"fastppo {fastppo.__version__}\n"


@pytest.mark.slow
def test_train_reads_its_file_from_anywhere(project: Path, run: Run) -> None:
    (project / "elsewhere").mkdir()
    (project / "run.toml").rename(project / "elsewhere" / "run.toml")
    for name in ("model", "prompts.jsonl", "rewards.py"):
        (project / name).rename(project / "elsewhere" / name)
    flags = ["--num-iterations", "3", "--seed=7", "--no-norm-adv"]
    done = run("train", "--config", "elsewhere/run.toml", *flags)
    assert "reward" in done.stdout and "report.html" in done.stdout
    rows = [json.loads(r) for r in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2, 3]
    written = json.loads((project / "run" / "config.json").read_text())
    assert (written["num_iterations"], written["seed"], written["norm_adv"]) == (3, 7, False)
    assert written["learning_rate"] == 1e-3
    model = AutoModelForCausalLM.from_pretrained(project / "run" / "model")
    assert model(torch.tensor([[3, 4]])).logits.isfinite().all()
    assert AutoTokenizer.from_pretrained(project / "run" / "model")("3")["input_ids"] == [6]


def test_a_folder_that_is_taken_is_refused(project: Path, call: Call) -> None:
    (project / "run").mkdir()
    (project / "run" / "mine").write_text("")
    error = call("train", "--config", "run.toml", status=2)[1]
    assert error.startswith("fastppo train: output_dir: ") and len(error.splitlines()) == 1
    assert files_below(project / "run") == {"mine"}


def test_a_dry_run_shows_everything_and_touches_nothing(project: Path, call: Call) -> None:
    (project / "model" / "model.safetensors").unlink()  # no weights to load
    before = files_below(project)
    out = call("train", "--config", "run.toml", "--dry-run", "--train-layers", "1")[0]
    model = tiny_model(len(WORDS), seed=0)
    total = sum(p.numel() for p in model.parameters())
    last = sum(p.numel() for p in model.model.layers[1].parameters()) + 64  # and the final norm
    assert f"parameters  {total:,}, of which {last:,} are trained" in out
    for name, value in (("learning_rate", "0.001"), ("gae_lambda", "0.95"), ("kl_in", "'reward'")):
        assert any(name in line and value in line for line in out.splitlines()), name
    assert "GiB" in out and "AdamW" in out and "larger" in out
    lines = out.splitlines()
    assert lines[lines.index("first prompt, as the model will see it:") + 1].strip() == "0 9 >"
    new = files_below(project) - before
    assert not {name for name in new if not name.startswith("__pycache__")}  # Python's own


@pytest.mark.parametrize("option", ["--eval-dataset", "--ref-model", "--reward"])
def test_a_dry_run_looks_at_every_input(project: Path, call: Call, option: str) -> None:
    error = call("train", "--config", "run.toml", "--dry-run", option, "./none.jsonl", status=2)[1]
    assert "none.jsonl" in error and len(error.splitlines()) == 1


def test_an_unsupported_family_is_refused_by_name(project: Path, call: Call) -> None:
    shape: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": len(WORDS)}
    Gemma2Config(**shape).save_pretrained(project / "model")
    (project / "model" / "model.safetensors").unlink()
    error = call("train", "--config", "run.toml", status=2)[1]
    assert "gemma2" in error and len(error.splitlines()) == 1
    assert call("train", "--config", "run.toml", "--dry-run", status=2)[1] == error
    assert not (project / "run").exists()


def test_a_failing_reward_is_one_line(project: Path, call: Call) -> None:
    (project / "rewards.py").write_text("def larger(completions): return 1 / 0\n")
    error = call("train", "--config", "run.toml", status=2)[1]
    assert "'larger'" in error and "ZeroDivisionError" in error
    assert len(error.splitlines()) == 1


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_one_line(project: Path) -> None:
    # A shell's background job ignores SIGINT and passes that on: set it back first.
    restore = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    arguments = ["train", "--config", "run.toml", "--num-iterations", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-c", restore, PROGRAM, *arguments],
        cwd=project,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = project / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error.split() == [
        *("fastppo", "train:", "interrupted;", "the", "run", "is", "in", str(project / "run"))
    ]
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


@pytest.mark.slow
def test_doctor_passes_a_sound_model(project: Path, run: Run) -> None:
    out = run("doctor", "--model", "model").stdout
    assert not [check for check in CHECKS if check not in out]
    assert "all checks passed" in out and "FAILED" not in out
    assert fastppo.__version__ in out and torch.__version__ in out


@pytest.mark.parametrize(
    ("scale", "failed"),
    [(float("nan"), "weights are finite"), (1e7, "packed = transformers' own")],
    ids=["nan", "huge"],  # logits of 1e7 move by thousands with the last bit of a bf16
)
def test_doctor_fails_a_broken_model(project: Path, call: Call, scale: float, failed: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(project / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    model.save_pretrained(project / "model")
    out = call("doctor", "--model", "model", "--precision", "bf16", status=1)[0]
    assert any(failed in line for line in out.splitlines() if "FAILED" in line)
    assert "checks failed" in out and "all checks passed" not in out


def test_doctor_loads_what_it_saved(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = PPOStep(load_model(str(project / "model")), PPOConfig(precision="fp32", device="cpu"))
    step.policy.actor.model.model.layers[1].register_forward_hook(lambda *args: args[2] + 0.1)
    checks = {check.name: check for check in step_checks(step, [[3, 4], [5]], (1,))}
    assert not checks["saved and loaded = the model"].ok
    assert "loaded again, the model is not" in capsys.readouterr().out
    lost = step_checks(step, [[3, 40], [5]], (99,))
    assert [(check.name, check.measured) for check in lost if not check.ok] == [
        ("tokens are in the vocabulary", 2)
    ]


def test_doctor_names_weights_that_are_missing(project: Path, call: Call) -> None:
    file = project / "model" / "model.safetensors"
    state = {name: value for name, value in load_file(file).items() if "layers.1" not in name}
    save_file(state, file, {"format": "pt"})
    error = call("doctor", "--model", "model", status=2)[1]
    assert "fastppo doctor: model: 'model' lacks weights for model.layers.1." in error


def test_a_check_is_ok_up_to_its_limit() -> None:
    def check(measured: float) -> bool:
        return Check("x", measured, 0.5, "nats").ok

    assert check(0.5) and not check(0.51) and not check(float("nan")) and not check(float("inf"))


@pytest.mark.slow
def test_doctor_knows_another_family(tmp_path: Path, run: Run) -> None:
    config = GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=len(WORDS), eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    word_tokenizer().save_pretrained(tmp_path / "gpt2")
    assert "all checks passed" in run("doctor", "--model", "gpt2").stdout


@pytest.mark.slow
def test_the_demo_learns(tmp_path: Path, run: Run) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = run("demo", "--seed", "1", "--output-dir", "run").stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of the processor, whoever else uses it; 15 s on two free cores
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in lines]
    assert sum(rewards[-5:]) / 5 >= sum(rewards[:3]) / 3 + 0.4
    assert "accuracy" in out and "report.html" in out
