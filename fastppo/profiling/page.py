"""One self-contained HTML page of an analysis: phases, roofline, kernels, host syncs.

Nothing is loaded from anywhere; the page's own policy forbids it. All that comes from the trace or
from meta.json is escaped. Markup, style and script are in page.html.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from fastppo.profiling.analysis import Analysis, Kernel
from fastppo.profiling.names import amount, duration, percent, short_name
from fastppo.profiling.phases import OTHER
from fastppo.profiling.scatter import roofline_section
from fastppo.profiling.table import format_count
from fastppo.reporting.formatting import format_number
from fastppo.reporting.markup import text

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
    meta, path = analysis.meta, Path(path)
    colors = _colors(analysis)
    steps = f"{analysis.steps} step{'s' * (analysis.steps != 1)}"
    torch = meta.versions.get("torch")
    about = [f"profile of {steps}", meta.device, f"torch {torch}" if torch else ""]
    name = meta.model or "fastppo"
    parts = {
        "title": text(f"{name} · profile"),
        "heading": text(name),
        "about": text(" · ".join(part for part in about if part)),
        "figures": _figures(analysis),
        "phases": _phases(analysis, colors),
        "roofline": roofline_section(
            analysis.kernels, meta.ceilings, colors, "a kernel" if meta.is_cuda else "an operator"
        ),
        "kernels": _kernels(analysis, colors),
        "syncs": _syncs(analysis),
        "details": _details(analysis),
    }
    page = files("fastppo.profiling").joinpath("page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_bytes(page.encode("utf-8", "backslashreplace"))
    unfinished.replace(path)


def _colors(analysis: Analysis) -> dict[str, str]:
    names = [phase.name for phase in analysis.phases] + [k.phase for k in analysis.kernels]
    others = [name for name in dict.fromkeys(names) if name not in _COLORS]
    chosen = _COLORS | {name: _FURTHER[i % len(_FURTHER)] for i, name in enumerate(others)}
    return {name: f"var(--{color})" for name, color in chosen.items()}


def _figures(analysis: Analysis) -> str:
    """The headline."""
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
    drawn = ""
    for what, value, note in items:
        small = f"<small>{text(note)}</small>" if note else ""
        drawn += f"<div><dt>{text(what)}</dt><dd>{text(value)}{small}</dd></div>"
    return drawn


def _phases(analysis: Analysis, colors: Mapping[str, str]) -> str:
    """The wall time as one bar: widths are time, filled heights the share in which work ran."""
    cuda = analysis.meta.is_cuda
    busy = "GPU busy" if cuda else "in operators"
    bar, legend = "", ""
    for phase in analysis.phases:
        name, color = text(phase.name), colors[phase.name]
        facts = f"{duration(1e6 * phase.seconds)}, {percent(phase.share)}"
        full = f"{busy} {percent(phase.busy)}"
        fits = next((w for size, w in _FITS if phase.share > size * (len(phase.name) + 1)), None)
        label = "" if fits is None else f'<b class="{fits}">{name}</b>'
        bar += (
            f'<span data-phase="{name}" style="flex:{phase.share:.5f} 1 0;color:{color}" '
            f'title="{name} {facts}, {full}">'
            f'<i style="height:{100 * phase.busy:.1f}%"></i>{label}</span>'
        )
        legend += (
            f'<li><button type="button" data-phase="{name}" aria-pressed="false">'
            f'<i style="background:{color}"></i>{name} <span class="quiet">{facts}</span> '
            f'<span class="quiet busy">{full}</span></button></li>'
        )
    return (
        f'<h2>Time by phase</h2><p class="note">Width is time, filled height the share of it with '
        f"{'the GPU busy' if cuda else 'an operator running'}. Choose a phase to see only its "
        f"{'kernels' if cuda else 'operators'}.</p>"
        f'<div class="bar">{bar}</div><ul class="phases">{legend}</ul>'
    )


def _kernels(analysis: Analysis, colors: Mapping[str, str]) -> str:
    """The longest kernels of every phase; the script shows `_ROWS` of those chosen."""
    cuda = analysis.meta.is_cuda
    if not analysis.kernels:
        return '<h2>Kernels</h2><p class="quiet">Nothing ran.</p>'
    largest = analysis.kernels[0].share or 1.0
    shown: list[Kernel] = []
    for phase in {kernel.phase: None for kernel in analysis.kernels}:
        shown += [kernel for kernel in analysis.kernels if kernel.phase == phase][:_ROWS]
    shown.sort(key=lambda kernel: -kernel.total_us)
    rows = ""
    for index, kernel in enumerate(shown):
        values = [
            ("calls", format_count(kernel.calls / analysis.steps)),
            ("time", duration(kernel.total_us / analysis.steps)),
            ("share", percent(kernel.share)),
            ("moved", _per_call(kernel.bytes, kernel.calls, "B")),
            ("GB/s", format_number(kernel.gb_s)),
            ("TFLOP/s", format_number(kernel.tflop_s)),
        ]
        if cuda:
            values.append(("regs", "–" if kernel.registers is None else str(kernel.registers)))
            values.append(("occupancy", percent(kernel.occupancy)))
        cells = "".join(f'<td data-name="{name}">{text(value)}</td>' for name, value in values)
        width = 100 * kernel.share / largest
        rows += (
            f'<tr data-phase="{text(kernel.phase)}"{" hidden" if index >= _ROWS else ""}>'
            f'<td title="{text(kernel.name)}"><div>{text(short_name(kernel.name))}&ensp;'
            f'<span class="quiet">{text(kernel.phase)}</span></div>'
            f'<s style="width:{width:.2f}%;background:{colors[kernel.phase]}"></s></td>'
            f'{cells}<td data-name="roofline">{_meter(kernel.roofline)}</td></tr>'
        )
    names = ["calls", "time", "share", "a call moves", "GB/s", "TFLOP/s"]
    names += ["registers", "occupancy"] if cuda else []
    head = "".join(f"<th>{name}</th>" for name in ["", *names, "roofline"])
    rest = len(analysis.kernels) - min(_ROWS, len(analysis.kernels))
    more = f" The {_ROWS} longest; table.csv has {rest:,} more." if rest else ""
    return (
        f"<h2>{'Kernels' if cuda else 'Operators'}</h2>"
        f'<p class="note">Calls and time are a step\'s.{more}</p>'
        f'<table id="kernels" data-rows="{_ROWS}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )


def _per_call(value: float | None, calls: int, unit: str) -> str:
    return "–" if value is None else amount(value / calls, unit)


def _meter(share: float | None) -> str:
    if share is None:
        return "–"
    return f'<u><i style="width:{min(100.0, 100 * share):.1f}%"></i></u>{text(percent(share))}'


def _syncs(analysis: Analysis) -> str:
    """Lines that made the host wait, and how long it waited by the CUDA API's own account."""
    drawn = "<h2>Host syncs</h2>"
    if not analysis.syncs:
        drawn += '<p class="quiet">No line of Python was seen to wait for the device.</p>'
    else:
        rows = "".join(
            f"<tr><td><div>{text(f'{sync.file}:{sync.line}')}</div>"
            f'<span class="quiet">{text(sync.function)}</span></td><td>{text(sync.phase)}</td>'
            f"<td>{text(sync.api)}</td><td>{sync.count:,}</td></tr>"
            for sync in analysis.syncs
        )
        head = "<th>line</th><th>phase</th><th>what</th><th>a step</th>"
        drawn += f'<table class="syncs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    if analysis.waits:
        rows = "".join(
            f"<tr><td>{text(wait.api)}</td><td>{text(wait.phase)}</td>"
            f"<td>{format_count(wait.calls / analysis.steps)}</td>"
            f"<td>{duration(wait.total_us / analysis.steps)}</td></tr>"
            for wait in analysis.waits
        )
        head = "<th>the host waited in</th><th>phase</th><th>calls</th><th>time a step</th>"
        drawn += f'<table class="syncs"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return drawn


def _details(analysis: Analysis) -> str:
    """Folded: what was measured how, and where the files are opened."""
    meta, rows = analysis.meta, []
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
    rows += sorted(meta.versions.items())
    drawn = "".join(f"<tr><td>{text(k)}</td><td>{text(v)}</td></tr>" for k, v in rows)
    return (
        "<details><summary>How it was measured</summary>"
        f"<table><tbody>{drawn}</tbody></table></details>"
    )
