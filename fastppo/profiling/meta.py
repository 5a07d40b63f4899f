"""What a trace does not say about the run it was taken of: meta.json beside the trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    """One traced iteration.

    Args:
        wall_us: µs on the host's clock, measured independently of the trace.
    """

    wall_us: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device was measured to reach in the same run.

    Args:
        copy_gb_s: a large copy, bytes read plus bytes written, in 1e9 bytes a second.
        bf16_tflops, fp32_tflops: a large matrix product, in 1e12 operations a second.
    """

    copy_gb_s: float
    bf16_tflops: float
    fp32_tflops: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call must move and compute.

    Args:
        bytes: read plus written, each tensor once.
        flops: floating point operations; a multiply-add is two.
        half: the operations are in bf16 or fp16, else fp32.
    """

    bytes: float
    flops: float
    half: bool = False


@dataclass(frozen=True, slots=True)
class Sync:
    """A line of Python that made the host wait for the device.

    Args:
        api: what waited, such as "aten::_local_scalar_dense".
        file, line, function: where, of the program and not of torch.
        phase: the innermost phase around it.
        count: how often in one step.
    """

    api: str
    file: str
    line: int
    function: str
    phase: str
    count: int


@dataclass(frozen=True, slots=True)
class Meta:
    """Everything the analysis needs besides the trace.

    Args:
        steps: the traced iterations, in order.
        device: name of the device that was profiled.
        is_cuda: it is a GPU; otherwise operators on the CPU stand for kernels.
        model: name of the model.
        ceilings: None where they were not measured; then there is no roofline.
        versions: of python, torch, fastppo and so on, by name.
        costs: of one call of the operator or kernel named so, for what cannot be derived from the
            shapes in the trace. Kernels are matched by the start of their names.
        list_dtype: type of the tensors that optimisers get in lists, as the trace names types
            ("float", "c10::BFloat16"), where it does not say.
        syncs: host syncs of one step, which is not a traced one: counting takes time.
        memory_snapshot: file name beside meta.json, for https://pytorch.org/memory_viz.
    """

    steps: tuple[Step, ...]
    device: str
    is_cuda: bool
    model: str = ""
    ceilings: Ceilings | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    list_dtype: str = "float"
    syncs: tuple[Sync, ...] = ()
    memory_snapshot: str | None = None

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Meta:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a field is missing, unknown, or of the wrong shape.
        """
        path = Path(path)
        try:
            value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            ceilings = value.get("ceilings")
            return cls(
                **{
                    **value,
                    "steps": tuple(Step(**step) for step in value["steps"]),
                    "ceilings": Ceilings(**ceilings) if ceilings else None,
                    "costs": {name: Cost(**cost) for name, cost in value.get("costs", {}).items()},
                    "syncs": tuple(Sync(**sync) for sync in value.get("syncs", ())),
                }
            )
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path}: expected the meta.json of a profile, got {type(error).__name__}: {error}"
            ) from error
