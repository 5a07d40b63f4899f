"""Rewrites the performance tables of README.md from the results that are kept in bench/results.

    python bench/readme.py

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`; what is there is replaced. A
result that is not there leaves the place empty. tests/test_readme.py fails where README.md is not
what this makes.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.tables import bytes_text, seconds_text, table

ROOT, RESULTS = Path(__file__).resolve().parents[1], "bench/results"
HEAD = ("linear_ppo_loss", "linear_logprobs_forward", "linear_logprobs", "token_logprobs")
PROJECTS = {"TRL": "trl", "Liger": "liger_kernel", "verl": "verl"}
GAE = {
    "gae": "no mask",
    "gae_carry": "masked tokens carried",
    "gae_dense_zero": "masked tokens zeroed",
}
PHASES = ("rollout", "evaluation", "update", "iteration")
PLACE = re.compile(r"(<!-- figures: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str, results: Path) -> str:
    """The text with every table made anew from a folder of results.

    Raises:
        KeyError: a place in the text that nothing is made for.
    """
    makers = {"step": step, "ops": ops, "end-to-end": end_to_end, "gpu": gpu}

    def fill(match: re.Match[str]) -> str:
        made = makers[match[2]](results)
        return match[1] + (f"\n{made}\n\n" if made else "") + match[4]

    return PLACE.sub(fill, text)


def gpu(results: Path) -> str:
    """The same of every GPU whose results are kept: its step and its ops, each in a folder."""
    parts = []
    for name in sorted(path.parent.name for path in results.glob("*/step.json")):
        parts += [step(results, f"{name}/step.json"), ops(results, name)]
    return "\n\n".join(parts)


def step(results: Path, name: str = "step-cpu.json") -> str:
    """The update beside padded ones, and the rest of the iteration: bench_step.py."""
    path = results / name
    if not path.exists():
        return ""
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    seconds = {name: median(samples) for name, samples in kept["seconds"].items()}
    first = min(seconds.values())
    rows = [
        (name, seconds_text(s), f"{kept['tokens'] / s:.0f}", f"{s / first:.1f}")
        for name, s in sorted(seconds.items(), key=lambda item: item[1])
    ]
    rest = ", ".join(f"{name} {seconds_text(s)}" for name, s in kept["phases"].items())
    rounds = len(next(iter(kept["seconds"].values())))
    return "\n\n".join(
        (
            table(("update", "median", "real tokens/s", "× the first"), rows),
            paragraph(f"The rest of an iteration, in the same run: {rest}."),
            origin(
                step_command(kept.get("options", {}), rounds),
                kept["hardware"],
                kept["torch"],
                kept["date"],
                kept["commit"],
                name,
            ),
        )
    )


def step_command(options: dict[str, Any], rounds: int) -> str:
    """The command of a result, without what is the default."""
    defaults = {"precision": "auto", "seed": 0, "decode_rows": [], "repeats": rounds}
    words = ["python bench/bench_step.py"]
    for option, value in {**options, "repeats": rounds}.items():
        if option == "repeats" or value != defaults.get(option):
            values = value if isinstance(value, list) else [value]
            words += [f"--{option.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def ops(results: Path, folder: str = ".") -> str:
    """The head's ops and GAE beside others, for every result of `fastppo bench` in a folder."""
    parts = []
    for path in sorted((results / folder).glob("*/result.json")):
        result = Result.load(path)
        tables = [made for made in (head(result), gae(result)) if made]
        if tables:
            where = path.with_name("tables.md").relative_to(results)
            parts += [*tables, origin_of(result, str(where))]
    return "\n\n".join(parts)


def head(result: Result) -> str:
    """A line per case and size; of a project with several forms, the fastest."""
    columns = ("torch", "torch.compile", *PROJECTS)
    names = [f"{c} {result.versions.get(PROJECTS.get(c, ''), '')}".strip() for c in columns]
    lines = []
    for case in HEAD:
        for size, rows in by_size(result, case).items():
            ours = rows["fastppo"]
            cells = [figures(fastest(rows, column), ours) for column in columns]
            lines.append([f"`{case}` {size}", f"**{figures(ours)}**", *cells])
    return table(("op", "fastppo", *names), lines) if lines else ""


