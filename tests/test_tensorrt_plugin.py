"""Attention of packed tokens by TensorRT's plugin, which is not here: the emitted graph is run with the plugin as its source
describes it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from graphopt.backends.onnx.emitter import Dialect
from graphopt.backends.tensorrt import backend as backends
from graphopt.backends.tensorrt import engine as engines
from graphopt.backends.tensorrt import flavours
from graphopt.backends.tensorrt.backend import TensorRtBackend, TensorRtRtxBackend
from graphopt.backends.tensorrt.dialect import tensorrt_dialect
from graphopt.backends.tensorrt.engine import TensorRtEngine
from graphopt.backends.tensorrt.options import Options, PackedPadding
from graphopt.backends.tensorrt.plugin_attention import CREATOR
from graphopt.errors import BackendError, LoweringError, PipelineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.remove_padding import RemovePadding
from graphopt.pipeline import run_passes
from graphopt.schemas.manifest import Manifest
from graphopt.schemas.pipeline import TargetConfig
from graphopt.tensors import Weight
from tests.onnx_helpers import emit
from tests.rules import inputs_of, load, program
from tests.test_tensorrt_logger import TalkingLibrary

SIZES = ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 1}, {"batch": 4, "sequence": 9})
PADDINGS = ("behind", "before", "mixed", "none", "holes")


def dialect_of(padding: PackedPadding) -> Dialect:
    return tensorrt_dialect(lambda op: op not in flavours._SINCE, accumulate="long", padding=padding)


DIMS = """
    dim batch in [1, 4]
    dim sequence in [1, 64]
    input %m: bool[batch, sequence]
    input %x: f16[batch, sequence, 16]
    %f: f16[batch*sequence, 16] = aten.reshape.default(self=%x, shape=[batch*sequence, 16])
"""
LINEARS = "".join(
    f"""
    weight %w{name}: f16[128, 16]
    weight %b{name}: f16[128]
    %l{name}: f16[batch*sequence, 128] = aten.linear.default(input=%f, weight=%w{name}, bias=%b{name})"""
    for name in "qkv"
)
QUANTIZED = """
    weight %t: f16[]
    %n: {0}[batch*sequence, 16] = graphopt.quantize.default(x=%f, scale=%t{1})""" + "".join(
    f"""
    weight %w{name}: {{0}}[128, 16]
    weight %s{name}: f16[{"128" if name == "q" else ""}]
    weight %b{name}: f16[128]
    %l{name}: f16[batch*sequence, 128] = graphopt.static_linear.default(
        x=%n, x_scale=%t, weight=%w{name}, scale=%s{name}, bias=%b{name})""".replace("(\n       ", "(")
    for name in "qkv"
)
ATTENTION = (
    "".join(
        f"""
    %{name}: f16[batch, sequence, 2, 64] = aten.reshape.default(self=%l{name}, shape=[batch, sequence, 2, 64])"""
        for name in "qkv"
    )
    + """
    %a: f16[batch, sequence, 2, 64] = graphopt.attention.default(q=%q, k=%k, v=%v, key_mask=%m, heads_last=True, scale=0.125)
    %g: f16[batch*sequence, 128] = aten.reshape.default(self=%a, shape=[batch*sequence, 128])
    %e: f16[batch*sequence, 128] = aten.gelu.default(self=%g)
    %y: f16[batch, sequence, 128] = aten.reshape.default(self=%e, shape=[batch, sequence, 128])
    output y = %y
