"""The stages of a build for ``report.html``: parity as bars, refusals by reason, differences."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

from graphopt.html_views import (
    BAR_DECADES,
    NO_BREAK,
    TIMES,
    Bar,
    Diff,
    Parity,
    Place,
    Places,
    ProbeRow,
    Refusals,
    Run,
    Stage,
    Work,
    by_count,
    bytes_text,
    change_of,
    count_text,
    grouped,
    seconds_text,
    sizes_text,
    some_text,
)
from graphopt.measures import decibels_text, number_text, worst_and_limit
from graphopt.schemas.pipeline import HIGHER_IS_BETTER
from graphopt.schemas.report import BuildReport, PassReport, RefusalReport, StageParity

#: The longest diff that is shown whole, in bytes.
DIFF_BYTES = 200_000
#: Up to this many places of a refusal are shown at once.
FEW = 3


def stages_of(report: BuildReport) -> list[Stage]:
    """Trace, passes, engine. Numbers make anchors unique: a pass may run twice."""
    trace = Stage("stage-trace", "", "trace", seconds=_part(report, "trace"), parity=_parity(report.trace))
    name, parity = report.last
    engine = Stage("stage-engine", "", name, seconds=_part(report, "build"), parity=_parity(parity))
    return [trace, *_pass_stages(report.passes), engine]


def _part(report: BuildReport, name: str) -> str:
    return seconds_text(report.seconds[name]) if name in report.seconds else ""


def _pass_stages(steps: list[PassReport]) -> list[Stage]:
    made: list[Stage] = []
    for number, step in enumerate(steps, 1):
        repeats = bool(made) and not step.changes and step.parity == steps[number - 2].parity
        made.append(
            Stage(
                anchor=f"stage-{number}",
                number=str(number),
                name=step.kind,
                changes=count_text(step.changes),
                nodes=f"{count_text(step.nodes_before)} → {count_text(step.nodes_after)}",
                seconds=seconds_text(step.seconds),
                parity=_parity(step.parity),
                work=_work(step),
                same_as=(made[-1].same_as or (made[-1].anchor, made[-1].name)) if repeats else None,
            )
        )
    return made


def _parity(parity: StageParity | None) -> Parity | None:
    if parity is None:
        return None
    decades = decades_of(parity)
    worst, limit = worst_and_limit(parity)
    return Parity(
        contract=parity.contract,
        metric=parity.metric,
        sign="≥" if parity.metric in HIGHER_IS_BETTER else "≤",
        worst=worst,
        limit=limit,
        share=share_text(decades),
        bar=_stage_bar(decades),
        max_abs=number_text(parity.max_abs),
        holds=parity.holds,
        axes=f" {TIMES} ".join(parity.probes[0].sizes) if parity.probes else "",
        probes=_probe_rows(parity),
    )


def decades_of(parity: StageParity) -> float:
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


def share_text(decades: float) -> str:
    """The worst value as a part of its limit."""
    if decades == -math.inf:
        return f"0{NO_BREAK}%"
    if decades > 3:
        return f">{NO_BREAK}1000{NO_BREAK}{TIMES}"
    if decades >= 1:
        return f"{10**decades:.0f}{NO_BREAK}{TIMES}"
    percent = 10 ** (decades + 2)
    shown = "< 0.001" if percent < 0.001 else f"{percent:.2g}" if percent < 99.5 else f"{percent:.0f}"
    return f"{shown}{NO_BREAK}%"


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
            sizes=sizes_text(probe.sizes),
            output=name,
            max_abs=number_text(found.max_abs),
            relative=number_text(found.relative),
            cosine=f"{found.cosine:.6f}",
            snr=decibels_text(found.snr),
            compared=count_text(found.compared),
            left_out=count_text(found.left_out),
        )
        for probe in parity.probes
        for name, found in probe.outputs.items()
    ]


def _work(step: PassReport) -> Work:
    return Work(
        options=[(name, json.dumps(value, ensure_ascii=False)) for name, value in step.options.items()],
        matches=[(rule, count_text(times)) for rule, times in by_count(step.matches)],
        refusals=_refusals(step.refusals),
        changed=some_text(step.changes, "change"),
        refused=count_text(len(step.refusals)) if step.refusals else "",
        notes=step.notes,
        layers=[(precision, reason, modules) for (precision, reason), modules in step.layers_by_precision.items()],
        sensitivities=step.sensitivities,
        changes=[
            change_of("nodes", step.nodes_before, step.nodes_after),
            change_of("parameters", step.parameters_before, step.parameters_after),
            change_of("weight bytes", step.bytes_before, step.bytes_after),
        ],
        diff=_diff(step.diff),
    )


_VALUE_NAME = re.compile(r"%[\w.\-]*\w")


def reason_pattern(reason: str) -> str:
    """A reason without the names of values, which differ between layers that are refused for the same reason."""
    return _VALUE_NAME.sub("%…", reason)


def common_reason(reasons: list[str]) -> str:
    """What equal reasons have in common: all of it, or all but the names of values."""
    return reasons[0] if len(set(reasons)) == 1 else reason_pattern(reasons[0])


def values_text(reason: str, common: str) -> str:
    """The names that ``common`` leaves out."""
    return "" if reason == common else ", ".join(_VALUE_NAME.findall(reason))


def _refusals(refusals: list[RefusalReport]) -> list[Refusals]:
    return [
        _refusal_group(group) for group in grouped(refusals, lambda found: (found.rule, reason_pattern(found.reason)))
    ]


def _refusal_group(group: list[RefusalReport]) -> Refusals:
    reason = common_reason([refusal.reason for refusal in group])
    places = [replace(place_of(refusal.where), values=values_text(refusal.reason, reason)) for refusal in group]
    return Refusals(group[0].rule, reason, count_text(len(group)), len(group) <= FEW, places_of(places))


#: The columns of places, by field.
_COLUMNS = {
    "node": "node", "values": "%…", "module": "module", "op": "op", "source": "source line", "made_by": "made by",
}  # fmt: skip


def places_of(places: list[Place]) -> Places:
    """What all places share is taken out; of a single place that is everything."""
    cells = {title: [str(getattr(place, name)) for place in places] for name, title in _COLUMNS.items()}
    shared = [(title, column[0]) for title, column in cells.items() if column[0] and len(set(column)) == 1]
    own = {title: column for title, column in cells.items() if len(set(column)) > 1}
    rows = [(first, list(rest)) for first, *rest in zip(*own.values(), strict=True)]
    return Places(shared, list(own), rows)


_WHERE = re.compile(r"(?P<node>[^=]+?) = (?P<op>[\w.]+)(?:, from (?P<origin>.+))?", re.DOTALL)
_SOURCE = re.compile(r"\S.*:\d+")


def place_of(where: str) -> Place:
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
        added=some_text(sum(line.startswith("+") for line in lines), "line"),
        removed=some_text(sum(line.startswith("-") for line in lines), "line"),
        size=bytes_text(len(text.encode())),
        runs=[Run(sign, "".join(f"{line}\n" for line in run)) for sign, run in itertools.groupby(shown, _line_sign)],
        left_out=count_text(len(lines) - len(shown)) if len(shown) < len(lines) else "",
    )


def _first(lines: list[str], size: int) -> Iterable[str]:
    """As many lines from the beginning as ``size`` bytes hold."""
    ends = itertools.accumulate(len(line.encode()) + 1 for line in lines)
    return (line for line, _ in itertools.takewhile(lambda item: item[1] <= size, zip(lines, ends, strict=True)))


def _line_sign(line: str) -> Literal["+", "-", ""]:
    return "+" if line.startswith("+") else "-" if line.startswith("-") else ""
