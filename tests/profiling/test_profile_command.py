"""`fastppo profile`, `fastppo profile op` and its --ncu, as a person types them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
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
from fastppo.profiling.case import SIZE_NAMES, Count, Inputs, Passes, Size, passes
from fastppo.profiling.op_cases import CASES

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
    """But what Python keeps of a reward that it imported."""
    return sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")


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
    command = [sys.executable, "-m", "fastppo", "profile", "--config", "run.toml"]
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
    for part in ("forward", "roofline", f"{name} {CASES[name].sizes['smoke'][0].text}"):
        assert part in shown.out
    meta = json.loads((folder / "meta.json").read_text())
    assert len(meta["steps"]) == 3
    phases = json.loads((folder / "table.json").read_text())["phases"]
    assert {"forward", "backward"} & {phase["name"] for phase in phases}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gea"], ["gea", *CASES]),
        (["gae", "--size", "huge"], ["smoke, cpu, gpu", "B=NUMBER,T=NUMBER", "huge"]),
        (["gae", "--size", "T=10,V=5"], ["B=NUMBER,T=NUMBER", "V=5"]),
        (["gae", "--size", "T=0"], ["≥ 1", "T=0"]),
        (["loss_weights", "--size", "N=3,B=4"], ["N ≥ B", "N=3,B=4"]),
        (["group_advantages", "--size", "B=3"], ["B ≥ G", "B=3,G=8"]),
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
    case = CASES["linear_logprobs"]
    for text, default in (("", "cpu"), ("smoke", "cpu")):
        size = case.size(text, default, torch.float32)
        assert size.text == case.sizes[text or default][0].text
    size = case.size("V=7, N=70", "cpu", torch.bfloat16)
    assert size.text == f"N=70 H={case.sizes['cpu'][0]['H']} V=7 bf16"
    assert case.size(size.argument, "gpu", torch.bfloat16).text == size.text


LETTERS = {"N": 60, "B": 5, "T": 7, "E": 3, "G": 5, "H": 16, "V": 33}
GRADIENTS_IN_FORWARD = ("ppo_loss", "value_loss", "linear_ppo_loss")


class Noting(dict[str, Tensor]):
    """Inputs that remember which were used."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.used: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self.used.setdefault(name, super().__getitem__(name))


def small(name: str, dtype: torch.dtype = torch.float32) -> tuple[Size, Inputs]:
    numbers = CASES[name].sizes["smoke"][0].numbers
    size = Size(dtype, **{letter: LETTERS[letter] for letter in numbers})
    return size, CASES[name].inputs(size, CPU, 0)


def made(name: str) -> tuple[Size, Passes]:
    case, (size, inputs) = CASES[name], small(name)
    return size, passes(case.prepare, case.leaves, case.upstream, inputs, size)


def total(tensors: Iterable[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_inputs_and_results(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    size, inputs = small(name, dtype if CASES[name].has_matrices else torch.float32)
    noting = Noting(inputs)
    outputs = case.prepare(noting, size)()
    written = total(outputs.values())
    if name in GRADIENTS_IN_FORWARD:  # instead of a loss and metrics, which N does not make larger
        written = total(noting.used[leaf] for leaf in case.leaves)
    reads, writes = (Count.read(text).of(size) for text in case.work.forward[:2])
    assert (reads, writes) == (total(noting.used.values()), written)
    assert (
        case.work.forward.bytes(size.letters)
        == size.cost(case.work.forward).bytes
        == reads + writes
    )


@pytest.mark.parametrize("name", ["token_logprobs", "linear_logprobs"])
def test_bytes_of_a_backward_pass(name: str) -> None:
    case, (size, inputs) = CASES[name], small(name)
    leaves = total(inputs[leaf] for leaf in case.leaves)
    assert case.work.backward is not None and case.work.both is not None
    assert case.work.backward.bytes(size.letters) == total(inputs.values()) + leaves
    again = leaves if name == "linear_logprobs" else 0  # in one call it is read once, and targets
    targets = inputs["targets"].nbytes if name == "linear_logprobs" else 0
    apart = case.work.forward.bytes(size.letters) + case.work.backward.bytes(size.letters)
    assert case.work.both.bytes(size.letters) == apart - again - targets
    assert case.work.both.flops(size.letters) == case.work.forward.flops(
        size.letters
    ) + case.work.backward.flops(size.letters)


@pytest.mark.parametrize("name", ["linear_logprobs", "linear_ppo_loss"])
def test_flops_are_those_of_the_matrix_products(name: str) -> None:
    case, (size, call) = CASES[name], made(name)
    counted = []

    def count(work: Callable[[], Any]) -> Any:
        # The profiler looks into custom ops.
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as run:
            result = work()
        counted.append(sum(x.flops for x in run.events() if x.name in ("aten::mm", "aten::addmm")))
        return result

    outputs = count(call.forward)
    assert call.backward is not None
    count(functools.partial(call.backward, outputs))
    expected = [work.flops(size.letters) if work else 0 for work in case.work[:2]]
    if name == "linear_logprobs":  # the logits are made again, which does not count
        expected[1] += case.work.forward.flops(size.letters)
    assert counted == expected


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_and_depends_on_the_numbers_it_names(name: str) -> None:
    case, (size, call) = CASES[name], made(name)
    found = call.run()
    assert {f"grad {leaf}" for leaf in case.leaves} == {x for x in found if x.startswith("grad ")}
    assert all(x.isfinite().all() for label, x in found.items() if label != "metrics")
    assert set(case.sizes) == set(SIZE_NAMES)
    for letter in size.numbers.keys() - {"G"}:  # and B where it says how advantages repeat
        other = Size(**{**size.numbers, letter: 2 * size[letter]})
        same = name == "linear_ppo_loss" and letter == "B"
        assert (other.cost(case.work.forward) == size.cost(case.work.forward)) == same, letter


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
    arguments = ["gae", "--ncu", "--size", "T=32,B=2", "--output-dir", str(tmp_path / "out")]
    assert main(["profile", "op", *arguments]) == 2
    message, _, command = capfd.readouterr().err.partition(": ncu ")
    command = f"ncu {command}"
    assert "--ncu" in message and "no program ncu on the PATH" in message
    words = shlex.split(command)
    assert words[0] == "ncu" and words[words.index("--export") + 1].endswith("out/gae.ncu-rep")
    assert words[-4:-2] == ["gae", "B=2,T=32"]
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
