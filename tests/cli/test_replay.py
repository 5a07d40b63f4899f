"""`fastppo replay` and `fastppo export`, on what real runs of a tiny model leave behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from fastppo import PackedBatch, PPOStep
from fastppo.checkpoint import CheckpointStore, verify
from fastppo.cli.main import main
from fastppo.data.text import decode
from fastppo.ops import PPO_METRIC_NAMES
from fastppo.training import interrupts

Command = Callable[..., Any]
TRAIN = ("train", "--config", "run.toml", "--reward-workers", "0", "--sample-interval", "0")
POISONED = 5  # the sequence of the batch that gets an advantage of NaN

# peft asks transformers by a name that transformers 5.23 deprecates
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def train(project: Path, *arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        return main([*TRAIN, *arguments])


def poison(patch: pytest.MonkeyPatch, iteration: int) -> None:
    """From an iteration on (from 1), one token of every batch has an advantage of NaN."""
    original = PPOStep.advantages

    def advantages(self: PPOStep, *arguments: Any) -> PackedBatch:
        batch = original(self, *arguments)
        if self.iteration + 1 < iteration:
            return batch
        bad = batch.advantages.clone()
        bad[int(batch.cu_responses_host[POISONED])] = torch.nan
        return batch.replace(advantages=bad)

    patch.setattr(PPOStep, "advantages", advantages)


@pytest.fixture(scope="module")
def bad(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the run `run`, which met a NaN in its second iteration."""
    project = Path(shutil.copytree(template, tmp_path_factory.mktemp("bad") / "project"))
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 2)
        assert train(project, "--output-dir", "run", "--max-nonfinite-steps", "1") == 2
    return project


@pytest.fixture
def dump(bad: Path, tmp_path: Path) -> Path:
    """A copy of the step it kept."""
    name = "iteration-000002-nonfinite"
    return Path(shutil.copytree(bad / "run" / "dumps" / name, tmp_path / name))


@pytest.mark.slow
def test_the_step_is_the_recorded_one_in_another_process(bad: Path) -> None:
    """And what is wrong has a name: parameters, the operation, the sequence."""
    name = "iteration-000002-nonfinite"
    done = subprocess.run(
        [sys.executable, "-m", "fastppo", "replay", f"run/dumps/{name}"],
        cwd=bad,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{name}: iteration 2, epoch 1, minibatch ")
    assert lines[1].startswith("policy_loss nan  value_loss ")
    assert lines[2] == "as recorded, bit by bit"
    saved = verify(bad / "run" / "dumps" / name)
    trained = len([name for name in saved.tensors("policy") if not name.startswith("value_head")])
    text = "gradients that are not finite: "
    assert lines[3] == f"{text}{trained} parameters, the first is model.model.embed_tokens.weight"
    assert "actor = ops.linear_ppo_loss(" in done.stdout  # where in the forward pass
    assert "returned nan values in its" in done.stdout  # torch's anomaly detection
    responses = saved.tensors("iteration")
    ids = responses["rollouts/responses"].split(responses["rollouts/lengths"].tolist())[POISONED]
    text = decode(AutoTokenizer.from_pretrained(bad / "model"), ids.numpy())
    (shown,) = [line for line in lines if line.startswith("sequence ")]
    assert shown.endswith(f": {text!r}")


@pytest.mark.parametrize("file", ["iteration", "recorded", "policy", "state.json"])
def test_a_dump_that_was_changed_is_refused(file: str, dump: Path, command: Command) -> None:
    path = dump / (file if "." in file else f"{file}.safetensors")
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    done = command(dump.parent, "replay", dump)
    assert (done.status, done.out) == (2, "")
    assert f"{path.name} is damaged" in done.err


def signed(dump: Path, name: str, value: float) -> None:
    """Give one recorded figure another last bit, and the dump a valid manifest."""
    saved = verify(dump)
    tensors = {group: saved.tensors(group) for group in saved.groups}
    figure = tensors["recorded"][name].view(-1)
    index = PPO_METRIC_NAMES.index("entropy") if name == "policy" else 0
    figure[index] = torch.nextafter(figure[index], torch.tensor(value))
    store = CheckpointStore(dump.parent, keep_last=None)
    store.save(dump.name, tensors, saved.state, wait=True)


@pytest.mark.parametrize("name", ["policy", "value_loss"])
def test_other_numbers_than_recorded_are_status_1(name: str, bad: Path, dump: Path) -> None:
    signed(dump, name, torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(bad)
        assert main(["replay", str(dump)]) == 1


def test_other_numbers_are_said(bad: Path, dump: Path, command: Command) -> None:
    signed(dump, "critic_norm", 1e30)
    done = command(bad, "replay", dump)
    assert done.status == 1 and "NOT the recorded numbers" in done.out


def test_a_step_of_the_critics_warm_up(project: Path, command: Command) -> None:
    """Only the critic steps: its norm is not the actor's."""
    options = ("--critic-warmup", "1", "--max-nonfinite-steps", "1", "--num-iterations", "2")
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, 1)
        assert train(project, "--output-dir", "run", *options) == 2
    done = command(project, "replay", "run/dumps/iteration-000001-nonfinite")
    assert done.status == 0 and "as recorded, bit by bit" in done.out
    assert "actor_grad_norm 0  critic_grad_norm 0." in done.out
    assert done.out.endswith("every gradient is finite")
    signed(project / "run" / "dumps" / "iteration-000001-nonfinite", "critic_norm", 1e30)
    assert command(project, "replay", "run/dumps/iteration-000001-nonfinite").status == 1


def test_a_batch_kept_for_reading_has_no_step(project: Path, command: Command) -> None:
    options = ("--kl-warning", "1e-9", "--num-iterations", "1")
    assert train(project, "--output-dir", "run", *options) == 0
    done = command(project, "replay", "run/dumps/iteration-000001-kl")
    assert (done.status, done.out) == (2, "")
    assert "got a batch that was kept for reading. Its samples are in state.json" in done.err


def test_a_checkpoint_in_the_middle_of_an_update(project: Path, command: Command) -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 32:
            raise interrupts.Interrupted(15)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interrupts, "check", check)
        assert train(project, "--output-dir", "run") == 128 + 15
    (middle,) = (project / "run" / "checkpoints").glob("*-????")
    step = int(middle.name[-4:])
    assert 0 < step < 6
    done = command(project, "replay", middle)
    assert done.status == 0, done.err
    epoch, minibatch = divmod(step, 3)
    assert f"epoch {epoch + 1}, minibatch {minibatch + 1}: " in done.out
    assert "recorded" not in done.out and done.out.endswith("every gradient is finite")


