"""The page of a profile is one self-contained file that shows what the analysis found."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastppo.profiling.analysis import Analysis, Kernel, Phase, Wait, analyse
from fastppo.profiling.meta import Ceilings, Meta, Sync
from fastppo.profiling.page import write_page
from fastppo.profiling.roofline import attainable_tflops
from fastppo.profiling.trace import Trace

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"' {{figures}} \x00\u202e"


class Page(HTMLParser):
    """Elements with their attributes and text; fails on one that is closed out of order."""

    VOID = frozenset({"meta", "link", "path"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.content: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.content.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.content))

    def dots(self) -> dict[str, dict[str, str]]:
        """Attributes of the roofline's dots by the first line of what they say."""
        found = [a for tag, a in self.elements if tag == "i" and "data-tip" in a]
        return {a["data-tip"].splitlines()[0]: a for a in found}

    def rows(self) -> list[dict[str, str]]:
        return [a for tag, a in self.elements if tag == "tr" and "data-phase" in a]


def css(attributes: dict[str, str], name: str) -> float:
    found = re.search(rf"(?:^|;){name}:([\d.]+)", attributes["style"])
    assert found is not None, attributes["style"]
    return float(found[1])


def of_fixture(kind: str) -> Analysis:
    name = {"gpu": "gpu_trace.json", "cpu": "cpu_trace.json.gz"}[kind]
    return analyse(Trace.load(HERE / name), Meta.load(HERE / f"{kind}_meta.json"))


def written(analysis: Analysis, tmp_path: Path) -> Page:
    write_page(analysis, tmp_path / "profile.html")
    return Page(tmp_path / "profile.html")


def test_what_a_gpu_did(tmp_path: Path) -> None:
    page = written(of_fixture("gpu"), tmp_path)
    for expected in (
        "Qwen2.5-0.5B profile of 2 steps · NVIDIA H200 · torch 2.11.0",
        "A step 1.00 ms mean of 2",  # 2010 / 2 µs
        "GPU idle 72 %",
        "Launches 4.50 a step",  # 9 / 2
        "Host syncs 6 a step, from 2 lines",
        # weighted by time: (0.800·256 + 0.390·110 + 0.25·60 + 0.2625·40 + 0.537·40 + 0.157·40 +
        # 0.25·2) / 548, which are 91 % of 600 µs
        "Of the roofline 55 % over 91 % of kernels' time",
        "rollout 200 µs, 20 % GPU busy 28 %",
        "rewards.py:8 score",
        "cudaStreamSynchronize rollout 0.500 30.0 µs",
        "the trace against the clock -0.5 %",
    ):
        assert expected in page.text, expected
    assert [row["data-phase"] for row in page.rows()][:2] == ["update", "update"]
    cells = "0.500 128 µs 43 % 819 MB 3,200 12.0 40 75 % 80 %"
    assert f"token_logprobs_bwd_kernel\u2002 update {cells}".replace("\u2002", "") in page.text


def test_what_a_cpu_did(tmp_path: Path) -> None:
    analysis = of_fixture("cpu")
    page = written(analysis, tmp_path)
    assert "In operators" in page.text and "the rest is Python" in page.text
    assert "GPU" not in page.text and "occupancy" not in page.text
    assert "No line of Python was seen to wait" in page.text
    shown = [row for row in page.rows() if "hidden" not in row]
    assert len(shown) == 30
    assert f"table.csv has {len(analysis.kernels) - 30} more" in page.text


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_bar_is_as_wide_as_time_and_filled_as_busy(tmp_path: Path, kind: str) -> None:
    analysis = of_fixture(kind)
    page = written(analysis, tmp_path)
    bars = [a for tag, a in page.elements if tag == "span" and "flex:" in a.get("style", "")]
    assert [bar["data-phase"] for bar in bars] == [phase.name for phase in analysis.phases]
    assert [css(bar, "flex") for bar in bars] == pytest.approx(
        [phase.share for phase in analysis.phases], abs=1e-5
    )
    fills = [css(a, "height") for tag, a in page.elements if "height:" in a.get("style", "")]
    assert fills == pytest.approx([100 * phase.busy for phase in analysis.phases], abs=0.05)


