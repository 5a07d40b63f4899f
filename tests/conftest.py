"""Fixtures of the whole suite."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for a hub is a broken test
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch: less spinning on a busy machine

import pytest
import torch

if TYPE_CHECKING:
    from fastppo.profiling.meta import Ceilings

ROOT = Path(__file__).resolve().parents[1]
TOML = """
model = "model"
dataset = "prompts.jsonl"
eval_dataset = "prompts.jsonl"
reward = ["rewards.py:larger"]
num_iterations = 6
prompts_per_iteration = 8
max_prompt_length = 8
max_response_length = 3
update_epochs = 2
num_minibatches = 3
token_budget = 16
learning_rate = 1e-3
kl_coef = 0.1
kl_target = 0.05
kl_horizon = 100
eval_interval = 2
save_interval = 1
device = "cpu"
precision = "fp32"
"""
REWARD = """
def larger(completions, answer):
    return [float(text.split() == [a]) + 0.1 * len(text) for text, a in zip(completions, answer)]
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that the others run beside it."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)


@pytest.fixture(autouse=True)
def poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fill every `torch.empty` with NaN, so that reading what nobody wrote shows.

    Not in tests for a GPU: they run what production runs, launch for launch, and deterministic mode
    would add a fill for each allocation and take other kernels for attention and indexing.
    """
    if request.node.get_closest_marker("gpu"):
        yield
        return
    torch.use_deterministic_algorithms(True)  # its fill_uninitialized_memory is on by default
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def ceilings_once() -> Callable[[torch.device], Ceilings]:
    """`measure_ceilings` that keeps its answer: ten seconds on a CPU without bf16."""
    from fastppo.profiling.ceilings import measure_ceilings

    return functools.cache(measure_ceilings)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, a reward and a configuration that names them."""
    folder = tmp_path_factory.mktemp("template")
    from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer

    tiny_model(len(WORDS), seed=0).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(5) for b in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARD)
    (folder / "run.toml").write_text(TOML)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Path:
    """A copy of the template."""
    return Path(shutil.copytree(template, tmp_path / "project"))


@pytest.fixture
def private_mounts() -> tuple[str, ...]:
    """A command prefix under which a program can mount what only it sees."""
    prefix = ("unshare", "--user", "--map-root-user", "--mount")
    try:
        mount = ("mount", "-t", "tmpfs", "none", "/mnt")
        done = subprocess.run([*prefix, *mount], capture_output=True, text=True)
    except FileNotFoundError as error:
        pytest.skip(f"no program {error.filename}")
    if done.returncode:
        pytest.skip(f"not permitted to mount: {done.stderr.strip()}")
    return prefix


class Done(NamedTuple):
    """What a command came to; the output is one line, whatever the width of the display."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """`fastppo ARGUMENTS` in this process and in a project's folder."""

    def run(project: Path, *arguments: str | Path) -> Done:
        from fastppo.cli.main import main

        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(project)
            status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return Done(status, out.replace("\n", ""), err)

    return run
