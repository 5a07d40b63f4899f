"""torch.profiler's Chrome trace as plain objects.

The file is what `torch.profiler.profile.export_chrome_trace` writes: JSON in the trace event format
that Perfetto and chrome://tracing open. Only complete events (`"ph": "X"`) are kept. Categories
that the analysis reads:

    user_annotation               record_function ranges of the program, ProfilerStep#N
    cpu_op                        operators, with "Input Dims" and "Input type" (record_shapes)
    cuda_runtime, cuda_driver     calls of the CUDA API, with "correlation"
    kernel, gpu_memcpy, gpu_memset  what ran on the device; `thread` is the stream
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ON_DEVICE = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
API_CALLS = frozenset({"cuda_runtime", "cuda_driver"})


@dataclass(frozen=True, slots=True)
class Span:
    """One event with a duration: an operator, a range, an API call, a kernel.

    Args:
        name: as the profiler wrote it.
        category: see the module.
        start, duration: µs on the trace's clock.
        process: the process id; the device's index for what ran on a device.
        thread: the thread id; the stream for what ran on a device.
        args: everything else the profiler knows, by the profiler's names.
    """

    name: str
    category: str
    start: float
    duration: float
    process: int | str
    thread: int | str
    args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def end(self) -> float:
        return self.start + self.duration

    @property
    def correlation(self) -> int | None:
        """The number that an API call and what it started on the device have in common."""
        value = self.args.get("correlation")
        return int(value) if value else None

    @property
    def external_id(self) -> int | None:
        """The number that an operator and what it started have in common."""
        value = self.args.get("External id", self.args.get("external id"))
        return int(value) if value else None


@dataclass(frozen=True, slots=True)
class Trace:
    """Spans in the order they started; of those that start together, the longest first."""

    spans: tuple[Span, ...]

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read a trace, gzipped (.gz) or not.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a Chrome trace.
        """
        path = Path(path)
        raw = path.read_bytes()
        try:
            document = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        except (OSError, EOFError, zlib.error, ValueError) as error:
            raise ValueError(f"{path}: expected a Chrome trace in JSON, got {error}") from error
        return cls.parse(document)

    @classmethod
    def parse(cls, document: Any) -> Trace:
        """The spans of a decoded trace file: an object with `traceEvents`, or their list.

        Raises:
            ValueError: there is no list of events, or an event has no numbers where it needs them.
        """
        events = document.get("traceEvents") if isinstance(document, dict) else document
        if not isinstance(events, list):
            raise ValueError(
                "trace: expected an object with a list 'traceEvents', "
                f"got {type(document).__name__}"
            )
        spans = [_span(event) for event in events if isinstance(event, dict) and _complete(event)]
        return cls(tuple(sorted(spans, key=lambda span: (span.start, -span.duration))))


def _complete(event: Mapping[str, Any]) -> bool:
    return event.get("ph") == "X" and "cat" in event


def _span(event: Mapping[str, Any]) -> Span:
    try:
        start, duration = float(event["ts"]), float(event.get("dur", 0))
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"trace: expected numbers in 'ts' and 'dur', got {str(dict(event))[:120]}"
        ) from None
    return Span(
        name=str(event.get("name", "")),
        category=str(event["cat"]).lower(),
        start=start,
        duration=max(0.0, duration),
        process=event.get("pid", 0),
        thread=event.get("tid", 0),
        args=event.get("args") or {},
    )
