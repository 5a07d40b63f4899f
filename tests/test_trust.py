"""What a person downloads is data: no checkpoint, model folder or data set runs code here, and a
run writes nothing outside its folder.

Reward functions that a configuration names are code by purpose, and the only code.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastppo.checkpoint import CheckpointError, CheckpointStore, verify
from fastppo.checkpoint import format as fmt
from fastppo.models.tiny import WORDS, word_tokenizer
from fastppo.rewards import RewardModel

Command = Callable[..., Any]
TRAIN = ("train", "--config", "run.toml", "--num-iterations", "1", "--reward-workers", "0")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that hostile code makes; whoever is asked whether it may run says yes."""
    monkeypatch.setattr("builtins.input", lambda *question: "y")
    return tmp_path / "it-ran"


@pytest.fixture
def evil(marker: Path) -> str:
    """Source that makes the marker when it is imported."""
    return f"open({str(marker)!r}, 'w').close()\n"


class Bomb:
    """Makes the marker when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return open, (str(self.marker), "w")


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


# Model folders


def own_class(folder: Path, source: str) -> None:
    """A model type that only the code in the folder knows."""
    classes = (
        "\nfrom transformers import LlamaConfig, LlamaForCausalLM"
        "\nclass EvilConfig(LlamaConfig): model_type = 'evil'"
        "\nclass Evil(LlamaForCausalLM): config_class = EvilConfig\n"
    )
    (folder / "evil.py").write_text(source + classes)
    names = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    names["AutoModelForSequenceClassification"] = "evil.Evil"
    edit(folder / "config.json", model_type="evil", auto_map=names)


def known_class(folder: Path, source: str) -> None:
    """Code in the place of a model type that transformers has."""
    own_class(folder, source)
    edit(folder / "config.json", model_type="llama")


def own_tokenizer(folder: Path, source: str) -> None:
    (folder / "evil.py").write_text(source + "\nclass Evil: pass\n")
    names = {"AutoTokenizer": ["evil.Evil", None]}
    edit(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=names)


def own_generate(folder: Path, source: str) -> None:
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(source)


@pytest.mark.parametrize("role", ["model", "ref-model"])
@pytest.mark.parametrize("hostile", [own_class, known_class, own_tokenizer, own_generate])
def test_code_in_a_models_folder_never_runs(
    hostile: Callable[[Path, str], None],
    role: str,
    project: Path,
    evil: str,
    marker: Path,
    command: Command,
) -> None:
    """It is refused in one line, or the model is the one that transformers has."""
    shutil.copytree(project / "model", project / "hostile")
    hostile(project / "hostile", evil)
    done = command(project, *TRAIN, "--output-dir", "run", f"--{role}", "hostile")
    assert not marker.exists()
    assert done.status in (0, 2)
    if hostile is own_class:
        assert done.status == 2 and "contains custom code" in done.err
        assert not (project / "run").exists()
    if hostile in (known_class, own_generate):
        assert done.status == 0, done.err


def test_the_hostile_code_works(project: Path, evil: str, marker: Path) -> None:
    """Where somebody trusts it: otherwise the tests above could not fail."""
    from transformers import AutoConfig

    own_class(project / "model", evil)
    AutoConfig.from_pretrained(project / "model", trust_remote_code=True)
    assert marker.exists()
    marker.unlink()
    pickle.loads(pickle.dumps(Bomb(marker))).close()
    assert marker.exists()


@pytest.fixture
def reward_folder(tmp_path: Path) -> Path:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_labels": 1}
    config = LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, **small, **heads)
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    word_tokenizer().save_pretrained(tmp_path / "reward")
    assert RewardModel(tmp_path / "reward")(["1 2 >"], ["3"])
    return tmp_path / "reward"


@pytest.mark.parametrize("hostile", [own_class, own_tokenizer])
def test_code_in_a_reward_models_folder_never_runs(
    hostile: Callable[[Path, str], None], reward_folder: Path, evil: str, marker: Path
) -> None:
    hostile(reward_folder, evil)
    with pytest.raises(ValueError, match="custom code|no usable tokenizer"):
        RewardModel(reward_folder).load()
    assert not marker.exists()


def test_a_kernel_that_a_config_asks_for_is_not_fetched(
    project: Path, reward_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """attn_implementation = "who/what" is native code on a hub."""
    from transformers.integrations import hub_kernels

    asked: list[str] = []
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *_: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda name, **_: asked.append(name))
    for folder in (project / "model", reward_folder):
        edit(folder / "config.json", attn_implementation="kernels-community/evil")
    done = command(project, *TRAIN, "--output-dir", "run")
    assert done.status == 0, done.err
    with pytest.raises(ValueError, match="'kernels-community/evil' in its config.json is code"):
        RewardModel(reward_folder)
    assert asked == []


def test_pickled_weights_run_nothing(project: Path, marker: Path, command: Command) -> None:
    (project / "model" / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin"):
        torch.save({"weight": Bomb(marker)}, project / "model" / name)
    done = command(project, *TRAIN, "--output-dir", "run")
    assert done.status == 2 and "its weights are a pickle with more than tensors" in done.err
    assert done.err.count("\n") == 1 and not marker.exists()


def test_a_chat_template_cannot_leave_its_sandbox(
    project: Path, marker: Path, command: Command
) -> None:
    template = (
        "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (project / "model" / "chat_template.jinja").write_text(template)
    (project / "chat.jsonl").write_text(
        json.dumps({"prompt": [{"role": "user", "content": "1 2 >"}], "answer": "2"}) + "\n"
    )
    options = ("--dataset", "chat.jsonl", "--eval-dataset", "chat.jsonl")
    done = command(project, *TRAIN, "--output-dir", "run", *options)
    assert done.status == 2 and "chat template" in done.err, done.err
    assert not marker.exists()


# Data sets


def test_a_pickled_data_set_is_refused(project: Path, marker: Path, command: Command) -> None:
    for name in ("data.pkl", "data.pickle", "data.bin"):
        (project / name).write_bytes(pickle.dumps(Bomb(marker)))
        done = command(project, *TRAIN, "--output-dir", "run", "--dataset", name)
        assert done.status == 2 and "has the ending" in done.err
    assert not marker.exists()


def test_a_data_sets_script_never_runs(
    project: Path, evil: str, marker: Path, command: Command
) -> None:
    (project / "data").mkdir()
    for name in ("data.py", "dataset.py", "__init__.py"):
        (project / "data" / name).write_text(evil)
    (project / "data" / "rows.pkl").write_bytes(pickle.dumps(Bomb(marker)))
    done = command(project, *TRAIN, "--output-dir", "run", "--dataset", "data")
    assert done.status == 2 and "is not a Hugging Face dataset folder" in done.err
    assert not marker.exists()


# Checkpoints


def signed_again(checkpoint: Path, **config: Any) -> None:
    """Another configuration in a checkpoint, with a valid manifest: what a stranger may hand on."""
    saved = verify(checkpoint)
    state = {**saved.state, "config": {**saved.state["config"], **config}}
    tensors = {group: saved.tensors(group) for group in saved.groups}
    store = CheckpointStore(checkpoint.parent, keep_last=None)
    store.save(checkpoint.name, tensors, state, wait=True)


def test_the_code_that_a_checkpoint_names_is_not_imported(
    project: Path, evil: str, marker: Path, command: Command
) -> None:
    """A continuation takes its reward from its own configuration."""
    (project / "evil.py").write_text(evil + "def f(completions): return [1.0] * len(completions)\n")
    assert command(project, *TRAIN, "--output-dir", "run").status == 0
    checkpoint = project / "run" / "checkpoints" / "iteration-000001"
    data = {"dataset": "evil.py", "eval_dataset": "evil.py"}
    signed_again(checkpoint, reward=["evil.py:f"], **data)
    assert command(project, "export", checkpoint, "out").status == 0
    assert command(project, "replay", checkpoint).status == 2  # it is between two iterations
    done = command(project, *TRAIN, "--resume", "run")
    assert done.status == 2 and "reward: ['evil.py:f'] → " in done.err
    allowed = ("--allow-changes", "reward", "dataset", "num-iterations")
    done = command(project, *TRAIN, "--num-iterations", "2", "--resume", "run", *allowed)
    assert done.status == 0, done.err
    assert not marker.exists()
    hostile = project / "hostile"
    shutil.copytree(project / "model", hostile)
    own_class(hostile, evil)
    signed_again(project / "run" / "checkpoints" / "iteration-000002", model=str(hostile))
    done = command(project, "export", "run/checkpoints/iteration-000002", "out-2")
    assert done.status == 2 and not (project / "out-2").exists() and not marker.exists()


def resigned_files(checkpoint: Path, files: dict[str, Any]) -> None:
    manifest = json.loads((checkpoint / fmt.MANIFEST).read_text())
    del manifest["sha256"]
    manifest["files"] |= files
    (checkpoint / fmt.MANIFEST).write_bytes(fmt._render(manifest))


def test_names_in_a_manifest_stay_in_its_folder(project: Path, command: Command) -> None:
    assert command(project, *TRAIN, "--output-dir", "run").status == 0
    checkpoint = project / "run" / "checkpoints" / "iteration-000001"
    manifest, file = (checkpoint / fmt.MANIFEST).read_bytes(), project / "rewards.py"
    for outside in ("../../../rewards.py", str(file)):
        (checkpoint / fmt.MANIFEST).write_bytes(manifest)
        resigned_files(checkpoint, {outside: fmt._fingerprint(file)})
        with pytest.raises(CheckpointError, match=f"{outside} is missing"):
            verify(checkpoint)
    for name in ("../escaped", "a/b", "..", ""):
        with pytest.raises(ValueError, match="expected letters, digits"):
            CheckpointStore(project / "store").save(name, {}, {})
        with pytest.raises(ValueError, match="expected letters, digits"):
            CheckpointStore(project / "store").save("a", {name: {}}, {})


def test_a_pickle_in_the_place_of_tensors_runs_nothing(
    project: Path, marker: Path, command: Command
) -> None:
    assert command(project, *TRAIN, "--output-dir", "run").status == 0
    checkpoint = project / "run" / "checkpoints" / "iteration-000001"
    file = checkpoint / "policy.safetensors"
    file.write_bytes(pickle.dumps(Bomb(marker)))
    resigned_files(checkpoint, {file.name: fmt._fingerprint(file)})
    for arguments in (("export", checkpoint, "out"), (*TRAIN, "--resume", "run")):
        done = command(project, *arguments)
        assert done.status == 2 and f"{file} cannot be read" in done.err
    assert not marker.exists()


# What a run writes

CACHES = {
    "home/.cache/matplotlib": "matplotlib's list of fonts",
    "home/.config/matplotlib": "matplotlib's folder for a person's own settings",
    "project/__pycache__": "Python's, of the reward function's file",
}


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
        if not path.is_dir() or path.is_symlink()
    }


@pytest.mark.slow
def test_a_run_writes_nothing_outside_its_folder(project: Path, tmp_path: Path) -> None:
    """Through a link too."""
    for name in ("home", "tmp", "disk"):
        (tmp_path / name).mkdir()
    (project / "link").symlink_to(tmp_path / "disk")
    before = files_below(tmp_path)
    left_out = {"PYTHONDONTWRITEBYTECODE", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"}
    environment = {k: v for k, v in os.environ.items() if k not in left_out}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    options = ("--output-dir", "link/run", "--kl-warning", "1e-9", "--report-to", "tensorboard")
    done = subprocess.run(
        [sys.executable, "-m", "fastppo", *TRAIN[:-2], *options],
        cwd=project,
        env={**environment, **places},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    after = files_below(tmp_path)
    assert before.items() <= after.items()
    new = [name for name in after.keys() - before.keys() if not name.startswith("disk/run/")]
    assert [name for name in new if not name.startswith(tuple(CACHES))] == []
    made = {path.name for path in (tmp_path / "disk" / "run").iterdir()}
    assert {"checkpoints", "dumps", "model", "tensorboard", "report.html"} <= made
    assert (project / "link").is_symlink()
    assert not [name for name in after if (tmp_path / name).is_symlink() and name not in before]


def test_a_run_behind_a_link_is_continued(project: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "disk").mkdir()
    (project / "link").symlink_to(tmp_path / "disk")
    assert command(project, *TRAIN, "--output-dir", "link").status == 0
    options = ("--lr-schedule", "constant", "--allow-changes", "lr-schedule")
    for iterations, named in (("2", "link"), ("3", "link/checkpoints/iteration-000002")):
        done = command(project, *TRAIN, "--num-iterations", iterations, "--resume", named, *options)
        assert done.status == 0, done.err
    saved = {path.name for path in (tmp_path / "disk" / "checkpoints").iterdir()}
    assert saved == {"iteration-000002", "iteration-000003"}


# The source


def calls(root: Path) -> list[tuple[str, str, ast.Call]]:
    """File, name of the function, and every call of it in the library."""
    found = []
    for path in sorted((root / "fastppo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                found.append((path.name, ast.unparse(node.func), node))
    return found


def test_every_from_pretrained_reads_data_only(root: Path) -> None:
    loads = [(f, node) for f, name, node in calls(root) if name.endswith(".from_pretrained")]
    assert len(loads) >= 4
    for file, node in loads:
        unpacked = [ast.unparse(k.value) for k in node.keywords if k.arg is None]
        assert "DATA_ONLY" in unpacked, f"{file}, line {node.lineno}"
    texts = [path.read_text() for path in (root / "fastppo").rglob("*.py")]
    assert sum(text.count("trust_remote_code") for text in texts) == 1


def test_nothing_unpickles_but_a_reward_worker(root: Path) -> None:
    names = {"pickle.load", "pickle.loads", "torch.load", "np.load", "numpy.load"}
    found = {file for file, name, _ in calls(root) if name in names}
    assert found == {"child.py"}


def test_nothing_is_evaluated_but_the_formulas_of_the_ops(root: Path) -> None:
    """Constants of the code, in profiling/work.py, of numbers alone."""
    found = [(f, ast.unparse(node)) for f, name, node in calls(root) if name in ("eval", "exec")]
    assert [file for file, _ in found] == ["work.py"]
    assert "{'__builtins__': {}}" in found[0][1]
