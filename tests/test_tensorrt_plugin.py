"""Attention by TensorRT's plugin, which is not here: the emitted graph is run with the plugin as its source describes it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from graphopt.backends.onnx.emitter import Emitter
from graphopt.backends.tensorrt import backend as backends
from graphopt.backends.tensorrt import flavours
from graphopt.backends.tensorrt.backend import TensorRtBackend, TensorRtRtxBackend, _not_by_plugin
from graphopt.backends.tensorrt.dialect import tensorrt_dialect
from graphopt.backends.tensorrt.plugin_attention import CREATOR, why_not
from graphopt.errors import BackendError, PipelineError
from graphopt.execution import run
from graphopt.ir import Graph, Weight
from graphopt.schemas.pipeline import TargetConfig
from tests.onnx_helpers import emit
from tests.rules import inputs_of, load, program

WITH_PLUGIN = tensorrt_dialect(lambda op: op not in flavours._SINCE, accumulate="long", plugin=True)
SIZES = ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 1}, {"batch": 4, "sequence": 9})
DIMS = """
    dim batch in [1, 4]
    dim sequence in [1, 64]
    input %m: bool[batch, sequence]
"""
LINEARS = """
    input %x: f16[batch, sequence, 16]
    weight %wq: f16[128, 16]
    weight %wk: f16[128, 16]
    weight %wv: f16[128, 16]
    weight %bq: f16[128]
    weight %bk: f16[128]
    weight %bv: f16[128]
""" + "".join(
    f"""
    %l{name}: f16[batch, sequence, 128] = aten.linear.default(input=%x, weight=%w{name}, bias=%b{name})
    %r{name}: f16[batch, sequence, 2, 64] = aten.reshape.default(self=%l{name}, shape=[batch, sequence, 2, 64])
    %{name}: f16[batch, 2, sequence, 64] = aten.transpose.int(self=%r{name}, dim0=1, dim1=2)"""
    for name in "qkv"
)
INTEGERS = """
    input %x: f16[batch, sequence, 16]
    weight %t: f16[]
    %n: i8[batch, sequence, 16] = graphopt.quantize.default(x=%x, scale=%t)""" + "".join(
    f"""
    weight %w{name}: i8[128, 16]
    weight %s{name}: f16[{"128" if name == "q" else ""}]
    weight %b{name}: f16[128]
    %l{name}: f16[batch, sequence, 128] = graphopt.static_linear.default(
        x=%n, x_scale=%t, weight=%w{name}, scale=%s{name}, bias=%b{name})
    %r{name}: f16[batch, sequence, 2, 64] = aten.reshape.default(self=%l{name}, shape=[batch, sequence, 2, 64])
    %{name}: f16[batch, 2, sequence, 64] = aten.transpose.int(self=%r{name}, dim0=1, dim1=2)""".replace(
        "(\n       ", "("
    )
    for name in "qkv"
)
INPUTS = """
    input %q: f16[batch, 2, sequence, 64]
    input %k: f16[batch, 2, sequence, 64]
    input %v: f16[batch, 2, sequence, 64]"""
LAST = INPUTS.replace("2, sequence", "sequence, 2")
ATTENTION = """
    %y: f16[batch, 2, sequence, 64] = graphopt.attention.default(q=%q, k=%k, v=%v, key_mask=%m, scale=0.125)
    output y = %y
"""
LAST_ATTENTION = ATTENTION.replace("2, sequence", "sequence, 2").replace("scale", "heads_last=True, scale")
BODIES = {
    "one product": LINEARS + ATTENTION,
    "one product of int8": INTEGERS + ATTENTION,
    "any values": INPUTS + ATTENTION,
    "heads last": LAST + LAST_ATTENTION,
}


class Plugin(OpRun):
    """Each run of tokens attends to itself; a row of tokens has each head's query, key and value side by side."""

    op_domain = ""

    def _run(
        self, rows: Any, mask: Any, ends: Any, longest: Any, hidden_size: int, num_heads: int, **others: Any
    ) -> tuple[Any]:
        tokens = rows.shape[0]
        assert rows.shape == (tokens, 3 * hidden_size, 1, 1)
        assert (rows.dtype, ends.dtype, longest.ndim) == (np.float16, np.int32, 1)
        assert (others["type_id"], others["has_mask"], others["var_seqlen"]) == (1, 1, 1)
        assert (ends[0], ends[-1], max(np.diff(ends)) <= len(longest)) == (0, tokens, True)
        split = torch.from_numpy(rows).float().reshape(tokens, num_heads, 3, -1)
        result = torch.zeros(tokens, num_heads, split.shape[-1])
        for start, end in itertools.pairwise(ends):
            q, k, v = (split[start:end, :, part].transpose(0, 1) for part in range(3))
            result[start:end] = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return (result.reshape(tokens, hidden_size, 1, 1).half().numpy(),)


