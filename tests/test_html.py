"""The page of an engine directory: whole, well-formed, inert, and small enough."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import graphopt
from graphopt import html, html_stages, html_views
from graphopt.schemas.manifest import Manifest, TensorSpec
from graphopt.schemas.pipeline import PipelineConfig
from graphopt.schemas.report import (
    AttentionReport,
    BuildReport,
    OutputParity,
    PassReport,
    ProbeParity,
    RefusalReport,
    StageParity,
    TacticReport,
)
from tests.tiny import tiny_bert

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
LEAVES = {"rect", "line"}  # written <rect .../>
EVIL = "<script>alert('x')</script>\"&"
HEADINGS = [
    "Versions", "Inputs and outputs", "Stages against eager", "Stage by stage", "Attention", "Ops and weights", "Engine ops",
    "Tactics", "Warnings", "Time", "Files", "Reproduce",
]  # fmt: skip

SQUARE = f"sequence {html_views.TIMES} sequence"


class Page(HTMLParser):
    """A page as its elements and text; AssertionError for a tag that is not closed where it must be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, int]] = []  # with which of its tag it is
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.within: dict[str, list[str]] = {}
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} stands twice"
        if tag not in VOID:
            assert tag not in LEAVES, f"{tag} is not closed"
            found = self.within.setdefault(tag, [])
            self.open.append((tag, len(found)))
            found.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in LEAVES
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"{tag} is closed and was not open"
        assert self.open.pop()[0] == tag
        if tag in {"td", "th"}:
            self.handle_data(" | ")  # between the cells of a row

    def handle_data(self, data: str) -> None:
        for tag, index in self.open:
            self.within[tag][index] += data
        if not {"style", "script"} & {tag for tag, _ in self.open}:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [re.sub(r"\s+", " ", text).strip() for text in self.within.get(tag, [])]


def parity(worst: float = 1e-7, limit: float = 1e-4, **changes: Any) -> StageParity:
    found = OutputParity(max_abs=worst, relative=worst, cosine=1.0, snr=120.0, compared=96, left_out=4)
    probe = ProbeParity(sizes={"batch": 2, "sequence": 5}, outputs={"y": found})
    whole = {
        "contract": "exact", "metric": "relative", "worst": worst, "limit": limit, "holds": worst <= limit, "probes": [probe],
    }  # fmt: skip
    return StageParity(**{**whole, **changes})


def step(kind: str = "fuse", **changes: Any) -> PassReport:
    whole: dict[str, Any] = {
        "kind": kind, "matches": {"Rule": 2}, "nodes_before": 1200, "nodes_after": 900, "bytes_before": 4000,
        "bytes_after": 2000, "parameters_before": 1000, "parameters_after": 1000, "seconds": 0.25, "parity": parity(),
    }  # fmt: skip
    return PassReport(**{**whole, **changes})


def manifest(report: BuildReport | None = None, **changes: Any) -> Manifest:
    whole: dict[str, Any] = {
        "graphopt": "1", "versions": {"torch": "2"}, "model": "m", "weights_digest": "d", "pipeline": {"passes": []},
        "backend": "onnx", "dims": {"batch": (1, None)}, "inputs": {"x": TensorSpec(dtype="f32", shape=["batch", 3])},
        "outputs": {"y": TensorSpec(dtype="f32", shape=["batch"])}, "report": report or BuildReport(),
    }  # fmt: skip
    return Manifest(**{**whole, **changes})


def page_of(report: BuildReport | None = None, **changes: Any) -> Page:
    return Page(html.render(manifest(report, **changes)))


def layer(index: int, **changes: Any) -> AttentionReport:
    where = (
        f"%attention_{index} = graphopt.attention.default, from layers.{index}.attn | models/m.py:265 | fuse_attention"
    )
    whole = {
        "name": f"attention_{index}", "where": where, "heads": "8", "kv_heads": "2", "size": "64", "value_size": "32",
        "queries": "sequence", "keys": "sequence", "mask": "causal, key padding",
    }  # fmt: skip
    return AttentionReport(**{**whole, **changes})


