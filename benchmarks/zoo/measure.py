"""One animal: compiled for ONNX Runtime, run at sizes that were not traced, held beside ``torch.onnx.export``."""

from __future__ import annotations

import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks.measure import quiet
from benchmarks.zoo.catalog import Animal
from benchmarks.zoo.small import source as small_source
from graphopt import attentions
from graphopt.eager import eager, kept
from graphopt.errors import GraphoptError
from graphopt.ir import Graph
from graphopt.parity import Probe, compare
from graphopt.pipeline import Pass
from graphopt.schemas.report import PassReport
from graphopt.sources import Source

LIMIT = 1e-4  # of the output's scale
SIZES = (3, 11, 9), (1, 7, 12), (4, 19, 3)  # for the first, second and third dimension: none is traced


@dataclass
class Outcome:
    """How far an engine got: ``refused`` with a reason, or the worst difference relative to the output's scale."""

    seconds: float = 0.0
    worst: float | None = None
    refused: str = ""

    @property
    def right(self) -> bool:
        return self.worst is not None and self.worst <= LIMIT


@dataclass
class Row:
    """One animal with one attention implementation."""

    name: str
    family: str
    attention: str
    found: int = 0
    fused: int = 0
    refusals: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    unproven: list[str] = field(default_factory=list)
    norms: int = 0
    rotaries: int = 0
    graphopt: Outcome = field(default_factory=Outcome)
    export: Outcome | None = None


class _AfterFusion:
    """Keeps what ``fuse_attention`` left, for counting."""

    def __init__(self) -> None:
        self.unfused: list[str] = []
        self.text = ""

    def before(self, step: Pass, graph: Graph) -> None: ...

    def after(self, step: Pass, graph: Graph, report: PassReport) -> None:
        if step.kind == "fuse_attention":
            self.unfused = [node.where for node in attentions.unfused(graph)]
            self.text = graph.text(origins=True)


def attempt(work: tuple[Animal, str, bool]) -> Row:
    """``measure``, alone in its process, on one thread; a crash is a row as well."""
    animal, attention, beside = work
    torch.set_num_threads(1)
    with quiet():
        try:
            return measure(animal, attention, beside)
        except Exception as error:
            row = Row(animal.name, animal.family, attention)
            where = traceback.extract_tb(error.__traceback__)[-1]
            row.graphopt.refused = f"crash: {type(error).__name__}: {error} at {where.filename}:{where.lineno}"
            return row


def measure(animal: Animal, attention: str, beside: bool = True) -> Row:
    """Compile, run, compare; with ``beside`` also through ``torch.onnx.export``."""
    row = Row(animal.name, animal.family, attention)
    probes = make_probes(small_source(animal, attention))
    reference = eager(small_source(animal, attention).module)
    with tempfile.TemporaryDirectory() as folder:
        _compile(row, small_source(animal, attention), probes, reference, Path(folder))
        if beside:
            row.export = Outcome()
            _export(row.export, small_source(animal, attention), probes, reference, Path(folder))
    return row


def make_probes(source: Source) -> list[Probe]:
    """Inputs with padding at three sizes; a dimension the model bounds stays inside its bounds."""
    generator = torch.Generator().manual_seed(7)
    sample = source.sample()
    probes = []
    for sizes in SIZES:
        named = {}
        for index, name in enumerate(source.traced):
            bounds = source.dims.get(name)
            size = sizes[min(index, 2)] if name != "samples" else source.traced[name] + 37 * sizes[1]
            named[name] = min(size, bounds.max) if bounds and bounds.max else size
        inputs = sample(named, generator)
        probes.append(Probe(named, inputs, inputs.get(source.mask) if source.mask else None))
    return probes


def _compile(
    row: Row, source: Source, probes: list[Probe], reference: Callable[..., dict[str, Tensor]], folder: Path
) -> None:
    watch = _AfterFusion()
    start = time.perf_counter()
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    try:
        compiled = graphopt.compile(source, folder / "engine", target=target, instruments=[watch])
        row.graphopt.seconds = time.perf_counter() - start
        _count(row, compiled.report.passes, graphopt.artifact.read_graph(compiled.folder), watch)
        engine = compiled.engine
        row.graphopt.worst = _worst(
            lambda inputs: engine(**{name: inputs[name] for name in engine.inputs}), probes, reference
        )
    except GraphoptError as error:
        row.graphopt.refused = str(error)


def _count(row: Row, reports: list[PassReport], graph: Graph, watch: _AfterFusion) -> None:
    found = [attentions.describe(node) for node in attentions.fused(graph)]
    row.fused, row.found = len(found), len(found) + len(watch.unfused)
    row.masks = sorted({attention.mask for attention in found})
    for report in reports:
        for refusal in report.refusals:
            if report.kind == "fuse_attention":
                (row.unproven if refusal.rule == "ProveMask" else row.refusals).append(
                    f"{refusal.reason} [{refusal.where}]"
                )
    counts = graph.op_counts()
    row.norms = sum(count for op, count in counts.items() if "norm" in op)
    row.rotaries = sum(count for op, count in counts.items() if "rotary" in op)
    row.refusals += [f"left: {where}" for where in watch.unfused]


def _worst(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    probes: list[Probe],
    reference: Callable[..., dict[str, Tensor]],
) -> float:
    """The largest difference on any output and probe, relative to the output's scale."""
    worst = 0.0
    for probe in probes:
        got = run(probe.inputs)
        expected = kept(reference(**probe.inputs), got)
        worst = max([worst, *(output.relative for output in compare(expected, got, probe.mask).values())])
    return worst


def _export(
    outcome: Outcome, source: Source, probes: list[Probe], reference: Callable[..., dict[str, Tensor]], folder: Path
) -> None:
    """``torch.onnx.export`` as its documentation has it: dynamic sizes, default opset."""
    import onnxruntime

    shapes = {
        name: {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(source.axes[name]) if dim}
        for name in source.tensors
    }
    start = time.perf_counter()
    try:
        file = folder / "export.onnx"
        torch.onnx.export(
            source.module, (), file, kwargs=source.tensors, dynamo=True, verbose=False, dynamic_shapes=shapes
        )
        outcome.seconds = time.perf_counter() - start
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        takes = [given.name for given in session.get_inputs()]
        names = list(reference(**source.tensors))

        def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
            results = session.run(None, {name: inputs[name].numpy() for name in takes})
            return dict(zip(names, map(torch.from_numpy, results), strict=False))

        outcome.worst = _worst(run, probes, reference)
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        outcome.refused = f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def as_json(row: Row) -> dict[str, Any]:
    return asdict(row)
