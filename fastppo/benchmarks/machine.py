"""What a result was measured on and with: hardware, versions, source tree."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fastppo

PACKAGES = ("torch", "numpy", "transformers", "triton")


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """The hardware, and how much of it is used. Results of unequal machines are not compared."""
    found: dict[str, str | int] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
        found["cuda"] = torch.version.cuda or ""
        found["driver"] = _first_line(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
    return found


def find_versions(peers: Iterable[str] = ()) -> dict[str, str]:
    """Versions of python, fastppo and installed packages.

    Args:
        peers: packages that are timed, besides those that fastppo stands on.
    """
    found = {"python": platform.python_version(), "fastppo": fastppo.__version__}
    for name in dict.fromkeys((*PACKAGES, *peers)):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source_state() -> tuple[str, bool]:
    """The commit of the source tree and whether it has changes; ("", False) of an installed one."""
    root = str(Path(fastppo.__file__).resolve().parents[1])
    commit = _first_line(["git", "-C", root, "rev-parse", "HEAD"])
    if not commit or not Path(root, "pyproject.toml").exists():
        return "", False
    return commit, bool(_first_line(["git", "-C", root, "status", "--porcelain"]))


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _first_line(command: list[str]) -> str:
    """Of what a program prints; empty where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