Plugin.__name__ = CREATOR[0]


def run_emitted(graph: Graph, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    model = emit(graph, WITH_PLUGIN)
    known = {given.name for given in model.graph.input}
    feeds = {name: tensor.numpy() for name, tensor in inputs.items() if name in known}
    (result,) = ReferenceEvaluator(model, new_ops=[Plugin]).run(None, feeds)
    return torch.from_numpy(np.array(result))


def masks(sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Padding behind, before, and none."""
    rows, columns = torch.arange(sizes["batch"])[:, None], torch.arange(sizes["sequence"])[None]
    real = (rows + 2) % sizes["sequence"] + 1
    return {
        "behind": columns < real,
        "before": columns >= sizes["sequence"] - real,
        "mixed": torch.where(rows % 2 == 0, columns < real, columns >= sizes["sequence"] - real),
        "none": torch.ones(sizes["batch"], sizes["sequence"], dtype=torch.bool),
    }


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("padding", ["behind", "before", "mixed", "none"])
def test_real_tokens_are_as_in_the_graph(body: str, sizes: dict[str, int], padding: str) -> None:
    graph = load(program(DIMS + BODIES[body]))
    for name, weight in graph.weights.items():
        own = weight.load()
        graph.weights[name] = Weight.of(
            own if own.dtype == torch.int8 else own.abs() / 256 if name[0] in "st" else own / 4
        )
    assert Emitter(graph, WITH_PLUGIN).used_forms["plugin"] == 1
    mask = masks(sizes)[padding]
    inputs = {**inputs_of(graph, sizes), "m": mask}
    got, expected = run_emitted(graph, inputs), run(graph, inputs)["y"]
    assert got.shape == expected.shape
    assert got.isfinite().all()
    tokens = (got, expected) if "last" in body else (got.transpose(1, 2), expected.transpose(1, 2))
    torch.testing.assert_close(tokens[0][mask], tokens[1][mask], atol=2e-2, rtol=2e-2)


def test_one_product_makes_queries_keys_and_values() -> None:
    ops = [node.op_type for node in emit(load(program(DIMS + BODIES["one product"])), WITH_PLUGIN).graph.node]
    assert (ops.count("MatMul"), ops.count("Softmax"), ops.count(CREATOR[0])) == (1, 0, 1)
    ops = [node.op_type for node in emit(load(program(DIMS + BODIES["one product of int8"])), WITH_PLUGIN).graph.node]
    assert (ops.count("MatMul"), ops.count("QuantizeLinear"), ops.count("DequantizeLinear")) == (1, 1, 2)
    other = BODIES["one product"].replace("input=%x, weight=%wk", "input=%z, weight=%wk")
    ops = [
        node.op_type
        for node in emit(load(program(DIMS + "input %z: f16[batch, sequence, 16]" + other)), WITH_PLUGIN).graph.node
    ]
    assert ops.count("MatMul") == 3


def test_padding_elsewhere_gives_nan() -> None:
    """In its own rows, and whatever follows from them."""
    again = """
    %z: f16[batch, 2, sequence, 64] = graphopt.attention.default(q=%y, k=%y, v=%y, key_mask=%m, scale=0.125)
    output z = %z
"""
    graph = load(program(DIMS + INPUTS + ATTENTION.replace("output y = %y", "") + again))
    ops = [node.op_type for node in emit(graph, WITH_PLUGIN).graph.node]
    assert (ops.count(CREATOR[0]), ops.count("Xor")) == (2, 2)  # the rows are looked at once
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0]]).bool()
    inputs = {**inputs_of(graph, {"batch": 3, "sequence": 5}), "m": mask}
    got = run_emitted(graph, inputs)
    assert [bool(row.isnan().all()) for row in got] == [True, False, True]
    assert got[1].isfinite().all()


def test_without_a_mask_rows_are_whole() -> None:
    graph = load(program(DIMS + INPUTS + ATTENTION.replace("key_mask=%m, ", "")))
    inputs = inputs_of(graph, {"batch": 3, "sequence": 5})
    torch.testing.assert_close(run_emitted(graph, inputs), run(graph, inputs)["y"], atol=2e-2, rtol=2e-2)


QUANTIZED = """
    weight %w: i8[4, 128]
    weight %u: f16[4]
    weight %t: f16[]
    %b: f16[batch, sequence, 2, 64] = aten.transpose.int(self=%y, dim0=1, dim1=2)
    %c: f16[batch, sequence, 128] = aten.reshape.default(self=%b, shape=[batch, sequence, 128])
    %n: i8[batch, sequence, 128] = graphopt.quantize.default(x=%c, scale=%t)
    %z: f16[batch, sequence, 4] = graphopt.static_linear.default(x=%n, x_scale=%t, weight=%w, scale=%u, bias=None)
    output z = %z
"""


@pytest.mark.parametrize(
    ("attention", "scale", "forms"),
    [
        ("plugin", "0.125", {"plugin": 1, "integers": 1}),
        ("compiled", "0.125", {"products": 1, "floats": 1}),
        ("plugin", "0.3", {"products": 1, "floats": 1}),
    ],
)
def test_products_of_the_plugins_result_are_in_int8(
    attention: str, scale: str, forms: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10.6 builds none of attention that it compiles."""
    monkeypatch.setattr(backends, "parsed_ops", lambda flavour: lambda op: op not in flavours._SINCE)
    monkeypatch.setattr(flavours.Flavour, "version", lambda flavour: "10.6.0")
    backend = TensorRtBackend(TargetConfig(backend="tensorrt", options={"attention": attention}))
    graph = load(program(DIMS + INPUTS + ATTENTION.replace("output y = %y", "").replace("0.125", scale) + QUANTIZED))
    assert backend.emit(graph).used_forms == forms


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"f16": "f32"}, "not in fp16"),
        ({"64]": "32]"}, "heads of 32, not 64"),
        ({"key_mask=%m": 'causal="upper_left"'}, "causal"),
        ({"key_mask=%m": "window_left=2"}, "a mask that is not of padding"),
        ({"key_mask=%m": "softcap=3.0"}, "sinks or a soft cap"),
        ({"0.125": "0.3"}, "a scale of 0.3"),
        ({"[1, 64]": "[1, 513]", "[1, 32]": "[1, 513]"}, "up to 513 tokens, not 512"),
        (
            {"%k: f16[batch, 2,": "%k: f16[batch, 1,", "%v: f16[batch, 2,": "%v: f16[batch, 1,"},
            "other numbers of heads",
        ),
    ],
)
def test_what_the_plugin_does_not_compute(changes: dict[str, str], reason: str) -> None:
    body, dims = INPUTS + ATTENTION, DIMS
    for old, new in changes.items():
        body, dims = body.replace(old, new), dims.replace(old, new) if "dim" in dims and "51" in new else dims
    graph = load(program(dims + body))
    (node,) = graph.nodes
    assert reason in (why_not(graph, node) or "")
    assert Emitter(graph, WITH_PLUGIN).used_forms == {"products": 1}
    with pytest.raises(PipelineError, match="no attention is one that the plugin computes") as error:
        _not_by_plugin(graph)
    assert reason in str(error.value)