def test_dots_stand_where_their_numbers_say(tmp_path: Path) -> None:
    dot = written(of_fixture("gpu"), tmp_path).dots()["token_logprobs_bwd_kernel"]
    # 3.072e9 operations on 819298304 bytes at 12 TFLOP/s. The axes: 0.1 to 1000 operations a byte,
    # 10^-2 to 10^3 TFLOP/s, as the slowest dot is at 0.1.
    assert css(dot, "left") == pytest.approx(
        100 * (math.log10(3.072e9 / 819298304) + 1) / 4, abs=0.01
    )
    assert css(dot, "top") == pytest.approx(100 * (3 - math.log10(12)) / 5, abs=0.01)
    assert "80 % of the roofline" in dot["data-tip"] and "43 % of the kernels" in dot["data-tip"]
    assert css(dot, "--size") == 44.0  # the largest


@pytest.mark.parametrize("intensity", [0.5, 3000.0])
def test_a_kernel_at_the_roof_stands_on_the_line(tmp_path: Path, intensity: float) -> None:
    ceilings = Ceilings(copy_gb_s=2000.0, bf16_tflops=500.0, fp32_tflops=500.0)
    reached = attainable_tflops(intensity, ceilings, half=True)
    kernel = Kernel("update", "k", 1, 1.0, 1.0, 1.0, intensity, 1.0, reached, 1.0)
    meta = Meta((), "GPU", True, ceilings=ceilings)
    page = written(made(meta, (kernel,)), tmp_path)
    dot = page.dots()["k"]
    (roof,) = [a["d"] for tag, a in page.elements if a.get("class") == "roof"]
    points = [tuple(map(float, point.split())) for point in roof[1:].split("L")]
    x, y = 10 * css(dot, "left"), 10 * css(dot, "top")
    ends = next((a, b) for a, b in itertools.pairwise(points) if a[0] - 0.2 <= x <= b[0] + 0.2)
    (x0, y0), (x1, y1) = ends
    assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.5)


def made(meta: Meta, kernels: tuple[Kernel, ...] = (), **options: Any) -> Analysis:
    phases = (Phase("update", 1.0, 0.5, 1.0, 0.5), Phase("other", 1.0, 0.5, 1.0, 0.0))
    values = {"phases": phases, "idle": 0.5, "launches": 1, "syncs": (), "waits": ()} | options
    return Analysis(meta=meta, steps=1, wall_us=2e6, traced_us=2e6, kernels=kernels, **values)


def test_all_that_comes_from_a_trace_is_escaped(tmp_path: Path) -> None:
    ceilings = Ceilings(1.0, 1.0, 1.0)
    meta = Meta((), EVIL, True, EVIL, ceilings, {EVIL: EVIL, "torch": EVIL}, memory_snapshot=EVIL)
    kernel = Kernel(EVIL, EVIL, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5)
    page = written(
        made(
            meta,
            (kernel,),
            phases=(Phase(EVIL, 1.0, 1.0, 1.0, 0.5),),
            syncs=(Sync(EVIL, EVIL, 1, EVIL, EVIL, 1),),
            waits=(Wait(EVIL, EVIL, 1, 1.0),),
        ),
        tmp_path,
    )
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert page.text.count("alert(1)") > 8
    assert "{{figures}}" in page.text
    assert not {"\x00", "\u202e"} & set(page.source)
    for _, attributes in page.elements:
        assert not {"src", "onerror"} & set(attributes)


@pytest.mark.parametrize("kind", ["gpu", "cpu"])
def test_the_page_loads_nothing(tmp_path: Path, kind: str) -> None:
    page = written(of_fixture(kind), tmp_path)
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "audio", "video", "base", "form"}
        assert not {"src", "srcset", "xlink:href", "action", "onclick", "onload"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"https?://|@import|url\(", page.source)
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_little_is_enough(tmp_path: Path) -> None:
    page = written(made(Meta((), "CPU", False), idle=None, launches=None), tmp_path)
    assert "Nothing ran." in page.text and "Roofline" not in page.text
    kernel = Kernel("elsewhere", "k", 1, 1.0, 1.0)
    page = written(made(Meta((), "GPU", True), (kernel,)), tmp_path)
    assert "Roofline" not in page.text and "None" not in page.text
    assert page.rows()[0]["data-phase"] == "elsewhere"


