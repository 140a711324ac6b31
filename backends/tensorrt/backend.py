"""``backend: tensorrt`` and ``backend: tensorrt_rtx``: a strongly typed engine in ``model.plan``."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch

from graphopt.attentions import PACKED
from graphopt.backend import Backend, Built, Progress, no_progress, refuse_options
from graphopt.backends.onnx.backend import MODEL, STANDARD_PASSES, write_model
from graphopt.backends.onnx.emitter import ORIGIN, Emitter
from graphopt.backends.onnxruntime.widened import widened
from graphopt.backends.quirks import Quirk, faults_in_force, quirks_in_force
from graphopt.backends.tensorrt.builder import build_plan
from graphopt.backends.tensorrt.cached import of_any_length
from graphopt.backends.tensorrt.dialect import tensorrt_dialect
from graphopt.backends.tensorrt.engine import PLAN, TensorRtEngine, opened_plan, unrunnable
from graphopt.backends.tensorrt.flavours import RTX, TENSORRT, Flavour, load_plugins, parsed_ops
from graphopt.backends.tensorrt.inspection import check_kernels, kernels_of, layers_of
from graphopt.backends.tensorrt.linears import Device
from graphopt.backends.tensorrt.options import (
    Options,
    Profile,
    check_names,
    for_two_rows,
    hole_in,
    lengths_of,
    most_run,
    profiles_of,
)
from graphopt.backends.tensorrt.plugin_attention import CREATOR
from graphopt.backends.tensorrt.stand_in import StandIn
from graphopt.errors import EngineError, MissingBackendError, PipelineError
from graphopt.ir import Graph, types_of
from graphopt.measures import named_sizes
from graphopt.ops.quantization import FP8
from graphopt.runtime.cache import CacheLayout, layout_of
from graphopt.runtime.engine import Engine
from graphopt.schemas.manifest import Manifest
from graphopt.schemas.pipeline import TargetConfig


class TensorRtBackend(Backend):
    """TensorRT, 10.6 and later: builds and runs on a machine with an NVIDIA GPU."""

    name: ClassVar[str] = "tensorrt"
    flavour: ClassVar[Flavour] = TENSORRT
    #: Options that it has not, and why.
    unheeded: ClassVar[Mapping[str, str]] = {
        "compute_capabilities": "compute_capabilities are for backend: tensorrt_rtx; tensorrt builds for the GPU that is here",
    }
    standard_passes: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        step for step in STANDARD_PASSES if step["kind"] not in ("heads_last", "flatten_tokens")
    )

    def __init__(self, target: TargetConfig) -> None:
        super().__init__(target)
        self.options = self.options_as(Options)
        for name, why in self.unheeded.items():
            if getattr(self.options, name) != Options.model_fields[name].default:
                raise PipelineError(why, where=f"target.options.{name}")

    def check_graph(self, graph: Graph) -> None:
        check_names(graph.dims, self.options)
        if self.options.cache_lengths:
            self._check_lengths(max(self.options.cache_lengths), layout_of(graph))

    def _check_lengths(self, longest: int, layout: CacheLayout | None) -> None:
        where = "target.options.cache_lengths"
        if layout is None or layout.max_length is None:
            raise PipelineError("the model has no static cache", where=where, hint="insert_kv_cache: layout: static")
        if not layout.whole:
            raise PipelineError("all buffers of the cache are of windows", where=where, hint="leave it out")
        if longest >= layout.max_length:
            raise PipelineError(f"{longest} is not below the cache's max_length, {layout.max_length}", where=where)
        if parsed_ops(self.flavour)("TensorScatter"):
            why = "reads buffers where they lie, and their length is fixed"
            raise PipelineError(f"{self.name} here {why}", where=where, hint="leave it out")

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {cls.name: cls.flavour.version(), "onnx-ir": version("onnx-ir")}

    @classmethod
    def unrunnable(cls) -> str | None:
        return unrunnable(cls.flavour)

    def emit(self, graph: Graph) -> Emitter:
        """The graph in the dialect of the importer; TensorRT itself is not needed."""
        try:
            own = self.flavour.version()
        except MissingBackendError:
            own = "0"
        device = None
        if self.options.split_sums and self.unrunnable() is None:
            device = Device.here(most_run(self.profiles(graph), layout_of(graph)))
        padding = self.options.packed_padding if self.flavour.has_plugins else None
        quirks = quirks_in_force(self.name, own)
        dialect = tensorrt_dialect(
            parsed_ops(self.flavour), self.name, quirks, device, self.options.accumulate, padding
        )
        return Emitter(self._with_lengths(graph), dialect)

    def _with_lengths(self, graph: Graph) -> Graph:
        """The graph with buffers that may have any of several lengths. (A decoder's encoder has no buffers.)"""
        layout = layout_of(graph)
        return of_any_length(graph, layout) if layout is not None and self.lengths(graph) else graph

    def lengths(self, graph: Graph) -> list[int]:
        """Of a static cache's buffers, shortest first, where they have several."""
        return [] if parsed_ops(self.flavour)("TensorScatter") else lengths_of(self.options, layout_of(graph))

    def build(self, graph: Graph, folder: Path, progress: Progress = no_progress) -> Built:
        self._check_device()
        asked = self.profiles(graph)
        trt = self.flavour.module()  # before anything is written
        profiles, widened = self._widened(graph, asked)
        if self.flavour.has_plugins and PACKED in graph.op_counts():
            load_plugins(trt, [CREATOR])
        emitter = self.emit(graph)
        origins = {str(node.name): node.metadata_props.get(ORIGIN, "") for node in emitter.model.graph.all_nodes()}
        with tempfile.TemporaryDirectory(dir=folder) as inside:
            written = write_model(emitter, Path(inside), progress)
            plan = build_plan(
                self.flavour,
                Path(inside) / MODEL,
                types_of(emitter.graph.inputs),
                profiles,
                self.options,
                origins,
                progress,
            )
        (folder / PLAN).write_bytes(plan.data)
        digest = hashlib.sha256(plan.data).hexdigest()
        kernels: dict[str, int] = {}
        if self.unrunnable() is None:
            kernels = kernels_of(layers_of(trt, opened_plan(self.flavour, plan.data, folder / PLAN).engine))
        warnings = [f"{self.name}: {each}" for each in plan.warnings]
        hole = hole_in(graph.dims, asked, layout_of(graph))
        if hole is not None:
            warnings.append(f"{self.name}: dims allow sizes that fit no profile: {named_sizes(hole)}, for one")
        for fault, places in (widened | emitter.avoided).items():
            warnings.append(f"{self.name}, {len(places)} times, first at {places[0]}: {fault.text} ({fault.reference})")
        if kernels:
            warnings += check_kernels(kernels, _asked(graph, emitter), self.options.sparse_weights)
        weights = written.weights_digest or digest
        return Built({PLAN: digest}, weights, plan.layers, [], warnings, kernels, self.lengths(graph))

    def _check_device(self) -> None:
        """PipelineError where options need the device at the build, and it is not here."""
        needs = {"split_sums": "split_sums counts the processors of the GPU"}
        if self.flavour.builds_without_gpu:
            needs["refit"] = f"{self.name} compiles engines with refit on the GPU"
        reason = self.unrunnable()
        for name, why in needs.items():
            if reason is not None and getattr(self.options, name):
                where = f"target.options.{name}"
                raise PipelineError(f"{why}: {reason}", where=where, hint="leave it out, or build on the device")

    def profiles(self, graph: Graph) -> list[Profile]:
        """What ``target.options`` and the graph's dims ask an engine to be built for."""
        inputs, layout = types_of(graph.inputs), layout_of(graph)
        return profiles_of(inputs, graph.dims, self.options, layout, self.lengths(graph))

    def _widened(self, graph: Graph, profiles: list[Profile]) -> tuple[list[Profile], dict[Quirk, list[str]]]:
        """The profiles, expecting two rows of products that faults need two of; and where those are."""
        found: dict[Quirk, list[str]] = {}
        faults = [fault for fault in quirks_in_force(self.name, self.flavour.version()) if fault.action == "widen"]
        widened = profiles
        for fault, node in itertools.product(faults, graph.nodes):
            if fault.condition(node, ""):
                lead = node.output.type.shape[:-1]
                if any(for_two_rows(profile, lead) != profile for profile in profiles):
                    found.setdefault(fault, []).append(node.where)
                widened = [for_two_rows(profile, lead) for profile in widened]
        return widened, found

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, **options: Any) -> Engine:
        cuda_graphs = options.pop("cuda_graphs", False)
        if not isinstance(cuda_graphs, bool):
            raise PipelineError(f"cuda_graphs is {cuda_graphs!r}, must be True or False")
        refuse_options(cls.name, options, "cuda_graphs")
        try:
            given = manifest.pipeline["target"]["options"]
        except KeyError as error:
            raise EngineError(f"the manifest is damaged: it has no {error}", where=str(folder)) from error
        own = cls.options_of(given, Options)
        return TensorRtEngine(folder, manifest, cls.flavour, own, cuda_graphs)

    def stand_in(self, graph: Graph, engine: Engine) -> Engine | None:
        assert isinstance(engine, TensorRtEngine)
        made = StandIn(engine, self.emit(widened(graph)[0]))
        if graph.prologue is not None and engine.prologue is not None:
            made.prologue = self.stand_in(graph.prologue, engine.prologue)
        return made

    @classmethod
    def facts(cls) -> dict[str, str]:
        version = cls.flavour.version()
        return {
            "version": version,
            "engines here": cls.unrunnable() or "can run",
            "faults in force": faults_in_force(cls.name, version),
        }


