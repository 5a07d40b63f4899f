"""Tables and files of a comparison."""

from __future__ import annotations

import json
import sys
from datetime import datetime, timezone
from pathlib import Path
from statistics import median

import torch
from forms import Form
from workload import Workload

from fastppo.benchmarks.machine import describe_machine, find_versions, source_state
from fastppo.benchmarks.results import Result, Row
from fastppo.benchmarks.tables import table
from fastppo.profiling.ceilings import measure_ceilings
from fastppo.profiling.meta import Ceilings
from fastppo.profiling.roofline import peak_tflops

PHASES = ("rollout", "evaluation", "update")
TRL, SHARED = "TRL 1.12.0", ", shared trunk"


def walls(form: Form, phase: str | None = None) -> list[float]:
    """Seconds of each sample, of one phase or of the iteration."""
    return [
        sum(wall for name, (wall, _) in sample["seconds"].items() if phase in (None, name))
        for sample in form.samples
    ]


def rows(work: Workload, model: str, form: Form) -> list[Row]:
    """The result's rows of one form."""
    size = f"{model} {work.real_tokens} tokens"
    last = form.samples[-1]
    memory = last.get("gpu_gb") if work.device == "cuda" else last["rss_gb"]
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


def report(
    work: Workload, forms: list[Form], gaps: dict[str, float], ceilings: Ceilings
) -> str:  # fmt: skip
    """The tables."""

    def times(form: Form) -> list[str]:
        base = next((f for f in forms if f.name == form.name.removesuffix(SHARED)), form)
        peer = next((f for f in forms if f.name == base.name.replace("fastppo", TRL)), base)
        cpu = median(sum(used for _, used in s["seconds"].values()) for s in form.samples)
        last = form.samples[-1]
        return [
            form.name,
            *(f"{median(walls(form, phase)):.2f}" for phase in (*PHASES, None)),
            f"{median(walls(peer)) / median(walls(form)):.2f}",
            f"{cpu:.2f}",
            f"{last.get('gpu_gb', last['rss_gb']):.1f}",
        ]

    def rates(form: Form) -> list[str]:
        flops = work.flops(SHARED in form.name)
        peak = 1e12 * peak_tflops(ceilings, "bf16" in form.name)
        tokens = {"update": work.epochs * work.real_tokens}
        seconds = {phase: median(walls(form, phase)) for phase in PHASES}
        total = median(walls(form))
        return [
            form.name,
            *(f"{tokens.get(phase, work.real_tokens) / seconds[phase]:.0f}" for phase in PHASES),
            f"{work.real_tokens / total:.0f}",
            *(f"{flops[phase] / seconds[phase] / peak:.0%}" for phase in PHASES),
            f"{sum(flops.values()) / total / peak:.0%}",
        ]

    every = (*PHASES, "iteration")
    header = ("seconds", *every, "× TRL", "CPU seconds", "peak GB")
    speeds = ("per second", *(f"{p}: tokens" for p in every), *(f"{p}: MFU" for p in every))
    passes = sorted({name for form in forms for name in form.samples[-1]["tokens"]})
    counts = [
        [name, *(str(form.samples[-1]["tokens"].get(name, 0)) for form in forms)] for name in passes
    ]
    parts = [
        f"{len(work.prompts)} episodes, {sum(work.prompt_lengths)} prompt and "
        f"{sum(work.response_lengths)} response tokens, {work.epochs} epoch(s) of "
        f"{work.minibatches} minibatches; medians, samples in end-to-end.json. TRL is the one of "
        "the same precision.",
        table(header, [times(form) for form in forms]),
        "Real tokens per second (in the update: of all epochs), and the share of the machine's "
        f"measured {ceilings.fp32_tflops:.2f} (fp32) or {ceilings.bf16_tflops:.2f} (bf16) TFLOP/s "
        "that goes into the operations of real tokens (MFU):",
        table(speeds, [rates(form) for form in forms]),
        "Tokens that pass through each model and output head in one iteration:",
        table(("model", *(form.name for form in forms)), counts),
    ]
    if gaps:
        parts.append("Largest differences between both sides on one batch, in fp32:")
        parts.append(table(("quantity", "gap"), [[k, f"{v:.1e}"] for k, v in gaps.items()]))
    return "\n\n".join(parts) + "\n"


def save(
    folder: Path, work: Workload, model: str, forms: list[Form], gaps: dict[str, float]
) -> str:
    """Write result, details and tables; returns the tables.

    Args:
        folder: made where it is missing.
        work: of one iteration.
        model: its name.
        forms: with their samples.
        gaps: largest differences between both sides; empty where that was not checked.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(work.device)
    commit, dirty = source_state()
    peer = {k: v for form in forms if "TRL" in form.name for k, v in form.versions.items()}
    versions = find_versions() | {f"{k} (TRL's side)": v for k, v in peer.items()}
    ceilings = measure_ceilings(device)
    Result(
        commit=commit,
        dirty=dirty,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(["bench/end_to_end/compare.py", *sys.argv[1:]]),
        machine=describe_machine(device),
        versions=versions,
        ceilings=ceilings,
        rows=tuple(row for form in forms for row in rows(work, model, form)),
    ).save(folder / "end-to-end.json")
    details = {"gaps": gaps, "samples": {form.name: form.samples for form in forms}}
    (folder / "details.json").write_text(json.dumps(details, indent=1))
    text = report(work, forms, gaps, ceilings)
    (folder / "end-to-end.md").write_text(text)
    return text
