"""Every op of fastppo once, at the smallest size, with its answer checked: for compute-sanitizer.

compute-sanitizer --error-exitcode 9 python bench/kernel_smoke.py cuda
"""

from __future__ import annotations

import sys

from fastppo.benchmarks.check import Judge
from fastppo.benchmarks.registry import all_cases
from fastppo.training.device import resolve_device


def main(device_name: str) -> None:
    device = resolve_device(device_name)
    for case in all_cases().values():
        if case.axis is not None:  # the same kernels, many times
            continue
        size = case.sizes["smoke"][0]
        inputs = case.inputs(size, device, 0)
        judge = Judge(case, size, inputs)
        for name in dict.fromkeys((case.baseline, "fastppo")):
            error = judge.check(name, case.providers[name].prepare(inputs, size)())
        print(f"{case.name}: error {error:.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
