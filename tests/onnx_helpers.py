"""Run a graph through the emitter and compare it with the interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx.reference import ReferenceEvaluator

from graphopt.backends.onnx.dialects import STANDARD
from graphopt.backends.onnx.emitter import Dialect, Emitter
from graphopt.backends.onnx.weights import embed
from graphopt.backends.onnxruntime.dialect import onnxruntime_dialect
from graphopt.backends.onnxruntime.engine import make_session
from graphopt.execution import run
from graphopt.ir import Graph

ONNXRUNTIME = onnxruntime_dialect(onnxruntime.__version__)


def emit(graph: Graph, dialect: Dialect = STANDARD, form: str | None = None) -> onnx.ModelProto:
    emitter = Emitter(graph, dialect, lambda node: form)
    embed(emitter)
    return ir.to_proto(emitter.model)


def run_onnxruntime(model: onnx.ModelProto, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    session = make_session(model.SerializeToString())
    known = {given.name for given in session.get_inputs()}
    results: list[np.ndarray] = session.run(None, {k: v.numpy() for k, v in inputs.items() if k in known})
    return results


def run_reference(model: onnx.ModelProto, inputs: Mapping[str, torch.Tensor]) -> list[np.ndarray]:
    known = {given.name for given in model.graph.input}
    results = ReferenceEvaluator(model).run(None, {k: v.numpy() for k, v in inputs.items() if k in known})
    assert isinstance(results, list)
    return results


def assert_same(
    graph: Graph, inputs: Mapping[str, torch.Tensor], results: Sequence[np.ndarray], tolerance: float
) -> None:
    expected = run(graph, inputs)
    for (name, tensor), got in zip(expected.items(), results, strict=True):
        assert tuple(got.shape) == tuple(tensor.shape), name
        assert torch.from_numpy(np.array(got)).dtype == tensor.dtype, name
        torch.testing.assert_close(torch.from_numpy(np.array(got)), tensor, atol=tolerance, rtol=tolerance)


def check_everywhere(graph: Graph, examples: Sequence[Mapping[str, torch.Tensor]], tolerance: float = 1e-5) -> None:
    """The graph in the standard dialect, by checker, reference evaluator and onnxruntime, and in onnxruntime's own."""
    standard, own = emit(graph), emit(graph, ONNXRUNTIME)
    onnx.checker.check_model(standard, full_check=True)
    for inputs in examples:
        assert_same(graph, inputs, run_reference(standard, inputs), tolerance)
        assert_same(graph, inputs, run_onnxruntime(standard, inputs), tolerance)
        assert_same(graph, inputs, run_onnxruntime(own, inputs), tolerance)
