"""The graph: edits that keep uses true, and views."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import save_file
from torch import Tensor

from graphopt.dims import Dim
from graphopt.errors import GraphError, InputError
from graphopt.execution import run
from graphopt.ir import Graph, Node, leaves, map_arg
from graphopt.tensors import DimRange, TensorType, Weight
from tests.graphs import Case, cases, graph_of

s = Dim.named("s")
F32 = torch.float32


def small() -> Graph:
    return graph_of(
        """
        weight %fc.weight: f32[4, 4]
        %h: f32[s, 4] = aten.linear.default(input=%x, weight=%fc.weight)
        %r: f32[s, 4] = aten.relu.default(self=%h)
        %y: f32[s, 4] = aten.add.Tensor(self=%r, other=%r)
        output y = %y
        """,
        {"fc.weight": torch.arange(16.0).reshape(4, 4)},
    )


def producer(graph: Graph, name: str) -> Node:
    node = graph.value(name).producer
    assert node is not None
    return node


def names(graph: Graph) -> list[str]:
    return [node.output.name for node in graph.nodes]


# Types, dims, weights


def test_type_text_and_names() -> None:
    type_ = TensorType(torch.bfloat16, (s, 2 * Dim.named("t") + 1, 3))
    assert str(type_) == "bf16[s, 2*t + 1, 3]"
    assert type_.names == {"s", "t"}
    assert type_.concrete({"s": 2, "t": 5}) == TensorType(torch.bfloat16, (2, 11, 3))


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [(DimRange(2, 4), "[2, 4]", (2, 4), (1, 5)), (DimRange(), "[1, ...]", (1, 10**6), (0, 2.5))],
)
def test_dim_range(bounds: DimRange, text: str, inside: tuple[int, ...], outside: tuple[float, ...]) -> None:
    assert str(bounds) == text
    assert all(size in bounds for size in inside)
    assert not any(size in bounds for size in outside)


def test_a_weight_refers_to_its_tensor() -> None:
    tensor = torch.ones(2, 3, dtype=torch.float16, requires_grad=True)
    weight = Weight.of(tensor)
    assert weight.type == TensorType(torch.float16, (2, 3))
    assert weight.nbytes == 12
    assert weight.load().data_ptr() == tensor.data_ptr()
    assert not weight.load().requires_grad


def test_a_weight_is_read_when_asked_for() -> None:
    loads: list[str] = []

    def load() -> Tensor:
        loads.append("read")
        return torch.ones(4)

    graph = graph_of("output y = %x")
    weight = graph.add_weight("w", Weight(TensorType(F32, (4,)), load))
    graph.outputs["y"] = graph.insert("aten.add.Tensor", {"self": graph.value("x"), "other": weight}).output
    assert "weight %w: f32[4]" in graph.clone().text()
    assert graph.weight_bytes == 16
    graph.verify()
    assert loads == []
    run(graph, {"x": torch.zeros(2, 4)})
    assert loads == ["read"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_weight_from_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(dtype)
    path = tmp_path / "model.safetensors"
    save_file({"a.weight": tensor, "b": torch.zeros(1)}, path)
    weight = Weight.from_safetensors(str(path), "a.weight")
    assert weight.type == TensorType(dtype, (2, 3))
    assert torch.equal(weight.load().float(), tensor.float())


def test_a_weight_from_safetensors_stays_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(3)}, path)
    weight = Weight.from_safetensors(str(path), "w")
    save_file({"w": torch.ones(3)}, path)
    assert torch.equal(weight.load(), torch.ones(3))


def test_map_arg_and_leaves() -> None:
    assert map_arg((1, (2, 3)), lambda leaf: leaf + 1) == (2, (3, 4))
    assert list(leaves(((1, 2), None))) == [1, 2, None]


# Inserting


def test_insert_fills_in_defaults_and_infers_the_type() -> None:
    graph = graph_of("output y = %x")
    node = graph.insert("aten.cat.default", {"tensors": [graph.value("x"), graph.value("x")]})
    assert node.args == {"tensors": (graph.value("x"), graph.value("x")), "dim": 0}
    assert node.output.type == TensorType(F32, (2 * s, 4))
    assert repr(node) == "%cat: f32[2*s, 4] = aten.cat.default(tensors=[%x, %x])"
    assert repr(node.output) == "%cat: f32[2*s, 4]"


def test_insert_before() -> None:
    graph = small()
    graph.insert("aten.neg.default", {"self": graph.value("x")}, before=producer(graph, "h"))
    graph.insert("aten.neg.default", {"self": graph.value("x")}, before=producer(graph, "y"))
    assert names(graph) == ["neg", "h", "r", "neg_1", "y"]
    assert len(graph) == 5
    graph.verify()


def test_precedes_after_many_insertions_at_one_place() -> None:
    graph = small()
    place = producer(graph, "r")
    made = [graph.insert("aten.neg.default", {"self": graph.value("x")}, before=place) for _ in range(40)]
    order = list(graph.nodes)
    assert order[1:41] == made
    assert all(graph.precedes(first, second) for first, second in pairwise(order))
    assert not graph.precedes(place, made[0])


def test_insert_makes_names_unique() -> None:
    graph = small()
    node = graph.insert("aten.relu.default", {"self": graph.value("x")}, names=["h"])
    assert node.output.name == "h_1"
    assert graph.unique("h") == "h_2"
    assert graph.unique("new") == "new"


def test_several_outputs() -> None:
    graph = graph_of("output y = %x")
    node = graph.insert("aten.topk.default", {"self": graph.value("x"), "k": 2})
    assert [repr(value) for value in node.outputs] == ["%topk: f32[s, 2]", "%topk_1: i64[s, 2]"]
    with pytest.raises(GraphError, match=r"aten.topk.default has 2 outputs, not one"):
        _ = node.output


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        ("relu", {}, "'relu' is not an op name"),
        ("aten.rely.default", {}, "there is no torch op 'aten.rely.default'"),
        ("aten.add.Tenser", {}, "aten.add has no overload 'Tenser'"),
        ("aten.relu.default", {}, "aten.relu.default needs an argument 'self'"),
        ("aten.relu.default", {"self": 1, "inplace": True}, "aten.relu.default has no argument 'inplace'"),
    ],
)
def test_insert_refuses(op: str, args: dict[str, object], message: str) -> None:
    graph = small()
    before = graph.text()
    with pytest.raises(GraphError) as error:
        graph.insert(op, args)
    assert error.value.what == message
    assert graph.text() == before


def test_insert_of_a_foreign_operand_changes_nothing() -> None:
    graph = small()
    before = graph.text()
    with pytest.raises(GraphError, match="%x is not a value of this graph"):
        graph.insert("aten.relu.default", {"self": small().value("x")})
    assert graph.text() == before
    graph.verify()


def test_set_args_of_a_foreign_operand_changes_nothing() -> None:
    graph = small()
    with pytest.raises(GraphError, match="%x is not a value of this graph"):
        graph.set_args(producer(graph, "r"), {"self": small().value("x")})
    graph.verify()


def test_operands_that_do_not_fit_have_no_type() -> None:
    graph = graph_of("output y = %x")
    wide = graph.add_weight("w", Weight.of(torch.ones(3)))
    with pytest.raises(GraphError, match=r"aten.add.Tensor\(self=f32\[s, 4\], other=f32\[3\], alpha=1\) has no type"):
        graph.insert("aten.add.Tensor", {"self": graph.value("x"), "other": wide})


def test_names_are_taken_once() -> None:
    graph = small()
    with pytest.raises(GraphError, match="%x exists already"):
        graph.add_input("x", TensorType(F32, (s,)))
    with pytest.raises(GraphError, match=r"%h exists already"):
        graph.add_weight("h", Weight.of(torch.ones(1)))


def test_unknown_value() -> None:
    with pytest.raises(GraphError, match="the graph has no value %q"):
        small().value("q")


# Changing


def test_users_count_every_use_in_order() -> None:
    graph = small()
    r, y = graph.value("r"), producer(graph, "y")
    assert r.users == {y: 2}
    last = graph.insert("aten.cat.default", {"tensors": (r, graph.value("x"), r), "dim": 0})
    assert list(r.users.items()) == [(y, 2), (last, 2)]
    graph.set_args(last, {"tensors": (r, graph.value("x"))})
    assert r.users == {y: 2, last: 1}
    graph.remove(last)
    assert r.users == {y: 2}
    assert last.graph is None


def test_set_args_refuses_unknown_arguments() -> None:
    graph = small()
    with pytest.raises(GraphError, match=r"aten.relu.default has no argument dim") as error:
        graph.set_args(producer(graph, "r"), {"dim": 1})
    assert error.value.where == "%r = aten.relu.default"


def test_replace_moves_every_use_and_output() -> None:
    graph = small()
    graph.outputs["r"] = graph.value("r")
    new = graph.insert("aten.tanh.default", {"self": graph.value("h")}, before=producer(graph, "y")).output
    graph.replace(graph.value("r"), new)
    assert graph.value("r").users == {}
    assert new.users == {producer(graph, "y"): 2}
    assert graph.outputs["r"] is new
    graph.replace(new, new)
    graph.verify()


def test_replace_refuses_another_type() -> None:
    graph = small()
    with pytest.raises(
        GraphError, match=r"cannot replace %r: f32\[s, 4\] by %fc.weight: f32\[4, 4\]: the types differ"
    ):
        graph.replace(graph.value("r"), graph.value("fc.weight"))


def test_remove_refuses_what_is_used() -> None:
    graph = small()
    with pytest.raises(GraphError, match="%r is still used and cannot be removed"):
        graph.remove(producer(graph, "r"))
    with pytest.raises(GraphError, match="%y is still used and cannot be removed"):
        graph.remove(producer(graph, "y"))


def test_nodes_may_be_removed_and_inserted_while_iterating() -> None:
    graph = small()
    seen = []
    for node in graph.nodes:
        seen.append(node.output.name)
        if node.output.name == "r":
            new = graph.insert("aten.tanh.default", {"self": graph.value("h")}, before=node).output
            graph.replace(node.output, new)
            graph.remove(node)
    assert seen == ["h", "r", "y"]
    assert names(graph) == ["h", "tanh", "y"]


def test_prune_removes_what_no_output_needs() -> None:
    graph = small()
    graph.add_weight("unused", Weight.of(torch.ones(1)))
    kept = graph.add_weight("kept", Weight.of(torch.ones(1)))
    dead = graph.insert("aten.relu.default", {"self": graph.value("r")}).output
    graph.insert("aten.tanh.default", {"self": dead})
    graph.outputs = {"h": graph.value("h"), "kept": kept}
    assert graph.prune() == 4
    assert names(graph) == ["h"]
    assert list(graph.weights) == ["fc.weight", "kept"]
    assert list(graph.inputs) == ["x"]
    assert graph.prune() == 0
    graph.verify()


def test_remove_dead_takes_only_what_the_roots_needed() -> None:
    graph = small()
    other = graph.insert("aten.neg.default", {"self": graph.value("x")})
    dead = graph.insert("aten.relu.default", {"self": graph.value("r")})
    graph.remove_dead([dead])
    assert names(graph) == ["h", "r", "y", "neg"]
    assert other.graph is graph


def test_rename_and_take_name() -> None:
    graph = small()
    graph.rename(graph.value("r"), "activated")
    assert names(graph) == ["h", "activated", "y"]
    with pytest.raises(GraphError, match="%h exists already"):
        graph.rename(graph.value("y"), "h")
    new = graph.insert("aten.tanh.default", {"self": graph.value("h")}).output
    old = graph.value("activated")
    graph.take_name(new, old)
    assert (new.name, old.name) == ("activated", "activated_1")
    assert graph.value("activated") is new
    graph.take_name(graph.value("x"), old)
    assert (graph.value("x").name, old.name) == ("x", "activated_1")


def test_weight_of() -> None:
    graph = small()
    assert graph.weight_of(graph.value("fc.weight")) is graph.weights["fc.weight"]
    assert graph.weight_of(graph.value("x")) is None
    assert graph.weight_of(graph.value("r")) is None
    assert graph.weight_of(3) is None


# Copies and views


def test_clone_is_equal_and_independent_and_shares_weights() -> None:
    graph = small()
    before = graph.text()
    other = graph.clone()
    assert other == graph
    assert other.weights["fc.weight"] is graph.weights["fc.weight"]
    assert not set(map(id, other.values.values())) & set(map(id, graph.values.values()))
    other.outputs = {"y": other.value("h")}
    other.dims["s"] = DimRange(2, 3)
    other.prune()
    other.verify()
    assert graph.text() == before
    graph.verify()


@settings(deadline=None, max_examples=15)
@given(cases())
def test_clone_keeps_origins_and_results(case: Case) -> None:
    graph, other = case.graph, case.graph.clone()
    other.verify()
    assert other.text(origins=True) == graph.text(origins=True)
    inputs = case.inputs(case.sizes())
    torch.testing.assert_close(run(other, inputs), run(graph, inputs))


def test_equality_sees_names_types_and_dims_but_not_origins() -> None:
    assert small() == small()
    assert small() != "a graph"
    other = small()
    other.rename(other.value("r"), "q")
    assert other != small()
    other = small()
    other.dims["s"] = DimRange(1, 65)
    assert other != small()
    other = small()
    producer(other, "r").origin = ("somewhere",)
    assert other == small()
    with pytest.raises(TypeError):
        hash(small())


def test_as_networkx_keeps_both_edges_of_add_x_x() -> None:
    graph = small()
    view = graph.as_networkx()
    r, y = graph.value("r"), producer(graph, "y")
    assert view.number_of_edges(r, y) == 2
    assert sorted(data["argument"] for data in view.get_edge_data(r, y).values()) == ["other", "self"]
    assert view.has_edge(y, graph.value("y"))
    assert nx.has_path(view, graph.value("fc.weight"), graph.value("y"))
    assert not nx.has_path(view, graph.value("y"), graph.value("x"))
    assert view.nodes[y] == {"kind": "node", "label": "aten.add.Tensor"}
    assert view.nodes[r] == {"kind": "value", "label": "%r\nf32[s, 4]"}
    assert view.number_of_nodes() == 5 + 3


def test_op_counts_most_frequent_first() -> None:
    graph = small()
    graph.insert("aten.relu.default", {"self": graph.value("y")})
    assert list(graph.op_counts().items()) == [
        ("aten.relu.default", 2),
        ("aten.add.Tensor", 1),
        ("aten.linear.default", 1),
    ]


def test_where_names_the_node_and_its_origin() -> None:
    node = producer(small(), "r")
    assert node.where == "%r = aten.relu.default"
    node.origin = ("encoder.0", "model.py:7")
    assert node.where == "%r = aten.relu.default, from encoder.0 | model.py:7"


def test_as_module_trains() -> None:
    graph = graph_of(
        """
        weight %a.b.weight: f32[4, 4]
        weight %shift: f32[4]
        weight %index: i64[2]
        %h: f32[s, 4] = aten.linear.default(input=%x, weight=%a.b.weight, bias=%shift)
        %y: f32[s, 2] = aten.index_select.default(self=%h, dim=1, index=%index)
        output y = %y
        """,
        {"a.b.weight": torch.eye(4) * 2, "shift": torch.ones(4), "index": torch.tensor([3, 1])},
    )
    module = graph.as_module()
    assert set(module.state_dict()) == {"a.b.weight", "shift", "index"}
    assert {name for name, _ in module.named_parameters()} == {"a.b.weight", "shift"}
    x = torch.randn(3, 4)
    found = module(x)["y"]
    torch.testing.assert_close(found, (2 * x + 1)[:, [3, 1]])
    torch.testing.assert_close(module(x=x)["y"], run(graph, {"x": x})["y"])
    found.sum().backward()
    gradient = torch.zeros(4, 4)
    gradient[[1, 3]] = x.sum(0)
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    torch.testing.assert_close(grads, {"a.b.weight": gradient, "shift": torch.tensor([0.0, 3.0, 0.0, 3.0])})


def test_as_module_refuses_too_many_inputs() -> None:
    with pytest.raises(InputError, match="input"):
        small().as_module()(torch.ones(2, 4), torch.ones(2, 4))


@pytest.mark.parametrize("name", ["graph.weight", "weight", "a.0.b"])
def test_as_module_takes_the_names_of_any_weights(name: str) -> None:
    graph = graph_of(f"weight %{name}: f32[4]\n%y: f32[s, 4] = aten.mul.Tensor(self=%x, other=%{name})\noutput y = %y")
    graph.weights[name] = Weight.of(torch.ones(4))
    assert list(graph.as_module().state_dict()) == [name]