def test_a_checkpoint_between_iterations_has_no_step(bad: Path, command: Command) -> None:
    done = command(bad, "replay", "run/checkpoints/iteration-000001")
    assert done.status == 2 and "got a checkpoint between two iterations" in done.err
    done = command(bad, "replay", "run/checkpoints/missing")
    assert done.status == 2 and "does not exist" in done.err


# Export

CASES = {
    "full": (),
    "train-layers": ("--train-layers", "1"),
    "lora": ("--lora-rank", "4"),
    "separate-critic": ("--critic", "separate"),
}


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_policy_of_the_checkpoint(case: str, project: Path, command: Command) -> None:
    options = ("--num-iterations", "2", "--learning-rate", "0.01", *CASES[case])
    assert train(project, "--output-dir", "run", *options) == 0
    for iteration in (1, 2):
        checkpoint = f"run/checkpoints/iteration-00000{iteration}"
        done = command(project, "export", checkpoint, f"out-{iteration}")
        assert done.status == 0, done.err
    first, last, saved = (project / name for name in ("out-1", "out-2", "run/model"))
    files = {path.relative_to(saved) for path in saved.rglob("*") if path.is_file()}
    assert {path.relative_to(last) for path in last.rglob("*") if path.is_file()} == files
    for name in files:  # the last checkpoint is what the run ended with
        assert (last / name).read_bytes() == (saved / name).read_bytes(), name
    weights = AutoModelForCausalLM.from_pretrained(first).state_dict()
    start = AutoModelForCausalLM.from_pretrained(project / "model").state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in weights.items())
    trained = verify(project / "run/checkpoints/iteration-000001").tensors("policy")
    if case != "lora":  # merged in the weights
        own = {n.removeprefix("model."): v for n, v in trained.items() if n.startswith("model.")}
        assert own and all(torch.equal(weights[name], value) for name, value in own.items())
        frozen = weights.keys() - own.keys()
        assert all(torch.equal(weights[name], start[name]) for name in frozen)
        assert bool(frozen) == (case == "train-layers")
    head = load_file(first / "critic" / "value_head.safetensors")
    assert torch.equal(head["weight"], trained["value_head.weight"])
    if case == "separate-critic":
        trunk = AutoModel.from_pretrained(first / "critic").state_dict()
        own = {n.removeprefix("critic."): v for n, v in trained.items() if n.startswith("critic.")}
        found = [n for n, v in own.items() if torch.equal(trunk[n.removeprefix("model.")], v)]
        assert found == list(own) != []


def test_export_refuses_a_folder_that_exists(bad: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "mine").mkdir()
    done = command(bad, "export", "run/checkpoints/iteration-000001", tmp_path / "mine")
    assert done.status == 2 and "folder: expected a name that is free" in done.err
    assert list((tmp_path / "mine").iterdir()) == []


def test_another_model_is_refused(bad: Path, project: Path, command: Command) -> None:
    from fastppo.models.tiny import WORDS, tiny_model

    tiny_model(len(WORDS), seed=1).save_pretrained(project / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(project / "model" / name, project / "other")
    arguments = ("run/checkpoints/iteration-000001", "out", "--model", project / "other")
    done = command(bad, "export", *arguments)
    assert done.status == 2 and "digest of the frozen and reference parameters" in done.err
    assert not (bad / "out").exists()
