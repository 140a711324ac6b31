"""The graph's invariants: one test for each that verify checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt.dims import Dim
from graphopt.errors import GraphError
from graphopt.invariants import CHECKS
from graphopt.ir import Graph, Value
from graphopt.tensors import DimRange, TensorType, Weight
from tests.graphs import graph_of
from tests.test_ir import F32, producer, s, small

# What verify checks


def broken_by(check: str) -> Callable[[Callable[[Graph], str]], Callable[[Graph], str]]:
    """Register a function that breaks one invariant and returns the message that must come."""

    def register(fn: Callable[[Graph], str]) -> Callable[[Graph], str]:
        BROKEN.append((check, fn))
        return fn

    return register


BROKEN: list[tuple[str, Callable[[Graph], str]]] = []


@broken_by("names_are_true")
def filed_under_another_name(graph: Graph) -> str:
    graph.value("r").name = "q"
    return "%q is filed under %r"


@broken_by("names_are_true")
def weight_without_entry(graph: Graph) -> str:
    del graph.weights["fc.weight"]
    return "%fc.weight is neither an input, a weight nor a node's output, or two of them"


@broken_by("names_are_true")
def weight_of_another_type(graph: Graph) -> str:
    graph.weights["fc.weight"] = Weight.of(torch.ones(2))
    return "weight %fc.weight is f32[2], its value says f32[4, 4]"


@broken_by("defined_before_use")
def used_too_early(graph: Graph) -> str:
    late = graph.insert("aten.neg.default", {"self": graph.value("x")}).output
    graph.set_args(producer(graph, "r"), {"self": late})
    return "%neg is used before it is defined"


@broken_by("defined_before_use")
def output_of_nothing(graph: Graph) -> str:
    graph.outputs["y"] = Value("gone", TensorType(F32, (s, 4)), None)
    return "output 'y' is %gone, which nothing defines"


@broken_by("uses_are_true")
def uses_miscounted(graph: Graph) -> str:
    graph.value("r").users[producer(graph, "y")] = 1
    return "the users of %r are not counted right"


@broken_by("args_fit_schema")
def argument_missing(graph: Graph) -> str:
    del producer(graph, "y").args["alpha"]
    return "aten.add.Tensor has arguments ['self', 'other'], its schema ['self', 'other', 'alpha']"


@broken_by("args_fit_schema")
def op_that_mutates(graph: Graph) -> str:
    producer(graph, "r").op = "aten.relu_.default"
    return "aten.relu_.default writes into an operand; a graph holds no such op"


@broken_by("dims_are_declared")
def dim_that_no_input_has(graph: Graph) -> str:
    graph.dims["t"] = DimRange()
    return "no input has the plain size 't', so it cannot be known at run time"


@broken_by("dims_are_declared")
def dim_named_like_a_dtype(graph: Graph) -> str:
    graph.add_input("z", TensorType(F32, (Dim.named("f32"),)))
    graph.dims["f32"] = DimRange()
    return "'f32' is the name of a dtype and cannot name a size"


@broken_by("dims_are_declared")
def type_with_an_unknown_size(graph: Graph) -> str:
    graph.add_input("z", TensorType(F32, (Dim.named("t"),)))
    return "%z has the undeclared size t"


@broken_by("dims_are_declared")
def argument_with_an_unknown_size(graph: Graph) -> str:
    producer(graph, "y").args["alpha"] = Dim.named("t") * 2
    return "the size 2*t is not declared"


@broken_by("types_are_derived")
def wrong_type(graph: Graph) -> str:
    graph.value("r").type = TensorType(F32, (s, 5))
    return "at {'s': 3} the type is f32[3, 4], declared is f32[3, 5]"


@broken_by("types_are_derived")
def operands_that_do_not_fit(graph: Graph) -> str:
    graph.value("fc.weight").type = TensorType(F32, (4, 3))
    graph.weights["fc.weight"] = Weight.of(torch.ones(4, 3))
    return "at {'s': 3}: "


@pytest.mark.parametrize(("check", "break_it"), BROKEN, ids=[fn.__name__ for _, fn in BROKEN])
def test_verify_sees(check: str, break_it: Callable[[Graph], str]) -> None:
    graph = small()
    graph.verify()
    message = break_it(graph)
    with pytest.raises(GraphError) as error:
        graph.verify()
    assert error.value.what.startswith(message)
    first = next(each for each in CHECKS if _fails(each, graph))
    assert first.__name__ == check


def _fails(check: Callable[[Graph], None], graph: Graph) -> bool:
    try:
        check(graph)
    except GraphError:
        return True
    return False


def test_every_check_is_tested() -> None:
    assert {check for check, _ in BROKEN} == {check.__name__ for check in CHECKS}


def test_types_are_checked_at_several_sizes() -> None:
    """Right at the first size, wrong at the second."""
    graph = graph_of("output y = %x")
    node = graph.insert("aten.slice.Tensor", {"self": graph.value("x"), "start": 0, "end": 3})
    node.output.type = TensorType(F32, (s, 4))
    with pytest.raises(GraphError, match=r"at \{'s': 5\} the type is f32\[3, 4\], declared is f32\[5, 4\]"):
        graph.verify()
