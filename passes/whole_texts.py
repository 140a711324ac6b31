"""What belongs to a whole text, and would be another in a longer one: such values cannot be computed for new tokens alone."""

from __future__ import annotations

from collections.abc import Iterable, Set

from graphopt.dims import Dim
from graphopt.ir import Graph, Value

#: Ops that make one number of many.
_REDUCTIONS = frozenset(
    f"aten.{name}"
    for name in (
        "amax",
        "amin",
        "max",
        "min",
        "argmax",
        "argmin",
        "sum",
        "mean",
        "prod",
        "any",
        "all",
        "logsumexp",
        "median",
    )
)


def following(graph: Graph, values: Iterable[Value]) -> set[Value]:
    """These values and everything that depends on them."""
    found = set(values)
    for node in graph.nodes:
        if any(operand in found for operand in node.operands):
            found.update(node.outputs)
    return found


def of_whole_texts(graph: Graph, sequence: str, data: Set[Value]) -> set[Value]:
    """What depends on all positions at once, as the length of the text does, and not on tokens (``data``): rotary frequencies
    that are others in long texts, for one."""
    size = Dim.named(sequence)
    reduced: set[Value] = set()
    for node in graph.nodes:
        if node.op.rpartition(".")[0] not in _REDUCTIONS or any(operand in data for operand in node.operands):
            continue
        shape = next(iter(node.operands)).type.shape
        dims = node.args.get("dim")
        dims = range(len(shape)) if dims in (None, ()) else dims if isinstance(dims, tuple) else (dims,)
        if any(shape[dim] == size for dim in dims):
            reduced.update(node.outputs)
    return following(graph, reduced) - data
