"""The invariants of a graph, each a small named check; ``verify`` runs them after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from graphopt import operators
from graphopt.dims import Dim
from graphopt.errors import GraphError, GraphoptError
from graphopt.inference import rederive
from graphopt.ir import Graph, Value, leaves
from graphopt.tensors import DTYPE_NAMES


def defined_before_use(graph: Graph) -> None:
    """Every operand is an input, a weight, or the output of an earlier node."""
    seen = {v for v in graph.values.values() if v.producer is None}
    for node in graph.nodes:
        for operand in node.operands:
            if operand not in seen:
                raise GraphError(f"%{operand.name} is used before it is defined", where=node.where)
        seen.update(node.outputs)
    for name, value in graph.outputs.items():
        if value not in seen:
            raise GraphError(f"output {name!r} is %{value.name}, which nothing defines")


def uses_are_true(graph: Graph) -> None:
    """``users`` of every value counts exactly the arguments that name it."""
    counted: dict[Value, dict[Any, int]] = {value: {} for value in graph.values.values()}
    for node in graph.nodes:
        for operand in node.operands:
            uses = counted[operand]
            uses[node] = uses.get(node, 0) + 1
    for value, uses in counted.items():
        if value.users != uses:
            raise GraphError(f"the users of %{value.name} are not counted right")


def names_are_true(graph: Graph) -> None:
    """Names lead to their values; inputs and weights have no producer, everything else has one."""
    for name, value in graph.values.items():
        if value.name != name:
            raise GraphError(f"%{value.name} is filed under %{name}")
        if (value.producer is None) != (name in graph.inputs or name in graph.weights):
            raise GraphError(f"%{name} is neither an input, a weight nor a node's output, or two of them")
    for name, weight in graph.weights.items():
        if graph.values[name].type != weight.type:
            raise GraphError(f"weight %{name} is {weight.type}, its value says {graph.values[name].type}")


def args_fit_schema(graph: Graph) -> None:
    """Every node has all arguments of its op's schema and no other; the op mutates nothing."""
    for node in graph.nodes:
        expected = [argument.name for argument in operators.parameters(node.op)]
        if list(node.args) != expected:
            raise GraphError(f"{node.op} has arguments {list(node.args)}, its schema {expected}", where=node.where)
        if operators.resolve(node.op)._schema.is_mutable:
            raise GraphError(f"{node.op} writes into an operand; a graph holds no such op", where=node.where)


def dims_are_declared(graph: Graph) -> None:
    """Every name in a size is declared, and every declared name can be read from an input's shape."""
    readable = {size.name for value in graph.inputs.values() for size in value.type.shape if isinstance(size, Dim)}
    for name in graph.dims:
        if name not in readable:
            raise GraphError(f"no input has the plain size {name!r}, so it cannot be known at run time")
        if name in DTYPE_NAMES.values():
            raise GraphError(f"{name!r} is the name of a dtype and cannot name a size")
    for value in graph.values.values():
        unknown = value.type.names - graph.dims.keys()
        if unknown:
            raise GraphError(f"%{value.name} has the undeclared size {', '.join(sorted(unknown))}")
    for node in graph.nodes:
        for arg in node.args.values():
            for leaf in leaves(arg):
                if isinstance(leaf, Dim) and leaf.names - graph.dims.keys():
                    raise GraphError(f"the size {leaf} is not declared", where=node.where)


def types_are_derived(graph: Graph) -> None:
    """Every declared type is what torch derives, at several sizes."""
    for env in sizes_to_check(graph):
        for node in graph.nodes:
            declared = tuple(value.type.concrete(env) for value in node.outputs)
            try:
                derived = rederive(node.op, node.args, env)
            except GraphoptError:
                raise
            except Exception as error:
                raise GraphError(f"at {env}: {str(error).splitlines()[0]}", where=node.where) from error
            if declared != derived:
                says, is_ = (", ".join(map(str, types)) for types in (declared, derived))
                raise GraphError(f"at {env} the type is {is_}, declared is {says}", where=node.where)


def sizes_to_check(graph: Graph) -> Iterator[dict[str, int]]:
    """Sizes inside the declared ranges, different for different names."""
    for start, step in ((3, 2), (5, 4)):
        env = {}
        for index, (name, bounds) in enumerate(graph.dims.items()):
            size = max(bounds.min, start + step * index)
            env[name] = size if bounds.max is None else min(size, bounds.max)
        yield env


CHECKS: tuple[Callable[[Graph], None], ...] = (
    names_are_true,
    defined_before_use,
    uses_are_true,
    args_fit_schema,
    dims_are_declared,
    types_are_derived,
)


def verify(graph: Graph) -> None:
    """GraphError with the first invariant that does not hold."""
    for check in CHECKS:
        check(graph)
    if graph.prologue is not None:
        for name, value in graph.prologue.outputs.items():
            if name in graph.inputs and graph.inputs[name].type != value.type:
                raise GraphError(
                    f"the prologue gives {name} as {value.type}, the graph takes {graph.inputs[name].type}"
                )
        verify(graph.prologue)
