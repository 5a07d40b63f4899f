"""`fastppo profile`, `fastppo profile op` and its --ncu, as a person types them."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastppo.cli.main import main
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.ppo import update_metrics
from fastppo.ppo.config import TrainConfig
from fastppo.profiling.op_inputs import Inputs, Size
from fastppo.profiling.ops import OPS, SIZES, parse_size

FILES = ["meta.json", "profile.html", "table.csv", "table.json", "trace.json.gz"]
CPU = torch.device("cpu")
TOML = """
model = "model"
dataset = "prompts.jsonl"
reward = ["rewards.py:larger"]
num_iterations = 2
prompts_per_iteration = 8
max_prompt_length = 8
max_response_length = 3
num_minibatches = 2
output_dir = "run"
device = "cpu"
precision = "fp32"
"""
REWARD = """
def larger(completions, answer):
    return [float(text.split() == [a]) for text, a in zip(completions, answer)]
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model, prompts, a reward and a configuration that names them."""
    tiny_model(len(WORDS), seed=0).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a} 9 >", "answer": "9"} for a in range(9)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARD)
    (tmp_path / "run.toml").write_text(TOML)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_words(stderr: str) -> str:
    """What is left without the lines that torch's profiler writes once it has been used before."""
    return "".join(x for x in stderr.splitlines(True) if not x.startswith("USDT:"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_run_is_profiled_into_a_folder_of_its_own(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (project / "run").mkdir()
    (project / "run" / "metrics.jsonl").write_text("of a real run\n")
    before = names(project)
    arguments = ["profile", "--config", "run.toml", "--steps", "1", "--num-minibatches", "1"]
    assert main(arguments) == 0
    assert names(project) == sorted([*before, "profiles"]) and names(project / "run") == [
        "metrics.jsonl"
    ]
    (folder,) = (project / "profiles").iterdir()
    assert names(folder) == FILES
    shown = capfd.readouterr()
    assert own_words(shown.err) == ""
    source = Path(update_metrics.__file__).read_text().splitlines()
    (line,) = (number for number, text in enumerate(source, 1) if ".tolist()" in text)
    for part in ("rollout", "update", "optimiser", f"update_metrics.py:{line}"):
        assert part in shown.out
    for name in FILES:
        assert str(folder / name) in shown.out.replace("\n", "")
    table = json.loads((folder / "table.json").read_text())
    assert {phase["name"] for phase in table["phases"]} >= {"rollout", "update", "ref", "other"}
    meta = json.loads((folder / "meta.json").read_text())
    assert len(meta["steps"]) == 1
    assert "<html" in (folder / "profile.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--steps", "0"], ["steps", "≥ 1", "0"]),
        (["--num-minibatchs", "4"], ["--num-minibatch"]),
        (["--output-dir", "model"], ["output_dir", "not empty"]),
        (["--dataset", "nowhere.jsonl"], ["nowhere.jsonl"]),
    ],
)
def test_what_cannot_work_is_refused(
    project: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    before = names(project)
    try:
        status = main(["profile", "--config", "run.toml", *arguments])
    except SystemExit as exit:  # tyro's own: an unknown flag
        status = int(exit.code or 0)
    assert status == 2
    assert names(project) == before
    shown = capfd.readouterr().err
    assert all(word in shown for word in words), shown


def test_help_lists_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    own = {"--steps", "--config", "--aot", "op NAME"}
    flags = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(TrainConfig)}
    for arguments, expected in (
        ([], own | flags),
        (["op"], {"NAME", "--size", "--device", "--precision", "--output-dir", "--ncu"}),
        (["--aot"], {"--aot", "--target"}),
    ):
        with pytest.raises(SystemExit) as exit:
            main(["profile", *arguments, "--help"])
        assert exit.value.code == 0
        shown = capsys.readouterr().out
        assert not [flag for flag in expected if flag not in shown]


