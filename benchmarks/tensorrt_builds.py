"""TensorRT engines of graphs and of ONNX files for timing: built without a compilation's proofs, which take most of its time, and
run as compiled ones are."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import Table
from graphopt.backend import no_progress
from graphopt.backends.tensorrt.backend import TensorRtBackend
from graphopt.backends.tensorrt.builder import build_plan
from graphopt.backends.tensorrt.engine import PLAN, TensorRtEngine, opened_plan
from graphopt.backends.tensorrt.flavours import TENSORRT
from graphopt.backends.tensorrt.options import Options, Profile
from graphopt.ir import Graph, types_of
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.pipeline import TargetConfig
from graphopt.sources import Source
from graphopt.tensors import DimRange, TensorType
from graphopt.tracing import trace

RUNS = 50
Call = Callable[[], Any]
Types = Mapping[str, TensorType]


class BareEngine(TensorRtEngine):
    """A plan in ``folder`` with the inputs and outputs that it has, and no manifest."""

    def __init__(
        self,
        folder: Path,
        inputs: Types,
        outputs: Types,
        dims: Mapping[str, DimRange],
        profiles: list[Profile],
        cuda_graphs: bool,
        lengths: Sequence[int] = (),
    ) -> None:
        self.folder, self.flavour, self.cuda_graphs = folder, TENSORRT, cuda_graphs
        self.inputs, self.outputs, self.dims, self.profiles = dict(inputs), dict(outputs), dict(dims), profiles
        self.cache_lengths = list(lengths)
        self._opened = opened_plan(TENSORRT, (folder / PLAN).read_bytes(), folder / PLAN)


def graph_of(source: Source, passes: Sequence[Mapping[str, Any]], dims: Mapping[str, tuple[int, int]]) -> Graph:
    """A model after its passes, held to nothing."""
    ranges = {name: DimRange(*bounds) for name, bounds in dims.items()}
    graph = trace(source.module, source.inputs, source.axes, ranges, source.dims, source.truths)
    run_passes(graph, load_passes(passes), context=Context(None, source))
    return graph


def narrowed(graph: Graph, **dims: tuple[int, int]) -> Graph:
    """The same for fewer sizes."""
    made = graph.clone()
    made.dims.update({name: DimRange(*bounds) for name, bounds in dims.items()})
    return made


def engine_of(graph: Graph, folder: Path, cuda_graphs: bool = True, **options: Any) -> BareEngine:
    """A graph's engine, with ``target.options``; prints what a build would warn of."""
    folder.mkdir()
    backend = TensorRtBackend(TargetConfig(backend="tensorrt", options=options))
    for warning in backend.build(graph, folder).warnings:
        print(f"{folder.name}: {warning}"[:300], flush=True)
    inputs, outputs = map(types_of, (graph.inputs, graph.outputs))
    own = backend.profiles(graph), cuda_graphs, backend.lengths(graph)
    return BareEngine(folder, inputs, outputs, graph.dims, *own)


def engine_of_file(
    file: Path, inputs: Types, outputs: Types, dims: Mapping[str, tuple[int, int]], profiles: Sequence[Profile]
) -> BareEngine:
    """The engine of an ONNX file of somebody else's."""
    plan = build_plan(TENSORRT, file, inputs, list(profiles), Options(), {}, no_progress)
    (file.parent / PLAN).write_bytes(plan.data)
    ranges = {name: DimRange(*bounds) for name, bounds in dims.items()}
    return BareEngine(file.parent, inputs, outputs, ranges, list(profiles), cuda_graphs=True)


def median_ms(call: Call) -> float:
    """Of runs one by one, timed by events on the GPU."""
    for _ in range(10):
        call()
    times: list[float] = []
    for _ in range(RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def slowest(title: str, context: Any, run: Call, rows: int = 30) -> Table:
    """The layers of an execution context that take longest when ``run`` puts one run of it on the GPU, by TensorRT's own
    profiler: together where their names differ in numbers alone and their times by less than a tenth or so. (It waits after each
    layer, which adds 4 or 5 us to it.)"""
    trt = TENSORRT.module()

    class Profiler(trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = defaultdict(float)

        def report_layer_time(self, layer: str, milliseconds: float) -> None:
            self.times[layer] += milliseconds

    profiler = Profiler()
    context.profiler = profiler
    for _ in range(RUNS):
        run()
        torch.cuda.synchronize()
    alike: dict[tuple[str, int], list[float]] = defaultdict(list)
    for layer, milliseconds in profiler.times.items():
        us = 1000 * milliseconds / RUNS
        alike[re.sub(r"\d+", "#", layer), round(10 * math.log(max(us, 0.1)))].append(us)
    total = sum(map(sum, alike.values()))
    table = Table(f"{title}: {len(profiler.times)} layers, {total:.0f} us with the profiler's waits", "layers alike")
    for (name, _), times in sorted(alike.items(), key=lambda item: -sum(item[1]))[:rows]:
        table.add(name[:120], layers=len(times), us_together=sum(times), us_of_one=statistics.median(times))
    return table