"""
)
OTHER_INPUT = "    %f2: f16[batch*sequence, 16] = aten.neg.default(self=%f)\n"
BODIES = {
    "one product": LINEARS,
    "one product of int8": QUANTIZED.format("i8", ""),
    "products of other inputs": OTHER_INPUT + LINEARS.replace("input=%f, weight=%wk", "input=%f2, weight=%wk"),
    "no biases": LINEARS.replace(", bias=%bq", "").replace(", bias=%bk", "").replace(", bias=%bv", ""),
    "some biases": LINEARS.replace(", bias=%bk", ""),
    "one weight for keys and values": LINEARS.replace("weight=%wv", "weight=%wk"),
}


class Plugin(OpRun):
    """Each text attends to itself; a row of tokens has each head's query, key and value side by side."""

    op_domain = ""

    def _run(
        self, rows: Any, mask: Any, ends: Any, longest: Any, hidden_size: int, num_heads: int, **others: Any
    ) -> tuple[Any]:
        tokens = rows.shape[0]
        assert rows.shape == (tokens, 3 * hidden_size, 1, 1)
        assert (rows.dtype, ends.dtype, longest.ndim) == (np.float16, np.int32, 1)
        assert (others["type_id"], others["has_mask"], others["var_seqlen"]) == (1, 1, 1)
        assert (others["dq_probs"], others["use_int8_scale_max"]) == (pytest.approx(1 / 127), 1)  # or the parser warns
        assert ends[0] == 0
        assert ends[-1] <= tokens
        assert max(np.diff(ends)) <= len(longest)
        split = torch.from_numpy(rows).float().reshape(tokens, num_heads, 3, -1)
        result = torch.full(
            (tokens, num_heads, split.shape[-1]), float("nan")
        )  # behind the texts stands whatever was there
        for start, end in itertools.pairwise(ends):
            q, k, v = (split[start:end, :, part].transpose(0, 1) for part in range(3))
            result[start:end] = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return (result.reshape(tokens, hidden_size, 1, 1).half().numpy(),)


Plugin.__name__ = CREATOR[0]


def graph_of(body: str) -> Graph:
    graph = load(program(DIMS + body))
    for name, weight in graph.weights.items():
        own = weight.load()
        if own.dtype == torch.float16:
            graph.weights[name] = Weight.of(own.abs() / 256 if name[0] in "st" else own / 4)
    return graph


def packed(graph: Graph) -> Graph:
    made = graph.clone()
    run_passes(made, [RemovePadding(attention="packed", padding="behind")])
    return made


def run_emitted(graph: Graph, inputs: Mapping[str, torch.Tensor], padding: PackedPadding) -> list[torch.Tensor]:
    model = emit(graph, dialect_of(padding))
    known = {given.name for given in model.graph.input}
    feeds = {name: tensor.numpy() for name, tensor in inputs.items() if name in known}
    results = ReferenceEvaluator(model, new_ops=[Plugin]).run(None, feeds)
    return [torch.from_numpy(np.array(result)) for result in cast(list[Any], results)]


