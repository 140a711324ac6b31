"""The text form: what it looks like, that it parses back, and that errors name the line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.dims import Dim, maximum
from graphopt.errors import GraphError, ParseError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.tensors import DTYPES, DimRange, TensorType, Weight
from graphopt.text import arg_text, parse, parse_type
from tests.graphs import Case, cases, graph_of

s, t = Dim.named("s"), Dim.named("t")

GOLDEN = """graph {
  dim batch in [1, 64]
  dim sequence in [2, ...]
  input %ids: i64[batch, sequence]
  input %scale: f32[]
  weight %embed.weight: f32[10, 4]
  %e: f32[batch, sequence, 4] = aten.embedding.default(weight=%embed.weight, indices=%ids)
  %m: f32[batch, sequence, 4] = aten.mul.Tensor(self=%e, other=%scale)
  %r: f32[batch*sequence, 4] = aten.reshape.default(self=%m, shape=[batch*sequence, 4])
  %top: f32[batch*sequence, 2], %index: i64[batch*sequence, 2] = aten.topk.default(self=%r, k=2)
  output hidden.0 = %m
  output top = %top
}
"""


def leaf_graph(op: str, argument: str, value: Any) -> Graph:
    """A graph with one node that has this argument."""
    graph = graph_of("output y = %x", shape="s, t")
    operand = {"self": graph.value("x")}
    graph.insert(op, {**operand, argument: value}, [TensorType(torch.float32, (s, t))])
    return graph


def test_golden() -> None:
    graph = Graph(dims={"batch": DimRange(1, 64), "sequence": DimRange(2)})
    batch, sequence = Dim.named("batch"), Dim.named("sequence")
    ids = graph.add_input("ids", TensorType(torch.int64, (batch, sequence)))
    scale = graph.add_input("scale", TensorType(torch.float32, ()))
    weight = graph.add_weight("embed.weight", Weight.of(torch.ones(10, 4)))
    e = graph.insert("aten.embedding.default", {"weight": weight, "indices": ids}, names=["e"]).output
    m = graph.insert("aten.mul.Tensor", {"self": e, "other": scale}, names=["m"]).output
    r = graph.insert("aten.reshape.default", {"self": m, "shape": (batch * sequence, 4)}, names=["r"]).output
    top = graph.insert("aten.topk.default", {"self": r, "k": 2}, names=["top", "index"])
    graph.outputs = {"hidden.0": m, "top": top.outputs[0]}
    graph.verify()
    assert graph.text() == GOLDEN
    assert str(graph) == GOLDEN


def test_golden_parses_back() -> None:
    graph = parse(GOLDEN, {"embed.weight": torch.ones(10, 4)})
    graph.verify()
    assert str(graph) == GOLDEN
    assert graph.dims == {"batch": DimRange(1, 64), "sequence": DimRange(2, None)}
    assert graph.value("m").type.shape == (Dim.named("batch"), Dim.named("sequence"), 4)
    assert torch.equal(graph.weights["embed.weight"].load(), torch.ones(10, 4))


@settings(deadline=None, max_examples=30)
@given(cases())
def test_random_graphs_parse_back(case: Case) -> None:
    other = parse(str(case.graph), case.weights())
    assert other == case.graph
    other.verify()
    inputs = case.inputs(case.sizes())
    torch.testing.assert_close(run(other, inputs), run(case.graph, inputs), rtol=0, atol=0)


@settings(deadline=None, max_examples=15)
@given(cases())
def test_origins_parse_back(case: Case) -> None:
    text = case.graph.text(origins=True)
    other = parse(text)
    assert other.text(origins=True) == text
    assert [node.origin for node in other.nodes] == [node.origin for node in case.graph.nodes]


def test_origins_are_comments() -> None:
    graph = graph_of("%r: f32[s, 4] = aten.relu.default(self=%x)  # encoder.0 | model.py:7 | fuse\noutput y = %r")
    assert [node.origin for node in graph.nodes] == [("encoder.0", "model.py:7", "fuse")]
    line = "  %r: f32[s, 4] = aten.relu.default(self=%x)"
    assert f"{line}  # encoder.0 | model.py:7 | fuse\n" in graph.text(origins=True)
    assert f"{line}\n" in graph.text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1, "1"),
        (-1, "-1"),
        (2**63 - 1, "9223372036854775807"),
        (1.0, "1.0"),
        (1e-05, "1e-05"),
        (-2.5e20, "-2.5e+20"),
        (-0.0, "-0.0"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (True, "True"),
        (False, "False"),
        (s, "s"),
        (2 * s - 1, "2*s - 1"),
        (maximum(s, t) // 2, "(max(s, t)) // 2"),
        (-s, "-s"),
    ],
)
def test_scalars(value: Any, text: str) -> None:
    assert arg_text(value) == text
    graph = leaf_graph("aten.mul.Scalar", "other", value)
    parsed = next(parse(str(graph)).nodes).args["other"]
    assert type(parsed) is type(value)
    assert parsed == value or (math.isnan(parsed) and math.isnan(value))
    assert math.copysign(1, parsed) == math.copysign(1, value) if isinstance(value, float) else True
    assert f"other={text})" in str(graph)


@pytest.mark.parametrize(("name", "dtype"), DTYPES.items())
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    graph = leaf_graph("aten.to.dtype", "dtype", dtype)
    assert f"aten.to.dtype(self=%x, dtype={name})" in str(graph)
    assert next(parse(str(graph)).nodes).args["dtype"] is dtype


def test_none_and_other_defaults_are_not_written() -> None:
    graph = leaf_graph("aten.sum.dim_IntList", "dim", (1,))
    assert "aten.sum.dim_IntList(self=%x, dim=[1])" in str(graph)
    _, *others = next(parse(str(graph)).nodes).args.items()
    assert others == [("dim", (1,)), ("keepdim", False), ("dtype", None)]


def test_none_without_a_default_is_written() -> None:
    graph = leaf_graph("aten.sum.dim_IntList", "dim", None)
    assert "aten.sum.dim_IntList(self=%x, dim=None)" in str(graph)
    assert next(parse(str(graph)).nodes).args["dim"] is None


def test_a_number_equal_to_the_default_but_of_another_type_is_written() -> None:
    graph = graph_of("output y = %x")
    x = graph.value("x")
    graph.insert("aten.add.Tensor", {"self": x, "other": x, "alpha": 1.0})
    graph.insert("aten.add.Tensor", {"self": x, "other": x, "alpha": 1})
    assert "aten.add.Tensor(self=%x, other=%x, alpha=1.0)\n" in str(graph)
    assert "aten.add.Tensor(self=%x, other=%x)\n" in str(graph)
    assert parse(str(graph)) == graph


@pytest.mark.parametrize("value", [(), (s,), (s * t, -1), ((1, 2), (s, (3,))), (None, True, "a, b")])
def test_nested_lists(value: Any) -> None:
    graph = leaf_graph("aten.reshape.default", "shape", value)
    assert next(parse(str(graph)).nodes).args["shape"] == value


def test_lists_of_values() -> None:
    graph = graph_of("%i: f32[s, 4] = aten.index.Tensor(self=%x, indices=[None, %x])\noutput y = %i")
    assert next(graph.nodes).args["indices"] == (None, graph.value("x"))
    assert "indices=[None, %x]" in str(graph)


STRINGS = [
    "none", "", "a, b", "a)b(", "[", '"', "a=b", "%x", "1", "back\\slash", "new\nline", "\u00e9\u2028",
    "ends with a backslash\\", "a  # no comment", 'a \\" b',
]  # fmt: skip


@pytest.mark.parametrize("value", STRINGS)
def test_strings(value: str) -> None:
    graph = leaf_graph("aten.gelu.default", "approximate", value)
    assert next(parse(str(graph)).nodes).args["approximate"] == value
    assert parse(str(graph)) == graph


@pytest.mark.parametrize("value", STRINGS)
def test_strings_before_other_arguments(value: str) -> None:
    graph = graph_of("output y = %x", shape="s, t, 4, 4")
    x = graph.value("x")
    args = {"q": x, "k": x, "v": x, "scale": 1.0, "causal": value, "window_left": 7}
    graph.insert("graphopt.attention.default", args, [x.type])
    parsed = next(parse(str(graph)).nodes)
    assert (parsed.args["causal"], parsed.args["window_left"]) == (value, 7)


@settings(deadline=None, max_examples=30)
@given(st.floats())
def test_floats_parse_back(value: float) -> None:
    parsed = next(parse(str(leaf_graph("aten.mul.Scalar", "other", value))).nodes).args["other"]
    assert type(parsed) is float
    assert parsed == value or (math.isnan(parsed) and math.isnan(value))


def test_blank_lines_comments_and_indentation_do_not_matter() -> None:
    text = GOLDEN.replace("\n  ", "\n\n        ").replace("graph {\n", "# a graph\ngraph {\n# inputs first\n")
    assert parse(text) == parse(GOLDEN)


def test_parse_type() -> None:
    assert parse_type("f32[2*s + 1, max(s, t), 4]") == TensorType(torch.float32, (2 * s + 1, maximum(s, t), 4))
    assert parse_type("bool[]") == TensorType(torch.bool, ())
    with pytest.raises(ParseError, match="not a typed value: '%_: f31"):
        parse_type("f31[2]")


def test_weights_without_data() -> None:
    graph = parse(GOLDEN)
    with pytest.raises(GraphError, match=r"the data of weight %embed.weight is not in the text") as error:
        graph.weights["embed.weight"].load()
    assert error.value.hint == "pass weights= to parse"


@pytest.mark.parametrize("text", ["", "graph {", "output y = %x\n}", "nothing"])
def test_not_a_graph(text: str) -> None:
    with pytest.raises(ParseError, match=r"the text of a graph starts with 'graph \{' and ends with '\}'"):
        parse(text)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("nonsense", "cannot read this line"),
        ("dim s in [1]", "cannot read this line"),
        ("input %z: f31[2]", "not a typed value: '%_: f31[2]'"),
        ("input %z: f32[2 2]", "not a size: '2 2' (invalid syntax"),
        ("input %x: f32[2]", "%x exists already"),
        ("weight %x: f32[2]", "%x exists already"),
        ("%x: f32[s, 4] = aten.relu.default(self=%x)", "%x exists already"),
        ("%y: f32[s, 4] = aten.relu.default(self=%q)", "the graph has no value %q"),
        ("%y: f32[s, 4] = aten.rely.default(self=%x)", "there is no torch op 'aten.rely.default'"),
        ("%y: f32[s, 4] = aten.relu.out(self=%x)", "aten.relu.out needs an argument 'out'"),
        ("%y: f32[s, 4] = aten.relu.default()", "aten.relu.default needs an argument 'self'"),
        ("%y: f32[s, 4] = aten.relu.default(%x)", "not an argument: '%x'"),
        ("%y: f32[s, 4] = aten.relu.default(input=%x)", "aten.relu.default has no argument 'input'"),
        ("%y = aten.relu.default(self=%x)", "cannot read this line"),
        ("output y = %q", "the graph has no value %q"),
        ("output y = x", "cannot read this line"),
        ("%y: f32[s, 4] = aten.mul.Scalar(self=%x, other=1 / 2)", "not a size: '1 / 2' (cannot read 1 / 2)"),
        ("%y: f32[s, 4] = aten.mul.Scalar(self=%x, other=s // 0)", "not a size: 's // 0'"),
        ("%y: f32[s, 4] = aten.mul.Scalar(self=%x, other=max(s))", "not a size: 'max(s)'"),
        ('%y: f32[s, 4] = aten.gelu.default(self=%x, approximate="tanh)', ""),
    ],
)
def test_errors_name_the_line(line: str, what: str) -> None:
    text = f"graph {{\n  dim s in [1, 64]\n\n  input %x: f32[s, 4]\n  {line}\n  output z = %x\n}}\n"
    with pytest.raises(ParseError) as error:
        parse(text)
    assert error.value.what.startswith(what)
    assert error.value.where == f"line 5: {line}"


def test_a_weight_of_another_type_is_refused() -> None:
    with pytest.raises(ParseError, match=r"weight %embed.weight is f64\[10, 4\], the text says f32\[10, 4\]"):
        parse(GOLDEN, {"embed.weight": torch.ones(10, 4, dtype=torch.float64)})