def test_long_profiles_stay_small_and_show_every_phase(tmp_path: Path) -> None:
    analysis = of_fixture("gpu")
    first = analysis.kernels[0]
    many = [
        replace(first, phase=f"phase {i % 7}", name=f"{first.name}_{i}", total_us=9999.0 - i)
        for i in range(5000)
    ]
    rare = replace(first, phase="rare", name="rare", total_us=0.1)
    page = written(replace(analysis, kernels=(*many, rare)), tmp_path)
    assert len(page.source) < 500_000
    rows = page.rows()
    assert len([row for row in rows if "hidden" not in row]) == 30
    assert {row["data-phase"] for row in rows} == {f"phase {i}" for i in range(7)} | {"rare"}
    assert len(page.dots()) == 150
    names = [a for _, a in page.elements if a.get("class", "").startswith("dot-name")]
    assert len(names) == 1  # the others would stand on it


def test_a_page_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "profile.html"
    path.write_text("old")
    write_page(of_fixture("gpu"), path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("kind", ["gpu", "cpu"])
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_overflows_and_a_phase_can_be_chosen(
    tmp_path: Path, width: int, kind: str
) -> None:
    analysis = of_fixture(kind)
    sync = Sync("aten::" + "x" * 60, "a/very/long/" + "folder" * 20 + ".py", 12, "f" * 80, "p", 3)
    meta = replace(analysis.meta, model="name-" * 30)
    write_page(replace(analysis, meta=meta, syncs=(sync,)), tmp_path / "profile.html")
    # A headless window cannot be narrower than 500 px, so the page is measured in a frame.
    probe = """<script>
var frame = document.createElement("iframe");
frame.style.cssText = "border:0;width:WIDTHpx;height:4000px";
frame.srcdoc = document.getElementById("page").textContent;
frame.onload = function () {
  var page = frame.contentDocument, root = page.documentElement;
  function shown() {
    return Array.from(page.querySelectorAll("#kernels tbody tr:not([hidden])"));
  }
  page.querySelector("details").open = true;
  var before = shown().length;
  page.querySelector('button[data-phase="rollout"]').click();
  var chosen = shown().map(function (row) { return row.dataset.phase; });
  var faded = page.querySelectorAll(".bar span.off").length;
  page.querySelector('button[data-phase="rollout"]').click();
  page.querySelector("#roofline > i").dispatchEvent(
    new frame.contentWindow.PointerEvent("pointerenter"));
  var tip = page.querySelector(".tip"), box = tip.getBoundingClientRect();
  document.body.textContent = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, before: before, chosen: chosen, faded: faded,
    after: shown().length, tip: tip.textContent, inside: box.left >= 0 && box.right <= WIDTH});
};
document.body.appendChild(frame);
</script>""".replace("WIDTH", str(width))
    source = (tmp_path / "profile.html").read_text(encoding="utf-8")
    source = source.replace("&", "&amp;").replace("<", "&lt;")
    page = f'<!doctype html><meta charset="utf-8"><body><pre id="page" hidden>{source}</pre>{probe}'
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu"),
        *(f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=3000"),
        *("--window-size=1400,4000", "--dump-dom", (tmp_path / "probe.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<body>(\{.*\})</body>", done.stdout)
    assert found is not None, done.stdout[-500:]
    seen = json.loads(found[1].replace("&amp;", "&").replace("&gt;", ">").replace("&lt;", "<"))
    assert seen["overflow"] == 0
    assert seen["before"] == seen["after"] == min(30, len(analysis.kernels))
    in_rollout = sum(kernel.phase == "rollout" for kernel in analysis.kernels)
    assert seen["chosen"] == ["rollout"] * min(30, in_rollout)
    assert seen["faded"] == len(analysis.phases) - 1
    assert seen["tip"].count("\n") == 3 and seen["inside"]
