"""``report.html`` of an engine directory: the whole build report as one page, for people without a terminal.

The page needs nothing but itself: style and script stand in it, their digests in its Content-Security-Policy, and whatever
the manifest holds is escaped. The template only loops; what it shows is prepared here as plain text in dataclasses. This
module imports schemas alone, so that whoever writes a directory can import it."""

from __future__ import annotations

import base64
import functools
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import jinja2

from graphopt.schemas.manifest import Manifest
from graphopt.schemas.pipeline import HIGHER_IS_BETTER
from graphopt.schemas.report import AttentionReport, BuildReport, PassReport, RefusalReport, StageParity, TacticReport

#: The longest diff that is shown whole, in bytes.
DIFF_BYTES = 200_000
#: The bar of a stage begins this many powers of ten below its limit, and ends one above.
BAR_DECADES = 6
#: Up to this many places of a refusal are shown at once.
FEW = 3

Item = TypeVar("Item")
MINUS, TIMES, NO_BREAK = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}", "\N{NO-BREAK SPACE}"
Difference = tuple[float, str, str]  # largest absolute difference, output, sizes of the probe


# What the template sees


@dataclass(frozen=True)
class Verdict:
    """The first thing to read: a sign and a sentence, so that colour is never needed."""

    state: Literal["good", "bad", "open"]
    text: str

    @property
    def sign(self) -> str:
        return {"good": "✓", "bad": "✗", "open": "?"}[self.state]


@dataclass(frozen=True)
class Figure:
    """One number of the headline."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Port:
    """An input, output or dim."""

    role: str
    name: str
    type: str
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """Part of a line that is filled, and where the limit is marked on it; both in percent."""

    fill: float
    tick: float | None = None


@dataclass(frozen=True)
class ProbeRow:
    """One output on one probe."""

    sizes: str
    output: str
    max_abs: str
    relative: str
    cosine: str
    snr: str
    compared: str
    left_out: str


@dataclass(frozen=True)
class Parity:
    """A stage against eager."""

    contract: str
    metric: str
    sign: str
    worst: str
    limit: str
    share: str
    bar: Bar
    max_abs: str
    holds: bool
    axes: str
    probes: list[ProbeRow]


@dataclass(frozen=True)
class Place:
    """Where a node is and where it came from. ``values``: the names that stand for the ``%…`` of its group's reason."""

    node: str
    op: str = ""
    module: str = ""
    source: str = ""
    made_by: str = ""
    values: str = ""


@dataclass(frozen=True)
class Places:
    """Places as a table, without the columns that would say the same in every row: those are told once."""

    shared: list[tuple[str, str]]
    columns: list[str]
    rows: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class Refusals:
    """Equal refusals of one rule."""

    rule: str
    reason: str
    count: str
    few: bool
    places: Places


@dataclass(frozen=True)
class Change:
    """A number before and after; ``before_bar`` and ``after_bar`` where a table draws them."""

    name: str
    before: str
    after: str
    difference: str
    before_bar: Bar | None = None
    after_bar: Bar | None = None


@dataclass(frozen=True)
class Run:
    """Lines of a diff that follow each other and have the same sign."""

    sign: Literal["+", "-", ""]
    text: str


@dataclass(frozen=True)
class Diff:
    """``left_out`` counts the lines that are not on the page."""

    added: str
    removed: str
    size: str
    runs: list[Run]
    left_out: str = ""


@dataclass(frozen=True)
class Work:
    """What a pass did to the graph."""

    options: list[tuple[str, str]]
    matches: list[tuple[str, str]]
    refusals: list[Refusals]
    changed: str
    refused: str
    notes: list[str]
    changes: list[Change]
    diff: Diff | None


@dataclass(frozen=True)
class Stage:
    """A row of the table of stages, and the part of the page it leads to. ``same_as``: the stage whose comparison this
    one repeats, because nothing changed in between."""

    anchor: str
    number: str
    name: str
    changes: str = ""
    nodes: str = ""
    seconds: str = ""
    parity: Parity | None = None
    work: Work | None = None
    same_as: tuple[str, str] | None = None


@dataclass(frozen=True)
class AttentionRow:
    """Equal attentions."""

    label: str
    count: str
    heads: str
    size: str
    reach: str
    mask: str
    extras: str
    source: str
    fused: bool
    reasons: list[tuple[str, str]]
    places: Places


