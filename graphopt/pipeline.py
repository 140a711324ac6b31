"""Passes and pipelines: what a pass is, a list of them checked before anything runs, and running it with proof."""

from __future__ import annotations

import contextlib
import difflib
import gc
import re
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import networkx as nx
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from graphopt.calibration import Tapped, calibrate, feeds_of, in_order, means, sample, second_moments
from graphopt.errors import CalibrationError, NoMatchError, ParityError, PassError, PipelineError, nearest
from graphopt.execution import run
from graphopt.ir import Graph, Node
from graphopt.measures import worst_and_limit
from graphopt.parity import Contract, Difference, Outputs, Probe, bisect, judge
from graphopt.plugins import plugins
from graphopt.rewrite import RewriteLog, Rule, apply_rules
from graphopt.runtime.cache import CacheLayout, Call, as_if_uncached, last_step, layout_of
from graphopt.runtime.engine import Engine
from graphopt.schemas.calibration import Calibration
from graphopt.schemas.pipeline import Budget, Exact
from graphopt.schemas.report import LayerPrecision, PassReport, RefusalReport, StageParity
from graphopt.sources import Source

PASSES = "graphopt.passes"  # the entry point group


class Stopwatch(Protocol):
    """What a target can tell a pass: how long a graph takes there."""

    def milliseconds(self, graph: Graph) -> float:
        """Median time of one run of ``graph`` on the target, at the sizes it is built for."""


@dataclass
class Context:
    """What a pass may ask beyond its graph. ``stopwatch`` is None where nothing can be timed (``tactics: fixed``); ``source``
    is the model, for calibration; ``progress`` is told how much of a long pass is done;
    ``layers`` takes what became of each layer."""

    stopwatch: Stopwatch | None = None
    source: Source | None = None
    progress: Callable[[float], None] = lambda done: None
    notes: list[str] = field(default_factory=list)
    layers: list[LayerPrecision] = field(default_factory=list)
    modules: set[str] = field(default_factory=set)
    """The paths of modules that a pass has met so far."""
    is_last: bool = True
    """Whether no other graph comes after this one: a pass runs on a graph, then on its prologue."""

    def calibrate(self, graph: Graph, config: Calibration, taps: Iterable[Tapped]) -> dict[str, Tensor]:
        """The magnitude up to which each tapped value is to be kept: see :func:`graphopt.calibration.calibrate`."""
        return calibrate(graph, self._model(), config, taps, self.progress)

    def sample(self, graph: Graph, config: Calibration, names: Iterable[str], rows: int) -> dict[str, Tensor]:
        """Some of each value's numbers: see :func:`graphopt.calibration.sample`."""
        return sample(graph, self._model(), config, names, rows)

    def second_moments(self, graph: Graph, config: Calibration, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The mean of ``x.T @ x`` of values: see :func:`graphopt.calibration.second_moments`."""
        return second_moments(graph, self._model(), config, names, self.progress)

    def means(self, graph: Graph, config: Calibration, names: Iterable[str]) -> dict[str, Tensor]:
        """The mean of each channel of values: see :func:`graphopt.calibration.means`."""
        return means(graph, self._model(), config, names, self.progress)

    def in_order(
        self, graph: Graph, config: Calibration, linears: Set[Node], change: Callable[[Node, Tensor], Tensor]
    ) -> None:
        """Change linears one after another: see :func:`graphopt.calibration.in_order`."""
        in_order(graph, self._model(), config, linears, change, self.progress)

    def feeds(self, graph: Graph, config: Calibration) -> Iterator[Probe]:
        """The data as a graph takes it, a batch at a time."""
        return feeds_of(graph, self._model(), config)

    def _model(self) -> Source:
        if self.source is None:
            raise CalibrationError("there is no model whose inputs the data could be", hint="give the Context a source")
        return self.source


class Pass(BaseModel):
    """A named rewrite of a whole graph. Subclasses set ``kind`` and write ``run``; their fields are the options."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: str
    allow_no_match: bool = False
    """Let the pass change nothing; without, that is an error."""

    requires: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def contract(self) -> Contract:
        """How far the result may be from eager."""
        return Exact()

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        """Change ``graph``; say what was matched and what was refused."""
        raise NotImplementedError


class RulePass(Pass):
    """A pass that is a list of rules."""

    def rules(self) -> Sequence[Rule]:
        raise NotImplementedError

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = apply_rules(graph, self.rules(), self.kind)
        graph.prune()
        return log


class Instrument(Protocol):
    """Watches a pipeline: called before and after each pass."""

    def before(self, step: Pass, graph: Graph) -> None: ...

    def after(self, step: Pass, graph: Graph, report: PassReport) -> None: ...


# Loading


def known_passes() -> dict[str, type[Pass]]:
    """Every installed pass by kind, third parties' included."""
    found = plugins(PASSES, Pass)
    for name, step in found.items():
        kind = step.model_fields["kind"].get_default()
        if isinstance(kind, str) and kind != name:
            raise PipelineError(
                f"the entry point {name!r} is of the pass {kind!r}",
                where=f"{step.__module__}.{step.__qualname__}",
                hint="let both have one name",
            )
    return found


def load_passes(
    entries: Sequence[Mapping[str, Any] | Pass],
    *,
    file: str = "the pipeline",
    extra: Mapping[str, type[Pass]] | None = None,
) -> list[Pass]:
    """Passes from their declarations, checked for unknown names and options and for an order that can work.

    PipelineError names the entry and the key, with the nearest right name."""
    known = known_passes() | dict(extra or {})
    steps = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, Pass | Mapping):
            raise PipelineError(
                f"{entry!r} is no pass", where=f"{file}, passes[{index}]", hint=f"{{'kind': {entry!r}}}"
            )
        steps.append(entry if isinstance(entry, Pass) else _load_one(dict(entry), known, f"{file}, passes[{index}]"))
    check_order(steps, file, known)
    return steps


