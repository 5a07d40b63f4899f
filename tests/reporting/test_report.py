"""The report is one self-contained page, whatever a run wrote."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastppo.reporting.report import write_curve_png, write_report
from fastppo.training.metrics import MetricsWriter

METRICS = (
    *("kl", "entropy", "approx_kl", "clipfrac", "explained_variance", "value_loss", "policy_loss"),
    *("response_length", "truncated", "tokens_per_second", "actor_grad_norm", "critic_grad_norm"),
)


def write_run(run_dir: Path, iterations: int, **samples: Any) -> None:
    with MetricsWriter(run_dir, [], {}, "run") as writer:
        for i in range(1, iterations + 1):
            row = {"iteration": i, "reward": 1 - math.exp(-i / iterations) + 0.05 * math.sin(i)}
            row |= {key: math.cos(i) for key in METRICS}
            row |= {"seconds_rollout": 2.0, "seconds_update": 1.0, "seconds_total": 3.5}
            if i % 10 == 0:
                row["eval_reward"] = 0.9
            writer.log(row)
            if samples:
                writer.samples(i, [samples])
    summary = {
        "eval_before": {"accuracy": 0.889, "reward": 0.889, "prompts": 81},
        "eval_after": {"accuracy": 0.963, "reward": 0.963, "prompts": 81},
        "seconds": 192.0,
        "hardware": "2 CPU cores",
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    (run_dir / "config.json").write_text(json.dumps({"model": "models/tiny", "seed": 0}))


class Page(HTMLParser):
    """Elements, attributes and text of a page; fails on an element that is closed out of order."""

    VOID = frozenset({"meta", "link", "path", "br"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("option", "li") and self.open[-1] != tag:
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.content.append(data)

    @property
    def text(self) -> str:
        return "".join(self.content)

    def data(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', self.source)
        assert found is not None
        return json.loads(found[1])

    def plots(self) -> list[str | None]:
        return [a["data-key"] for _, a in self.elements if "data-key" in a]


def test_headline_curves_phases_and_configuration(tmp_path: Path) -> None:
    write_run(tmp_path, 40, prompt="2 + 2?", response="4", reward=1.0)
    page = Page(write_report(tmp_path))
    for expected in ("tiny", "88.9 % → 96.3 %", "3 min 12 s", "2 CPU cores", "81 held-out prompts"):
        assert expected in page.text
    assert page.plots() == ["reward", *METRICS]
    assert "rollout 57.1 %" in page.text and "other 14.3 %" in page.text
    assert "models/tiny" in page.text
    data = page.data()
    assert data["series"]["reward"]["x"] == list(range(1, 41))
    assert data["series"]["kl"]["y"][0] == pytest.approx(math.cos(1), rel=1e-5)
    assert data["evals"] == {"x": [0, 10, 20, 30, 40], "y": [0.889, 0.9, 0.9, 0.9, 0.9]}


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, 3, prompt="see http://a.example/x.png", response="<img src=x>", reward=0.0)
    page = Page(write_report(tmp_path))
    for tag, attributes in page.elements:
        assert tag not in {"img", "iframe", "object", "embed", "audio", "video", "base", "form"}
        assert not {"src", "srcset", "xlink:href", "action", "onclick", "onload"} & set(attributes)
        assert attributes.get("href", "data:,") == "data:,"
    style_and_script = re.sub(r"<main>.*</main>", "", page.source, flags=re.S)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", style_and_script.replace("</", ""))
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'")


def test_model_text_is_escaped_everywhere(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    evil += "\"' {{data}} \x00\ud800\u202e"
    write_run(tmp_path, 2, prompt=evil, response=evil, reward=1.0, truncated=True)
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        writer.log({"iteration": 3, "reward": 1.0, f"reward/{evil}": 1.0, "reward/b": 0.0})
    (tmp_path / "config.json").write_text(json.dumps({"model": evil, evil: [evil]}))
    summary = {"hardware": evil, "run_name": evil, "eval_after": {"reward": 0.5, "prompts": evil}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(tmp_path))
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert "alert(1)" in page.text and "{{data}}" in page.text
    assert not {"\x00", "\u202e"} & set(page.source)
    page.data()


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_short_runs(tmp_path: Path, iterations: int) -> None:
    write_run(tmp_path, iterations)
    page = Page(write_report(tmp_path))
    assert ("No iteration" in page.text) == (iterations == 0)
    assert "NaN" not in page.source and "Infinity" not in page.source
    assert write_curve_png(tmp_path).read_bytes().startswith(b"\x89PNG")


def test_metrics_alone_are_enough(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 5, "reward": 0.5}\n{"iteration": 6, "re')
    page = Page(write_report(tmp_path))
    assert page.plots() == ["reward"]
    assert tmp_path.name in page.text
    assert "Samples" not in page.text and "Configuration" not in page.text


def test_null_values_are_gaps(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        for i in range(1, 9):
            writer.log(
                {"iteration": i, "reward": math.nan if i == 4 else i, "value_loss": math.nan}
            )
    page = Page(write_report(tmp_path))
    assert page.plots() == ["reward"]
    assert page.data()["series"]["reward"]["x"] == [1, 2, 3, 5, 6, 7, 8]
    curve = next(a["d"] for t, a in page.elements if t == "path" and a.get("class") == "")
    assert curve is not None and curve.count("M") == 2


def test_a_resumed_run_shows_each_iteration_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        for i, reward in ((1, 0.0), (2, 0.1), (3, 0.2), (2, 0.5), (3, 0.6)):
            writer.log({"iteration": i, "reward": reward})
    series = Page(write_report(tmp_path)).data()["series"]["reward"]
    assert series == {"x": [1, 2, 3], "y": [0.0, 0.5, 0.6]}


@pytest.mark.slow
def test_long_runs_stay_small_and_keep_their_extremes(tmp_path: Path) -> None:
    rows = [
        {"iteration": i, "reward": math.sin(i / 300), **{key: math.sin(i * 1.7) for key in METRICS}}
        for i in range(1, 10_001)
    ]
    rows[4321]["reward"], rows[5000]["kl"] = 7.25, None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "quote ' and < " * 2000
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        for i in range(1, 10_001, 50):
            writer.samples(i, [{"prompt": text, "response": text, "reward": 0.5}] * 20)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    page = Page(path)
    assert 7.25 in page.data()["series"]["reward"]["y"]
    shown = [int(a["data-iteration"] or 0) for t, a in page.elements if "data-iteration" in a]
    assert {1, 9951} <= set(shown)


def test_samples_show_the_first_and_last_iteration(tmp_path: Path) -> None:
    write_run(tmp_path, 1)
    with MetricsWriter(tmp_path, [], {}, "run") as writer:
        for i in (1, 5, 9):
            messages = [{"role": "user", "content": f"prompt of {i}"}]
            writer.samples(i, [{"prompt": messages, "response": f"answer {i}", "reward": None}])
    page = Page(write_report(tmp_path))
    shown = page.source.split('<div id="samples" hidden>')[0]
    assert "answer 1<" in shown and "answer 9<" in shown and "answer 5<" not in shown
    assert "answer 5<" in page.source
    assert [t for t, a in page.elements if t == "option" and "selected" in a] == ["option"] * 2


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl is missing"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nnot json\n{"iteration": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 must be a JSON object"):
        write_report(tmp_path)


def test_writing_again_gives_the_same_page(tmp_path: Path) -> None:
    write_run(tmp_path, 5, prompt="p", response="r", reward=1.0)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser_nothing_overflows_and_hovering_reads_the_curve(
    tmp_path: Path, width: int
) -> None:
    write_run(tmp_path, 40, prompt="p" * 300, response="long " * 300, reward=1.0)
    (tmp_path / "config.json").write_text(json.dumps({"model": "name-" * 30, "key": "v" * 500}))
    report = write_report(tmp_path)
    # A headless window cannot be narrower than 500 px, so the page is measured in a frame.
    probe = """<script>
