"""report and page: what is in the page, in every state of a run, and that nothing in it is obeyed."""

import json
import re
from html.parser import HTMLParser

import pytest

from lowrank_geo import page, report
from lowrank_geo.report import write_report

HOSTILE = "<script>alert(1)</script>"
NAMES = [f"blocks.{i}.{kind}" for i in range(2) for kind in ("q", "up")]
VOID = {"meta", "link", "br", "hr", "img", "input"}


def entry(name, rank=4, reason="", **more):
    dense = {"name": name, "kind": "linear", "m": 16, "n": 8, "rank": rank, "reason": reason}
    ours = 4 * (16 + 8 + 4) if rank else 128
    return dense | {"dense_parameters": 128, "parameters": ours, "error": None} | more


def record(names=NAMES, **changes):
    entries = [entry(n) for n in names] + [entry("lm_head", None, "skipped by name")]
    dense = sum(e["dense_parameters"] for e in entries) + 64
    ours = sum(e["parameters"] for e in entries) + 64
    found = {
        "format": "lowrank_geo run",
        "version": 1,
        "status": "finished",
        "config": {"model": "2m", "optimizer": "muon", "steps": 100, "tokenizer": "bytes"},
        "plan": {"entries": entries, "budget": 0.9, "init": "spectral"},
        "model": {"layers": 2, "width": 8},
        "data": {"description": "two books"},
        "parameters": {"dense": dense, "low_rank": ours},
        "environment": {"torch": "2.13"},
        "samples": [{"prompt": "def ", "text": "def f(): pass"}],
    }
    return found | changes


def metrics(names=NAMES, steps=(1, 50, 100)):
    for step in steps:
        train = {"loss": 5 - step / 50, "lr": 0.01, "grad_norm": 1.0}
        time = {"tokens": step * 64, "seconds": step * 0.5, "tokens_per_second": 128.0}
        yield {"kind": "train", "step": step, **train, **time}
        yield {"kind": "eval", "step": step, "loss": 5.25 - step / 50}
        layers = {
            "ranks": dict.fromkeys(names, 4),
            "spectra": {n: [2.0, 1.0, 0.5, 0.1] for n in names},
            "orthonormality": dict.fromkeys(names, 3e-7),
            "transport": dict.fromkeys(names, 0.99),
        }
        yield {"kind": "diagnostics", "step": step, **layers}


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(report, "to_svg", lambda figure, title: "<svg></svg>")


def write(run, found, lines=(), tail=""):
    (run / "run.json").write_text(json.dumps(found))
    (run / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + tail)
    return Page(write_report(run).read_text("utf-8"))


class Page(HTMLParser):
    """Parses a page, fails on tags that do not nest, and keeps its text, tags and attributes."""

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.attributes, self.text = html, [], [], [], ""
        self.feed(html)
        self.close()
        ids = [value for name, value in self.attributes if name == "id"]
        assert not self.open and len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_the_page_tells_the_whole_run(tmp_path):
    shown = write(tmp_path, record(), metrics())
    for words in (
        "Model 2m (layers 2, width 8), trained with muon for 100 of 100 steps. Data: two books.",
        "Parameters: 640, 90.9% of the 704 of the dense model (budget 90.0%).",
        "Loss on held-out text: 3.2500 nats or 4.6888 bits per byte.",
        "50.0 s",
        "128 bytes/s",
        "finished",
        "skipped by name",
        "4 (50%)",
        "16 × 8",
        "def f(): pass",
        "2.13",
    ):
        assert words in shown.text, words
    assert shown.tags.count("svg") == len(report.CAPTIONS) == 9
    assert all(title in shown.text for title in report.CAPTIONS)


def test_a_token_is_called_a_token(tmp_path):
    shown = write(tmp_path, record(config={"tokenizer": "bpe"}), metrics())
    assert "bits per token" in shown.text and "loss (nats per token)" in shown.text


def test_nothing_is_loaded_and_nothing_can_run(tmp_path):
    shown = write(tmp_path, record(), metrics())
    assert not {"script", "link", "iframe", "object", "embed", "img", "image"} & set(shown.tags)
    assert "http://" not in shown.html and "https://" not in shown.html
    assert "@import" not in shown.html
    assert all(m.startswith("#") for m in re.findall(r"url\((.*?)\)", shown.html))
    links = [v for name, v in shown.attributes if name in ("href", "src", "xlink:href")]
    assert all(link.startswith("#") for link in links)
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    assert f'content="{page.POLICY}"' in shown.html