def mask_of(padding: str, sizes: Mapping[str, int]) -> torch.Tensor:
    rows, columns = torch.arange(sizes["batch"])[:, None], torch.arange(sizes["sequence"])[None]
    real = (rows + 2) % sizes["sequence"] + 1
    holes = torch.rand(sizes["batch"], sizes["sequence"], generator=torch.Generator().manual_seed(0)) < 0.5
    return {
        "behind": columns < real,
        "before": columns >= sizes["sequence"] - real,
        "mixed": torch.where(rows % 2 == 0, columns < real, columns >= sizes["sequence"] - real),
        "none": torch.ones(sizes["batch"], sizes["sequence"], dtype=torch.bool),
        "holes": holes | (columns == sizes["sequence"] - 1),
    }[padding]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("rows", ["dropped", "behind"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("padding", PADDINGS)
def test_real_tokens_are_as_in_the_graph(body: str, rows: PackedPadding, sizes: dict[str, int], padding: str) -> None:
    """Wherever padding lies, and with a row's first token packed though it is padding."""
    before = graph_of(BODIES[body] + ATTENTION)
    mask = mask_of(padding, sizes)
    inputs = {**inputs_of(before, sizes), "m": mask}
    (got,), expected = run_emitted(packed(before), inputs, rows), run(before, inputs)["y"]
    assert got.isfinite().all()
    torch.testing.assert_close(got[mask], expected[mask], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    ("body", "products"),
    [(body, 3 if body in ("products of other inputs", "some biases") else 1) for body in BODIES],
)
def test_queries_keys_and_values_of_one_input_are_one_product(body: str, products: int) -> None:
    model = emit(packed(graph_of(BODIES[body] + ATTENTION)), dialect_of("dropped"))
    ops = [node.op_type for node in model.graph.node]
    sums = 1  # of how many tokens there are before each one in its row
    assert ops.count("MatMul") + ops.count("Gemm") - sums == products
    assert (ops.count("NonZero"), ops.count("CumSum"), ops.count("Softmax"), ops.count(CREATOR[0])) == (1, 0, 0, 1)


def test_with_padding_behind_no_size_depends_on_the_data() -> None:
    model = emit(packed(graph_of(LINEARS + ATTENTION)), dialect_of("behind"))
    assert not {"NonZero", "CumSum"} & {node.op_type for node in model.graph.node}


def test_weights_that_attentions_share_in_another_order() -> None:
    again = ATTENTION.replace("q=%q, k=%k, v=%v", "q=%q, k=%v, v=%k")
    for name in ("q", "k", "v", "a", "g", "e", "y"):
        again = (
            again.replace(f"%{name}:", f"%{name}2:")
            .replace(f"=%{name},", f"=%{name}2,")
            .replace(f"=%{name})", f"=%{name}2)")
        )
    graph = graph_of(LINEARS + ATTENTION + again.replace("output y = %y", "output y2 = %y2"))
    sizes = {"batch": 2, "sequence": 6}
    inputs = {**inputs_of(graph, sizes), "m": mask_of("none", sizes)}
    expected = run(graph, inputs)
    for got, name in zip(run_emitted(packed(graph), inputs, "dropped"), ("y", "y2"), strict=True):
        torch.testing.assert_close(got, expected[name], atol=2e-2, rtol=2e-2)


def test_zero_points_are_of_the_type_of_what_is_quantized() -> None:
    body = QUANTIZED.format("f8e4m3", ", dtype=f8e4m3") + ATTENTION
    model = emit(packed(graph_of(body)), dialect_of("dropped"))
    zeros = {node.input[2] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    types = {tensor.data_type for tensor in model.graph.initializer if tensor.name in zeros}
    assert types == {17}  # FLOAT8E4M3FN


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"f16": "f32"}, "f32, only with f16"),
        ({"2, 64]": "4, 32]"}, "heads of 32, only with heads of 64"),
        ({"0.125": "0.3"}, "a scale of 0.3"),
        ({"[1, 64]": "[1, 513]"}, "texts of 513 tokens, only with up to 512"),
        ({"[1, 64]": "[1, ...]"}, "texts of any number of tokens, only with up to 512"),
    ],
)
def test_what_the_plugin_does_not_compute(changes: dict[str, str], reason: str) -> None:
    text = DIMS + LINEARS + ATTENTION
    for old, new in changes.items():
        text = text.replace(old, new)
    with pytest.raises(LoweringError, match=f"plugin computes no attention with .*{reason}"):
        emit(packed(load(program(text))), dialect_of("dropped"))


def test_the_plugin_computes_no_grouped_heads() -> None:
    text = LINEARS + ATTENTION
    for name in "kv":
        text = text.replace(f"%w{name}: f16[128", f"%w{name}: f16[64").replace(
            f"%b{name}: f16[128", f"%b{name}: f16[64"
        )
        text = text.replace(f"%l{name}: f16[batch*sequence, 128", f"%l{name}: f16[batch*sequence, 64")
        text = text.replace(f"%{name}: f16[batch, sequence, 2", f"%{name}: f16[batch, sequence, 1")
        text = text.replace(f"%l{name}, shape=[batch, sequence, 2", f"%l{name}, shape=[batch, sequence, 1")
    with pytest.raises(LoweringError, match="fewer heads of keys"):
        emit(packed(graph_of(text)), dialect_of("dropped"))


def test_rtx_has_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "parsed_ops", lambda flavour: lambda op: True)
    monkeypatch.setattr(flavours.Flavour, "version", lambda flavour: "1.7.1")
    graph = packed(graph_of(LINEARS + ATTENTION))
    with pytest.raises(LoweringError, match="need remove_padding without attention: packed"):
        TensorRtRtxBackend(TargetConfig(backend="tensorrt_rtx")).emit(graph)
    assert TensorRtBackend(TargetConfig(backend="tensorrt")).emit(graph).weights