var frame = document.createElement("iframe");
frame.style.cssText = "border:0;width:WIDTHpx;height:4000px";
frame.srcdoc = document.getElementById("page").textContent;
frame.onload = function () {
  var page = frame.contentDocument, root = page.documentElement;
  page.querySelector("details").open = true;
  var plot = page.querySelector(".hero .plot"), box = plot.getBoundingClientRect();
  var at = {clientX: box.left + box.width / 2};
  plot.dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
  var select = page.querySelector("select");
  select.value = "7"; select.dispatchEvent(new frame.contentWindow.Event("change"));
  document.body.textContent = JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, tip: page.querySelector(".tip").textContent,
    kl: page.querySelector(".small .read").textContent,
    table: page.querySelector(".pair table").dataset.iteration});
};
document.body.appendChild(frame);
</script>""".replace("WIDTH", str(width))
    source = report.read_text(encoding="utf-8").replace("&", "&amp;").replace("<", "&lt;")
    page = f'<!doctype html><meta charset="utf-8"><body><pre id="page" hidden>{source}</pre>{probe}'
    (tmp_path / "probe.html").write_text(page, encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    command += ["--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command += ["--window-size=1400,1000", (tmp_path / "probe.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<body>(\{.*?\})</body>", done.stdout, re.S)
    assert found is not None, done.stdout[-500:]
    result = json.loads(found[1])
    assert result["overflow"] == 0
    assert re.fullmatch(
        r"iteration 20\nreward 0\.\d+\nheld out 0\.9 \(iteration 20\)", result["tip"]
    )
    assert float(result["kl"].replace("−", "-")) == pytest.approx(math.cos(20), rel=1e-5)
    assert result["table"] == "7"
