"""Does a change leave every number as it was?

    python bench/compare_commits.py BEFORE AFTER [--full] [--resume] [--only NAME ...] \
        [--allow "METRIC=why"]

BEFORE and AFTER are revisions of this repository, or `.` for the working tree. Code that is moved
or rewritten must compute what it computed. Tests hold that to tolerances, and only for what they
think of. Here both revisions are built and train the same tiny models on the same prompts, in every
form of PPO that the options give (compare_scenarios.py). Then all that came out is compared bit for
bit: each metric of each iteration, the summary, each sample, each weight of actor and critic. Only
times may differ, and what `ALLOWED` or `--allow` names with a reason. Exit status 1 where anything
else does, or where a scenario fails.

The two sides run at the same time, on one thread each, for about two minutes on two quiet cores.
Each revision is built once, in about a minute, and kept in `--cache`. `--full` adds the demo and
the addition example on its real model: five minutes more. With `--resume`, AFTER goes on with what
BEFORE has saved, and has to end where BEFORE does by itself.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from tyro.conf import UseAppendAction

ROOT = Path(__file__).resolve().parents[1]
SCENARIOS = ROOT / "bench" / "compare_scenarios.py"
CACHE = Path(tempfile.gettempdir()) / "fastppo-compare-commits"
ABSENT = "absent"
ALLOWED = {"seconds*": "a time", "tokens_per_second": "a time"}
"""Patterns of names that may differ, and why."""

# Both revisions


def git(*arguments: str, **variables: str) -> bytes:
    command, env = ["git", "-C", str(ROOT), *arguments], {**os.environ, **variables}
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True).stdout


def tree_of(revision: str) -> str:
    """The hash of a revision's files; of the working tree's, untracked ones included, for `.`."""
    if revision != ".":
        return git("rev-parse", "--verify", f"{revision}^{{tree}}").decode().strip()
    with tempfile.TemporaryDirectory() as folder:
        index = str(Path(folder) / "index")  # the real one is left alone
        git("read-tree", "HEAD", GIT_INDEX_FILE=index)
        git("add", "--all", GIT_INDEX_FILE=index)
        return git("write-tree", GIT_INDEX_FILE=index).decode().strip()


def build(tree: str, cache: Path) -> Path:
    """A folder with `source`, the files of a tree, and `site`, where they are installed."""
    folder = cache / f"{tree}-{sys.implementation.cache_tag}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        new = Path(scratch) / "new"
        source = new / "source"
        source.mkdir(parents=True)
        subprocess.run(["tar", "-x", "-C", source], input=git("archive", tree), check=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
        if all(map(importlib.util.find_spec, ("scikit_build_core", "pybind11"))):
            pip.append("--no-build-isolation")
        subprocess.run([*pip, "--no-deps", "--target", new / "site", source], check=True)
        with contextlib.suppress(OSError):  # somebody else was quicker
            new.rename(folder)
    return folder


def train(built: Path, project: Path, out: Path, phases: list[str], only: Sequence[str]) -> Path:
    """Run the scenarios of some phases, or those named `only`, with what was built, in `out`.

    Raises:
        RuntimeError: the process ended otherwise than it should.
    """
    out.mkdir(exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "COLUMNS": "120"}
    env |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    for phase in phases:
        places = [built / "site", built / "source", project]
        command = [sys.executable, "-I", str(SCENARIOS), phase, *map(str, places), *only]
        with open(out / "log.txt", "ab") as log:
            status = subprocess.run(command, cwd=out, env=env, stdout=log, stderr=log).returncode
        if status:
            raise RuntimeError(f"the scenarios ended with status {status}; see {out / 'log.txt'}")
    return out


# What came out

Facts = dict[str, dict[str, Any]]
"""By place ("iteration 2", "summary", "sample 3", "weights") and name."""


class Difference(NamedTuple):
    place: str
    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.place}, {self.name}: {self.before} before, {self.after} after"


def read_run(folder: Path) -> Facts:
    """All that a run wrote which should not depend on when and where it ran."""
    facts: Facts = {}
    for row in _lines(folder / "metrics.jsonl"):
        facts[f"iteration {row['iteration']}"] = row
    if (folder / "summary.json").exists():
        summary = json.loads((folder / "summary.json").read_text())
        facts["summary"] = {k: v for k, v in summary.items() if not isinstance(v, str)}
    for number, sample in enumerate(_lines(folder / "samples.jsonl")):
        facts[f"sample {number}"] = sample
    weights = facts["weights"] = {}
    for file in sorted((folder / "model").rglob("*.safetensors")):
        data = file.read_bytes()  # the length of the header, the header, the tensors
        start = 8 + int.from_bytes(data[:8], "little")
        for name, about in json.loads(data[8:start]).items():
            if name != "__metadata__":
                first, last = (start + offset for offset in about["data_offsets"])
                text = f"{about['dtype']} {about['shape']} ".encode()
                digest = hashlib.sha256(text + data[first:last]).hexdigest()
                weights[f"{file.relative_to(folder)}:{name}"] = digest
    return facts


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


def compare(before: Facts, after: Facts, allowed: Mapping[str, str]) -> list[Difference]:
    """Every value that differs by a bit or is on one side only, in the order of the run."""
    found = []
    for place in dict.fromkeys([*before, *after]):
        one, other = before.get(place, {}), after.get(place, {})
        for name in dict.fromkeys([*one, *other]):
            # As text, in which -0.0 is not 0.0, and which has every bit of a float.
            values = [json.dumps(side[name]) if name in side else ABSENT for side in (one, other)]
            if values[0] != values[1] and not _allowing(name, allowed):
                found.append(Difference(place, name, *values))
    return found


def _allowing(name: str, allowed: Mapping[str, str]) -> list[str]:
    return [pattern for pattern in allowed if fnmatch.fnmatchcase(name, pattern)]


def report(before: Path, after: Path, allowed: Mapping[str, str]) -> bool:
    """Print what each scenario came to; whether nothing differs.

    Args:
        before, after: folders of `train`.
        allowed: patterns of names that may differ, and why.
    """
    named = {p.stem for out in (before, after) for p in out.iterdir() if p.is_dir()}
    named |= {p.stem for out in (before, after) for p in out.glob("*.failed")}
    used: set[str] = set()
    details = []
    print(f"{'scenario':24} rows metrics  weights before  after       verdict")
    for scenario in sorted(named):
        one, other = (read_run(out / scenario) for out in (before, after))
        rows = [row for place, row in one.items() if place.startswith("iteration")]
        names = {name for row in rows for name in row if not _allowing(name, allowed)}
        weights = [json.dumps(side["weights"], sort_keys=True).encode() for side in (one, other)]
        shas = [hashlib.sha256(text).hexdigest()[:10] for text in weights]
        found = compare(one, other, allowed)
        used |= {p for d in compare(one, other, {}) for p in _allowing(d.name, allowed)}
        failed = [out / f"{scenario}.failed" for out in (before, after)]
        verdict = f"{len(found)} DIFFER" if found else "same"
        if problems := [file for file in failed if file.exists()]:
            verdict = "FAILED"
            last = [file.read_text().strip().splitlines()[-1] for file in problems]
            details += [f"{scenario}: {file}: {x}" for file, x in zip(problems, last, strict=True)]
        elif not (rows and one["weights"]):
            verdict = "FAILED"
            details.append(f"{scenario}: it wrote no metrics or no weights")
        elif found:
            others = list(dict.fromkeys(d.name for d in found if d.name != found[0].name))
            more = f"; then {', '.join(others[:6])}{' ...' if others[6:] else ''}" if others else ""
            details.append(f"{scenario}: {found[0]}{more}")
        print(f"{scenario:24} {len(rows):4} {len(names):7}  {shas[0]:14}  {shas[1]}  {verdict}")
    if not named:
        details.append("no scenario ran")
    for pattern, why in allowed.items():
        verb = "differs" if pattern in used else "does not differ"
        print(f"allowed: {pattern} {verb} ({why})")
    print("\n".join(details) or f"every number of {len(named)} scenarios is the same")
    return not details


def main(
    before: str,
    after: str,
    /,
    *,
    full: bool = False,
    resume: bool = False,
    only: tuple[str, ...] = (),
    allow: UseAppendAction[tuple[str, ...]] = (),
    cache: Path = CACHE,
) -> None:
    """Compare; exit status 1 where something differs.

    Args:
        before, after: revisions, or `.` for the working tree.
        full: the demo and the addition example too.
        resume: AFTER resumes the checkpoints of BEFORE; instead of everything else.
        only: names of the scenarios to run; none: all.
        allow: NAME=why: a metric that may differ, or a pattern of such names.
        cache: folder in which built revisions are kept.
    """
    allowed = {**ALLOWED, **{name: why for name, _, why in (a.partition("=") for a in allow)}}
    if unexplained := [name for name, why in allowed.items() if not why.strip()]:
        sys.exit(f"--allow {unexplained[0]}: expected a reason, as in {unexplained[0]}=renamed")
    if resume and full:
        sys.exit("--full: expected no --resume beside it, which runs neither demo nor example")
    started = time.perf_counter()
    work = Path(tempfile.mkdtemp(prefix="fastppo-runs-"))
    project = work / "project"
    make = [sys.executable, str(SCENARIOS), "make", str(project)]
    subprocess.run(make, stderr=subprocess.DEVNULL, check=True)
    trees = [tree_of(before), tree_of(after)]
    phases = ["straight"] if resume else ["tiny", "resume", *(["full"] if full else [])]
    with ThreadPoolExecutor() as pool:
        made = {tree: pool.submit(build, tree, cache) for tree in trees}
        built = [made[tree].result() for tree in trees]
        ready = time.perf_counter()
        first = pool.submit(train, built[0], project, work / "before", phases, only)
        if resume:
            train(built[0], project, work / "after", ["half"], only)
            phases = ["rest"]
        after_out = train(built[1], project, work / "after", phases, only)
        outs = [first.result(), after_out]
    for side, revision, tree in zip(("before", "after"), (before, after), trees, strict=True):
        print(f"{side}: {revision} (tree {tree[:10]})")
    print(f"{ready - started:.0f} s to build, {time.perf_counter() - ready:.0f} s to run")
    if unknown := [name for name in only if not list(outs[0].glob(f"{name}*"))]:
        sys.exit(f"--only {unknown[0]}: no scenario of that name")
    if not report(outs[0], outs[1], allowed):
        sys.exit(f"the runs are kept in {work}")
    shutil.rmtree(work)


if __name__ == "__main__":
    tyro.cli(main)