def test_products_of_the_plugins_result_are_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    """10.6 builds none of attention that it compiles."""
    monkeypatch.setattr(backends, "parsed_ops", lambda flavour: lambda op: op not in flavours._SINCE)
    monkeypatch.setattr(flavours.Flavour, "version", lambda flavour: "10.6.0")
    result = """
    weight %w: i8[4, 128]
    weight %u: f16[4]
    weight %t: f16[]
    %i: i8[batch*sequence, 128] = graphopt.quantize.default(x=%g, scale=%t)
    %e: f16[batch*sequence, 4] = graphopt.static_linear.default(x=%i, x_scale=%t, weight=%w, scale=%u, bias=None)
    %y: f16[batch, sequence, 4] = aten.reshape.default(self=%e, shape=[batch, sequence, 4])
    output y = %y
"""
    graph = graph_of(LINEARS + ATTENTION[: ATTENTION.index("    %e:")] + result)
    backend = TensorRtBackend(TargetConfig(backend="tensorrt"))
    used = [backend.emit(each).used_forms for each in (graph, packed(graph))]
    assert [(forms.get("integers", 0), forms.get("floats", 0)) for forms in used] == [(0, 1), (1, 0)]


def test_a_library_without_the_plugin_is_refused() -> None:
    class Registry:
        def get_creator(self, name: str, version: str, namespace: str) -> object | None:
            return None if name == "Other" else object()

    class Library(TalkingLibrary):
        __version__ = "11.0"

        @staticmethod
        def init_libnvinfer_plugins(logger: object, namespace: str) -> bool:
            assert logger is flavours.logger_of(Library)
            return True

        @staticmethod
        def get_plugin_registry() -> Registry:
            return Registry()

    flavours.load_plugins(Library, [CREATOR])
    with pytest.raises(BackendError, match=r"TensorRT 11\.0 has no plugin Other, version 1"):
        flavours.load_plugins(Library, [("Other", "1")])


def test_plugins_are_loaded_where_an_engine_has_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """When it is built, and when it is opened."""
    loaded: list[str] = []
    monkeypatch.setattr(backends, "load_plugins", lambda library, creators: loaded.append("built"))
    monkeypatch.setattr(engines, "load_plugins", lambda library: loaded.append("opened"))
    monkeypatch.setattr(flavours.Flavour, "module", lambda flavour: SimpleNamespace(__version__="10.6.0"))
    monkeypatch.setattr(backends, "build_plan", lambda *given: 1 / 0)
    for graph in (graph_of(LINEARS + ATTENTION), packed(graph_of(LINEARS + ATTENTION))):
        with pytest.raises(ZeroDivisionError):
            TensorRtBackend(TargetConfig(backend="tensorrt")).build(graph, tmp_path)
    monkeypatch.setattr(engines, "unrunnable", lambda flavour: None)
    for ops in ({}, {"graphopt.packed_attention.default": 1}):
        manifest = SimpleNamespace(
            inputs={}, outputs={}, dims={}, cache_lengths=[], report=SimpleNamespace(engine_ops={}, final_ops=ops)
        )
        with pytest.raises(FileNotFoundError):
            TensorRtEngine(tmp_path, cast(Manifest, manifest), flavours.TENSORRT, Options()).opened()
    assert loaded == ["built", "opened"]


def test_calls_whose_sizes_depend_on_data_are_not_recorded() -> None:
    report = SimpleNamespace(engine_ops={"NON_ZERO": 1})
    manifest = cast(Manifest, SimpleNamespace(inputs={}, outputs={}, dims={}, cache_lengths=[], report=report))
    folder = cast(Any, "engine")
    with pytest.raises(PipelineError, match="its calls cannot be recorded"):
        TensorRtEngine(folder, manifest, flavours.TENSORRT, Options(), cuda_graphs=True)
    assert TensorRtEngine(folder, manifest, flavours.TENSORRT, Options()).cuda_graphs is False
