"""One PPO iteration: TRL 1.12.0's PPOTrainer against fastppo's, the same work on both sides.

    make bench-trl          # sets up both environments, then runs this
    python bench/end_to_end/compare.py --peer-python .venv-trl/bin/python

First the check: both sides get one batch, and log-probabilities, values, rewards, advantages,
losses and the weights after one update have to agree. Then every form is a process that stays
alive, and they do one iteration in turn (A B C A B C …), of which the first is a warm-up. Written
to the output folder: end-to-end.json (a result of fastppo.benchmarks), details.json (tokens through
each model, the check) and end-to-end.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from prepare import Model, prepare
from workload import Workload

from fastppo.benchmarks.machine import describe_machine, find_versions, source_state
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.tables import table
from fastppo.profiling.ceilings import measure_ceilings

HERE = Path(__file__).parent
TRL, SHARED = "TRL 1.12.0", ", shared trunk"
PHASES = ("rollout", "evaluation", "update")
LIMITS = {"change of all weights, relative": 0.01}
LIMIT = 1e-3
"""Largest difference that the check allows, in units of the quantity."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared."""

    peer_python: str = ".venv-trl/bin/python"
    """Python of the environment that TRL is in."""
    model: Model = "smollm2-135m-instruct"
    """Of policy, reference, critic and reward model."""
    device: str = "cpu"
    """cpu or cuda."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 (autocast) or both."""
    rounds: int = 3
    """Timed iterations of each form, after one that warms up."""
    sequences: int = 16
    """Episodes of an iteration."""
    prompt: tuple[int, int] = (8, 64)
    """Shortest and longest prompt, in tokens."""
    response: tuple[int, int] = (4, 32)
    """Shortest and longest response, in tokens."""
    epochs: int = 1
    """Passes over the episodes."""
    skip_peer: bool = False
    """Time fastppo alone, and check nothing."""
    output: str = "bench-results/end-to-end"
    """Folder of the results."""


class Form:
    """A process that does one iteration whenever it is told to."""

    def __init__(self, name: str, command: Sequence[str | Path], log: Path) -> None:
        self.name = name
        self.samples: list[dict[str, Any]] = []
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "TQDM_DISABLE": "1"},
            )
        self._log = log
        self.versions: dict[str, str] = {}

    def read(self) -> dict[str, Any]:
        """The next message.

        Raises:
            SystemExit: the process has ended; says what it said last.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise SystemExit(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        message: dict[str, Any] = json.loads(line)
        return message

    def tell(self, word: str) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def iterate(self) -> dict[str, Any]:
        """One iteration."""
        self.tell("go")
        return self.read()

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self.tell("end")
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def check(options: Options, scratch: Path) -> dict[str, float]:
    """The differences between both sides on one batch.

    Raises:
        SystemExit: one is larger than allowed.
    """
    folder, tensors = scratch / "check", scratch / "check.safetensors"
    prepare(
        folder,
        options.model,
        4,
        (options.prompt[0], options.prompt[0] + 16),
        (8, 8),
        minibatches=1,
        device=options.device,
        forced=False,
    )
    command = [options.peer_python, HERE / "trl_worker.py", folder, tensors]
    peer = Form("TRL", command, scratch / "check-trl.log")
    peer.read()
    peer.iterate()
    peer.close()
    command = [sys.executable, HERE / "fastppo_worker.py", folder, "check", tensors]
    ours = Form("fastppo", command, scratch / "check-fastppo.log")
    gaps: dict[str, float] = ours.read()["gaps"]
    ours.close()
    print("largest differences on one batch, in fp32:")
    for name, gap in gaps.items():
        print(f"  {name:40} {gap:.1e}")
    if bad := [name for name, gap in gaps.items() if not gap <= LIMITS.get(name, LIMIT)]:
        raise SystemExit(f"TRL and fastppo do not compute the same: {', '.join(bad)}")
    return gaps


def measure(options: Options, scratch: Path, work: Workload) -> list[Form]:
    """All forms with their samples.

    TRL and fastppo of one precision take turns. The shared trunk comes after them: three processes
    with all their models would need 21 GB.
    """
    done: list[Form] = []
    for precision in options.precisions:
        folder = scratch / precision
        folder.mkdir()
        for name in ("policy", "reward", "tokenizer"):
            (folder / name).symlink_to(scratch / "work" / name)
        replace(work, precision=precision).save(folder)
        trl: list[str | Path] = [options.peer_python, HERE / "trl_worker.py", folder]
        ours: list[str | Path] = [sys.executable, HERE / "fastppo_worker.py", folder]
        pair = {} if options.skip_peer else {f"{TRL}, {precision}": trl}
        pair[f"fastppo, {precision}"] = [*ours, "separate"]
        done += take_turns(pair, folder, options.rounds)
        done += take_turns(
            {f"fastppo, {precision}{SHARED}": [*ours, "shared"]}, folder, options.rounds
        )
    return done


def take_turns(runs: dict[str, list[str | Path]], folder: Path, rounds: int) -> list[Form]:
    """Iterations of several forms, one of each in turn."""
    forms: list[Form] = []
    try:
        for name, run in runs.items():
            forms.append(Form(name, run, folder / f"{name}.log"))
        for form in forms:
            form.versions = form.read()["versions"]
        for round_ in range(rounds + 1):
            for form in forms:
                sample = form.iterate()
                if round_:
                    form.samples.append(sample)
                wall, cpu = map(sum, zip(*sample["seconds"].values(), strict=True))
                print(f"round {round_}: {form.name}: {wall:.2f} s, {cpu:.2f} of CPU", flush=True)
    finally:
        for form in forms:
            form.close()
    return forms


def walls(form: Form, phase: str | None = None) -> list[float]:
    """Seconds of each sample, of one phase or of the iteration."""
    return [
        sum(wall for name, (wall, _) in sample["seconds"].items() if phase in (None, name))
        for sample in form.samples
    ]


def rows(work: Workload, form: Form, options: Options) -> list[Row]:
    """The result's rows of one form."""
    size = f"{options.model} {work.real_tokens} tokens {options.device}"
    last = form.samples[-1]
    memory = last.get("gpu_gb") if options.device == "cuda" else last["rss_gb"]
    common = {"size": size, "provider": form.name, "status": "ok", "mode": "perf_counter"}
    return [
        Row(
            case=f"ppo {name or 'iteration'}",
            seconds=walls(form, name),
            peak_bytes=None if name else int((memory or 0) * 1e9),
            **common,
        )
        for name in (None, *PHASES)
    ]


