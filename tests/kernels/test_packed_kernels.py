"""The GAE scan: interpreted, in a process of its own, and compiled ahead of time for each GPU.

Triton decides at import whether kernels are interpreted, so the two cannot share a process.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton
from fastppo_kernels.gae import LAUNCH, gae_blocks_kernel, gae_fwd_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels"
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@pytest.mark.parametrize("name", ["gae"])
def test_under_the_interpreter(root, name):
    tests = root / "tests" / "kernels" / "interpreted" / f"test_{name}.py"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]


def spilled_bytes(kernel, target: GPUTarget, folder: Path, constants: dict, num_warps: int) -> int:
    """Compiles the kernel with every other argument present; bytes of stack a thread needs."""
    types = {"cu_seqlens_ptr": "*i32", "mask_ptr": "*i1", "discounts_ptr": "*fp64"}
    signature, values, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = types.get(name, "*fp32")
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if name.startswith("num_") else "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
    options = {"num_warps": num_warps, "enable_fp_fusion": True}
    made = triton.compile(
        source, target=target, options=make_backend(target).parse_options(options).__dict__
    )
    if target.backend == "hip":
        return int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", made.asm["amdgcn"])[1])
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(made.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run(
        [tool, "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    return sum(int(x) for x in re.findall(r"\b(?:STACK|LOCAL):(\d+)", usage))


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS.keys())
@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
def test_gae_compiles_without_spills(target, full, tmp_path):
    absent = ["mask", "bootstrap", "kl", "scores", "discounts"]
    constants = {"MODE": 0 if full else 2, "TWO": full, "BLOCK": LAUNCH.block}
    constants |= {} if full else {f"{name}_ptr": None for name in absent}
    assert spilled_bytes(gae_blocks_kernel, target, tmp_path, constants, LAUNCH.num_warps) == 0
    constants["CHUNK"] = LAUNCH.chunk
    assert spilled_bytes(gae_fwd_kernel, target, tmp_path, constants, LAUNCH.num_warps) == 0
