"""``backend: onnxruntime``: the onnxruntime dialect, tactics timed on this machine, an engine in a session."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir
import torch
from pydantic import Field
from torch import Tensor

from graphopt.backend import Backend, Built, Progress, no_progress, refuse_options
from graphopt.backends.onnx.backend import MODEL, STANDARD_PASSES, op_counts, write_model
from graphopt.backends.onnx.emitter import Dialect, Emitter
from graphopt.backends.onnx.weights import embed
from graphopt.backends.onnxruntime.dialect import onnxruntime_dialect
from graphopt.backends.onnxruntime.engine import OnnxRuntimeEngine, caller_of, make_session, onnxruntime, shape_options
from graphopt.backends.onnxruntime.tactics import Tuner, cpu_features, tuning_sizes
from graphopt.backends.onnxruntime.widened import widened
from graphopt.backends.quirks import faults_in_force
from graphopt.backends.tensorrt.dialect import tensorrt_dialect
from graphopt.backends.tensorrt.flavours import RTX, TENSORRT, parsed_ops
from graphopt.errors import BackendError, PipelineError
from graphopt.ir import Graph, Node, types_of
from graphopt.models import cache_folder
from graphopt.pipeline import Stopwatch
from graphopt.runtime.cache import layout_of
from graphopt.runtime.engine import Engine, to_numpy, to_torch
from graphopt.schemas.common import Schema
from graphopt.schemas.manifest import Manifest
from graphopt.schemas.pipeline import TargetConfig


class Options(Schema):
    """``target.options`` of this backend. ``tune``: the sizes that tactics are timed at; ``provider_options``: what onnxruntime
    gives its provider, by its own names."""

    tune: list[dict[str, int]] | None = None
    provider_options: dict[str, str] = Field(default_factory=dict)


#: Ops of the graph that are to be products of integers, and what they are in the model that onnxruntime runs.
_INTEGER_LINEARS = frozenset(
    {"graphopt.static_linear.default", "graphopt.dynamic_linear.default", "graphopt.packed_linear.default"}
)
_INTEGER_PRODUCTS = frozenset(
    {"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QLinearMatMul", "MatMulNBits"}
)


def check_integers(graph: Graph, model: Path) -> None:
    """BackendError if a linear that was quantized is no product of integers in the model that onnxruntime has optimized."""
    wanted = sum(node.op in _INTEGER_LINEARS and not _is_of_floats(node) for node in graph.nodes)
    if not wanted:
        return
    ops = optimized_ops(model)
    found = sum(count for op, count in ops.items() if op in _INTEGER_PRODUCTS)
    if found < wanted:
        raise BackendError(
            f"{wanted - found} of {wanted} quantized linears are no products of integers in onnxruntime's model"
        )


def _is_of_floats(node: Node) -> bool:
    """Whether a linear's numbers become floats again before the product: float8, and those of a codebook."""
    return node.args.get("codebook") is not None or node.args["x"].type.dtype == torch.float8_e4m3fn