@pytest.mark.slow
def test_ctrl_c_ends_with_what_was_traced(project: Path) -> None:
    command = [sys.executable, "-m", "fastppo.cli.main", "profile", "--config", "run.toml"]
    process = subprocess.Popen(
        [*command, "--steps", "500", "--output-dir", "out"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while "tracing step 3" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err == "fastppo profile: interrupted\n"
    assert names(project / "out") == FILES
    assert "rollout" in out
    assert len(json.loads((project / "out" / "meta.json").read_text())["steps"]) >= 2


# One op


@pytest.mark.parametrize("name", ["gae", "linear_ppo_loss", "token_logprobs"])
def test_one_op_is_timed_and_traced(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    folder = tmp_path / "out"
    arguments = [name, "--size", "smoke", "--device", "cpu", "--output-dir", str(folder)]
    assert main(["profile", "op", *arguments]) == 0
    assert names(folder) == FILES
    shown = capfd.readouterr()
    assert own_words(shown.err) == ""
    for part in ("forward", "roofline", SIZES["smoke"].text(OPS[name].letters)):
        assert part in shown.out
    meta = json.loads((folder / "meta.json").read_text())
    assert len(meta["steps"]) == 3
    phases = json.loads((folder / "table.json").read_text())["phases"]
    assert {"forward", "backward"} & {phase["name"] for phase in phases}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gea"], ["gea", *OPS]),
        (["gae", "--size", "huge"], ["smoke, cpu, gpu", "N=NUMBER,B=NUMBER", "huge"]),
        (["gae", "--size", "N=10,V=5"], ["N=NUMBER,B=NUMBER", "V=5"]),
        (["gae", "--size", "N=0"], ["≥ 1", "N=0"]),
        (["gae", "--size", "N=3,B=4"], ["N ≥ B", "N=3,B=4"]),
        (["whiten", "--size", "8192"], ["N=NUMBER", "8192"]),
    ],
)
def test_unknown_ops_and_sizes_are_refused_with_what_there_is(
    capfd: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    assert main(["profile", "op", *arguments]) == 2
    shown = capfd.readouterr().err
    assert all(word in shown for word in words), shown


def test_numbers_replace_those_of_the_default() -> None:
    assert parse_size("", "gae", "cpu") == SIZES["cpu"]
    assert parse_size("smoke", "gae", "cpu") == SIZES["smoke"]
    size = parse_size("V=7, N=70", "linear_logprobs", "cpu")
    assert size == dataclasses.replace(SIZES["cpu"], V=7, N=70)
    letters = OPS["linear_logprobs"].letters
    assert parse_size(size.text(letters), "linear_logprobs", "gpu").H == SIZES["cpu"].H


class Recorded(Inputs):
    """Inputs that remember how many bytes were made."""

    bytes = 0

    def _add(self, tensors: Sequence[Tensor]) -> None:
        self.bytes += sum(x.nbytes for x in tensors)

    def per_token(self, count: int = 1) -> list[Tensor]:
        made = super().per_token(count)
        self._add(made)
        return made


for _name in ("matrix", "mask", "weights", "targets", "cu_seqlens"):

    def _recorded(self: Recorded, *arguments: int, _name: str = _name) -> Tensor:
        made: Tensor = getattr(Inputs, _name)(self, *arguments)
        self._add([made])
        return made

    setattr(Recorded, _name, _recorded)

SMALL = Size(N=60, B=5, H=16, V=33)
SCANS = ("gae", "whiten", "kl_penalty", "loss_weights")


@pytest.mark.parametrize("name", SCANS)
def test_bytes_are_those_of_inputs_and_results(name: str) -> None:
    inputs = Recorded(SMALL, CPU, torch.float32)
    outputs = OPS[name].make(inputs).forward()
    moved = inputs.bytes + sum(x.nbytes for x in outputs)
    assert OPS[name].costs(SMALL, torch.float32)[0].bytes == moved


@pytest.mark.parametrize("name", ["ppo_loss", "value_loss", "linear_ppo_loss"])
def test_bytes_of_a_loss_are_those_of_its_inputs_and_gradients(name: str) -> None:
    inputs = Recorded(SMALL, CPU, torch.float32)
    call = OPS[name].make(inputs)
    gradients = call.backward(call.forward())
    moved = inputs.bytes + sum(x.nbytes for x in gradients)
    assert OPS[name].costs(SMALL, torch.float32)[0].bytes == moved


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_ppo_loss"])
def test_flops_are_those_of_the_matrix_products(name: str) -> None:
    call = OPS[name].make(Inputs(SMALL, CPU, torch.float32))
    counted = []

    def count(work: Callable[[], Any]) -> Any:
        # The profiler looks into custom ops.
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as run:
            result = work()
        counted.append(sum(x.flops for x in run.events() if x.name in ("aten::mm", "aten::addmm")))
        return result

    outputs = count(call.forward)
    count(lambda: call.backward(outputs))
    forward, backward = OPS[name].costs(SMALL, torch.float32)
    assert counted == [forward.flops, backward.flops if backward else 0]


@pytest.mark.parametrize("name", OPS)
def test_every_op_runs_and_depends_on_the_numbers_it_names(name: str) -> None:
    op = OPS[name]
    call = op.make(Inputs(SMALL, CPU, torch.float32))
    outputs = call.forward()
    gradients = call.backward(outputs) if call.leaves else ()
    assert all(x.isfinite().all() for x in (*outputs, *gradients))
    cost = op.costs(SMALL, torch.float32)
    for letter in "NBHV":
        other = dataclasses.replace(SMALL, **{letter: 2 * getattr(SMALL, letter)})
        assert (op.costs(other, torch.float32) != cost) == (letter in op.letters), letter


# Nsight Compute

NCU = """#!/bin/sh
# looks like ncu: notes its arguments and runs what stands behind its own ones
for argument in "$@"; do printf '%s\\n' "$argument"; done > "$NCU_ARGUMENTS"
while [ "$1" != "$NCU_PYTHON" ]; do shift; done
exec "$@"
"""


def test_without_ncu_the_error_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["gae", "--ncu", "--size", "N=32,B=2", "--output-dir", str(tmp_path / "out")]
    assert main(["profile", "op", *arguments]) == 2
    message, command = capfd.readouterr().err.rsplit("\n", 2)[:2]
    assert "--ncu" in message and "no program ncu on the PATH" in message
    words = shlex.split(command)
    assert words[0] == "ncu" and words[words.index("--export") + 1].endswith("out/gae.ncu-rep")
    assert words[-4:-2] == ["gae", "N=32,B=2"]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ncu_is_started_on_one_call_of_the_op(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program, noted = tmp_path / "ncu", tmp_path / "arguments"
    program.write_text(NCU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NCU_ARGUMENTS", str(noted))
    monkeypatch.setenv("NCU_PYTHON", sys.executable)
    arguments = ["whiten", "--ncu", "--size", "N=32", "--output-dir", str(tmp_path / "out")]
    assert main(["profile", "op", *arguments]) == 0
    assert str(tmp_path / "out" / "whiten.ncu-rep") in capfd.readouterr().out.replace("\n", "")
    lines = noted.read_text().splitlines()
    assert lines[lines.index("--nvtx-include") + 1] == "profiled/"
    program.write_text("#!/bin/sh\nexit 7\n")
    arguments[-1] += "2"
    assert main(["profile", "op", *arguments]) == 2
    assert "ended with status 7" in capfd.readouterr().err
