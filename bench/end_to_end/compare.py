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

import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from forms import Form, take_turns
from prepare import Mix, Model, prepare
from report import SHARED, TRL, save
from workload import Workload

HERE = Path(__file__).parent
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
    rounds: int = 2
    """Timed iterations of each form, after one that warms up."""
    sequences: int = 16
    """Episodes of an iteration."""
    prompt: tuple[int, int] = (8, 64)
    """Shortest and longest prompt, in tokens."""
    response: tuple[int, int] = (4, 64)
    """Shortest and longest response, in tokens."""
    mix: Mix = "geometric"
    """Where the other lengths lie; geometric: half of them below the geometric mean of the two."""
    epochs: int = 4
    """Passes over the episodes; TRL's default."""
    skip_peer: bool = False
    """Time fastppo alone, and check nothing."""
    output: str = "bench-results/end-to-end"
    """Folder of the results."""


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
        "even",
        epochs=1,
        device=options.device,
        stop="never",
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


def main(options: Options) -> None:
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
            options.mix,
            epochs=options.epochs,
            device=options.device,
        )
        forms = measure(options, scratch, work)
        print(save(Path(options.output), work, options.model, forms, gaps))


if __name__ == "__main__":
    main(tyro.cli(Options))
