"""The TensorRT backends without TensorRT: the dialect of old importers, faults, what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import onnxruntime
import pytest
import torch

import graphopt
from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend
from graphopt.backends.onnxruntime.engine import PROVIDERS, shape_options
from graphopt.backends.quirks import quirks_in_force
from graphopt.backends.tensorrt import backend as backends
from graphopt.backends.tensorrt import flavours
from graphopt.backends.tensorrt.backend import TensorRtBackend, TensorRtRtxBackend
from graphopt.backends.tensorrt.builder import Plan
from graphopt.backends.tensorrt.device_cache import Recorded
from graphopt.backends.tensorrt.dialect import OLD_OPSET, tensorrt_dialect
from graphopt.backends.tensorrt.options import (
    Profile,
    for_two_rows,
)
from graphopt.dims import Dim
from graphopt.errors import LoweringError, MissingBackendError, PipelineError
from graphopt.ir import Graph, types_of
from graphopt.schemas.pipeline import TargetConfig
from graphopt.sources import Source
from graphopt.tensors import Weight
from tests.onnx_helpers import assert_same, emit, run_onnxruntime
from tests.rules import inputs_of, load, program

OLD = tensorrt_dialect(lambda op: op not in flavours._SINCE)
NEW = tensorrt_dialect(lambda op: True)
TOKENS = """
    dim batch in [1, 4]
    dim sequence in [1, 64]
"""
SIZES = ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 1})


def graph_of(body: str, dims: str = TOKENS) -> Graph:
    return load(program(dims + body))


ROTARY = """
    input %x: f32[batch, {0}, 8]
    input %cos: f32[batch, sequence, {1}]
    input %sin: f32[batch, sequence, {1}]
    %y: f32[batch, {0}, 8] = graphopt.rotary_embedding.default(x=%x, cos=%cos, sin=%sin, interleaved={2}, heads_last={3})
    output y = %y