def _load_one(entry: dict[str, Any], known: Mapping[str, type[Pass]], where: str) -> Pass:
    if not isinstance(entry.get("kind"), str):
        raise PipelineError("an entry has no kind", where=where, hint=f"kind: one of {', '.join(sorted(known))}")
    kind = str(entry["kind"])
    if kind not in known:
        raise PipelineError(f"there is no pass {kind!r}", where=where, hint=nearest(kind, known))
    try:
        return known[kind](**entry)
    except ValidationError as error:
        raise PipelineError(validation_message(error, known[kind].model_fields), where=f"{where} ({kind})") from error


def validation_message(error: ValidationError, fields: Iterable[str]) -> str:
    """The first thing wrong, mostly in pydantic's words, with the nearest right key or value for an unknown one."""
    first = error.errors()[0]
    key, kind = ".".join(str(part) for part in first["loc"]), first["type"]
    said = str(first["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"there is no option {key!r}; {nearest(key, fields)}"
    if kind == "missing":
        return f"{key} is missing"
    if not key:  # of the whole, whose options would be all of the message
        return said
    given = reprlib.repr(first["input"])
    if kind in _SHAPES:
        return f"{key}: must be {_SHAPES[kind]} (got {given})"
    close = difflib.get_close_matches(str(first["input"]), re.findall(r"'([^']*)'", said), n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if kind == "literal_error" and close else ""
    return f"{key}: {said} (got {given}){guess}"


#: What YAML calls the kinds of values that pydantic names as Python does.
_SHAPES = {
    "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}  # fmt: skip


def check_order(steps: Sequence[Pass], file: str, known: Mapping[str, type[Pass]]) -> None:
    """PipelineError if a pass comes before what it needs, with the order or the pass that would work."""
    for index, (step, missing) in enumerate(_missing_facts(steps)):
        if missing:
            hint = _working_order(steps) or _missing_pass(missing, known)
            raise PipelineError(
                f"{step.kind} needs {', '.join(sorted(missing))}, which nothing before it provides",
                where=f"{file}, passes[{index}]",
                hint=hint,
            )


def _working_order(steps: Sequence[Pass]) -> str | None:
    """An order of the same passes that works, kept as close to the given one as it can be."""
    needs: nx.DiGraph[int] = nx.DiGraph()
    needs.add_nodes_from(range(len(steps)))
    for index, step in enumerate(steps):
        for fact in step.requires:
            providers = [
                other for other, candidate in enumerate(steps) if fact in candidate.provides and other != index
            ]
            if not providers:
                return None
            needs.add_edge(providers[0], index)
            spoilers = (
                other for other, candidate in enumerate(steps) if fact in candidate.invalidates and other != index
            )
            needs.add_edges_from((index, spoiler) for spoiler in spoilers)
    try:
        order = list(nx.lexicographical_topological_sort(needs))
    except nx.NetworkXUnfeasible:
        return None
    ordered = [steps[index] for index in order]
    if any(missing for _, missing in _missing_facts(ordered)):
        return None
    return "this order works: " + ", ".join(step.kind for step in ordered)


def _missing_facts(steps: Sequence[Pass]) -> Iterator[tuple[Pass, frozenset[str]]]:
    """Each pass with what it needs and nothing before it provides."""
    facts: frozenset[str] = frozenset()
    for step in steps:
        yield step, step.requires - facts
        facts = (facts - step.invalidates) | step.provides


def _missing_pass(missing: set[str] | frozenset[str], known: Mapping[str, type[Pass]]) -> str:
    providers = sorted(kind for kind, step in known.items() if missing <= step.provides)
    return f"add {' or '.join(providers)} before it" if providers else "no installed pass provides that"


# Running


@dataclass
class Proof:
    """What stages are compared with: probes and eager's outputs on them.

    The trace and the engine are compared on all of them, each pass on the first ``each_pass``: two sizes, one of them not
    the traced one. ``compact`` makes the same with all padding at the end, where a token's position is the number of tokens
    before it: what has a cache is compared on those."""

    probes: list[Probe]
    references: Sequence[Outputs]
    each_pass: int = 2
    compact: Callable[[], Proof] | None = None

    def of_pass(self, graph: Graph, contract: Contract) -> StageParity:
        return self.first(self.each_pass).of_graph(graph, contract)

    def first(self, count: int) -> Proof:
        """Of the first ``count`` probes."""
        compact = self.compact
        cut = None if compact is None else lambda: compact().first(count)
        return replace(self, probes=self.probes[:count], references=self.references[:count], compact=cut)

    def of_graph(self, graph: Graph, contract: Contract) -> StageParity:
        return self.of_call(_call(graph), layout_of(graph), contract, _before(graph))

    def of_engine(self, engine: Engine | Callable[..., Outputs], contract: Contract) -> StageParity:
        """An engine, or anything that is called like one; of an engine's several ways the worst."""
        if not isinstance(engine, Engine):
            return self.of_call(_named(engine), None, contract)
        before = None if engine.prologue is None else _named(engine.prologue, engine.prologue.inputs)
        found = [self.of_call(_named(way), engine.layout, contract, before) for way in engine.ways]
        return max(found, key=lambda parity: (not parity.holds, parity.worst))

    def of_call(
        self, call: Call, layout: CacheLayout | None, contract: Contract, before: Call | None = None
    ) -> StageParity:
        """What has a cache runs each probe in several steps, after what runs once ``before``."""
        if layout is None:
            results = [call(probe.inputs) for probe in self.probes]
            return judge(contract, self.probes, self.references, results)
        texts = self if self.compact is None else self.compact()
        found = [as_if_uncached(call, layout, probe.inputs, probe.mask, before) for probe in texts.probes]
        seen = [replace(probe, mask=text.seen) for probe, text in zip(texts.probes, found, strict=True)]
        return judge(contract, seen, texts.references, [text.outputs for text in found])


def _call(graph: Graph, names: Iterable[str] | None = None) -> Call:
    return lambda inputs: run(graph, inputs if names is None else {name: inputs[name] for name in names})


def _before(graph: Graph) -> Call | None:
    return None if graph.prologue is None else _call(graph.prologue, graph.prologue.inputs)


def _named(engine: Callable[..., Outputs], names: Iterable[str] | None = None) -> Call:
    return lambda inputs: engine(**(inputs if names is None else {name: inputs[name] for name in names}))


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """No garbage collection while millions of small objects are made that all stay: a tenth of a build's time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_passes(
    graph: Graph,
    steps: Sequence[Pass],
    *,
    context: Context | None = None,
    proof: Proof | None = None,
    override: Budget | None = None,
    force: bool = False,
    instruments: Sequence[Instrument] = (),
) -> list[PassReport]:
    """Run ``steps`` on ``graph`` in place; after each, verify the graph and hold it to its contract against eager.

    ``override``: a budget that replaces the passes' own. A contract that does not hold raises ParityError with the pass
    and the first value that differs, unless ``force``: then the report says so. A pass that changes nothing raises
    NoMatchError unless it allows that."""
    context = context or Context()
    reports: list[PassReport] = []
    budget: Contract = Exact()
    last: StageParity | None = None
    for step in steps:
        for instrument in instruments:
            instrument.before(step, graph)
        before = graph.clone()
        report = _run_one(graph, step, context)
        if proof is not None:
            budget = override or _looser(budget, step.contract())
            changed = report.changes or report.diff or not _has_weights_of(before, graph)
            parity = proof.of_pass(graph, budget) if changed or last is None else last
            report = report.model_copy(update={"parity": parity})
            if not (parity.holds or force):
                raise broken(step.kind, parity, first_difference(before, graph, proof))
            last = parity
        reports.append(report)
        for instrument in instruments:
            instrument.after(step, graph, report)
    return reports


def _has_weights_of(before: Graph, after: Graph) -> bool:
    """Whether two graphs of one text have the very same weights, which a text does not tell."""
    if any(weight is not after.weights[name] for name, weight in before.weights.items()):
        return False
    return before.prologue is None or after.prologue is None or _has_weights_of(before.prologue, after.prologue)


def _looser(current: Contract, own: Contract) -> Contract:
    """After a pass with a budget, later exact passes are held to that budget: what is lost is lost."""
    return own if isinstance(own, Budget) else current


def _run_one(graph: Graph, step: Pass, context: Context) -> PassReport:
    text, nodes = graph.text(), len(graph)
    parameters, size = _parameters(graph), graph.weight_bytes
    context.notes.clear()
    context.layers.clear()
    context.modules.clear()
    start = time.perf_counter()
    with paused_collector():
        before = graph.prologue
        context.is_last = before is None
        log = step.run(graph, context)
        if before is not None:
            context.is_last = True
            log.add(step.run(before, context))
        if not isinstance(log, RewriteLog):
            raise PassError(f"{step.kind} returned a {type(log).__name__}", hint="run returns a RewriteLog")
        graph.verify()
    seconds = time.perf_counter() - start
    if not log.total and not step.allow_no_match:
        reasons = "; ".join(dict.fromkeys(f"{refused.rule}: {refused.reason}" for refused in log.refusals[:3]))
        raise NoMatchError(
            f"{step.kind} changed nothing" + (f" ({reasons})" if reasons else ""),
            where=log.refusals[0].where if log.refusals else None,
            hint="take the pass out, or set allow_no_match: true",
        )
    return PassReport(
        kind=step.kind,
        options=step.model_dump(mode="json", exclude={"kind"}),
        matches=log.matches,
        refusals=[RefusalReport(rule=r.rule, where=r.where, reason=r.reason) for r in log.refusals],
        notes=list(context.notes),
        layers=list(context.layers),
        nodes_before=nodes,
        nodes_after=len(graph),
        bytes_before=size,
        bytes_after=graph.weight_bytes,
        parameters_before=parameters,
        parameters_after=_parameters(graph),
        seconds=seconds,
        diff=diff_text(text, graph.text()),
    )


def _parameters(graph: Graph) -> int:
    return sum(weight.nbytes // weight.type.dtype.itemsize for weight in graph.weights.values())


def diff_text(before: str, after: str) -> str:
    """The lines that changed, as a unified diff without context."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), "before", "after", lineterm="", n=0)
    return "\n".join(line for line in lines if not line.startswith("@@"))


def first_difference(before: Graph, after: Graph, proof: Proof) -> Difference | None:
    """Where a pass first went wrong: the first value by name that differs on a probe."""
    if before.inputs.keys() != after.inputs.keys():
        return None  # a pass that inserts a cache changes what a run is
    texts = proof if proof.compact is None or layout_of(before) is None else proof.compact()
    found = (bisect(before, after, single_run(before, probe)) for probe in texts.probes)
    return next((difference for difference in found if difference is not None), None)


def single_run(graph: Graph, probe: Probe) -> Probe:
    """The probe as one run of the graph: with a cache the last of its steps."""
    layout = layout_of(graph)
    if layout is None:
        return probe
    return replace(probe, inputs=last_step(_call(graph), layout, probe.inputs, probe.mask, _before(graph)))


def broken(stage: str, parity: StageParity, difference: Difference | str | None) -> ParityError:
    """The error of a stage that does not keep its contract. ``difference``: the first, or why none was looked for."""
    where = str(difference) if difference else "in the outputs only: no inner value differs by itself"
    worst, limit = worst_and_limit(parity)
    return ParityError(
        f"{stage} breaks its contract ({parity.contract}): {parity.metric} is {worst}, the limit {limit}",
        where=where,
        hint="take the pass out, widen its budget, or build with force to record it in the manifest",
    )
