"""Damages what fastppo reads, in every way it knows, and runs the real command on each.

    python tests/faults/damage.py            all of it, with a table at the end
    python tests/faults/damage.py 40         every 40th case
    python tests/faults/damage.py 1 model    of one kind

A case is a file, what is done to it and a command. Each command has a process of its own, forked
from this one, which has imported everything. Status 0 is legitimate: what was damaged is not read,
or says something else that is sound. Any other status must be 2, with exactly one line on stderr
that names the file (or the option, or the column, that it is about), no control character on
either stream, and every file as it was. Exit status: 1 where a case was not so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

EVIL = "\x1b[31m\u202e[red]a\u2028b\x85\x07"
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 10.5, float("inf"), float("nan"), "x", EVIL),
    *([], {}, [[]], {"a": {"b": 1}}, [None], ["x"]),
)
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "without its end": lambda data: data[:-2],
    "binary": lambda data: bytes(range(256)) * 20,
    "zeros": lambda data: bytes(len(data)),
    "not UTF-8": lambda data: data[: len(data) // 2] + b"\xff\xfe" + data[len(data) // 2 :],
    "a byte-order mark": lambda data: b"\xef\xbb\xbf" + data,
    "nested": lambda data: b"[" * 100_000,
    "nested objects": lambda data: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a list": lambda data: b"[]\n",
    "a number": lambda data: b"3\n",
    "null": lambda data: b"null\n",
    "an object": lambda data: b"{}\n",
    "a number of 5000 digits": lambda data: b'{"iteration": ' + b"1" * 5000 + b"}\n",
}
TOML = """
model = "model"
dataset = "prompts.jsonl"
reward = ["rewards.py:larger"]
num_iterations = 3
prompts_per_iteration = 4
max_prompt_length = 8
max_response_length = 3
num_minibatches = 2
update_epochs = 1
learning_rate = 1e-3
save_interval = 1
sample_interval = 0
reward_workers = 0
device = "cpu"
precision = "fp32"
"""
REWARD = "def larger(completions, answer):\n    return [float(len(c)) for c in completions]\n"
MIDDLE = "iteration-000001-0001"
SECONDS = 40

Damage = Callable[[Path], None]


class Case(NamedTuple):
    """`damage` to `file` of a project, then `command`."""

    kind: str
    what: str
    file: str
    damage: Damage
    command: tuple[str, ...]
    names: tuple[str, ...]
    """One of these is in the line that refuses."""


# What may be done to a file


def to_file(data: bytes) -> Iterator[tuple[str, Damage]]:
    """Damage to any file, which holds `data`."""
    for name, change in BYTES.items():
        yield name, lambda path, change=change: put(path, change(data))
    yield "missing", lambda path: path.unlink()
    yield "a folder", lambda path: (path.unlink(), path.mkdir())[1]
    yield "a pipe", lambda path: (path.unlink(), os.mkfifo(path))[1]


def to_fields(value: Any) -> Iterator[tuple[str, str]]:
    """JSON texts in which one field, two levels deep at most, is gone, twice or something else:
    three of the wrong values and one of the other ways for each field, in turn.
    """
    inner = [(key, name) for key in value if isinstance(value[key], dict) for name in value[key]]
    for number, place in enumerate([(key,) for key in value] + inner):
        name, key = "/".join(place), json.dumps(place[0])
        for other in (VALUES[(5 * number + 7 * i) % len(VALUES)] for i in range(3)):
            yield f"{name} = {other!r}", json.dumps(changed(value, place, other))
        if number % 3 == 0:
            yield f"{name} gone", json.dumps(changed(value, place))
        elif number % 3 == 1:
            yield f"{name} twice", f"{{{key}: 1, {json.dumps(value)[1:]}"
        else:
            marked = json.dumps(changed(value, place, "#deep"))
            yield f"{name} nested", marked.replace('"#deep"', "[" * 5000 + "]" * 5000)


def changed(value: Any, place: tuple[str, ...], *other: Any) -> Any:
    copy = dict(value)
    if len(place) > 1:
        copy[place[0]] = changed(copy[place[0]], place[1:], *other)
    elif other:
        copy[place[0]] = other[0]
    else:
        del copy[place[0]]
    return copy


def put(path: Path, data: str | bytes) -> None:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))


def put_state(path: Path, text: str) -> None:
    """state.json, with a manifest that says it is whole."""
    put(path, text)
    manifest = json.loads((path.parent / "manifest.json").read_text())
    data = path.read_bytes()
    manifest["files"][path.name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    put_manifest(path.parent / "manifest.json", json.dumps(manifest))


def put_manifest(path: Path, text: str) -> None:
    """A manifest whose own SHA-256 is right, where it can be read at all."""
    if "[[[[" in text:
        return put(path, text)
    manifest = {k: v for k, v in json.loads(text).items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    put(path, json.dumps({**manifest, "sha256": digest}, sort_keys=True, indent=2) + "\n")


# The cases


def cases(project: Path) -> Iterator[Case]:
    """Every case, on copies of a project that `build` made."""
    train = ("train", "--config", "run.toml")
    new = (*train, "--output-dir", "new", "--num-iterations", "1")
    resume, dry = (*train, "--resume", "--output-dir", "run"), (*train, "--dry-run")
    replay = ("replay", f"run/checkpoints/{MIDDLE}")
    export = ("export", f"run/checkpoints/{MIDDLE}", "exported")

    def damaged(kind: str, file: str, *commands: tuple[str, ...], names: tuple[str, ...] = ()):
        for what, damage in to_file((project / file).read_bytes()):
            for command in commands:
                yield Case(kind, what, file, damage, command, (Path(file).name, *names))

    def fields(kind: str, file: str, command: tuple[str, ...], names: tuple[str, ...], write=put):
        for what, text in to_fields(json.loads((project / file).read_text())):
            damage = lambda path, text=text: write(path, text)  # noqa: E731
            yield Case(kind, what, file, damage, command, (Path(file).name, *names))

    for file in sorted((project / "model").iterdir()):
        name, own = f"model/{file.name}", ("/model'", "'model'")
        yield from damaged("model", name, new, dry, ("doctor", "--model", "model"), names=own)
        if file.suffix == ".json":
            yield from fields("model", name, new, own)
    latest = sorted(p.name for p in (project / "run/checkpoints").iterdir())[-1]
    for name in ("metrics.jsonl", "samples.jsonl", "config.json"):
        yield from damaged("run directory", f"run/{name}", resume, names=("run",))
    for path in sorted((project / "run/checkpoints" / latest).iterdir()):
        yield from damaged("run directory", f"run/checkpoints/{latest}/{path.name}", resume)
    for path in sorted((project / "run/checkpoints" / MIDDLE).iterdir()):
        file = f"run/checkpoints/{MIDDLE}/{path.name}"
        yield from damaged("replay, export", file, replay, export, names=(MIDDLE,))
    state, manifest = (f"run/checkpoints/{MIDDLE}/{n}.json" for n in ("state", "manifest"))
    yield from fields("run directory", state, resume, (MIDDLE, "not that of the run"), put_state)
    yield from fields("run directory", manifest, resume, (MIDDLE,), put_manifest)
    yield from fields("replay, export", state, replay, (MIDDLE,), put_state)
    lines = (project / "run/metrics.jsonl").read_text().splitlines()
    for file in ("metrics", "samples"):
        row = (project / f"run/{file}.jsonl").read_text().splitlines()[0]
        for what, text in to_fields(json.loads(row)):
            rest = "".join(line + "\n" for line in lines[1:]) if file == "metrics" else ""
            damage = lambda path, text=text, rest=rest: put(path, f"{text}\n{rest}")  # noqa: E731
            yield Case("metrics", what, f"run/{file}.jsonl", damage, resume, (file,))
    for ending in ("jsonl", "json", "csv", "parquet"):
        file = f"prompts.{ending}"
        command = (*dry, "--dataset", file)
        yield from damaged("data", file, command, names=("dataset", "prompt"))
    row = {"prompt": "1 2 >", "answer": "2"}
    chat = {"prompt": [{"role": "user", "content": "1"}], "answer": "2"}
    for record in (row, chat, {"prompt": {"role": "user", "content": "1"}, "answer": "2"}):
        for what, text in to_fields(record):
            damage = lambda path, text=text: put(path, text + "\n")  # noqa: E731
            yield Case("data", what, "prompts.jsonl", damage, new, ("prompt", "column", "row"))
    yield from damaged("rewards", "rewards.py", dry, names=("reward",))
    yield from damaged("configuration", "run.toml", dry)
    yield from options(dry)
    result = ("bench", "render", "result.json"), ("bench", "compare", "result.json", "result.json")
    yield from damaged("bench", "result.json", *result)


def options(command: tuple[str, ...]) -> Iterator[Case]:
    """Every option of a run, set to what it does not take."""
    import dataclasses

    from fastppo.ppo.config import TrainConfig

    texts = ["nan", "inf", "-1", "0", "1" * 50, "1" * 5000, "true", '""', '"x"', "[]", "{}"]
    texts += ['"--help"', '["--x"]', "1979-05-27", "[[1]]", "[1, 'x']", '"\\u001b[31m\\u202e[red]"']
    for number, field in enumerate(dataclasses.fields(TrainConfig)):
        for text in (texts[(5 * number + 4 * i) % len(texts)] for i in range(5)):

            def damage(path: Path, name: str = field.name, text: str = text) -> None:
                kept = [line for line in TOML.splitlines() if not line.startswith(f"{name} =")]
                put(path, "\n".join([*kept, f"{name} = {text}"]))

            what = f"{field.name} = {text[:20]}"
            names = ("run.toml", field.name, field.name.removeprefix("eval_"))
            yield Case("configuration", what, "run.toml", damage, command, names)


# Running them


def build(folder: Path) -> Path:
    """A project whose run was stopped in its second iteration, and a result of a benchmark."""
    import datasets

    from fastppo.models.tiny import WORDS, tiny_model, word_tokenizer
    from fastppo.ppo.step import PPOStep

    tiny_model(len(WORDS), seed=0).save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": f"{a} {b} >", "answer": str(max(a, b))} for a in range(4) for b in range(4)]
    put(folder / "prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    put(folder / "prompts.json", json.dumps(rows))
    put(folder / "prompts.csv", "prompt,answer\n" + "".join(f"{a} >,{a}\n" for a in range(9)))
    datasets.Dataset.from_list(rows).to_parquet(folder / "prompts.parquet")
    put(folder / "rewards.py", REWARD)
    put(folder / "run.toml", TOML)
    original, calls = PPOStep._train_minibatch, Counter[str]()

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls["all"] += 1
        if calls["all"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    PPOStep._train_minibatch = stopped  # type: ignore[method-assign]
    status, err, _ = forked(folder, ("train", "--config", "run.toml", "--output-dir", "run"))
    PPOStep._train_minibatch = original  # type: ignore[method-assign]
    assert status == 143 and (folder / "run/checkpoints" / MIDDLE).is_dir(), (status, err)
    status, err, _ = forked(
        folder,
        (
            "bench",
            "--cases",
            "whiten",
            "--sizes",
            "smoke",
            "--seconds",
            "0.01",
            "--output-dir",
            "bench",
            "--device",
            "cpu",
        ),
    )
    assert status in (0, 1), err  # 1: a busy machine is no place for figures
    shutil.copy(folder / "bench" / "result.json", folder)
    shutil.rmtree(folder / "bench")
    return folder


def forked(folder: Path, command: tuple[str, ...]) -> tuple[int, str, str]:
    """Status (negative: the signal that ended it), stderr and stdout of a command in a folder."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (child := os.fork()) == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            signal.alarm(SECONDS)
            status = 99
            try:
                from fastppo.cli.main import main

                status = main(command)
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = []
        for file in (err, out):
            file.seek(0)
            texts.append(file.read().decode("utf-8", "replace"))
        return status, texts[0], texts[1]


