"""`fastppo profile`: what the kernels cost, as far as it can be known without running them."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

COLUMNS = ("registers", "spills", "shared_bytes", "loads", "wide_loads", "wide_stores", "barriers")


def profile(aot: bool = False, target: str = "") -> None:
    """Print the table of kernels compiled ahead of time for GPUs that need not be here.

    Args:
        aot: compile every kernel and launch-table entry; needs no GPU, about half a minute.
        target: one of sm_80, sm_90, sm_100, gfx942; empty: all four.
    """
    if not aot:
        raise ValueError("expected --aot, the only profile there is so far")
    from fastppo_kernels.aot import TARGETS, report
    from fastppo_kernels.aot_cases import cases

    if target and target not in TARGETS:
        raise ValueError(f"--target: expected one of {', '.join(TARGETS)}, got {target!r}")
    table = Table("kernel, logits, vocabulary", "target", "warps", *COLUMNS)
    for column in table.columns[2:]:
        column.justify = "right"
    for name, call in cases().items():
        for each in [target] if target else TARGETS:
            made = report(call, each)
            counts = (str(getattr(made, column)) for column in COLUMNS)
            table.add_row(name, each, str(made.num_warps), *counts)
    Console().print(table)