# A real build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("html") / "engine"
    return graphopt.compile(tiny_bert("eager"), folder, target={"tactics": "fixed"}).manifest


@pytest.fixture(scope="module")
def page(built: Manifest) -> Page:
    return Page(html.render(built))


def test_outline(page: Page) -> None:
    assert page.texts("h1") == ["tiny-bert"]
    assert page.texts("h2") == HEADINGS
    assert page.all("html") == [{"lang": "en"}]
    assert page.texts("title") == ["tiny-bert: build report of graphopt"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")


def test_every_pass_attention_and_refusal_is_there(page: Page, built: Manifest) -> None:
    report = built.report
    assert [text.lstrip("0123456789 ") for text in page.texts("h3")] == [
        "trace",
        *(s.kind for s in report.passes),
        "engine",
    ]
    assert {"Every stage is within its contract"} <= set(page.texts("span"))
    for done in report.passes:
        for rule in done.matches:
            assert rule in page.texts("code")
        for refusal in done.refusals:
            assert refusal.rule in page.text
            assert html_stages.place_of(refusal.where).source in page.text
    assert report.attentions
    for attention in report.attentions:
        assert attention.name in page.text
        assert attention.mask in page.text


def test_numbers_of_the_manifest_are_there(page: Page, built: Manifest) -> None:
    report = built.report
    for op in report.traced_ops.keys() | report.final_ops.keys() | report.engine_ops.keys():
        assert op in page.texts("code")
    for name, digest in built.files.items():
        assert name in page.text
        assert digest in page.text
    for package, version in built.versions.items():
        assert f"{package} {version}" in page.text
    assert report.engine is not None
    assert f"{report.engine.max_abs:.1e}" in page.text


def test_diffs_are_whole(page: Page, built: Manifest) -> None:
    shown = "".join(page.within["ins"] + page.within["del"])
    for done in built.report.passes:
        lines = done.diff.splitlines()[2:]
        assert all(line in shown for line in lines)
    assert all(line.startswith("+") for text in page.within["ins"] for line in text.splitlines())
    assert all(line.startswith("-") for text in page.within["del"] for line in text.splitlines())


def test_pipeline_can_be_read_again(page: Page, built: Manifest) -> None:
    again = PipelineConfig.model_validate(json.loads(page.within["pre"][-1]))
    assert again.model == "tiny-bert"
    assert again.dims == built.dims
    assert again.passes == built.pipeline["passes"]
    assert again.target.model_dump(mode="json") == built.pipeline["target"]


def test_nothing_is_fetched(built: Manifest, page: Page) -> None:
    text = html.render(built)
    assert not re.search(r"https?://|url\(|@import", text)
    for tag, attributes in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        assert not {"src", "srcset", "data", "action"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")


def test_policy_allows_just_this_style_and_script(page: Page) -> None:
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'{digest(page.within['style'])}'",
        "script-src": f"'{digest(page.within['script'])}'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for _, attributes in page.elements:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)


def digest(blocks: list[str]) -> str:
    assert len(blocks) == 1
    return "sha256-" + base64.b64encode(hashlib.sha256(blocks[0].encode()).digest()).decode()


def test_links_lead_somewhere(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert max(ids.values()) == 1
    used = [str(link["href"])[1:] for link in page.all("a")]
    named = [str(attributes["aria-labelledby"]) for _, attributes in page.elements if "aria-labelledby" in attributes]
    assert set(used + named) <= ids.keys()


def test_tables_say_what_they_are(page: Page) -> None:
    tables = len(page.all("table"))
    assert tables == len(page.texts("caption")) > 20
    assert all(page.texts("caption"))
    assert {header.get("scope") for header in page.all("th")} == {"row", "col"}
    boxes = [box for box in page.all("div") if box.get("class") == "scroll"]
    assert len(boxes) == tables  # each in a box that scrolls by itself
    assert all(box["aria-label"] and box["tabindex"] == "0" for box in boxes)


# Reports made by hand


def test_an_empty_report() -> None:
    page = page_of()
    assert page.texts("h2") == HEADINGS
    for words in ("No stage was compared", "The graph has no attention.", "Nothing was timed.", "names no files"):
        assert words in page.text


def everything(name: str) -> Manifest:
    """A manifest with ``name`` wherever text can be."""
    found = parity(contract=name, metric=name)
    probe = ProbeParity(sizes={name: 2}, outputs={name: found.probes[0].outputs["y"]})
    found = found.model_copy(update={"probes": [probe]})
    done = step(
        name, options={name: name}, matches={name: 1}, refusals=[RefusalReport(rule=name, where=name, reason=name)],
        notes=[name], diff=f"--- before\n+++ after\n-{name}\n+{name}\n {name}", parity=found,
    )  # fmt: skip
    attention = AttentionReport(**dict.fromkeys(AttentionReport.model_fields, name) | {"extras": [name]})
    tactic = TacticReport(
        signature=f"{name}({name})",
        chosen=name,
        how=name,
        milliseconds={name: None, "other" + name: 1.0},
        notes={name: name},
    )
    report = BuildReport(
        trace=found, traced_ops={name: 1}, final_ops={name: 2}, passes=[done], attentions=[attention], tactics=[tactic],
        engine=found, engine_ops={name: 1}, warnings=[name], seconds={name: 1.0},
    )  # fmt: skip
    spec = TensorSpec(dtype=name, shape=[name])
    return manifest(
        report, graphopt=name, versions={name: name}, model=name, weights_digest=name, backend=name, files={name: name},
        pipeline={"passes": [], "target": {"provider": name}}, dims={name: (1, 2)}, inputs={name: spec}, outputs={name: spec},
    )  # fmt: skip


def test_everything_is_escaped() -> None:
    text = html.render(everything(EVIL))
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;alert") > 40
    plain = Page(html.render(everything("plain")))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]


def test_a_broken_contract_is_the_first_thing_to_see() -> None:
    page = page_of(BuildReport(trace=parity(0), passes=[step(parity=parity(3e-3))], engine=parity(0.2)))
    assert "✗ Not within its contract: fuse, engine" in page.text
    assert page.texts("strong") == ["✗ broken"] * 6  # for both: in the table, in the summary, in the details
    rows = [row for row in page.texts("tr") if "broken" in row]
    assert [f"30 {html_views.TIMES}" in row for row in rows] == [True, False]
    assert [f"> 1000 {html_views.TIMES}" in row for row in rows] == [False, True]


def test_what_was_not_compared_is_said() -> None:
    page = page_of(BuildReport(trace=parity(), passes=[step(parity=None)], engine=None))
    assert "? Every compared stage is within its contract; not compared: fuse, engine" in page.text
    assert page.text.count("? not compared") == 4
    assert "the engine was not compared with eager" in page.text


def test_a_pass_without_changes_refers_to_the_comparison_it_repeats() -> None:
    idle: Callable[..., PassReport] = lambda kind: step(kind, matches={}, diff="")  # noqa: E731
    page = page_of(BuildReport(trace=parity(), passes=[step("first"), idle("second"), idle("third")], engine=parity()))
    assert [link["href"] for link in page.all("a")].count("#stage-1") == 3  # from the table, from second and from third
    assert page.text.count("Nothing changed, so the comparison is that of first") == 2
    assert page.text.count("The text of the graph did not change.") == 3


def test_equal_layers_are_one_row() -> None:
    others = [layer(96, mask="causal"), *(layer(index) for index in range(97, 100))]
    page = page_of(BuildReport(attentions=[*(layer(index) for index in range(96)), *others]))
    rows = [text for text in page.texts("tr") if "8 / 2" in text]
    assert rows == [
        f"attention_0 … attention_99 | 99 | ✓ yes | 8 / 2 | 64 / 32 | {SQUARE} | causal, key padding | — |",
        f"attention_96 | 1 | ✓ yes | 8 / 2 | 64 / 32 | {SQUARE} | causal | — |",
    ]
    for index in (0, 50, 99):
        assert f"attention_{index} | layers.{index}.attn |" in page.texts("tr")
    assert page.text.count("models/m.py:265") == 4  # for each row: under it, and once for all places


def test_reasons_that_differ_in_names_are_one_group() -> None:
    reason = "the mask %unsqueeze_{} stays a bias: it adds values"
    layers = [layer(index, unproven=reason.format(index)) for index in range(5)]
    refusals = [RefusalReport(rule="ProveMask", where=a.where, reason=a.unproven) for a in layers]
    refusals.append(RefusalReport(rule="Other", where="nowhere", reason="because"))
    page = page_of(BuildReport(passes=[step(refusals=refusals)], attentions=layers))
    assert f"5 {html_views.TIMES} ProveMask the mask %… stays a bias: it adds values" in page.text
    assert "Not proven: the mask %… stays a bias: it adds values" in page.text
    assert "%attention_3 | %unsqueeze_3 | layers.3.attn |" in page.texts("tr")  # no name is lost
    assert f"1 {html_views.TIMES} Other because" in page.text
    assert "nowhere" in page.texts("code")


def test_refusals_of_attentions_are_said_in_full() -> None:
    refused = AttentionReport(
        name="softmax", where="%matmul_1 = aten.matmul.default, from m.py:7", refusal="used twice"
    )
    page = page_of(BuildReport(attentions=[layer(0, extras=["softcap", "sinks"]), refused]))
    assert "Not one op: used twice" in page.text
    assert "✗ no" in page.text
    assert "1 of 2 1 left as the model spells them" in page.text
    assert "softcap, sinks" in page.text


def test_long_diffs_are_cut_between_lines() -> None:
    lines = [f"-  %value_{index}: f32[2] = aten.é.default()" for index in range(8000)]
    page = page_of(BuildReport(passes=[step(diff="\n".join(["--- before", "+++ after", *lines]))]))
    shown = page.within["del"][0].splitlines()
    assert shown == lines[: len(shown)]
    size = sum(len(f"{line}\n".encode()) for line in shown)
    assert html_stages.DIFF_BYTES - 60 < size <= html_stages.DIFF_BYTES
    assert f"{len(lines) - len(shown):,} more lines are left out" in page.text
    assert "manifest.json" in page.texts("code")
    assert "graph.gir" in page.texts("code")
    assert "8,000 lines removed, 0 lines added" in page.text


def test_the_chosen_form_is_marked() -> None:
    times = {"slow": 2.0, "quick": 0.5, "wrong": None}
    timed = TacticReport(
        signature="op(q=f32[2])", chosen="quick", how="timed", milliseconds=times, notes={"wrong": "differs"}
    )
    fixed = TacticReport(signature="other", chosen="only", how="fixed", milliseconds={}, uses=3)
    page = page_of(BuildReport(tactics=[timed, fixed]))
    rows = page.texts("tr")
    assert [row for row in rows if row.startswith(("slow", "quick", "wrong", "only"))] == [
        "quick | ✓ chosen | 0.500 | |", "slow | | 2.000 | |", "wrong | differs |", "only | ✓ chosen |",
    ]  # fmt: skip
    assert "other 3 in the graph, fixed" in page.text


@pytest.mark.parametrize(
    ("found", "share", "fill"),
    [
        (parity(0.0), "0 %", 0),
        (parity(1e-12), "< 0.001 %", 2),
        (parity(1e-7), "0.1 %", 42.9),
        (parity(1e-4), "100 %", 85.7),
        (parity(5e-4), "500 %", 95.7),
        (parity(float("inf")), f"> 1000 {html_views.TIMES}", 100),
        (parity(float("nan")), f"> 1000 {html_views.TIMES}", 100),
        (parity(0.0, 0.0), "0 %", 0),
        (parity(1.0, 0.0), f"> 1000 {html_views.TIMES}", 100),
        (parity(0.9999, 0.999, metric="cosine", holds=True), "10 %", 71.4),
        (parity(80, 60, metric="snr", holds=True), "10 %", 71.4),
        (parity(float("inf"), 60, metric="snr", holds=True), "0 %", 0),
    ],
)
def test_bars(found: StageParity, share: str, fill: float) -> None:
    made = html_stages._parity(found)
    assert made is not None
    assert (made.share.replace(html_views.NO_BREAK, " "), made.bar.fill, made.bar.tick) == (share, fill, 85.7)


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("%a = aten.add.Tensor", html_views.Place("%a", "aten.add.Tensor")),
        ("%a = aten.add.Tensor, from m.x", html_views.Place("%a", "aten.add.Tensor", "m.x")),
        ("%a = o.p.q, from m.x | a/b.py:7 | one | two", html_views.Place("%a", "o.p.q", "m.x", "a/b.py:7", "one, two")),
        ("%a = o.p.q, from a/b.py:7", html_views.Place("%a", "o.p.q", "", "a/b.py:7")),
        ("anything else", html_views.Place("anything else")),
        ("", html_views.Place("")),
    ],
)
def test_places(where: str, place: html_views.Place) -> None:
    assert html_stages.place_of(where) == place