def content(folder: Path) -> dict[str, str]:
    """What is in a project, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name != ".lock" and "__pycache__" not in path.parts:
            data = path.read_bytes() if path.is_file() else b""
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def verdict(case: Case, project: Path, work: Path) -> tuple[str, str]:
    """ "refused" or "legitimate", or what is wrong, with what was said."""
    folder = work / "case"
    shutil.copytree(project, folder)
    try:
        case.damage(folder / case.file)
        before = content(folder)
        status, err, out = forked(folder, case.command)
        bad = [c for c in err + out if unicodedata.category(c) in ("Cc", "Cf", "Zl") and c != "\n"]
        if status == -signal.SIGALRM:
            return "hangs", ""
        if bad:
            return f"control characters {bad[:3]!r}", err or out
        replayed = case.command[0] in ("replay", "doctor", "bench") and status == 1 and not err
        if status == 0 or replayed:
            return "legitimate", ""
        if status != 2 or err.count("\n") != 1 or not err.startswith("fastppo "):
            return f"status {status}, {err.count(chr(10))} lines", err[-1500:]
        if not any(name in err for name in case.names):
            return "names no file", err
        if content(folder) != before:
            gone = before.items() ^ content(folder).items()
            return f"changed {sorted({name for name, _ in gone})[:4]}", err
        return "refused", err
    finally:
        shutil.rmtree(folder)


def main(every: int = 1, kind: str = "") -> int:
    import fastppo.cli.bench
    import fastppo.cli.doctor
    import fastppo.cli.dry_run
    import fastppo.cli.export  # noqa: F401

    counts: Counter[tuple[str, str]] = Counter()
    started, failures = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "project").mkdir()
        project = build(Path(work) / "project")
        for number, case in enumerate(cases(project)):
            if number % every or not case.kind.startswith(kind):
                continue
            found, said = verdict(case, project, Path(work))
            counts[case.kind, "cases"] += 1
            counts[case.kind, found if found in ("refused", "legitimate") else "WRONG"] += 1
            if found not in ("refused", "legitimate"):
                failures += 1
                command = " ".join(case.command)
                print(f"WRONG {case.file}, {case.what!a}, {command}: {found}\n   {said!a}")
    print(f"{'kind':16}{'cases':>8}{'refused':>10}{'legitimate':>12}{'WRONG':>8}")
    columns = (("cases", 8), ("refused", 10), ("legitimate", 12), ("WRONG", 8))
    for name in dict.fromkeys(kind for kind, _ in counts):
        print(f"{name:16}" + "".join(f"{counts[name, c]:>{width}}" for c, width in columns))
    total = sum(n for (_, c), n in counts.items() if c == "cases")
    print(f"{total} cases, {failures} wrong, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    sys.exit(main(*(int(a) if a.isdigit() else a for a in sys.argv[1:])))
