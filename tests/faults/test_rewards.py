"""Rewards that fail in every way: the samples are lost, counted and named, and nothing else is."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastppo.cli.main import main
from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
from fastppo.rewards import load_reward_func
from fastppo.rollout.packed import PackedEngine
from fastppo.training.seeding import batch_indices

Runs = Any  # see conftest.py

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of workers")

REWARDS = '''
import os, urllib.request

def fragile(prompts, completions, fault):
    """Fails in the way that a sample's column says, while it is being read."""
    scores = []
    for prompt, text, how in zip(prompts, completions, fault):
        if how == "exception":
            raise ValueError("cannot parse this")
        if how == "loop":
            while True:
                pass
        if how == "crash":
            os._exit(3)
        if how == "memory":
            bytearray(8 << 30)
        scores.append(float("nan") if how == "nan" else 0.1 * len(text))
    return scores

def shapeless(completions, fault):
    """Returns something else than a score for each sample."""
    if "no list" in fault:
        return {"scores": []}
    scores = ["good" if how == "text" else 0.01 * len(t) for t, how in zip(completions, fault)]
    return [s for s, how in zip(scores, fault) if how != "length"]

def remote(prompts, fault):
    """Asks another program about some samples."""
    for how in fault:
        if how == "http":
            urllib.request.urlopen("http://127.0.0.1:PORT/", timeout=5)
    return [0.0] * len(prompts)