class TensorRtRtxBackend(TensorRtBackend):
    """TensorRT-RTX: builds anywhere, runs on GeForce and RTX devices."""

    name: ClassVar[str] = "tensorrt_rtx"
    flavour: ClassVar[Flavour] = RTX
    unheeded: ClassVar[Mapping[str, str]] = {
        "version_compatible": "TensorRT-RTX has no engines for later versions: version_compatible is for backend: tensorrt",
        "hardware_compatible": "TensorRT-RTX builds for all its devices: hardware_compatible is for backend: tensorrt",
        "packed_padding": "TensorRT-RTX has no packed tokens: packed_padding is for backend: tensorrt",
        "timing_cache": "TensorRT-RTX times nothing when it builds: timing_cache is for backend: tensorrt",
    }


def _asked(graph: Graph, emitter: Emitter) -> dict[str, int]:
    """How many products of linears are to be in which precision."""
    linears = [node for node in graph.nodes if node.op == "aten.linear.default"]
    of_integers = (count for form, count in emitter.used_forms.items() if form.startswith("integers"))
    integers = sum(of_integers) if not _of_fp8(graph) else 0
    return {
        "int8": integers,
        "fp16": sum(node.output.type.dtype == torch.float16 for node in linears),
        "bf16": sum(node.output.type.dtype == torch.bfloat16 for node in linears),
    }


def _of_fp8(graph: Graph) -> bool:
    return any(
        node.op == "graphopt.static_linear.default" and node.args["weight"].type.dtype == FP8 for node in graph.nodes
    )
