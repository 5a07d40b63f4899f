"""A trace file as spans, and meta.json there and back."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastppo.profiling.meta import Ceilings, Cost, Meta, Step, Sync
from fastppo.profiling.trace import Trace

HERE = Path(__file__).parent


def event(**values: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": "cpu_op", "name": "op", "ts": 1.0, "dur": 2.0, **values}


def test_complete_events_are_kept_in_the_order_they_started() -> None:
    trace = Trace.load(HERE / "gpu_trace.json")
    events = json.loads((HERE / "gpu_trace.json").read_text())["traceEvents"]
    assert len(trace.spans) == sum(each["ph"] == "X" for each in events) == 48
    starts = [span.start for span in trace.spans]
    assert starts == sorted(starts)
    kernel = next(span for span in trace.spans if span.name == "token_logprobs_bwd_kernel")
    assert (kernel.category, kernel.start, kernel.duration) == ("kernel", 1694.0, 256.0)
    assert (kernel.process, kernel.thread) == (0, 7)  # device and stream
    assert (kernel.correlation, kernel.external_id, kernel.end) == (602, 22, 1950.0)
    assert kernel.args["registers per thread"] == 40


def test_of_spans_that_start_together_the_outer_one_comes_first() -> None:
    spans = Trace.parse([event(name="inner", dur=1.0), event(name="outer", dur=5.0)]).spans
    assert [span.name for span in spans] == ["outer", "inner"]


def test_a_recorded_trace_is_read_gzipped_or_not(tmp_path: Path) -> None:
    packed = HERE / "cpu_trace.json.gz"
    (tmp_path / "trace.json").write_bytes(gzip.decompress(packed.read_bytes()))
    assert Trace.load(packed) == Trace.load(tmp_path / "trace.json")
    assert len(Trace.load(packed).spans) > 1000


def test_old_traces_name_things_otherwise() -> None:
    old = event(cat="Kernel", args={"external id": 7, "correlation": 0})
    (span,) = Trace.parse({"traceEvents": [old]}).spans
    assert (span.category, span.external_id, span.correlation) == ("kernel", 7, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trace.json", b"{"),
        ("trace.json.gz", b"no gzip"),
        ("cut.json.gz", gzip.compress(b"{}", mtime=0)[:9]),
    ],
)
def test_what_is_no_trace_is_refused_with_its_name(
    tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: expected a Chrome trace"):
        Trace.load(tmp_path / name)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"events": []}, "expected an object with a list 'traceEvents', got dict"),
        ([event(ts=None)], "expected numbers in 'ts' and 'dur', got .*'ts': None"),
        ([event(dur="long")], "expected numbers in 'ts' and 'dur'"),
    ],
)
def test_another_document_is_refused(document: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace.parse(document)


def test_meta_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    meta = Meta(
        steps=(Step(1.5), Step(2.5)),
        device="GPU",
        is_cuda=True,
        model="tiny",
        ceilings=Ceilings(1.0, 2.0, 3.0),
        versions={"torch": "2.11"},
        costs={"gae_fwd_kernel": Cost(10.0, 20.0, half=True)},
        list_dtype="c10::BFloat16",
        syncs=(Sync("aten::item", "a.py", 3, "f", "update", 2),),
        memory_snapshot="memory.pickle",
    )
    meta.save(tmp_path / "meta.json")
    assert Meta.load(tmp_path / "meta.json") == meta
    least = Meta(steps=(), device="CPU", is_cuda=False)
    least.save(tmp_path / "meta.json")
    assert Meta.load(tmp_path / "meta.json") == least


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"steps": [], "colour": 1}', '{"steps": 3}'])
def test_another_meta_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=r"meta\.json: expected"):
        Meta.load(tmp_path / "meta.json")