"""
SHAPE = "normalized_shape=[8], weight=%w)"
NORM = f"""
    input %x: f32[batch, sequence, 8]
    input %r: f32[batch, sequence, 8]
    weight %w: f32[8]
    %n: f32[batch, sequence, 8] = aten.rms_norm.default(input=%x, normalized_shape=[8], weight=%w, eps=1e-06)
    %y: f32[batch, sequence, 8], %s: f32[batch, sequence, 8] = graphopt.add_rms_norm.default(x=%n, residual=%r, {SHAPE}
    output y = %y
    output s = %s
"""
BODIES = {
    "norms": NORM,
    **{
        f"rotary {last} {turned} {width}": ROTARY.format("sequence, 3" if last else "3, sequence", width, turned, last)
        for last in (True, False)
        for turned in (True, False)
        for width in (4, 2)
    },
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_an_importer_without_the_later_ops_gets_products(name: str, sizes: Mapping[str, int]) -> None:
    graph = graph_of(BODIES[name])
    inputs = inputs_of(graph, dict(sizes))
    model = emit(graph, OLD)
    assert not {node.op_type for node in model.graph.node} & flavours._SINCE.keys()
    assert model.opset_import[0].version == OLD_OPSET
    assert_same(graph, inputs, run_onnxruntime(model, inputs), 1e-5)
    assert {node.op_type for node in emit(graph, NEW).graph.node} & {"RMSNormalization", "RotaryEmbedding"}


ATTENTION = """
    input %q: f32[batch, 4, sequence, 8]
    input %k: f32[batch, 2, sequence, 8]
    input %v: f32[batch, 2, sequence, 8]
    input %m: bool[batch, sequence]
    %y: f32[batch, 4, sequence, 8] = graphopt.attention.default(q=%q, k=%k, v=%v{0}, scale=0.3)
    output y = %y
"""


@pytest.mark.parametrize("mask", ["", ", key_mask=%m"], ids=["none", "keys"])
@pytest.mark.parametrize("causal", ["", ', causal="upper_left"'], ids=["all", "causal"])
@pytest.mark.parametrize("dialect", [OLD, NEW], ids=["products", "attention"])
def test_attention_has_a_causal_flag_or_a_mask(mask: str, causal: str, dialect: Any) -> None:
    graph = graph_of(ATTENTION.format(mask + causal))
    model = emit(graph, dialect)
    for sizes in ({"batch": 2, "sequence": 6}, {"batch": 1, "sequence": 9}):
        inputs = inputs_of(graph, sizes)
        inputs["m"] = torch.ones(sizes["batch"], sizes["sequence"], dtype=torch.bool)
        inputs["m"][0, -2:] = False
        assert_same(graph, inputs, run_onnxruntime(model, inputs), 1e-5)
    for node in model.graph.node:
        if node.op_type == "Attention":
            flag = any(attribute.name == "is_causal" for attribute in node.attribute)
            assert flag == bool(causal and not mask)
            assert not (flag and any(node.input[3:]))


# A cache of which there are new rows only

CACHED = """
    input %n: i64[batch]
    input %past: {0}[batch, 2, 64, 8]
    input %k: f32[batch, 2, sequence, 8]
    weight %s: f32[]
    %new: {0}[batch, 2, sequence, 8] = {1}
    %present: {0}[batch, 2, 64, 8] = graphopt.kv_cache_update.default(cache=%past, new=%new, starts=%n)
    %read: f32[batch, 2, 64, 8] = {2}
    output present = %present
    output read = %read
"""


@pytest.mark.parametrize(
    ("dtype", "stored", "read", "hint"),
    [
        ("f16", "aten.to.dtype(self=%k, dtype=f16)", "aten.to.dtype(self=%present, dtype=f32)", "dtype: fp16"),
        (
            "i8",
            "graphopt.quantize.default(x=%k, scale=%s, dtype=i8)",
            "graphopt.dequantize.default(x=%present, scale=%s)",
            "10.15",
        ),
    ],
    ids=["fp16", "int8"],
)
def test_what_stands_between_a_cache_and_its_attention_has_a_remedy(
    dtype: str, stored: str, read: str, hint: str
) -> None:
    with pytest.raises(LoweringError, match="reads a cache, of which there are only the new rows") as error:
        Emitter(graph_of(CACHED.format(dtype, stored, read)), OLD)
    assert error.value.hint is not None
    assert hint in error.value.hint


# Recorded calls


def test_results_of_a_recorded_call_are_the_callers_own() -> None:
    """The graph reads and writes tensors of its own, of any dtypes."""
    inputs = {"x": torch.zeros(2, 3), "y": torch.zeros(2, 3), "n": torch.zeros(2, dtype=torch.int64)}
    results = {"sum": torch.zeros(2, 3), "twice": torch.zeros(2, dtype=torch.int64)}

    class Graph:
        def replay(self) -> None:
            torch.add(inputs["x"], inputs["y"], out=results["sum"])
            torch.mul(inputs["n"], 2, out=results["twice"])

    recorded = Recorded(cast(torch.cuda.CUDAGraph, Graph()), results, inputs)
    calls = [{name: torch.full_like(tensor, number) for name, tensor in inputs.items()} for number in (1, 5)]
    found = [recorded.replay(call) for call in calls]
    for number, own in zip((1, 5), found, strict=True):
        assert torch.equal(own["sum"], torch.full((2, 3), 2.0 * number))
        assert own["twice"].tolist() == [2 * number] * 2


# Nothing installed


@pytest.mark.parametrize("backend", [TensorRtBackend, TensorRtRtxBackend])
def test_without_the_library_graphs_are_still_emitted(
    backend: type[TensorRtBackend], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    own, graph = backend(TargetConfig(backend=backend.name)), graph_of(NORM)
    assert len(list(own.emit(graph).model.graph.all_nodes())) > 1
    with pytest.raises(MissingBackendError, match="is not installed") as error:
        own.build(graph, tmp_path)
    assert "pip install" in str(error.value.hint)
    assert list(tmp_path.iterdir()) == []


# Faults of 10.6


HEAD = """
    input %x: f32[batch, 1, 8]
    weight %w: f32[{0}, 8]
    %y: f32[batch, 1, {0}] = aten.linear.default(input=%x, weight=%w)
    output y = %y
"""


@pytest.mark.parametrize(
    ("columns", "dtype", "version", "options", "expected"),
    [
        (4096, "f32", "10.6.0", {}, [(1, 2, 4)]),
        (2048, "f32", "10.6.0", {}, [(1, 1, 4)]),
        (4096, "f16", "10.6.0", {}, [(1, 1, 4)]),
        (4096, "f32", "10.9.0", {}, [(1, 1, 4)]),
        (4096, "f32", "10.6.0", {"shapes": [{"batch": 1, "sequence": 8}]}, [(1, 1, 1), (1, 2, 4)]),
        (4096, "f32", "10.6.0", {"shapes": [{"batch": 3, "sequence": 8}]}, [(3, 3, 3), (1, 2, 4)]),
    ],
)
def test_fp32_heads_are_built_for_two_rows_in_10_6(
    columns: int,
    dtype: str,
    version: str,
    options: dict[str, Any],
    expected: list[tuple[int, int, int]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    built: list[Any] = []

    def build(flavour: object, file: Path, inputs: object, profiles: list[Profile], *rest: object) -> Plan:
        built.extend(profile["batch"] for profile in profiles)
        return Plan(b"")

    monkeypatch.setattr(flavours.Flavour, "module", lambda flavour: SimpleNamespace(__version__=version))
    monkeypatch.setattr(backends, "build_plan", build)
    graph = graph_of(HEAD.format(columns).replace("f32", dtype))
    made = TensorRtBackend(TargetConfig(backend="tensorrt", options=options)).build(graph, tmp_path)
    assert built == expected
    assert ["1 times, first at %y" in warning for warning in made.warnings] == [True] * ((1, 2, 4) in expected)


def test_all_products_that_need_two_rows_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(flavours.Flavour, "module", lambda flavour: SimpleNamespace(__version__="10.6.0"))
    monkeypatch.setattr(backends, "build_plan", lambda *given: Plan(b""))
    other = HEAD.format(4096).replace("%y", "%z").replace("output y", "output z").split("weight %w: f32[4096, 8]")[1]
    made = TensorRtBackend(TargetConfig(backend="tensorrt")).build(graph_of(HEAD.format(4096) + other), tmp_path)
    assert ["2 times, first at %y" in warning for warning in made.warnings] == [True]


def test_a_product_takes_two_rows_where_its_sizes_allow_it() -> None:
    batch, sequence = Dim.named("batch"), Dim.named("sequence")
    one: Profile = {"batch": (1, 1, 4), "sequence": (1, 1, 1)}
    assert for_two_rows(one, (batch, 1)) == {"batch": (1, 2, 4), "sequence": (1, 1, 1)}
    for lead in ((sequence,), (batch, 2), (1,)):
        assert for_two_rows(one, lead) == one
    both: Profile = {"batch": (1, 1, 4), "sequence": (1, 1, 64)}
    assert for_two_rows(both, (batch, sequence)) == {"batch": (1, 2, 4), "sequence": (1, 1, 64)}
    long: Profile = {"batch": (1, 1, 1), "sequence": (1, 1, 64)}
    assert for_two_rows(long, (batch, sequence)) == {"batch": (1, 1, 1), "sequence": (1, 2, 64)}


INT8 = """
    input %q: f16[batch, 2, sequence, 8]
    input %s: f16[batch, sequence, 16]
    weight %w: i8[4, 16]
    weight %u: f16[4]
    weight %t: f16[]
    %a: f16[batch, 2, sequence, 8] = graphopt.attention.default(q=%q, k=%q, v=%q, scale=0.5)
    %b: f16[batch, sequence, 2, 8] = aten.transpose.int(self=%a, dim0=1, dim1=2)
    %c: f16[batch, sequence, 16] = aten.reshape.default(self=%b, shape=[batch, sequence, 16])
    %n: i8[batch, sequence, 16] = graphopt.quantize.default(x={0}, scale=%t)
    %y: f16[batch, sequence, 4] = graphopt.static_linear.default(x=%n, x_scale=%t, weight=%w, scale=%u, bias=None)
    output y = %y
    output c = %c
"""


@pytest.mark.parametrize(("x", "version", "floats"), [("%c", "10.6.0", 1), ("%s", "10.6.0", 0), ("%c", "10.9.0", 0)])
def test_products_of_attention_stay_in_half_precision_in_10_6(x: str, version: str, floats: int) -> None:
    dialect = tensorrt_dialect(lambda op: op not in flavours._SINCE, "tensorrt", quirks_in_force("tensorrt", version))
    emitter = Emitter(graph_of(INT8.format(x)), dialect)
    assert (emitter.used_forms.get("floats", 0), emitter.used_forms.get("integers", 0)) == (floats, 1 - floats)
    assert [len(places) for places in emitter.avoided.values()] == [1] * floats
    ops = [node.op_type for node in emitter.model.graph]
    assert ops.count("DequantizeLinear") == 2 * (1 - floats)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_product_in_half_precision_is_of_what_was_quantized(sizes: Mapping[str, int]) -> None:
    """By weights that are whole numbers of steps, of inputs that are: both forms are the same."""
    graph = graph_of(INT8.format("%s"))
    graph.weights["w"] = Weight.of(torch.arange(-32, 32, dtype=torch.int8).reshape(4, 16))
    graph.weights["u"] = Weight.of(torch.tensor([0.5, 0.25, 1.0, 2.0], dtype=torch.float16))
    graph.weights["t"] = Weight.of(torch.tensor(0.5, dtype=torch.float16))
    inputs = inputs_of(graph, sizes)
    inputs["s"] = (inputs["s"] * 4).round().clamp(-8, 8) / 2
    model = emit(graph, OLD, form="floats")
    assert_same(graph, inputs, run_onnxruntime(model, inputs), 2e-2)


# TensorRT inside onnxruntime


def test_onnxruntimes_providers_are_told_the_sizes() -> None:
    graph = graph_of(NORM)
    inputs = types_of(graph.inputs)
    assert shape_options("cpu", inputs, graph.dims) == {}
    assert shape_options("tensorrt", inputs, graph.dims) == {
        "trt_profile_min_shapes": "x:1x1x8,r:1x1x8",
        "trt_profile_opt_shapes": "x:1x64x8,r:1x64x8",
        "trt_profile_max_shapes": "x:4x64x8,r:4x64x8",
    }
    assert shape_options("tensorrt_rtx", inputs, graph.dims)["nv_profile_max_shapes"] == "x:4x64x8,r:4x64x8"


@pytest.mark.parametrize("provider", ["tensorrt", "tensorrt_rtx"])
def test_a_provider_that_this_onnxruntime_has_not(provider: str, tmp_path: Path) -> None:
    wanted = PROVIDERS[provider]
    if wanted in onnxruntime.get_available_providers():
        pytest.skip(f"this onnxruntime has {wanted}")
    with pytest.raises(MissingBackendError, match=f"this onnxruntime has no {wanted}"):
        graphopt.compile(torch_linear(), tmp_path / "e", target={"provider": provider}, dims={"batch": (1, 4)})
    assert not (tmp_path / "e").exists()


def torch_linear() -> Source:
    return Source(torch.nn.Linear(4, 4).eval(), {"input": torch.ones(2, 4)}, {"input": ("batch", None)})


def test_onnxruntimes_providers_write_no_cache_in_place() -> None:
    body = """
    dim batch in [1, 4]
    dim sequence in [1, 8]
    input %input_ids: i64[batch, sequence]
    input %past_key_values.0.key: f32[batch, 1, 8, 4]
    input %past_lengths: i64[batch]
    input %new: f32[batch, 1, sequence, 4]
    %k: f32[batch, 1, 8, 4] = graphopt.kv_cache_update.default(cache=%past_key_values.0.key, new=%new, starts=%past_lengths)
    output present.0.key = %k
    """
    backend = OnnxRuntimeBackend(TargetConfig(provider="tensorrt", tactics="fixed"))
    with pytest.raises(PipelineError, match="writes no cache in place"):
        backend.build(load(program(body)), Path("nowhere"))
