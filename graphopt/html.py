"""``report.html`` of an engine directory: the whole build report as one page, for people without a terminal.

The page needs nothing but itself: style and script stand in it, their digests in its Content-Security-Policy, and whatever
the manifest holds is escaped. The template only loops; what it shows is prepared here as plain text in dataclasses. This
module imports schemas alone, so that whoever writes a directory can import it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import jinja2

from graphopt.html_stages import (
    common_reason,
    decades_of,
    place_of,
    places_of,
    reason_pattern,
    share_text,
    stages_of,
    values_text,
)
from graphopt.html_views import (
    TIMES,
    AttentionRow,
    Bar,
    Candidate,
    Change,
    Figure,
    Page,
    Part,
    Place,
    Port,
    Tactic,
    Verdict,
    by_count,
    bytes_text,
    change_of,
    count_text,
    grouped,
    seconds_text,
    signed_text,
    sizes_text,
    some_text,
)
from graphopt.measures import number_text
from graphopt.schemas.manifest import Manifest
from graphopt.schemas.report import AttentionReport, BuildReport, PassReport, StageParity, TacticReport

Difference = tuple[float, str, str]  # largest absolute difference, output, sizes of the probe


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
        stages=stages_of(report),
        attentions=_attentions(report.attentions),
        ops=_ops(report.traced_ops, report.final_ops),
        ops_total=change_of("all", sum(report.traced_ops.values()), sum(report.final_ops.values())),
        weights=_weights(report.passes),
        engine_ops=[(op, count_text(times)) for op, times in by_count(report.engine_ops)],
        engine_total=count_text(sum(report.engine_ops.values())),
        kernels=[(name, count_text(count)) for name, count in report.kernels.items()],
        tactics=[_tactic(tactic) for tactic in report.tactics],
        warnings=report.warnings,
        parts=_parts(report.seconds),
        total_seconds=seconds_text(sum(report.seconds.values())),
        files=list(manifest.files.items()),
        pipeline=_pipeline(manifest),
    )


# The headline


def _target(manifest: Manifest) -> str:
    provider = manifest.pipeline.get("target", {}).get("provider")
    has_providers = not manifest.backend.startswith("tensorrt")
    return f"{manifest.backend}, {provider}" if provider and has_providers else manifest.backend


def _verdict(report: BuildReport) -> Verdict:
    """Whether every stage kept its contract; a stage that nothing was compared with is never passed over."""
    stages = [("trace", report.trace), *((p.kind, p.parity) for p in report.passes), ("engine", report.engine)]
    stages += [("emitted model", report.emitted)] if report.emitted is not None else []
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
    found = [_engine_figure(*report.last)]
    if report.passes:
        found += [_node_figure(report.passes), _weight_figure(report.passes)]
    if report.attentions:
        found.append(_attention_figure(report.attentions))
    return [*found, Figure("Build time", f"{sum(report.seconds.values()):.1f} s", "trace, proofs and engine")]


def _engine_figure(name: str, engine: StageParity | None) -> Figure:
    label = "Largest difference"
    if engine is None:
        return Figure(label, "unknown", f"the {name} was not compared with eager")
    size, output, sizes = max(_differences(engine), default=(0.0, "", ""))
    note = f"of the {name}, in {output} at {sizes}" if size else f"of the {name}: none on any probe"
    return Figure(label, number_text(engine.max_abs), f"{note}; {share_text(decades_of(engine))} of its limit")


def _node_figure(steps: list[PassReport]) -> Figure:
    before, after = steps[0].nodes_before, steps[-1].nodes_after
    note = f"{signed_text(after - before)} by {some_text(len(steps), 'pass', 'es')}"
    return Figure("Graph nodes", f"{count_text(before)} → {count_text(after)}", note)


def _weight_figure(steps: list[PassReport]) -> Figure:
    before, after = steps[0].bytes_before, steps[-1].bytes_after
    note = f"{signed_text(after - before, bytes_text)} from {bytes_text(before)}" if after != before else "unchanged"
    return Figure("Weights", bytes_text(after), note)


def _differences(parity: StageParity) -> list[Difference]:
    return [
        (found.max_abs, name, sizes_text(probe.sizes))
        for probe in parity.probes
        for name, found in probe.outputs.items()
    ]


def _attention_figure(attentions: list[AttentionReport]) -> Figure:
    fused = sum(attention.fused for attention in attentions)
    biased = sum(bool(attention.unproven) or "bias" in attention.mask.split(", ") for attention in attentions)
    note = f"{count_text(biased)} with a bias tensor" if biased else "no bias tensor in any"
    if fused < len(attentions):
        note = f"{count_text(len(attentions) - fused)} left as the model spells them"
    return Figure("Attentions as one op", f"{count_text(fused)} of {count_text(len(attentions))}", note)


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
    return f"{count_text(low)} or more" if high is None else f"{count_text(low)} to {count_text(high)}"


# Attentions, ops, engine


def _attentions(attentions: list[AttentionReport]) -> list[AttentionRow]:
    return [_attention_row(group) for group in grouped(attentions, _likeness)]


def _likeness(attention: AttentionReport) -> Hashable:
    """Equal for attentions that differ in nothing but the layer they are in."""
    facts = attention.model_dump(exclude={"name", "where", "unproven", "refusal", "extras"})
    reasons = reason_pattern(attention.unproven), reason_pattern(attention.refusal)
    return (*facts.values(), *attention.extras, *reasons, place_of(attention.where).source)


def _attention_row(group: list[AttentionReport]) -> AttentionRow:
    first, last = group[0], group[-1]
    unproven = common_reason([attention.unproven for attention in group])
    refusal = common_reason([attention.refusal for attention in group])
    reasons = [("Not proven", unproven), ("Not one op", refusal)]
    return AttentionRow(
        label=first.name if len(group) == 1 else f"{first.name} … {last.name}",
        count=count_text(len(group)),
        heads=_pair(first.heads, first.kv_heads, " / "),
        size=_pair(first.size, first.value_size, " / "),
        reach=_pair(first.queries, first.keys, f" {TIMES} "),
        mask=first.mask or "—",
        extras=", ".join(first.extras) or "—",
        source=place_of(first.where).source,
        fused=first.fused,
        reasons=[(title, text) for title, text in reasons if text],
        places=places_of([_attention_place(attention, unproven, refusal) for attention in group]),
    )


def _attention_place(attention: AttentionReport, unproven: str, refusal: str) -> Place:
    values = values_text(attention.unproven, unproven), values_text(attention.refusal, refusal)
    return replace(place_of(attention.where), node=attention.name, values=", ".join(filter(None, values)))


def _pair(first: str, second: str, between: str) -> str:
    return between.join(part for part in (first, second) if part) or "—"


def _ops(before: Mapping[str, int], after: Mapping[str, int]) -> list[Change]:
    """Every op of either graph, those that are in more places first."""
    names = sorted(before.keys() | after.keys(), key=lambda op: (-max(before.get(op, 0), after.get(op, 0)), op))
    most = max([*before.values(), *after.values()], default=0)
    return [_op(op, before.get(op, 0), after.get(op, 0), most) for op in names]


def _op(name: str, before: int, after: int, most: int) -> Change:
    return replace(change_of(name, before, after), before_bar=_linear(before, most), after_bar=_linear(after, most))


def _linear(value: float, most: float) -> Bar:
    return Bar(round(100 * value / most, 1) if most else 0)


def _weights(steps: list[PassReport]) -> list[Change]:
    if not steps:
        return []
    first, last = steps[0], steps[-1]
    return [
        change_of("parameters", first.parameters_before, last.parameters_after),
        change_of("bytes", first.bytes_before, last.bytes_after),
    ]


def _tactic(tactic: TacticReport) -> Tactic:
    op, bracket, arguments = tactic.signature.partition("(")
    timed: dict[str, float | None] = {tactic.chosen: None, **tactic.milliseconds}
    slowest = max((ms for ms in timed.values() if ms is not None), default=0.0)
    order = sorted(timed.items(), key=lambda item: (item[1] is None, item[1] or 0.0))
    return Tactic(
        op=op,
        arguments=arguments.removesuffix(")") if bracket else "",
        uses=count_text(tactic.uses),
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
        Part(name, seconds_text(seconds[name]), f"{share:.0f} %", _linear(share, 100)) for name, share in shares.items()
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
