"""Rows that a model splits by counts it computed, multiplies each part by a matrix of its own, and joins again.

No part has a size that the graph could name, but the whole has: it is one grouped product, and enters the graph as such.

::

    parts = x.split(counts.tolist())                                      # u0, u1, ... rows: known at run time only
    y = torch.cat([linear(part, w[i]) for i, part in enumerate(parts)])   ->   grouped_mm(x, w.mT, cumsum(counts))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers.integrations.moe  # noqa: F401 - registers the op

from graphopt.errors import TracingError
from graphopt.ir import Graph, Value

GROUPED = "transformers.grouped_mm_fallback.default"


@dataclass(frozen=True)
class Segment:
    """The ``index``-th part of ``rows``, of ``counts[index]`` rows; multiplied by ``weights[index]`` if given."""

    rows: Value
    counts: Value
    index: int
    weights: Value | None = None


def read(op: str, node: torch.fx.Node, env: Mapping[Any, Any], graph: Graph, origin: tuple[str, ...]) -> Any:
    """What a node is that splits rows into segments, multiplies one, or joins them; None for any other node."""
    if op == "aten.split_with_sizes.default":
        return _split(node, env)
    if op == "aten.linear.default" and isinstance(env.get(node.args[0]), Segment):
        return _product(node, env)
    if op == "aten.cat.default" and isinstance(node.args[0], (list, tuple)):
        parts = [env.get(part) for part in node.args[0]]
        if all(isinstance(part, Segment) for part in parts) and node.args[1:] in ((), (0,)):
            return _joined(parts, graph, origin)
    return None


def _split(node: torch.fx.Node, env: Mapping[Any, Any]) -> tuple[Segment, ...] | None:
    """Segments, if the sizes are the elements of one tensor in their order."""
    sizes: Any = node.args[1]
    if node.args[2:] not in ((), (0,)) or not all(isinstance(env.get(size), TracingError) for size in sizes):
        return None
    elements = [env.get(size.args[0]) for size in sizes if size.target is torch.ops.aten.item.default]
    nodes = {element.producer for element in elements if isinstance(element, Value)}
    if len(elements) != len(sizes) or len(nodes) != 1:
        return None
    (unbind,) = nodes
    if unbind is None or unbind.op != "aten.unbind.int" or unbind.outputs != tuple(elements):
        return None
    rows, counts = env[node.args[0]], unbind.args["self"]
    return tuple(Segment(rows, counts, index) for index in range(len(elements)))


def _product(node: torch.fx.Node, env: Mapping[Any, Any]) -> Segment | None:
    """A segment times its own matrix of a stack."""
    segment: Segment = env[node.args[0]]
    weight = env.get(node.args[1])
    if node.args[2:] not in ((), (None,)) or segment.weights is not None or not isinstance(weight, Value):
        return None
    select = weight.producer
    if (
        select is None
        or select.op != "aten.select.int"
        or (select.args["dim"], select.args["index"]) != (0, segment.index)
    ):
        return None
    return replace(segment, weights=select.args["self"])


def _joined(parts: Sequence[Any], graph: Graph, origin: tuple[str, ...]) -> Value | None:
    """All segments side by side: a grouped product."""
    first: Segment = parts[0]
    weights = first.weights
    if weights is None or weights.type.shape[0] != len(parts):
        return None
    if any(part != replace(first, index=index) for index, part in enumerate(parts)):
        return None
    turned = graph.insert("aten.transpose.int", {"self": weights, "dim0": 1, "dim1": 2}, origin=origin).output
    ends = graph.insert(
        "aten.cumsum.default", {"self": first.counts, "dim": 0, "dtype": torch.int32}, origin=origin
    ).output
    args = {"input": first.rows, "weight": turned, "offs": ends}
    return graph.insert(GROUPED, args, origin=origin).output
