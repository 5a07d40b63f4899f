"""Compile kernels for GPUs that are not here, and read off what the compiler made of them.

Launchers run on meta tensors inside `recording()`, so what is compiled is what would be launched:
the same types, divisibility hints and table entry. Needs only the triton wheel, which bundles
ptxas and the disassemblers, in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from fastppo_kernels.launch import KernelCall, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
_At = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What one kernel became on one target. Counts are of instructions in the program text."""

    kernel: str
    target: str
    num_warps: int
    registers: int
    """Per thread: registers (NVIDIA) or vector registers (AMD)."""
    spills: int
    """Loads and stores of registers that did not fit (AMD: registers spilled)."""
    shared_bytes: int
    loads: int
    """Loads from global memory."""
    wide_loads: int
    """Those of 16 bytes."""
    wide_stores: int
    barriers: int
    instructions: int


def record(launcher: Callable[[], Any]) -> list[KernelCall]:
    """The launches of a function that calls launchers on meta tensors."""
    with recording() as calls:
        launcher()
    return calls


def specialise(call: KernelCall) -> tuple[dict[str, Any], dict[_At, Any], dict[_At, Any]]:
    """Types, compile-time constants and divisibility hints that Triton's runtime would choose; the
    latter two by the place of an argument, or of one inside a tuple."""
    parameters = {p.name: p for p in call.kernel.params}
    signature: dict[str, Any] = {}
    constants: dict[_At, Any] = {}
    hints: dict[_At, list[list[Any]]] = {}

    def type_of(value: Any, at: _At, name: str, by_value: bool) -> Any:
        if isinstance(value, tuple):  # Triton looks at the values in it whatever the kernel says
            types = [type_of(x, (*at, i), name, True) for i, x in enumerate(value)]
            return type(value)(*types)
        if value is None or (by_value and type(value) is int and value == 1):
            constants[at] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            if value.storage_offset() * value.itemsize % 16 == 0:
                hints[at] = [["tt.divisibility", 16]]
            return _POINTERS[value.dtype]
        if type(value) is int:
            if by_value and value % 16 == 0:
                hints[at] = [["tt.divisibility", 16]]
            return "i32" if -(2**31) <= value < 2**31 else "i64"
        assert type(value) is float, f"{name}: {value!r}"
        return "fp32"

    for index, name in enumerate(call.kernel.arg_names):
        value, parameter = call.arguments[name], parameters[name]
        if parameter.is_constexpr:
            signature[name], constants[index,] = "constexpr", value
        else:
            signature[name] = type_of(value, (index,), name, not parameter.do_not_specialize)
    return signature, constants, hints


def compile_call(call: KernelCall, target: GPUTarget) -> Any:
    """Compile one recorded launch, with the specialisation Triton's runtime would choose."""
    signature, constants, hints = specialise(call)
    source = ASTSource(fn=call.kernel, signature=signature, constexprs=constants, attrs=hints)
    num_warps = call.num_warps * 32 // target.warp_size
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    if target.backend == "cuda" and call.max_registers is not None:
        options["maxnreg"] = call.max_registers
    parsed = make_backend(target).parse_options(options)
    return triton.compile(source, target=target, options=parsed.__dict__)


def report(call: KernelCall, target_name: str) -> Report:
    """Compile one recorded launch for one of TARGETS and count."""
    target = TARGETS[target_name]
    compiled = compile_call(call, target)
    count = _count_nvidia if target.backend == "cuda" else _count_amd
    return Report(
        kernel=call.kernel.__name__,
        target=target_name,
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        **count(compiled.asm),
    )


def _count_nvidia(asm: Mapping[str, Any]) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(asm["cubin"])
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin))
        sass = _run(knobs.nvidia.nvdisasm.path, "-c", str(cubin))
    found = re.search(r"\bREG:(\d+)", usage)
    assert found is not None, usage
    opcode = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
    return {"registers": int(found[1])} | _counts(
        re.findall(opcode, sass, re.MULTILINE),
        spills=r"LDL|STL",
        loads=r"LDG",
        wide_loads=r"LDG.*\.128",
        wide_stores=r"STG.*\.128",
        barriers=r"BAR",
    )


def _count_amd(asm: Mapping[str, Any]) -> dict[str, int]:
    text = asm["amdgcn"]

    def entry(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        return 0 if found is None else int(found[1])

    counts = _counts(
        re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.MULTILINE),
        spills=r"(?!)",
        loads=r"(global|buffer)_load",
        wide_loads=r"(global|buffer)_load_(dwordx4|b128)",
        wide_stores=r"(global|buffer)_store_(dwordx4|b128)",
        barriers=r"s_barrier",
    )
    spills = entry("vgpr_spill_count") + entry("sgpr_spill_count")
    return counts | {"registers": entry("vgpr_count"), "spills": spills}


def _counts(opcodes: list[str], **patterns: str) -> dict[str, int]:
    counts = {k: sum(bool(re.match(p, op)) for op in opcodes) for k, p in patterns.items()}
    return counts | {"instructions": len(opcodes)}


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