def gae(result: Result) -> str:
    """Two lines per treatment of masks, a column per size."""
    lines: list[list[str]] = []
    columns: list[str] = []
    for case, mask in GAE.items():
        sizes = by_size(result, case)
        peers = [[n for n in rows if n.endswith("loop")] for rows in sizes.values()]
        if not sizes or not all(peers):
            continue
        columns = columns or list(sizes)
        measured = [sizes.get(size, {}) for size in columns]  # a run that was cut off has some
        ours = [rows.get("fastppo") for rows in measured]
        cells = [f"**{seconds_text(row.median)}**" if row else "" for row in ours]
        lines.append([f"fastppo, {mask}", *cells])
        peer = peers[0][0]
        theirs = zip((rows.get(peer) for rows in measured), ours, strict=True)
        cells = [time_and_ratio(row, our) if row and our else "" for row, our in theirs]
        lines.append([peer, *cells])
    header = ["GAE", *(size.rpartition(" ")[0] for size in columns)]
    return table(header, lines) if lines else ""


def end_to_end(results: Path) -> str:
    """Iterations of fastppo and of TRL's PPOTrainer in the same precision, by phase."""
    path = results / "end-to-end" / "end-to-end.json"
    if not path.exists():
        return ""
    result = Result.load(path)
    found = {n: {row.provider: row for row in rows_of(result, f"ppo {n}")} for n in PHASES}
    whole = found["iteration"]
    lines = []
    for form, row in whole.items():
        peers = (n for n in whole if n.startswith("TRL") and precision(n) == precision(form))
        ratio = whole[next(peers, form)].median / row.median
        times = (seconds_text(found[phase][form].median) for phase in PHASES)
        lines.append([form, *times, f"{ratio:.2f}", memory(row)])
    size = next(iter(whole.values())).size
    made = table((size, *PHASES, "times as fast", "memory"), lines)
    return f"{made}\n\n{origin_of(result, 'end-to-end/end-to-end.json')}"


def precision(form: str) -> str:
    """Of a form such as "fastppo, bf16, shared trunk"."""
    return form.split(", ")[1]


def rows_of(result: Result, case: str) -> Iterable[Row]:
    """Rows of a case that have figures."""
    return (row for row in result.rows if row.case == case and row.status == "ok")


def by_size(result: Result, case: str) -> dict[str, dict[str, Row]]:
    """Rows by size and provider, of the sizes at which fastppo has figures."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows_of(result, case):
        found.setdefault(row.size, {})[row.provider] = row
    return {size: rows for size, rows in found.items() if "fastppo" in rows}


def fastest(rows: dict[str, Row], column: str) -> Row | None:
    """Of the providers of a column: "TRL" has "TRL chunked" and "TRL kernel"."""
    named = [row for name, row in rows.items() if name == column or name.startswith(f"{column} ")]
    return min(named, key=lambda row: row.median, default=None)


def figures(row: Row | None, ours: Row | None = None) -> str:
    """Such as "1.78 s (1.3×), 1.61 GB"; empty where there are none."""
    return "" if row is None else ", ".join(filter(None, (time_and_ratio(row, ours), memory(row))))


def time_and_ratio(row: Row, ours: Row | None) -> str:
    """The median, and how many times fastppo's it is."""
    if ours is None:
        return seconds_text(row.median)
    ratio = row.median / ours.median
    return f"{seconds_text(row.median)} ({ratio:.{1 if ratio < 10 else 0}f}×)"


def memory(row: Row) -> str:
    return "" if row.peak_bytes is None else bytes_text(row.peak_bytes)


def origin_of(result: Result, where: str) -> str:
    """`origin` of a result of fastppo.benchmarks."""
    machine = result.machine
    cpu = f"{machine.get('cpu')}, {machine.get('threads')} threads, {machine.get('isa')}"
    hardware = str(machine.get("gpu") or cpu)
    return origin(
        result.command, hardware, result.versions["torch"], result.date, result.commit, where
    )


def origin(command: str, hardware: str, torch: str, date: str, commit: str, where: str) -> str:
    """The command that printed it, without the paths of its machine; then where, when, the rest."""
    command = re.sub(r" --[\w-]+[ =]/\S+", "", command)
    command = re.sub(r"^(?=bench/)", "python ", command)
    lines = " \\\n  ".join(textwrap.wrap(command, 96, break_on_hyphens=False))
    at = f"{hardware}; torch {torch}; {date[:10]}, commit {commit[:7]}"
    text = paragraph(f"{at}; [every sample]({RESULTS}/{where}).")
    return f"```sh\n{lines}\n```\n\n{text}"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    made = filled(readme.read_text(encoding="utf-8"), ROOT / RESULTS)
    readme.write_text(made, encoding="utf-8")
