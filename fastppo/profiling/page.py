"""One self-contained HTML page of an analysis: phases, roofline, kernels, host syncs.

Nothing is loaded from anywhere; the page's own policy forbids it. Markup, style and script are in
page.html, which also escapes all that comes from the trace or from meta.json.
"""

from __future__ import annotations

from pathlib import Path

from fastppo.profiling.analysis import Analysis, Kernel, Phase
from fastppo.profiling.names import amount, duration, percent, short_name
from fastppo.profiling.phases import OTHER
from fastppo.profiling.scatter import roofline
from fastppo.profiling.table import format_count
from fastppo.reporting import markup
from fastppo.reporting.formatting import format_number

_ROWS = 30  # kernels in the table
_COLORS = {
    **{"rollout": "p0", "reward": "p1", "pack": "p2", "evaluate": "p3", "old_logprobs": "p7"},
    **{"ref": "p8", "values": "p9", "advantages": "p4", "update": "p5", "optimiser": "p10"},
    OTHER: "p6",
}
_FITS = ((0.021, ""), (0.0075, "wide"))  # share of the bar a letter takes, on which screens
_FURTHER = ("p0", "p1", "p3", "p4", "p5", "p9", "p7", "p10")  # of phases that are not the trainer's


def write_page(analysis: Analysis, path: str | Path) -> None:
    """Write the page, replacing an older one."""
    meta = analysis.meta
    steps = f"{analysis.steps} step{'s' * (analysis.steps != 1)}"
    torch = meta.versions.get("torch")
    name = meta.model or "fastppo"
    markup.write_page(
        Path(path),
        "profiling/page.html",
        title=f"{name} · profile",
        heading=name,
        about=[f"profile of {steps}", meta.device, f"torch {torch}" if torch else ""],
        figures=_figures(analysis),
        analysis=analysis,
        cuda=meta.is_cuda,
        colors=_colors(analysis),
        fits=_fits,
        roofline=roofline(analysis.kernels, meta.ceilings),
        rows=_longest(analysis),
        limit=_ROWS,
        more=max(0, len(analysis.kernels) - _ROWS),
        largest=(analysis.kernels[0].share if analysis.kernels else 0.0) or 1.0,
        details=_details(analysis),
        amount=amount,
        count=format_count,
        duration=duration,
        format_number=format_number,
        percent=percent,
        short_name=short_name,
    )


def _colors(analysis: Analysis) -> dict[str, str]:
    names = [phase.name for phase in analysis.phases] + [k.phase for k in analysis.kernels]
    others = [name for name in dict.fromkeys(names) if name not in _COLORS]
    chosen = _COLORS | {name: _FURTHER[i % len(_FURTHER)] for i, name in enumerate(others)}
    return {name: f"var(--{color})" for name, color in chosen.items()}


def _figures(analysis: Analysis) -> list[tuple[str, str, str, str]]:
    """The headline: name, nothing before, value, note."""
    steps, meta = analysis.steps, analysis.meta
    spread = f"mean of {steps}" if steps > 1 else ""
    items = [("A step", duration(analysis.wall_us / steps), spread)]
    if analysis.idle is not None:
        items.append(("GPU idle", percent(analysis.idle), "of the time nothing runs on it"))
    else:
        inside = sum(phase.busy * phase.share for phase in analysis.phases)
        items.append(("In operators", percent(inside), "the rest is Python"))
    if analysis.launches is not None:
        items.append(("Launches", format_count(analysis.launches / steps), "a step"))
    else:
        calls = sum(kernel.calls for kernel in analysis.kernels)
        items.append(("Operators", format_count(calls / steps), "calls a step"))
    where = len(analysis.syncs)
    lines = f"a step, from {where} line{'s' * (where != 1)}" if where else "a step"
    syncs = sum(sync.count for sync in analysis.syncs)
    items.append(("Host syncs", f"{syncs:,}", lines))
    limited = [(k.roofline, k.share) for k in analysis.kernels if k.roofline is not None]
    known = sum(share for _, share in limited)
    if meta.ceilings is not None and known:
        reached = sum(roofline * share for roofline, share in limited) / known
        what = "kernels'" if meta.is_cuda else "operators'"
        items.append(("Of the roofline", percent(reached), f"over {percent(known)} of {what} time"))
    return [(what, "", value, note) for what, value, note in items]


def _fits(phase: Phase) -> str | None:
    """On which screens the bar has room for the phase's name, as a CSS class; None: on none."""
    letters = len(phase.name) + 1
    return next((wide for size, wide in _FITS if phase.share > size * letters), None)


def _longest(analysis: Analysis) -> list[Kernel]:
    """The longest kernels of every phase; the script shows `_ROWS` of those chosen."""
    shown: list[Kernel] = []
    for phase in {kernel.phase: None for kernel in analysis.kernels}:
        shown += [kernel for kernel in analysis.kernels if kernel.phase == phase][:_ROWS]
    return sorted(shown, key=lambda kernel: -kernel.total_us)


def _details(analysis: Analysis) -> list[tuple[str, str]]:
    """What was measured how, and where the files are opened."""
    meta = analysis.meta
    rows: list[tuple[str, str]] = []
    if (ceilings := meta.ceilings) is not None:
        rows += [
            ("memory, measured", amount(ceilings.copy_gb_s * 1e9, "B/s")),
            ("bf16 product, measured", amount(ceilings.bf16_tflops * 1e12, "FLOP/s")),
            ("fp32 product, measured", amount(ceilings.fp32_tflops * 1e12, "FLOP/s")),
        ]
    off = 100 * (analysis.traced_us / analysis.wall_us - 1) if analysis.wall_us else 0.0
    rows.append(("the trace against the clock", f"{off:+.1f} %"))
    rows.append(("trace.json.gz", "opens in ui.perfetto.dev"))
    if meta.memory_snapshot:
        rows.append((meta.memory_snapshot, "opens at pytorch.org/memory_viz"))
    return rows + sorted(meta.versions.items())