def report(work: Workload, forms: list[Form], gaps: dict[str, float]) -> str:
    """The tables."""

    def row(form: Form) -> list[str]:
        base = next((f for f in forms if f.name == form.name.removesuffix(SHARED)), form)
        peer = next((f for f in forms if f.name == base.name.replace("fastppo", TRL)), base)
        total, last = median(walls(form)), form.samples[-1]
        cpu = median(sum(used for _, used in s["seconds"].values()) for s in form.samples)
        return [
            form.name,
            *(f"{median(walls(form, phase)):.2f}" for phase in PHASES),
            f"{total:.2f}",
            f"{cpu:.2f}",
            f"{work.real_tokens / total:.0f}",
            f"{median(walls(peer)) / total:.2f}",
            f"{last.get('gpu_gb', last['rss_gb']):.1f}",
        ]

    header = ("form", *PHASES, "iteration, s", "CPU s", "tokens/s", "× TRL", "peak GB")
    passes = sorted({name for form in forms for name in form.samples[-1]["tokens"]})
    counts = [
        [name, *(str(form.samples[-1]["tokens"].get(name, 0)) for form in forms)] for name in passes
    ]
    parts = [
        f"{len(work.prompts)} episodes, {sum(work.prompt_lengths)} prompt and "
        f"{sum(work.response_lengths)} response tokens, {work.epochs} epoch(s) of "
        f"{work.minibatches} minibatches; medians, samples in end-to-end.json. TRL is the one of "
        "the same precision.",
        table(header, [row(form) for form in forms]),
        "Tokens that pass through each model and output head in one iteration:",
        table(("model", *(form.name for form in forms)), counts),
    ]
    if gaps:
        parts.append("Largest differences between both sides on one batch, in fp32:")
        parts.append(table(("quantity", "gap"), [[k, f"{v:.1e}"] for k, v in gaps.items()]))
    return "\n\n".join(parts) + "\n"


def save(
    folder: Path, work: Workload, forms: list[Form], gaps: dict[str, float], o: Options
) -> str:
    """Write result, details and tables; returns the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(o.device)
    commit, dirty = source_state()
    peer = {k: v for form in forms if "TRL" in form.name for k, v in form.versions.items()}
    versions = find_versions() | {f"{k} (TRL's side)": v for k, v in peer.items()}
    Result(
        commit=commit,
        dirty=dirty,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(["bench/end_to_end/compare.py", *sys.argv[1:]]),
        machine=describe_machine(device),
        versions=versions,
        ceilings=measure_ceilings(device),
        rows=tuple(row for form in forms for row in rows(work, form, o)),
    ).save(folder / "end-to-end.json")
    details = {"gaps": gaps, "samples": {form.name: form.samples for form in forms}}
    (folder / "details.json").write_text(json.dumps(details, indent=1))
    text = report(work, forms, gaps)
    (folder / "end-to-end.md").write_text(text)
    return text


def main(options: Options, say: Callable[[str], None] = print) -> None:
    """Check, measure, write."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    with tempfile.TemporaryDirectory(prefix="fastppo-end-to-end-") as name:
        scratch = Path(name)
        gaps = {} if options.skip_peer else check(options, scratch)
        work = prepare(
            scratch / "work",
            options.model,
            options.sequences,
            options.prompt,
            options.response,
            epochs=options.epochs,
            device=options.device,
        )
        forms = measure(options, scratch, work)
        say(save(Path(options.output), work, forms, gaps, options))


if __name__ == "__main__":
    main(tyro.cli(Options))