'''
# how a sample fails → the function, the kind of failure and a part of its message
FAULTS = {
    "exception": ("fragile", "raised ValueError: cannot parse this"),
    "loop": ("fragile", "did not return within 2 s and was killed"),
    "crash": ("fragile", "ended its worker process with exit code 3"),
    "memory": ("fragile", "raised MemoryError (its limit is memory_gb = 1)"),
    "nan": ("fragile", "score must be finite in float32, got nan"),
    "no list": ("shapeless", "must return a list of 16 numbers or None, got dict"),
    "text": ("shapeless", "must be a number or None, got 'good' of type str"),
    "length": ("shapeless", "must return one score per sample: expected 16, got 15"),
    "http": ("remote", "Connection refused"),
}
ITERATIONS, BATCH = 10, 16


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of this machine that refuses connections: bound, and nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def faulty_rows() -> list[dict[str, str]]:
    """160 prompts, each of which is drawn once; one with each fault, and three crash at once."""
    texts = [f"{a} {b} {c} >" for a in range(4) for b in range(8) for c in range(5)]
    rows = [{"prompt": text, "fault": ""} for text in texts]
    order = [list(batch_indices(len(rows), BATCH, 1, i)) for i in range(ITERATIONS)]
    for number, how in enumerate(FAULTS):  # iteration 1 has none, iteration 2 two of them
        rows[order[max(1, number)][3 * number % BATCH]]["fault"] = how
    for place in (0, 7, 15):
        rows[order[4][place]]["fault"] = "crash"
    return rows


def without(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function for the samples without a fault, None for the others."""

    def careful(fault: list[str], **columns: Any) -> list[float | None]:
        good = [i for i, how in enumerate(fault) if not how]
        named = {k: [v[i] for i in good] for k, v in columns.items()} | {"fault": [""] * len(good)}
        scores = iter(function(**{k: v for k, v in named.items() if k in wanted}))
        return [None if how else next(scores) for how in fault]

    wanted = function.__code__.co_varnames[: function.__code__.co_argcount]
    careful.__name__ = function.__name__
    return careful


def test_every_failure_in_one_run(
    runs: Runs,
    closed_port: int,
    tmp_path: Path,
    state_of: Callable[..., Any],
    same: Callable[..., bool],
    finite: Callable[..., bool],
) -> None:
    file = tmp_path / "rewards.py"
    file.write_text(REWARDS.replace("PORT", str(closed_port)))
    functions = [load_reward_func(f"{file}:{n}") for n in ("fragile", "shapeless", "remote")]
    rows = faulty_rows()
    options = {
        **{"train_dataset": rows, "num_iterations": ITERATIONS, "prompts_per_iteration": BATCH},
        **{"reward_timeout": 2.0, "reward_memory_gb": 1.0, "reward_max_failure_rate": 0.1},
    }
    hurt = runs("hurt", functions, reward_workers=1, **options)
    hurt.train()
    limits = ("reward_timeout", "reward_memory_gb")
    for name in limits:
        del options[name]
    twin = runs("twin", [without(f) for f in functions], **options)
    twin.train()
    assert finite(hurt) and same(state_of(hurt), state_of(twin))

    faults = {row["prompt"]: row["fault"] for row in rows}
    samples = runs.lines("hurt", "samples.jsonl")
    assert len(samples) == len(faults) == len(rows)
    lost = [0] * ITERATIONS
    for sample, other in zip(samples, runs.lines("twin", "samples.jsonl"), strict=True):
        how, failure = faults[sample["prompt"]], sample.pop("failure", None)
        assert sample == other  # the reward is null in both
        if how:
            lost[sample["iteration"] - 1] += 1
            function, message = FAULTS[how]
            assert failure.startswith(f"reward function {function!r}: ") and message in failure
            assert sample["reward"] is None
        else:
            assert failure is None and sample["reward"] is not None
    assert lost == [0, 2, 1, 1, 4, 1, 1, 1, 1, 0]
    metrics = runs.lines("hurt", "metrics.jsonl")
    assert [row["reward_failures"] for row in metrics] == lost
    for name in ("unscored", "dropped"):
        shares = [row[name] for row in metrics]
        assert shares == pytest.approx([n / BATCH for n in lost], abs=1e-7)
    for row, other in zip(metrics, runs.lines("twin", "metrics.jsonl"), strict=True):
        del row["reward_failures"], other["reward_failures"]
        per_function = {k for k in row if k.startswith("reward/")}
        for key in row.keys() - per_function:
            assert row[key] == other[key], key


# More than the run accepts

STRICT = """
def counted(completions, hard):
    with open("calls", "a") as file:
        file.write(".")
    return [0.1 * len(text) for text in completions]

def strict(completions, hard):
    RAISE
    return [0.01 * len(text) for text in completions]
"""
RAISE = "if [h for h in hard if h]: raise ValueError('too hard')"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and 64 prompts, which four iterations draw once each.

    Three of those of iteration 3 are hard; and one of two held-out ones.
    """
    tiny_model(len(WORDS), seed=0).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{a} {b} >", "hard": False} for a in range(8) for b in range(8)]
    for place in (2, 3, 11):
        rows[batch_indices(len(rows), BATCH, 1, 2)[place]]["hard"] = True
    held_out = [{"prompt": "9 9 >", "hard": True}, {"prompt": "9 8 >", "hard": False}]
    for name, lines in (("prompts", rows), ("held_out", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_rewards(how: str) -> None:
    Path("rewards.py").write_text(STRICT.replace("RAISE", RAISE if how == "raises" else ""))
    Path("calls").write_text("")


def train(*arguments: str) -> int:
    return main(
        [
            *("train", "--model", "model", "--dataset", "prompts.jsonl", "--num-iterations", "4"),
            *("--prompts-per-iteration", "16", "--max-prompt-length", "8", "--device", "cpu"),
            *("--max-response-length", "3", "--sample-interval", "0", "--precision", "fp32"),
            *("--learning-rate", "1e-3", "--reward-max-failure-rate", "0.01"),
            *("--reward", "rewards.py:counted", "rewards.py:strict", *arguments),
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("training", "2 of the 160 samples of the last 10 batches (1.25%)"),
        ("evaluation", "1 of the 20 samples of the last 10 batches (5.00%)"),
    ],
    ids=["training", "evaluation"],
)
def test_more_failures_than_allowed_stop_the_run_until_they_are_mended(
    where: str,
    message: str,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--eval-dataset", "held_out.jsonl"] if where == "evaluation" else []
    write_rewards("mended")
    assert train("--output-dir", "whole", *options) == 0
    calls = {"training": (2, 2), "evaluation": (0, 6)}[where]  # before the stop, and from it on
    assert len(Path("calls").read_text()) == sum(calls)

    name = {"training": "iteration-000002-0000", "evaluation": "iteration-000000"}[where]
    for resume in ((), ("--resume",)):  # and it stops there again while nothing has been mended
        write_rewards("raises")
        capsys.readouterr()
        assert train("--output-dir", "run", *options, *resume) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("fastppo train: ") and message in line and "'strict'" in line
        assert [path.name for path in Path("run/checkpoints").iterdir()] == [name]

    write_rewards("mended")
    generate, drawn = PackedEngine.generate, []
    monkeypatch.setattr(PackedEngine, "generate", lambda *args: drawn.append(1) or generate(*args))
    assert train("--output-dir", "run", *options, "--resume") == 0
    assert len(Path("calls").read_text()) == calls[1]
    assert len(drawn) == (1 if where == "training" else 6)
    for file in ("model/model.safetensors", "model/critic/value_head.safetensors", "samples.jsonl"):
        assert (project / "run" / file).read_bytes() == (project / "whole" / file).read_bytes()


def test_failures_of_evaluations_are_not_those_of_iterations(runs: Runs) -> None:
    """A held-out prompt fails in each of six evaluations, more often than ten batches may lose."""

    def scores(prompts: list[str]) -> list[float]:
        if len(prompts) < 16 and prompts[0] == "9 9 >":
            raise ValueError("held out")
        return [0.1] * len(prompts)

    trainer = runs(
        "run",
        scores,
        eval_dataset=[{"prompt": f"{a} {b} >"} for a in (9, 8) for b in range(9, -1, -1)],
        eval_interval=1,
        reward_max_failure_rate=0.02,  # 4 of the 200 samples that ten evaluations would be
    )
    trainer.train()
    assert trainer.rewards.state_dict()["batches"] == [[0, 16]] * 4
