"""Model in, engine directory out: trace, run the passes, build, prove."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from torch import nn

from graphopt import artifact, attentions, models, operators
from graphopt.backend import Backend, Built, Progress, backend_class, no_progress
from graphopt.eager import eager, kept
from graphopt.errors import (
    BackendError,
    GraphError,
    MissingBackendError,
    ModelError,
    ParityError,
    PipelineError,
    TracingError,
)  # fmt: skip
from graphopt.ir import Graph
from graphopt.measures import measure_text
from graphopt.models import load_model
from graphopt.parity import Contract, Difference, Probe, bisect
from graphopt.pipeline import (
    Context,
    Instrument,
    Pass,
    Proof,
    broken,
    load_passes,
    paused_collector,
    run_passes,
    single_run,
    validation_message,
)
from graphopt.probes import make_probes
from graphopt.runtime.cache import compacted, take
from graphopt.runtime.engine import Engine, spec_of
from graphopt.schemas.manifest import Manifest
from graphopt.schemas.pipeline import Budget, Exact, PipelineConfig, TargetConfig
from graphopt.schemas.report import BuildReport, PassReport, StageParity
from graphopt.sources import Source, transformers_source
from graphopt.tensors import DimRange
from graphopt.tracing import trace


@dataclass
class Compiled:
    """A finished build: the directory, the loaded engine, what was done."""

    folder: Path
    engine: Engine
    manifest: Manifest

    @property
    def report(self) -> BuildReport:
        return self.manifest.report

    def __repr__(self) -> str:
        name, last = self.report.last
        proof = "" if last is None else f", {name}: {last.metric} {measure_text(last.metric, last.worst)} from eager"
        return f"<Compiled {self.folder}{proof}>"


@dataclass
class _Build:
    """One build in progress."""

    source: Source
    backend: Backend
    steps: list[Pass]
    parity: Budget | None
    force: bool
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.progress(name, 0.0)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)
        self.progress(name, 1.0)


class _OnceLoader(yaml.SafeLoader):
    """Takes no key twice, of which the last would silently win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_config(file: str | Path) -> PipelineConfig:
    """A pipeline file in YAML. PipelineError names the key that is wrong."""
    path = Path(file)
    if path.is_dir():
        raise PipelineError(
            f"{path} is a directory, not a pipeline file", hint="a YAML file that says model: with the directory's path"
        )
    if not path.is_file():
        raise PipelineError(f"there is no pipeline file {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)  # noqa: S506  # a safe loader
    except UnicodeDecodeError as error:
        raise PipelineError(f"a pipeline file is in UTF-8: {error}", where=str(path)) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        raise PipelineError(f"not YAML: {getattr(error, 'problem', None) or error}", where=f"{path}{line}") from error
    if not isinstance(content, dict):
        raise PipelineError("a pipeline file is a mapping with the key model", where=str(path))
    return parse_config(content, str(path))


def parse_config(content: Mapping[str, Any], where: str) -> PipelineConfig:
    try:
        return PipelineConfig.model_validate(content)
    except ValidationError as error:
        fields = {*PipelineConfig.model_fields, *TargetConfig.model_fields}
        raise PipelineError(validation_message(error, fields), where=where) from error


def compile_file(
    file: str | Path, out: str | Path, *, force: bool = False, progress: Progress = no_progress
) -> Compiled:
    """Compile what a pipeline file declares. Passes and target are checked before the model is read."""
    config = read_config(file)
    backend = backend_class(config.target.backend)(config.target)
    entries = (
        backend.standard_passes if config.passes is None else [_beside(each, Path(file)) for each in config.passes]
    )
    steps = load_passes(entries, file=str(file))
    progress("load", 0.0)
    source = load_model(config.model, Path(file).parent)
    dims = {name: DimRange(*bounds) for name, bounds in config.dims.items()}
    return _compile(_Build(source, backend, steps, config.parity, force, progress), Path(out), dims)


def _beside(entry: Mapping[str, Any], file: Path) -> Mapping[str, Any]:
    """A pass as a pipeline file declares it, with its calibration data's path from that file on, as the model's is."""
    calibration = entry.get("calibration")
    if not isinstance(calibration, dict) or not isinstance(calibration.get("data"), str):
        return entry
    return {**entry, "calibration": {**calibration, "data": str(file.parent / calibration["data"])}}


def compile(
    model: str | Source | nn.Module,
    out: str | Path,
    *,
    passes: Sequence[Mapping[str, Any] | Pass] | None = None,
    target: TargetConfig | Mapping[str, Any] | None = None,
    dims: Mapping[str, tuple[int, int | None]] | None = None,
    parity: Budget | None = None,
    force: bool = False,
    progress: Progress = no_progress,
    instruments: Sequence[Instrument] = (),
) -> Compiled:
    """Compile a model (a name for :func:`graphopt.models.load_model`, a Source, or a transformers model) into the engine
    directory ``out``.

    ``passes``: declarations or Pass objects, by default the target's standard list. ``dims``: the range of each named
    size. ``parity``: a budget in place of the passes' own contracts. ``force``: write down broken contracts instead of
    stopping. Every pass and the engine are compared with the eager model on probe inputs; ParityError names the pass and
    the value that is wrong."""
    if isinstance(target, str):
        raise PipelineError(f"target is the text {target!r}", where="target", hint=f"target={{'backend': {target!r}}}")
    if not isinstance(target, TargetConfig):
        target = parse_config({"model": "-", "target": dict(target or {})}, "target").target
    backend = backend_class(target.backend)(target)
    steps = load_passes(backend.standard_passes if passes is None else passes)
    source = source_of(model)
    ranges = {name: DimRange(*bounds) for name, bounds in (dims or {}).items()}
    return _compile(_Build(source, backend, steps, parity, force, progress), Path(out), ranges, instruments)


def _compile(
    build: _Build, out: Path, dims: Mapping[str, DimRange], instruments: Sequence[Instrument] = ()
) -> Compiled:
    with artifact.staged(out) as folder, paused_collector():
        with build.part("trace"):
            source = build.source
            graph = trace(source.module, source.inputs, source.axes, dims, source.dims, source.truths)
            _refuse_chance(graph)
        with build.part("probe"):
            proof = make_proof(
                source, graph, _behind(step.model_dump(include={"kind", "padding"}) for step in build.steps)
            )
        traced, traced_ops = _check_trace(build, graph, proof), graph.op_counts()
        with build.part("passes"):
            announcer = _Announcer(build)
            context = Context(build.backend.stopwatch(graph), source, announcer.inside)
            reports = run_passes(
                graph, build.steps, context=context, proof=proof,
                override=build.parity, force=build.force, instruments=[*instruments, announcer],
            )  # fmt: skip
        with build.part("build"):
            build.backend.check_graph(graph)
            built = build.backend.build(graph, folder, build.progress)
            if graph.prologue is not None:
                _build_prologue(build, graph.prologue, folder / artifact.PROLOGUE)
        (folder / artifact.GRAPH).write_text(graph.text(origins=True), encoding="utf-8")
        models.copy_tokenizer(build.source, folder)
        manifest = _manifest(build, graph, built, reports, traced, traced_ops)
        with build.part("engine"):
            engine = artifact.loaded(folder, manifest)
            reason = build.backend.unrunnable()
            if reason is None:
                checked = {"engine": _check_engine(build, graph, engine, proof)}
            else:
                checked, unchecked = _check_emitted(build, graph, engine, proof)
                reason += unchecked
        warnings = list(manifest.report.warnings)
        if reason is not None:
            warnings.append(f"the engine was built and not run: {reason}")
        report = manifest.report.model_copy(update={**checked, "seconds": build.seconds, "warnings": warnings})
        manifest = artifact.write_manifest(folder, manifest.model_copy(update={"report": report}))
        engine.manifest = manifest
    if reason is not None:
        engine = artifact.loaded(out, manifest)  # it was never opened, and the folder has moved
    return Compiled(out, engine, manifest)


def _build_prologue(build: _Build, graph: Graph, folder: Path) -> None:
    """What runs once before, as an engine of its own inside the directory."""
    folder.mkdir()
    built = build.backend.build(graph, folder, build.progress)
    (folder / artifact.GRAPH).write_text(graph.text(origins=True), encoding="utf-8")
    artifact.write_manifest(folder, _manifest(build, graph, built, [], None, {}))


def _refuse_chance(graph: Graph) -> None:
    """A model that draws random numbers has no result to be compared with."""
    for node in graph.nodes:
        if operators.is_random(node.op, node.args):
            hint = "switch the model's randomness off, or make the random tensor an input"
            raise TracingError(f"{node.op} draws random numbers: no two runs are equal", where=node.where, hint=hint)


class _Announcer:
    """Tells the progress which pass is running."""

    def __init__(self, build: _Build) -> None:
        self.build, self.done, self.kind = build, 0, ""

    def before(self, step: Pass, graph: Graph) -> None:
        self.kind = step.kind
        self.inside(0.0)

    def inside(self, done: float) -> None:
        """How much of the pass that is running is done."""
        self.build.progress(f"pass {self.kind}", (self.done + done) / max(len(self.build.steps), 1))

    def after(self, step: Pass, graph: Graph, report: PassReport) -> None:
        self.done += 1


def _behind(passes: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a pass is promised that padding lies behind texts only."""
    return any(step["kind"] == "remove_padding" and step.get("padding") == "behind" for step in passes)


def make_proof(source: Source, graph: Graph, behind: bool = False) -> Proof:
    """Probes for the graph and eager's outputs on them. ``behind``: with padding behind texts only."""
    mask = source.mask if source.mask in graph.inputs else None
    return _proof(source, _probes(source, graph.dims, mask, behind), set(graph.inputs), set(graph.outputs))


def _probes(source: Source, dims: Mapping[str, DimRange], mask: str | None, behind: bool, seed: int = 0) -> list[Probe]:
    probes = make_probes(source.sample(), dims, source.traced, mask, seed=seed)
    return [_compact(source, probe) for probe in probes] if behind else probes


def _proof(source: Source, probes: list[Probe], inputs: set[str], outputs: set[str]) -> Proof:
    """The probes' ``inputs``, and what eager says of the probes as they are or with all padding at the end."""
    call = eager(source.module)

    def held(probes: list[Probe], compact: Callable[[], Proof] | None = None) -> Proof:
        references = [kept(call(**probe.inputs), outputs) for probe in probes]
        fed = [{name: tensor for name, tensor in probe.inputs.items() if name in inputs} for probe in probes]
        return Proof(
            [replace(probe, inputs=feeds) for probe, feeds in zip(probes, fed, strict=True)],
            references,
            compact=compact,
        )

    @functools.cache
    def compact() -> Proof:
        return held([_compact(source, probe) for probe in probes])

    return held(probes, compact)


def _compact(source: Source, probe: Probe) -> Probe:
    """The probe with every row's padding behind its tokens."""
    if source.mask is None or probe.mask is None:
        return probe
    order, along = compacted(probe.mask), source.axes[source.mask][1]
    inputs = {
        name: take(tensor, order, source.axes[name].index(along)) if along in source.axes.get(name, ()) else tensor
        for name, tensor in probe.inputs.items()
    }
    return replace(probe, inputs=inputs, mask=inputs[source.mask])


def _check_trace(build: _Build, graph: Graph, proof: Proof) -> StageParity:
    parity = proof.of_graph(graph, Exact())
    if not (parity.holds or build.force):
        raise broken("the trace", parity, None)
    return parity


def _check_engine(build: _Build, graph: Graph, engine: Engine, proof: Proof, stage: str = "the engine") -> StageParity:
    parity = proof.of_engine(engine, final_contract(build.steps, build.parity))
    if parity.holds or build.force:
        return parity
    raise broken(stage, parity, first_engine_difference(build.backend, graph, proof))


def _check_emitted(build: _Build, graph: Graph, engine: Engine, proof: Proof) -> tuple[dict[str, StageParity], str]:
    """The model of an engine that cannot run here; a reason if that cannot run either."""
    try:
        stand_in = build.backend.stand_in(graph, engine)
        if stand_in is None:
            return {}, ""
        return {"emitted": _check_engine(build, graph, stand_in, proof, "the emitted model")}, ""
    except (BackendError, MissingBackendError) as error:
        return {}, f"; nor was the model that it was built of ({error.what})"


def final_contract(steps: Sequence[Pass], override: Budget | None) -> Contract:
    """What the engine is held to: the override, or the last budget of the passes, or rounding."""
    budgets = [contract for step in steps if isinstance(contract := step.contract(), Budget)]
    return override or (budgets[-1] if budgets else Exact())


def first_engine_difference(backend: Backend, graph: Graph, proof: Proof) -> Difference | str | None:
    """Run the graph on the backend with every inner value shown; the first that is not the interpreter's, or why it cannot be
    looked for."""
    names = [value.name for node in graph.nodes for value in node.outputs]
    try:
        show = backend.inner_values(graph, names)
    except (NotImplementedError, GraphError) as error:
        return f"in the outputs: inner values cannot be shown ({str(error) or backend.name})"
    found = (bisect(graph, show, single_run(graph, probe)) for probe in proof.probes)
    return next((difference for difference in found if difference is not None), None)


def _manifest(
    build: _Build,
    graph: Graph,
    built: Built,
    reports: list[PassReport],
    traced: StageParity | None,
    traced_ops: dict[str, int],
) -> Manifest:
    packages = {name: version(name) for name in ("torch", "transformers")} | type(build.backend).versions()
    refusals = [refusal for step in reports for refusal in step.refusals]
    report = BuildReport(
        trace=traced, traced_ops=traced_ops, final_ops=graph.op_counts(), passes=reports,
        attentions=attentions.table(graph, refusals), tactics=built.tactics, engine_ops=built.ops, kernels=built.kernels,
        warnings=built.warnings,
    )  # fmt: skip
    return Manifest(
        graphopt=version("graphopt"),
        versions=packages,
        model=build.source.name,
        weights_digest=built.weights_digest,
        pipeline={
            "passes": [step.model_dump(mode="json") for step in build.steps],
            "target": build.backend.target.model_dump(mode="json"),
            "parity": build.parity.model_dump(mode="json") if build.parity else None,
        },
        backend=build.backend.name,
        dims={name: (bounds.min, bounds.max) for name, bounds in graph.dims.items()},
        inputs={name: spec_of(value.type) for name, value in graph.inputs.items()},
        outputs={name: spec_of(value.type) for name, value in graph.outputs.items()},
        mask=build.source.mask if build.source.mask in graph.inputs else None,
        cache_lengths=built.cache_lengths,
        report=report,
        files=built.files,
    )


def source_of(model: str | Source | nn.Module) -> Source:
    """A model's Source, from its name or a transformers module."""
    if isinstance(model, Source):
        return model
    if isinstance(model, str):
        return load_model(model)
    if not hasattr(model, "config"):
        raise ModelError(
            f"a {type(model).__name__} is no model of transformers, so its inputs are not known",
            hint="graphopt.Source(module, inputs, axes): example inputs by name, and for each the names of its axes or None",
        )
    return transformers_source(model)


def verify(folder: str | Path, model: str | Source | nn.Module) -> StageParity:
    """Compare an engine directory with a model again, on fresh probes: ``holds`` of the result says whether it keeps its
    contract. ParityError if the two cannot be compared."""
    engine, source = artifact.load(folder), source_of(model)
    layout = engine.layout
    mask = engine.manifest.mask if layout is None else source.mask
    dims = {name: bounds for name, bounds in engine.dims.items() if name in source.traced}
    probes = _probes(source, dims, mask, _behind(engine.manifest.pipeline["passes"]), seed=1)
    proof = _proof(source, probes, set(engine.inputs), set(engine.outputs))
    cached = set() if layout is None else set(layout.names.values())
    missing = engine.outputs.keys() - proof.references[0].keys() - cached
    if missing:
        raise ParityError(
            f"the model has no output {', '.join(sorted(missing))}", hint="is it the model the engine was made of?"
        )
    _, stage = engine.manifest.report.last  # an engine that was built for another machine was proven by its model
    contract: Contract = Exact()
    if stage is not None and stage.contract != "exact":
        contract = Budget(metric=stage.metric, limit=stage.limit)
    return proof.of_engine(engine, contract)