@dataclass(frozen=True)
class Candidate:
    """A form that was timed, or why it was not."""

    form: str
    chosen: bool
    milliseconds: str
    bar: Bar | None
    note: str


@dataclass(frozen=True)
class Tactic:
    """The candidates for one op, fastest first."""

    op: str
    arguments: str
    uses: str
    how: str
    candidates: list[Candidate]


@dataclass(frozen=True)
class Part:
    """A part of the build's time."""

    name: str
    seconds: str
    share: str
    bar: Bar


@dataclass(frozen=True)
class Page:
    """Everything on the page, in its order."""

    model: str
    graphopt: str
    backend: str
    weights_digest: str
    verdict: Verdict
    figures: list[Figure]
    versions: list[tuple[str, str]]
    ports: list[Port]
    stages: list[Stage]
    attentions: list[AttentionRow]
    ops: list[Change]
    ops_total: Change
    weights: list[Change]
    engine_ops: list[tuple[str, str]]
    engine_total: str
    tactics: list[Tactic]
    warnings: list[str]
    parts: list[Part]
    total_seconds: str
    files: list[tuple[str, str]]
    pipeline: str
    bar_decades: int = field(default=BAR_DECADES)


def render(manifest: Manifest) -> str:
    """The page of an engine directory as text."""
    return _environment().get_template("report.html.j2").render(page=_page(manifest))


