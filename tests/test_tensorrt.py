"""The TensorRT backends without TensorRT: options, profiles, the dialect of old importers, what is missing."""

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
    Options,
    Profile,
    cache_lengths,
    for_two_rows,
    hole_in,
    lengths_of,
    most_run,
    nearest_profile,
    profiles_of,
    shapes_in,
)
from graphopt.dims import Dim
from graphopt.errors import LoweringError, MissingBackendError, PipelineError
from graphopt.ir import Graph, types_of
from graphopt.runtime.cache import CacheLayout
from graphopt.schemas.pipeline import TargetConfig
from graphopt.sources import Source
from graphopt.tensors import Weight
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


# Profiles

BERT = "input %x: i64[batch, sequence]\n    input %past: f32[batch, 3, sequence + 2]\n    output y = %x\n"


def found_in(graph: Graph, options: Options) -> list[Profile]:
    return profiles_of(types_of(graph.inputs), graph.dims, options)


def test_a_profile_for_each_expected_shape_and_one_for_all() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    found = found_in(graph, Options(shapes=({"batch": 1, "sequence": 16}, {"batch": 4, "sequence": 64})))
    exact = [{"batch": (size, size, size), "sequence": (long, long, long)} for size, long in ((1, 16), (4, 64))]
    assert found == [*exact, {"batch": (1, 1, 4), "sequence": (2, 64, 64)}]
    assert shapes_in(graph.inputs["past"].type, found[2]) == [(1, 3, 4), (1, 3, 66), (4, 3, 66)]
    assert nearest_profile(found, {"batch": 1, "sequence": 16}) == 0
    assert nearest_profile(found, {"batch": 1, "sequence": 17}) == 2
    assert nearest_profile(found, {"batch": 5, "sequence": 17}) is None


def test_profiles_need_not_take_all_largest_sizes_at_once() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    own = {"batch": (1, 1, 1), "sequence": (2, 8, 64)}, {"batch": (1, 4, 4), "sequence": (2, 8, 16)}
    assert found_in(graph, Options(profiles=own)) == list(own)


def test_profiles_of_windows_end_where_their_buffers_do() -> None:
    """What is made of dims may be given back."""
    graph = load(program(TOKENS + "    " + BERT))
    inputs = types_of(graph.inputs)
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=16, sequence="sequence"))
    made = profiles_of(inputs, graph.dims, Options(), layout)
    assert made[-1]["sequence"][2] == 16
    assert profiles_of(inputs, graph.dims, Options(profiles=tuple(map(dict, made))), layout) == made


def test_profiles_may_be_given() -> None:
    graph = load(program(TOKENS + "    " + BERT))
    own = {"batch": (1, 2, 4), "sequence": (2, 8, 64)}, {"batch": (1, 1, 1), "sequence": (2, 8, 32)}
    assert found_in(graph, Options(profiles=own)) == list(own)
    assert nearest_profile(list(own), {"batch": 1, "sequence": 9}) == 1


def test_a_decoders_steps_are_most_of_what_it_runs() -> None:
    step: Profile = {"batch": (1, 2, 4), "sequence": (1, 1, 1)}
    prompt: Profile = {"batch": (1, 2, 4), "sequence": (1, 32, 64)}
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=None, sequence="sequence"))
    assert most_run([prompt, step], layout) == [step]
    assert most_run([prompt], layout) == [prompt]
    assert most_run([step, prompt], None) == [step, prompt]


def test_profiles_of_an_encoder_are_of_its_own_sizes() -> None:
    """Options are a decoder's, which has a size more."""
    graph = load(program(TOKENS + "    " + BERT))
    shapes = tuple({"batch": 1, "sequence": 16, "decoder_sequence": size} for size in (1, 8))
    exact = {"batch": (1, 1, 1), "sequence": (16, 16, 16)}
    assert found_in(graph, Options(shapes=shapes)) == [exact, {"batch": (1, 1, 4), "sequence": (2, 64, 64)}]
    own: Any = {"batch": (1, 1, 4), "sequence": (2, 8, 64)}
    assert found_in(graph, Options(profiles=({**own, "decoder_sequence": (1, 1, 9)},))) == [own]


