"""The TensorRT backends without TensorRT: options, profiles, the dialect of old importers, what is missing."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.backends.tensorrt import flavours
from graphopt.backends.tensorrt.backend import TensorRtBackend, TensorRtRtxBackend
from graphopt.backends.tensorrt.dialect import OLD_OPSET, tensorrt_dialect
from graphopt.backends.tensorrt.options import Options, Profile, nearest_profile, profiles_of, shapes_in
from graphopt.errors import MissingBackendError, PipelineError
from graphopt.ir import Graph
from graphopt.schemas.pipeline import TargetConfig
from tests.onnx_helpers import assert_same, emit, run_onnxruntime
from tests.rules import inputs_of, load, program

OLD = tensorrt_dialect(lambda op: op not in flavours._SINCE)
NEW = tensorrt_dialect(lambda op: True)
TOKENS = """
    dim batch in [1, 4]
    dim sequence in [2, 64]
"""
SIZES = ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 1})


def graph_of(body: str, dims: str = TOKENS) -> Graph:
    return load(program(dims.replace("[2, 64]", "[1, 64]") + body))


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


# Profiles

BERT = "input %x: i64[batch, sequence]\n    input %past: f32[batch, 3, sequence + 2]\n    output y = %x\n"


def found_in(graph: Graph, options: Options) -> list[Profile]:
    return profiles_of({name: value.type for name, value in graph.inputs.items()}, graph.dims, options)


def test_a_profile_for_each_expected_shape_and_one_for_all() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    found = found_in(graph, Options(shapes=({"batch": 1, "sequence": 16}, {"batch": 4, "sequence": 64})))
    exact = [{"batch": (size, size, size), "sequence": (long, long, long)} for size, long in ((1, 16), (4, 64))]
    assert found == [*exact, {"batch": (1, 1, 4), "sequence": (2, 64, 64)}]
    assert shapes_in(graph.inputs["past"].type, found[2]) == [(1, 3, 4), (1, 3, 66), (4, 3, 66)]
    assert nearest_profile(found, {"batch": 1, "sequence": 16}) == 0
    assert nearest_profile(found, {"batch": 1, "sequence": 17}) == 2
    assert nearest_profile(found, {"batch": 5, "sequence": 17}) is None


def test_profiles_may_be_given() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    own = {"batch": (1, 2, 4), "sequence": (2, 8, 32)}, {"batch": (1, 1, 1), "sequence": (2, 8, 32)}
    assert found_in(graph, Options(profiles=own)) == list(own)
    assert nearest_profile(list(own), {"batch": 1, "sequence": 9}) == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shapes": [{"batch": 1, "sequenc": 8}]}, "the model has no size 'sequenc'"),
        ({"shapes": [{"batch": 1}]}, "no size for sequence"),
        ({"shapes": [{"batch": 5, "sequence": 8}]}, "batch = 5 is outside"),
        ({"profiles": [{"batch": (1, 1, 1)}]}, "no size for sequence"),
    ],
)
def test_sizes_that_are_refused(options: dict[str, Any], reason: str) -> None:
    graph = load(program(TOKENS + "    " + BERT))
    with pytest.raises(PipelineError, match=reason):
        found_in(graph, Options.model_validate(options))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fp16": True}, "no option 'fp16'"),
        ({"shapes": [{"a": 1}], "profiles": [{"a": (1, 1, 1)}]}, "exclude each other"),
        ({"profiles": [{"a": (2, 1, 3)}]}, r"a: \[2, 1, 3\] is not smallest, expected, largest"),
        ({"workspace": 0}, "greater than or equal to 1"),
        ({"optimization_level": 6}, "less than or equal to 5"),
        ({"compute_capabilities": ["8.9"]}, "compute_capabilities are for backend: tensorrt_rtx"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        TensorRtBackend(TargetConfig(backend="tensorrt", options=options))


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