def test_some_may_stay_with_the_compiler() -> None:
    again = """
    %z: f16[batch, 2, sequence, 64] = graphopt.attention.default(q=%y, k=%y, v=%y, causal="upper_left", scale=0.125)
    output z = %z
"""
    graph = load(program(DIMS + INPUTS + ATTENTION + again))
    assert [line.endswith("stays with the compiler: causal") for line in _not_by_plugin(graph)] == [True]
    graph = load(program(DIMS + "output m = %m\n"))
    with pytest.raises(PipelineError, match="there is none"):
        _not_by_plugin(graph)


def test_where_there_are_no_plugins() -> None:
    with pytest.raises(PipelineError, match="TensorRT-RTX has no plugins"):
        TensorRtRtxBackend(TargetConfig(backend="tensorrt_rtx", options={"attention": "plugin"}))
    assert (
        TensorRtBackend(TargetConfig(backend="tensorrt", options={"attention": "plugin"})).options.attention == "plugin"
    )


def test_a_library_without_the_plugin_is_refused() -> None:
    class Registry:
        def get_creator(self, name: str, version: str, namespace: str) -> object | None:
            return None if name == "Other" else object()

    class Library:
        __version__ = "11.0"

        @staticmethod
        def init_libnvinfer_plugins(logger: object, namespace: str) -> bool:
            return True

        @staticmethod
        def get_plugin_registry() -> Registry:
            return Registry()

    flavours.load_plugins(Library, [CREATOR])
    with pytest.raises(BackendError, match=r"TensorRT 11\.0 has no plugin Other, version 1"):
        flavours.load_plugins(Library, [("Other", "1")])