@pytest.mark.parametrize("expected", [(), ({"batch": 1, "sequence": 8},), ({"batch": 2, "sequence": 1},)], ids=str)
def test_a_decoder_has_a_profile_for_single_tokens(expected: tuple[dict[str, int], ...]) -> None:
    """But for one that is asked for."""
    graph = load(program(TOKENS.replace("[2, 64]", "[1, 64]") + "    " + BERT))
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=None, sequence="sequence"))
    made = profiles_of(types_of(graph.inputs), graph.dims, Options(shapes=expected), layout)
    assert [profile["sequence"] for profile in made].count((1, 1, 1)) == 1
    assert len(made) == 2 + len(expected) - any(shape["sequence"] == 1 for shape in expected)


@pytest.mark.parametrize(
    ("profiles", "hole"),
    [
        ([(1, 4, 2, 64)], None),
        ([(1, 2, 2, 64), (3, 4, 2, 64)], None),
        ([(1, 4, 2, 16), (1, 1, 17, 64)], {"batch": 2, "sequence": 17}),
        ([(1, 2, 2, 64), (1, 4, 8, 64)], {"batch": 3, "sequence": 2}),
    ],
)
def test_sizes_that_fit_no_profile_are_found(profiles: list[tuple[int, ...]], hole: dict[str, int] | None) -> None:
    """By trying all of them, too."""
    graph = load(program(TOKENS + "    " + BERT))
    made: list[Profile] = [{"batch": (a, a, b), "sequence": (c, c, d)} for a, b, c, d in profiles]
    assert hole_in(graph.dims, made) == hole
    sizes = [{"batch": batch, "sequence": long} for batch in range(1, 5) for long in range(2, 65)]
    assert any(nearest_profile(made, each) is None for each in sizes) == (hole is not None)


def test_buffers_of_several_lengths_have_profiles_of_their_own() -> None:
    """Of what they hold."""
    graph = load(program(TOKENS.replace("[2, 64]", "[1, 64]") + "    " + BERT))
    layout = cast(CacheLayout, SimpleNamespace(max_length=64, window=None, sequence="sequence", whole=["past"]))
    options = Options(cache_lengths=(32, 8), shapes=({"batch": 4, "sequence": 16},))
    lengths = lengths_of(options, layout)
    made = profiles_of(types_of(graph.inputs), graph.dims, options, layout, lengths)
    found = [(each["batch"], each["sequence"], each["cache_length"]) for each in made]
    step, any_batch, four = (1, 1, 1), (1, 1, 4), (4, 4, 4)
    assert found == [
        (any_batch, step, (8, 8, 8)), (any_batch, (1, 8, 8), (8, 8, 8)),
        (four, (16, 16, 16), (32, 32, 32)), (any_batch, step, (32, 32, 32)), (any_batch, (1, 32, 32), (32, 32, 32)),
        (four, (16, 16, 16), (64, 64, 64)), (any_batch, step, (64, 64, 64)), (any_batch, (1, 64, 64), (64, 64, 64)),
    ]  # fmt: skip
    assert hole_in(graph.dims, made, layout) is None
    assert cache_lengths(made) == lengths == [8, 32, 64]
    sizes = {"batch": 1, "sequence": 1}
    assert [nearest_profile(made, {**sizes, "cache_length": length}) for length in (8, 9, 32, 64)] == [0, None, 3, 6]