def test_numbers() -> None:
    assert [html_views.bytes_text(size) for size in (0, 999, 1000, 427_840, 90_900_000, 3_000_000_000)] == [
        "0 B", "999 B", "1.0 kB", "427.8 kB", "90.9 MB", "3.0 GB",
    ]  # fmt: skip
    assert [html_views.signed_text(number) for number in (-1200, 0, 3)] == [f"{html_views.MINUS}1,200", "0", "+3"]
    page = page_of(BuildReport(passes=[step()], seconds={"trace": 1.0, "build": 3.0}), files={"a": "b"})
    assert f"Weights 2.0 kB {html_views.MINUS}2.0 kB from 4.0 kB" in page.text
    assert f"1,200 → 900 {html_views.MINUS}300 by 1 pass" in page.text
    assert "build | 3.00 | 75 % | |" in page.texts("tr")


def test_a_deep_model_stays_small(tmp_path: Path) -> None:
    line = '-  %linear_{}: f32[batch, sequence, 4096] = aten.linear.default(input=%x, weight=%layers.{}.q, mode="none")'
    diff = "\n".join(line.format(index, index) for index in range(4000))
    refusals = [
        RefusalReport(rule="MergeLinears", where=layer(index).where, reason="not faster") for index in range(96)
    ]
    passes = [step(diff=diff, refusals=refusals) for _ in range(10)]
    report = BuildReport(passes=passes, attentions=[layer(index) for index in range(96)], engine=parity())
    start = time.perf_counter()
    text = html.render(manifest(report))
    assert time.perf_counter() - start < 2
    assert len(text.encode()) < 3_000_000
    (tmp_path / "report.html").write_text(text)
    Page(text)


def test_an_engine_that_was_not_run_shows_its_emitted_model() -> None:
    """With its difference and its kernels; the engine itself stays unseen."""
    whole = everything("plain").report
    report = whole.model_copy(update={"engine": None, "emitted": whole.engine, "kernels": {"fused attentions": 2}})
    page = Page(html.render(manifest(report, backend="tensorrt_rtx", pipeline={"target": {"provider": "cpu"}})))
    assert "of the emitted model" in page.text
    assert "not compared: engine" in page.text
    assert "fused attentions 2" in " ".join(page.text.split())
    assert "tensorrt_rtx, cpu" not in page.text