def optimized_ops(model: Path) -> dict[str, int]:
    """The ops of a model as onnxruntime runs it, after its own optimizer, and how often."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        make_session(model, optimized=optimized)
        return op_counts(ir.load(optimized))


def tactics_file() -> Path:
    """Where timed tactics are kept between builds."""
    return cache_folder() / "tactics.json"


_TENSORRT = {"tensorrt": TENSORRT, "tensorrt_rtx": RTX}


def _dialect(provider: str) -> Dialect:
    """Of onnxruntime's own kernels, or what TensorRT's importer takes where that is the provider."""
    if provider in _TENSORRT:
        return tensorrt_dialect(parsed_ops(_TENSORRT[provider]), provider)
    return onnxruntime_dialect(onnxruntime().__version__)


class OnnxRuntimeBackend(Backend):
    """ONNX Runtime on CPU, CUDA, TensorRT or TensorRT-RTX, as far as the installed package has them."""

    name: ClassVar[str] = "onnxruntime"
    takes: ClassVar[frozenset[str]] = frozenset({"provider", "threads", "options"})
    standard_passes = (*STANDARD_PASSES[:-2], {"kind": "merge_linears", "allow_no_match": True}, *STANDARD_PASSES[-2:])

    def __init__(self, target: TargetConfig) -> None:
        super().__init__(target)
        self.options = self.options_as(Options)
        self.dialect = _dialect(target.provider)
        self._tuner: Tuner | None = None

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"onnxruntime": onnxruntime().__version__, "onnx-ir": version("onnx-ir")}

    def stopwatch(self, graph: Graph) -> Stopwatch | None:
        if self.target.tactics == "fixed" or self.target.provider != "cpu":
            return None
        if self._tuner is None:
            sizes = self.options.tune or tuning_sizes(graph, graph.dims)
            self._tuner = Tuner(self.dialect, sizes, self.target.threads, tactics_file())
        return self._tuner

    def build(self, graph: Graph, folder: Path, progress: Progress = no_progress) -> Built:
        layout = layout_of(graph)
        if self.target.provider in _TENSORRT and layout is not None and layout.max_length is not None:
            raise PipelineError(
                f"provider: {self.target.provider} writes no cache in place",
                where="target.provider",
                hint="take backend: tensorrt, or layout: growing",
            )
        progress("tactics", 0.0)
        self.stopwatch(graph)
        if self._tuner is not None:
            self._tuner.sizes = self.options.tune or tuning_sizes(graph, graph.dims)  # passes may have added a past
        choose = self._tuner.choose if self._tuner else lambda node: None
        own, rounded = self._runnable(graph)
        emitter = Emitter(own, self.dialect, choose)
        built = write_model(emitter, folder, progress)
        if rounded:
            built.warnings.append(
                f"onnxruntime has no kernels for bf16 on the CPU: {len(rounded)} ops, first {rounded[0]}, are computed in fp32"
                " and rounded, which takes longer than fp32"
            )
        built.tactics = list(self._tuner.reports.values()) if self._tuner else []
        if self.target.provider == "cpu":
            check_integers(graph, folder / MODEL)
        return built

    def _runnable(self, graph: Graph) -> tuple[Graph, list[str]]:
        """The graph without what the provider has no kernels for, and where that stood."""
        return widened(graph) if self.target.provider == "cpu" else (graph, [])

    @classmethod
    def load(cls, folder: Path, manifest: Manifest, **options: Any) -> Engine:
        target = manifest.pipeline.get("target", {})
        provider = options.pop("provider", None) or target.get("provider", "cpu")
        threads = options.pop("threads", None) or target.get("threads")
        refuse_options(cls.name, options, "provider, threads")
        own = cls.options_of(target.get("options", {}), Options).provider_options
        return OnnxRuntimeEngine(folder, manifest, MODEL, provider, threads, own)

    def inner_values(
        self, graph: Graph, names: Sequence[str]
    ) -> Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]:
        own, _ = self._runnable(graph)
        emitter = Emitter(own, self.dialect, self._tuner.choose if self._tuner else lambda node: None, show=names)
        embed(emitter)
        inputs = types_of(graph.inputs)
        options = {**shape_options(self.target.provider, inputs, graph.dims), **self.options.provider_options}
        session = make_session(
            ir.to_proto(emitter.model).SerializeToString(),
            self.target.provider,
            self.target.threads,
            provider_options=options,
        )
        call = caller_of(session)

        def run(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            results = call(list(names), {name: to_numpy(tensor) for name, tensor in inputs.items()})
            return {name: to_torch(array) for name, array in zip(names, results, strict=True)}

        return run

    @classmethod
    def facts(cls) -> dict[str, str]:
        ort = onnxruntime()
        return {
            "version": ort.__version__,
            "providers": ", ".join(ort.get_available_providers()),
            "device": ort.get_device(),
            "CPU features": cpu_features(),
            "faults in force": faults_in_force(cls.name, ort.__version__),
            "kept tactics": str(tactics_file()),
        }