@pytest.mark.parametrize(
    ("longest", "given", "lengths"),
    [
        (511, None, []),
        (512, None, [256, 512]),
        (2304, None, [256, 1024, 2304]),
        (131072, None, [256, 1024, 4096, 16384, 65536, 131072]),
        (2304, (), []),
        (2304, (512,), [512, 2304]),
        (None, None, []),
    ],
)
def test_lengths_of_buffers(longest: int | None, given: tuple[int, ...] | None, lengths: list[int]) -> None:
    """Each four times the one before, unless they are given; a cache that grows has none."""
    layout = cast(CacheLayout, SimpleNamespace(max_length=longest, whole=["past"]))
    assert lengths_of(Options(cache_lengths=given), layout) == lengths


BATCH = {"batch": (1, 1, 4)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shapes": [{"batch": 1}]}, "no size for sequence"),
        ({"shapes": [{"batch": 5, "sequence": 8}]}, "batch = 5 is outside"),
        ({"profiles": [{"batch": (1, 1, 1)}]}, "no size for sequence"),
        ({"profiles": [{**BATCH, "sequence": (2, 8, 32)}]}, "and no profile takes 33"),
        ({"profiles": [{**BATCH, "sequence": (4, 8, 64)}]}, "and no profile takes 2"),
        ({"profiles": [{**BATCH, "sequence": (2, 8, 8)}, {**BATCH, "sequence": (12, 12, 64)}]}, "no profile takes 9"),
        ({"profiles": [{"batch": (1, 300, 400), "sequence": (2, 8, 64)}]}, "and a profile is for 400"),
        ({"profiles": [{"batch": (0, 1, 4), "sequence": (2, 8, 64)}]}, "and a profile is for 0"),
    ],
)
def test_sizes_that_are_refused(options: dict[str, Any], reason: str) -> None:
    graph = load(program(TOKENS + "    " + BERT))
    with pytest.raises(PipelineError, match=reason):
        found_in(graph, Options.model_validate(options))


@pytest.mark.parametrize("dims", [TOKENS, ""], ids=["dims", "none"])
@pytest.mark.parametrize("given", [{"shapes": [{"sequenc": 8}]}, {"profiles": [{"sequenc": (1, 1, 1)}]}], ids=str)
def test_sizes_that_the_model_has_not_are_refused(dims: str, given: dict[str, Any]) -> None:
    backend = TensorRtBackend(TargetConfig(backend="tensorrt", options=given))
    with pytest.raises(PipelineError, match="the model has no size 'sequenc'") as error:
        backend.check_graph(load(program(dims + "    input %x: f32[2]\n    output y = %x\n")))
    assert error.value.hint is not None
    assert ("sequence" if dims else "all fixed") in error.value.hint


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"fp16": True}, "no option 'fp16'"),
        ({"shapes": [{"a": 1}], "profiles": [{"a": (1, 1, 1)}]}, "exclude each other"),
        ({"profiles": [{"a": (2, 1, 3)}]}, r"a: \[2, 1, 3\] is not smallest, expected, largest"),
        ({"profiles": []}, "none are given"),
        ({"workspace": 0}, "greater than or equal to 1"),
        ({"workspace": 10**13}, "less than or equal to"),
        ({"optimization_level": 6}, "less than or equal to 5"),
        ({"split_sums": True, "accumulate": "fp32"}, "split_sums adds up parts in half precision"),
        ({"compute_capabilities": ["8.9"]}, "compute_capabilities are for backend: tensorrt_rtx"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        TensorRtBackend(TargetConfig(backend="tensorrt", options=options))


@pytest.mark.parametrize(
    "options",
    [{"version_compatible": True}, {"hardware_compatible": True}, {"packed_padding": "behind"}, {"timing_cache": "t"}],
    ids=str,
)
def test_options_of_the_other_library_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    TensorRtBackend(TargetConfig(backend="tensorrt", options=options))
    with pytest.raises(PipelineError, match=f"{name} is for backend: tensorrt") as error:
        TensorRtRtxBackend(TargetConfig(backend="tensorrt_rtx", options=options))
    assert error.value.where == f"target.options.{name}"


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