def test_file_names_prompts_texts_and_layers_are_escaped(tmp_path):
    run = tmp_path / "run<script>alert(1)<script>"
    run.mkdir()
    names = [f"blocks.0.{HOSTILE}", "blocks.1.\"quoted' & $x$"]
    found = record(
        names,
        status=HOSTILE,
        config={HOSTILE: HOSTILE, "optimizer": HOSTILE, "model": HOSTILE, "prompt": HOSTILE},
        data={"description": f"the file {HOSTILE}"},
        environment={HOSTILE: [HOSTILE]},
        model={"layers": HOSTILE},
        samples=[{"prompt": HOSTILE, "text": f"{HOSTILE}<img src=x onerror=alert(1)>"}],
    )
    found["plan"]["entries"].append(entry(HOSTILE, None, HOSTILE, kind=HOSTILE))
    shown = write(run, found, metrics(names))
    assert not {"script", "img"} & set(shown.tags)
    assert "<script" not in shown.html and "<img" not in shown.html
    assert shown.text.count(HOSTILE) > 10
    assert "blocks.1.\"quoted' & $x$" in shown.text
    assert "trained with <script>" in shown.text


def test_names_no_encoding_can_hold_do_not_break_the_page(tmp_path):
    samples = [{"prompt": "\ud800", "text": "\x00\x1b\ud800數"}]
    shown = write(tmp_path, record(["a\ud800\x1b"], samples=samples), metrics(["a\ud800\x1b"]))
    assert "a\ufffd\ufffd" in shown.text and "數" in shown.text


def test_a_run_that_recorded_nothing_has_a_page(tmp_path):
    shown = write(tmp_path, {"format": "lowrank_geo run", "version": 1})
    assert "Nothing has been recorded yet." in shown.text
    assert "No text was generated." in shown.text and "unknown" in shown.text
    assert "svg" not in shown.tags


def test_a_run_without_a_metrics_file_still_shows_its_plan(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(record(status="running")))
    shown = Page(write_report(tmp_path).read_text("utf-8"))
    assert "running" in shown.text and "Rank per layer" in shown.text
    assert "Loss." not in shown.text


@pytest.mark.parametrize("part", ["config", "plan", "model", "data", "parameters", "environment"])
@pytest.mark.parametrize("value", [None, 3, [1], "text", {"entries": [None, {}], "dense": "x"}])
def test_any_part_may_be_missing_or_odd(tmp_path, part, value, without_figures):
    assert "Samples" in write(tmp_path, record(**{part: value}), metrics()).text


def test_odd_samples_are_passed_over(tmp_path, without_figures):
    shown = write(tmp_path, record(samples=[None, 3, {"text": None}, {"prompt": "kept"}]))
    assert "kept" in shown.text


def test_a_half_written_last_line_is_skipped(tmp_path, without_figures):
    shown = write(tmp_path, record(), metrics(), tail='{"kind": "eval", "step": 999, "loss": 0.0')
    assert "3.2500 nats" in shown.text


def test_a_single_step_is_enough_for_every_figure(tmp_path):
    assert write(tmp_path, record(), metrics(steps=[7])).tags.count("svg") == 9


def test_200_layers_fit_a_page(tmp_path):
    names = [f"blocks.{i}.mlp.{kind}" for i in range(50) for kind in ("q", "k", "up", "down")]
    shown = write(tmp_path, record(names), metrics(names))
    assert shown.tags.count("svg") == 9 and "blocks.49.mlp.down" in shown.text
    assert len(shown.html) < 500_000


def test_a_recorded_rank_replaces_the_planned_one(tmp_path):
    lines = [{"kind": "diagnostics", "step": 1, "ranks": dict.fromkeys(NAMES, 2)}]
    assert "2 of 8 (25%)" in write(tmp_path, record(), lines).text


def test_an_old_report_is_replaced_at_once_and_nothing_else_is_left(tmp_path, without_figures):
    write(tmp_path, record(status="running"))
    write(tmp_path, record(status="finished"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "metrics.jsonl",
        "report.html",
        "run.json",
    ]


def test_a_failed_write_keeps_the_old_report(tmp_path, without_figures, monkeypatch):
    write(tmp_path, record(status="running"))
    monkeypatch.setattr(page.os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write_report(tmp_path)
    Page((tmp_path / "report.html").read_text("utf-8"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": "other"}', "\x00" * 9])
def test_a_corrupt_run_is_one_sentence(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json needs") as error:
        write_report(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="a run needs a folder with a run.json"):
        write_report(tmp_path / "nowhere")


def test_a_prompt_is_shown_once_whether_or_not_the_text_repeats_it():
    assert page.sample("a<", "a<b") == page.sample("a<", "b") == "<pre><b>a&lt;</b>b</pre>"


def test_table_escapes_heads_and_cells():
    assert "&lt;b&gt;" in page.table(["<b>"], []) and "<b>" not in page.table(["x"], [["<b>"]])