@functools.cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("graphopt"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters["digest"] = _digest
    return made


def _digest(text: str) -> str:
    """How a Content-Security-Policy names an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _page(manifest: Manifest) -> Page:
    report = manifest.report
    return Page(
        model=manifest.model,
        graphopt=manifest.graphopt,
        backend=_target(manifest),
        weights_digest=manifest.weights_digest,
        verdict=_verdict(report),
        figures=_figures(report),
        versions=list({"graphopt": manifest.graphopt, **manifest.versions}.items()),
        ports=_ports(manifest),
        stages=_stages(report),
        attentions=_attentions(report.attentions),
        ops=_ops(report.traced_ops, report.final_ops),
        ops_total=_change("all", sum(report.traced_ops.values()), sum(report.final_ops.values())),
        weights=_weights(report.passes),
        engine_ops=[(op, _count(times)) for op, times in _by_count(report.engine_ops)],
        engine_total=_count(sum(report.engine_ops.values())),
        tactics=[_tactic(tactic) for tactic in report.tactics],
        warnings=report.warnings,
        parts=_parts(report.seconds),
        total_seconds=_seconds(sum(report.seconds.values())),
        files=list(manifest.files.items()),
        pipeline=_pipeline(manifest),
    )


# Numbers as text


def _count(number: int) -> str:
    return f"{number:,}"


def _some(number: int, what: str, ending: str = "s") -> str:
    return f"{_count(number)} {what}{ending if number != 1 else ''}"


def _signed(number: int, show: Callable[[int], str] = _count) -> str:
    return "0" if not number else ("+" if number > 0 else MINUS) + show(abs(number))


def _size(size: int) -> str:
    """Bytes in the unit that keeps one to three digits before the point."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}"


def _number(number: float) -> str:
    """A difference: two digits, and a plain 0 where there is none."""
    if math.isinf(number):
        return "∞" if number > 0 else f"{MINUS}∞"
    return f"{number:.1e}" if number else "0"


def _decibels(snr: float) -> str:
    return _number(snr) if math.isinf(snr) else f"{snr:.1f}"


def _measure(metric: str, value: float) -> str:
    """A value in its metric's own form."""
    if metric == "snr":
        return f"{_decibels(value)} dB"
    return f"{value:.6f}" if metric in HIGHER_IS_BETTER else _number(value)


def _change(name: str, before: int, after: int, show: Callable[[int], str] = _count) -> Change:
    return Change(name, show(before), show(after), _signed(after - before, show))


def _grouped(items: Iterable[Item], key: Callable[[Item], Hashable]) -> list[list[Item]]:
    """Items with the same key together, groups in the order in which they begin."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])


# The headline


def _target(manifest: Manifest) -> str:
    provider = manifest.pipeline.get("target", {}).get("provider")
    return f"{manifest.backend}, {provider}" if provider else manifest.backend


def _verdict(report: BuildReport) -> Verdict:
    """Whether every stage kept its contract; a stage that nothing was compared with is never passed over."""
    stages = [("trace", report.trace), *((p.kind, p.parity) for p in report.passes), ("engine", report.engine)]
    broken = [name for name, parity in stages if parity is not None and not parity.holds]
    unseen = [name for name, parity in stages if parity is None]
    if broken:
        return Verdict("bad", f"Not within its contract: {', '.join(broken)}")
    if len(unseen) == len(stages):
        return Verdict("open", "No stage was compared with eager")
    if unseen:
        return Verdict("open", f"Every compared stage is within its contract; not compared: {', '.join(unseen)}")
    return Verdict("good", "Every stage is within its contract")


def _figures(report: BuildReport) -> list[Figure]:
    found = [_engine_figure(report.engine)]
    if report.passes:
        found += [_node_figure(report.passes), _weight_figure(report.passes)]
    if report.attentions:
        found.append(_attention_figure(report.attentions))
    return [*found, Figure("Build time", f"{sum(report.seconds.values()):.1f} s", "trace, proofs and engine")]


def _engine_figure(engine: StageParity | None) -> Figure:
    label = "Largest difference"
    if engine is None:
        return Figure(label, "unknown", "the engine was not compared with eager")
    size, output, sizes = max(_differences(engine), default=(0.0, "", ""))
    note = f"of the engine, in {output} at {sizes}" if size else "of the engine: none on any probe"
    return Figure(label, _number(engine.max_abs), f"{note}; {_share(_decades(engine))} of its limit")


def _node_figure(steps: list[PassReport]) -> Figure:
    before, after = steps[0].nodes_before, steps[-1].nodes_after
    note = f"{_signed(after - before)} by {_some(len(steps), 'pass', 'es')}"
    return Figure("Graph nodes", f"{_count(before)} → {_count(after)}", note)


def _weight_figure(steps: list[PassReport]) -> Figure:
    before, after = steps[0].bytes_before, steps[-1].bytes_after
    note = f"{_signed(after - before, _size)} from {_size(before)}" if after != before else "unchanged"
    return Figure("Weights", _size(after), note)


def _differences(parity: StageParity) -> list[Difference]:
    return [
        (found.max_abs, name, _sizes(probe.sizes)) for probe in parity.probes for name, found in probe.outputs.items()
    ]


def _sizes(sizes: Mapping[str, int]) -> str:
    return f"{NO_BREAK}{TIMES}{NO_BREAK}".join(str(size) for size in sizes.values())


def _attention_figure(attentions: list[AttentionReport]) -> Figure:
    fused = sum(attention.fused for attention in attentions)
    biased = sum(bool(attention.unproven) or "bias" in attention.mask.split(", ") for attention in attentions)
    note = f"{_count(biased)} with a bias tensor" if biased else "no bias tensor in any"
    if fused < len(attentions):
        note = f"{_count(len(attentions) - fused)} left as the model spells them"
    return Figure("Attentions as one op", f"{_count(fused)} of {_count(len(attentions))}", note)


def _ports(manifest: Manifest) -> list[Port]:
    mask = "the padding mask: outputs are compared where it is not zero"
    inputs = [
        Port("input", name, f"{spec.dtype}[{', '.join(map(str, spec.shape))}]", mask if name == manifest.mask else "")
        for name, spec in manifest.inputs.items()
    ]
    outputs = [
        Port("output", name, f"{spec.dtype}[{', '.join(map(str, spec.shape))}]")
        for name, spec in manifest.outputs.items()
    ]
    dims = [Port("dim", name, _range(low, high)) for name, (low, high) in manifest.dims.items()]
    return [*inputs, *outputs, *dims]


def _range(low: int, high: int | None) -> str:
    return f"{_count(low)} or more" if high is None else f"{_count(low)} to {_count(high)}"


# Stages


def _stages(report: BuildReport) -> list[Stage]:
    """Trace, passes, engine. Numbers make anchors unique: a pass may run twice."""
    trace = Stage("stage-trace", "", "trace", seconds=_part(report, "trace"), parity=_parity(report.trace))
    engine = Stage("stage-engine", "", "engine", seconds=_part(report, "build"), parity=_parity(report.engine))
    return [trace, *_pass_stages(report.passes), engine]


def _part(report: BuildReport, name: str) -> str:
    return _seconds(report.seconds[name]) if name in report.seconds else ""


def _pass_stages(steps: list[PassReport]) -> list[Stage]:
    made: list[Stage] = []
    for number, step in enumerate(steps, 1):
        repeats = bool(made) and not step.changes and step.parity == steps[number - 2].parity
        made.append(
            Stage(
                anchor=f"stage-{number}",
                number=str(number),
                name=step.kind,
                changes=_count(step.changes),
                nodes=f"{_count(step.nodes_before)} → {_count(step.nodes_after)}",
                seconds=_seconds(step.seconds),
                parity=_parity(step.parity),
                work=_work(step),
                same_as=(made[-1].same_as or (made[-1].anchor, made[-1].name)) if repeats else None,
            )
        )
    return made


def _parity(parity: StageParity | None) -> Parity | None:
    if parity is None:
        return None
    decades = _decades(parity)
    return Parity(
        contract=parity.contract,
        metric=parity.metric,
        sign="≥" if parity.metric in HIGHER_IS_BETTER else "≤",
        worst=_measure(parity.metric, parity.worst),
        limit=_measure(parity.metric, parity.limit),
        share=_share(decades),
        bar=_stage_bar(decades),
        max_abs=_number(parity.max_abs),
        holds=parity.holds,
        axes=f" {TIMES} ".join(parity.probes[0].sizes) if parity.probes else "",
        probes=_probe_rows(parity),
    )


def _decades(parity: StageParity) -> float:
    """How many powers of ten the worst value lies beyond its limit; negative inside. Of metrics where more is better, what
    is missing to the best value counts."""
    worst, limit = parity.worst, parity.limit
    if math.isnan(worst):
        return math.inf
    if parity.metric == "snr":
        return (limit - worst) / 20
    if parity.metric in HIGHER_IS_BETTER:
        worst, limit = 1 - worst, 1 - limit
    if worst <= 0:
        return -math.inf
    return math.log10(worst / limit) if limit > 0 else math.inf


def _share(decades: float) -> str:
    """The worst value as a part of its limit."""
    if decades == -math.inf:
        return "0 %"
    if decades > 3:
        return f"> 1000 {TIMES}"
    if decades >= 1:
        return f"{10**decades:.0f} {TIMES}"
    percent = 10 ** (decades + 2)
    return "< 0.001 %" if percent < 0.001 else f"{percent:.2g} %" if percent < 99.5 else f"{percent:.0f} %"


def _stage_bar(decades: float) -> Bar:
    """On a log scale; whatever is not zero shows at least a sliver."""
    span = BAR_DECADES + 1
    tick = round(100 * BAR_DECADES / span, 1)
    if decades == -math.inf:
        return Bar(0, tick)
    return Bar(round(100 * min(max((decades + BAR_DECADES) / span, 0.02), 1), 1), tick)


def _probe_rows(parity: StageParity) -> list[ProbeRow]:
    return [
        ProbeRow(
            sizes=_sizes(probe.sizes),
            output=name,
            max_abs=_number(found.max_abs),
            relative=_number(found.relative),
            cosine=f"{found.cosine:.6f}",
            snr=_decibels(found.snr),
            compared=_count(found.compared),
            left_out=_count(found.left_out),
        )
        for probe in parity.probes
        for name, found in probe.outputs.items()
    ]


def _work(step: PassReport) -> Work:
    return Work(
        options=[(name, json.dumps(value, ensure_ascii=False)) for name, value in step.options.items()],
        matches=[(rule, _count(times)) for rule, times in _by_count(step.matches)],
        refusals=_refusals(step.refusals),
        changed=_some(step.changes, "change"),
        refused=_count(len(step.refusals)) if step.refusals else "",
        notes=step.notes,
        changes=[
            _change("nodes", step.nodes_before, step.nodes_after),
            _change("parameters", step.parameters_before, step.parameters_after),
            _change("weight bytes", step.bytes_before, step.bytes_after),
        ],
        diff=_diff(step.diff),
    )


_VALUE_NAME = re.compile(r"%[\w.\-]*\w")


def _pattern(reason: str) -> str:
    """A reason without the names of values, which differ between layers that are refused for the same reason."""
    return _VALUE_NAME.sub("%…", reason)


def _common(reasons: list[str]) -> str:
    """What equal reasons have in common: all of it, or all but the names of values."""
    return reasons[0] if len(set(reasons)) == 1 else _pattern(reasons[0])


def _values(reason: str, common: str) -> str:
    """The names that ``common`` leaves out."""
    return "" if reason == common else ", ".join(_VALUE_NAME.findall(reason))


def _refusals(refusals: list[RefusalReport]) -> list[Refusals]:
    return [_refusal_group(group) for group in _grouped(refusals, lambda found: (found.rule, _pattern(found.reason)))]


def _refusal_group(group: list[RefusalReport]) -> Refusals:
    reason = _common([refusal.reason for refusal in group])
    places = [replace(_place(refusal.where), values=_values(refusal.reason, reason)) for refusal in group]
    return Refusals(group[0].rule, reason, _count(len(group)), len(group) <= FEW, _places(places))


#: The columns of places, by field.
_COLUMNS = {
    "node": "node", "values": "%…", "module": "module", "op": "op", "source": "source line", "made_by": "made by",
}  # fmt: skip


def _places(places: list[Place]) -> Places:
    """What all places share is taken out; of a single place that is everything."""
    cells = {title: [str(getattr(place, name)) for place in places] for name, title in _COLUMNS.items()}
    shared = [(title, column[0]) for title, column in cells.items() if column[0] and len(set(column)) == 1]
    own = {title: column for title, column in cells.items() if len(set(column)) > 1}
    rows = [(first, list(rest)) for first, *rest in zip(*own.values(), strict=True)]
    return Places(shared, list(own), rows)


_WHERE = re.compile(r"(?P<node>[^=]+?) = (?P<op>[\w.]+)(?:, from (?P<origin>.+))?", re.DOTALL)
_SOURCE = re.compile(r"\S.*:\d+")


def _place(where: str) -> Place:
    """The parts of a node's ``where``; text that is none stays whole."""
    found = _WHERE.fullmatch(where)
    if found is None:
        return Place(where)
    origin = (found["origin"] or "").split(" | ") if found["origin"] else []
    line = next((index for index, part in enumerate(origin) if _SOURCE.fullmatch(part)), None)
    if line is None:
        return Place(found["node"], found["op"], module=" | ".join(origin))
    modules, made_by = " | ".join(origin[:line]), ", ".join(origin[line + 1 :])
    return Place(found["node"], found["op"], modules, origin[line], made_by)


def _diff(text: str) -> Diff | None:
    """The diff in runs of one sign. One that is too long for a page is cut between two lines."""
    if not text:
        return None
    lines = text.splitlines()
    if lines[:2] == ["--- before", "+++ after"]:
        lines = lines[2:]
    shown = list(_first(lines, DIFF_BYTES))
    return Diff(
        added=_some(sum(line.startswith("+") for line in lines), "line"),
        removed=_some(sum(line.startswith("-") for line in lines), "line"),
        size=_size(len(text.encode())),
        runs=[Run(sign, "".join(f"{line}\n" for line in run)) for sign, run in itertools.groupby(shown, _line_sign)],
        left_out=_count(len(lines) - len(shown)) if len(shown) < len(lines) else "",
    )


def _first(lines: list[str], size: int) -> Iterable[str]:
    """As many lines from the beginning as ``size`` bytes hold."""
    ends = itertools.accumulate(len(line.encode()) + 1 for line in lines)
    return (line for line, _ in itertools.takewhile(lambda item: item[1] <= size, zip(lines, ends, strict=True)))


def _line_sign(line: str) -> Literal["+", "-", ""]:
    return "+" if line.startswith("+") else "-" if line.startswith("-") else ""


# Attentions, ops, engine


def _attentions(attentions: list[AttentionReport]) -> list[AttentionRow]:
    return [_attention_row(group) for group in _grouped(attentions, _likeness)]


def _likeness(attention: AttentionReport) -> Hashable:
    """Equal for attentions that differ in nothing but the layer they are in."""
    facts = attention.model_dump(exclude={"name", "where", "unproven", "refusal", "extras"})
    reasons = _pattern(attention.unproven), _pattern(attention.refusal)
    return (*facts.values(), *attention.extras, *reasons, _place(attention.where).source)


def _attention_row(group: list[AttentionReport]) -> AttentionRow:
    first, last = group[0], group[-1]
    unproven = _common([attention.unproven for attention in group])
    refusal = _common([attention.refusal for attention in group])
    reasons = [("Not proven", unproven), ("Not one op", refusal)]
    return AttentionRow(
        label=first.name if len(group) == 1 else f"{first.name} … {last.name}",
        count=_count(len(group)),
        heads=_pair(first.heads, first.kv_heads, " / "),
        size=_pair(first.size, first.value_size, " / "),
        reach=_pair(first.queries, first.keys, f" {TIMES} "),
        mask=first.mask or "—",
        extras=", ".join(first.extras) or "—",
        source=_place(first.where).source,
        fused=first.fused,
        reasons=[(title, text) for title, text in reasons if text],
        places=_places([_attention_place(attention, unproven, refusal) for attention in group]),
    )


def _attention_place(attention: AttentionReport, unproven: str, refusal: str) -> Place:
    values = _values(attention.unproven, unproven), _values(attention.refusal, refusal)
    return replace(_place(attention.where), node=attention.name, values=", ".join(filter(None, values)))


def _pair(first: str, second: str, between: str) -> str:
    return between.join(part for part in (first, second) if part) or "—"


def _ops(before: Mapping[str, int], after: Mapping[str, int]) -> list[Change]:
    """Every op of either graph, those that are in more places first."""
    names = sorted(before.keys() | after.keys(), key=lambda op: (-max(before.get(op, 0), after.get(op, 0)), op))
    most = max([*before.values(), *after.values()], default=0)
    return [_op(op, before.get(op, 0), after.get(op, 0), most) for op in names]


def _op(name: str, before: int, after: int, most: int) -> Change:
    return replace(_change(name, before, after), before_bar=_linear(before, most), after_bar=_linear(after, most))


def _linear(value: float, most: float) -> Bar:
    return Bar(round(100 * value / most, 1) if most else 0)


def _weights(steps: list[PassReport]) -> list[Change]:
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    return [
        _change("parameters", first.parameters_before, last.parameters_after),
        _change("bytes", first.bytes_before, last.bytes_after),
    ]


def _tactic(tactic: TacticReport) -> Tactic:
    op, bracket, arguments = tactic.signature.partition("(")
    timed: dict[str, float | None] = {tactic.chosen: None, **tactic.milliseconds}
    slowest = max((ms for ms in timed.values() if ms is not None), default=0.0)
    order = sorted(timed.items(), key=lambda item: (item[1] is None, item[1] or 0.0))
    return Tactic(
        op=op,
        arguments=arguments.removesuffix(")") if bracket else "",
        uses=_count(tactic.uses),
        how=tactic.how,
        candidates=[
            Candidate(
                form=form,
                chosen=form == tactic.chosen,
                milliseconds="" if ms is None else f"{ms:.3f}",
                bar=None if ms is None else _linear(ms, slowest),
                note=tactic.notes.get(form, "" if ms is not None or form == tactic.chosen else "refused"),
            )
            for form, ms in order
        ],
    )


def _parts(seconds: Mapping[str, float]) -> list[Part]:
    total = sum(seconds.values()) or 1.0
    shares = {name: 100 * part / total for name, part in seconds.items()}
    return [
        Part(name, _seconds(seconds[name]), f"{share:.0f} %", _linear(share, 100)) for name, share in shares.items()
    ]


def _pipeline(manifest: Manifest) -> str:
    """A pipeline file that makes this engine again: what the manifest keeps of it, with model and dims."""
    dims = {name: list(bounds) for name, bounds in manifest.dims.items()}
    return _json({"model": manifest.model, "dims": dims, **manifest.pipeline})


def _json(value: Any, indent: str = "") -> str:
    """JSON with short parts on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(indent + line) <= 100:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        ends, parts = (
            "{}",
            [f"{json.dumps(key, ensure_ascii=False)}: {_json(part, inner)}" for key, part in value.items()],
        )
    else:
        ends, parts = "[]", [_json(part, inner) for part in value]
    lines = ",\n".join(inner + part for part in parts)
    return f"{ends[0]}\n{lines}\n{indent}{ends[1]}"
