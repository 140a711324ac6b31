"""Linear products of one input as one product.

::

    %q = aten.linear.default(input=%x, weight=%q.weight)          %qkv = aten.linear.default(
    %k = aten.linear.default(input=%x, weight=%k.weight)    ->             input=%x, weight=%q.weight+k+v)
    %v = aten.linear.default(input=%x, weight=%v.weight)          %q, %k, %v = aten.split_with_sizes.default(
                                                                           self=%qkv, split_sizes=[576, 192, 192], dim=2)

The pieces cost a copy, but for queries, keys and values that a cached attention reads as they are: those are always merged.
``decide: timed`` measures both forms of others on the target and merges where that is faster; the report has the times. The
merged weight is put together when it is read, so nothing is held twice.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar, Literal

import torch

from graphopt.ir import Graph, Node, Value
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refused, RewriteLog
from graphopt.tensors import TensorType, Weight


class MergeLinears(Pass):
    """One product for linears that share their input (q/k/v, gate/up)."""

    kind: Literal["merge_linears"] = "merge_linears"
    decide: Literal["timed", "always"] = "timed"
    """Merge where the target is faster with it, or always."""
    gain: float = 0.03
    """The share of time that merging must save to be done, when timed."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        for group in _groups(graph):
            reason = self._reason_not_to(graph, group, context)
            if reason:
                log.refusals.append(Refused("MergeLinears", group[0].where, reason))
                continue
            _merge(graph, group, self.kind)
            log.matches["MergeLinears"] = log.matches.get("MergeLinears", 0) + 1
        graph.prune()
        return log

    def _reason_not_to(self, graph: Graph, group: list[Node], context: Context) -> str | None:
        if len({(node.args["bias"] is None) for node in group}) > 1:
            return "some have a bias and some have none"
        if self.decide == "always" or _are_read_as_one(group):
            return None
        if context.stopwatch is None:
            return "the target's tactics are fixed, so nothing is timed: set decide: always to merge"
        apart, merged = (context.stopwatch.milliseconds(_model(group, merge)) for merge in (False, True))
        note = f"{len(group)} products of {group[0].args['input'].type}: {apart:.3f} ms apart, {merged:.3f} ms merged"
        if note not in context.notes:
            context.notes.append(note)
        return (
            None if merged < apart * (1 - self.gain) else f"not faster ({apart:.3f} ms apart, {merged:.3f} ms merged)"
        )


def _groups(graph: Graph) -> list[list[Node]]:
    """Linears with weights of the graph, by their input; two or more each, in order."""
    found: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "aten.linear.default" and all(
            part is None or graph.weight_of(part) is not None for part in (node.args["weight"], node.args["bias"])
        ):
            found.setdefault(node.args["input"], []).append(node)
    return [group for group in found.values() if len(group) > 1 and _are_matrices(group)]


def _are_read_as_one(group: list[Node]) -> bool:
    """Whether they are the queries, keys and values of one cached attention, whose kernels read them packed: nothing splits."""
    readers = {user for view in group[0].output.users for out in view.outputs for user in out.users}
    attention = readers.pop() if len(readers) == 1 else None
    if attention is None or attention.op != "graphopt.cached_attention.default" or not attention.args["heads_last"]:
        return False
    views = [attention.args[part].producer for part in "qkv"]
    return [list(node.output.users) for node in group] == [[view] for view in views] and all(
        view.op == "aten.reshape.default" and list(view.output.users) == [attention] for view in views
    )


def _are_matrices(group: list[Node]) -> bool:
    """A weight of one dimension is a dot product, which has no rows to join."""
    return all(len(node.args["weight"].type.shape) == 2 for node in group)


def _merge(graph: Graph, group: list[Node], label: str) -> None:
    first = group[0]
    weights = [graph.weights[node.args["weight"].name] for node in group]
    args: dict[str, Any] = {"input": first.args["input"], "weight": _joined(graph, group, "weight", weights)}
    if first.args["bias"] is not None:
        args["bias"] = _joined(graph, group, "bias", [graph.weights[node.args["bias"].name] for node in group])
    origin = (*first.origin, label)
    merged = graph.insert("aten.linear.default", args, before=first, origin=origin)
    parts = graph.insert("aten.split_with_sizes.default", _split(merged.output, weights), before=first, origin=origin)
    for node, part in zip(group, parts.outputs, strict=True):
        graph.stand_in(part, node)


def _split(merged: Value, weights: list[Weight]) -> dict[str, Any]:
    sizes = tuple(weight.type.shape[0] for weight in weights)
    return {"self": merged, "split_sizes": sizes, "dim": len(merged.type.shape) - 1}


def _joined(graph: Graph, group: list[Node], part: str, weights: list[Weight]) -> Value:
    """The weights on top of each other, as one that is put together when it is read."""
    name = "+".join(
        (group[0].args[part].name, *(node.args[part].name.rpartition(".")[0].split(".")[-1] for node in group[1:]))
    )
    rows = functools.reduce(operator.add, (weight.type.shape[0] for weight in weights))
    type = TensorType(weights[0].type.dtype, (rows, *weights[0].type.shape[1:]))
    joined = Weight(type, lambda: torch.cat([weight.load() for weight in weights]))
    return graph.add_weight(graph.unique(name.replace("+", "_and_")), joined)


def _model(group: list[Node], merge: bool) -> Graph:
    """The group alone, with made-up weights, for the stopwatch."""
    source = group[0].args["input"]
    graph = Graph()
    owner = group[0].graph
    assert owner is not None
    graph.dims = {name: bounds for name, bounds in owner.dims.items() if name in source.type.names}
    x = graph.add_input("x", source.type)
    for index, node in enumerate(group):
        args: dict[str, Any] = {"input": x}
        for part in ("weight", "bias"):
            if node.args[part] is not None:
                args[part] = graph.add_weight(f"{part}{index}.weight", _made_up(node.args[part].type))
        made = graph.insert("aten.linear.default", args)
        graph.outputs[f"y{index}"] = made.output
    if merge:
        _merge(graph, list(graph.nodes), "merge_linears")
        graph.prune()
    return graph


def _made_up(type: TensorType) -> Weight:
    return Weight(type, lambda: torch.full([int(size) for size in type.shape], 0.01, dtype=type.dtype))  # type: ignore[arg-type]
