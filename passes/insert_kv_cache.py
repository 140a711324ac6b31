"""A decoder that keeps its keys and values: inputs for those of the past, outputs for those of past and present.

::

    %a = graphopt.attention.default(                   %k2 = aten.cat.default(tensors=[%past_key_values.0.key, %k], dim=2)
        q=%q, k=%k, v=%v, key_mask=%mask,     ->       %v2 = aten.cat.default(tensors=[%past_key_values.0.value, %v], dim=2)
        scale=0.125, causal="upper_left")              %a = graphopt.attention.default(q=%q, k=%k2, v=%v2, key_mask=%mask,
                                                           scale=0.125, causal="lower_right")
                                                       output present.0.key = %k2

Nothing knows an architecture. What depends on the tokens is computed for the new ones; what depends on positions and the
padding mask alone is computed for all positions, past ones included, and where it meets tokens its last rows are taken.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from graphopt import attentions
from graphopt.dims import Dim, names_of
from graphopt.errors import GraphError
from graphopt.ir import DimRange, Graph, Node, TensorType, Value, map_arg
from graphopt.passes.tails import Tails
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import RewriteLog
from graphopt.runtime.cache import past_name, present_name


class InsertKvCache(Pass):
    """Keys and values of earlier tokens come in as inputs and go out as outputs."""

    kind: Literal["insert_kv_cache"] = "insert_kv_cache"
    past: str = "past"
    """The name of the past's length."""

    requires: ClassVar[frozenset[str]] = frozenset({"attention"})
    provides: ClassVar[frozenset[str]] = frozenset({"cache"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        log.matches["attention"] = _Insertion(graph, self.past).run()
        graph.prune()
        return log


@dataclass
class _Insertion:
    graph: Graph
    past: str
    origin: tuple[str, ...] = ("insert_kv_cache",)
    data: set[Value] = field(default_factory=set)

    def run(self) -> int:
        graph = self.graph
        nodes = attentions.fused(graph)
        if not nodes:
            raise GraphError("there is no attention that could keep its keys", hint="run fuse_attention before")
        self.sequence = self._sequence(nodes)
        self._find_data()
        for node in nodes:
            self._require_causal(node)
        if self.past in graph.dims:
            raise GraphError(f"there is a size named {self.past} already", hint="set past to another name")
        longest = graph.dims[self.sequence].max
        graph.dims[self.past] = DimRange(0, None if longest is None else longest - 1)
        self.tails = Tails(graph, self.sequence, self.past, self.data, next(graph.nodes))
        for node in list(graph.nodes):
            if node.graph is graph and any(value in self.data for value in node.outputs):
                self._feed(node)
        for index, node in enumerate(nodes):
            self._keep(node, index)
        self._swap_inputs()
        return len(nodes)

    def _sequence(self, nodes: list[Node]) -> str:
        """The name of the sequence's length: that of every attention's queries and keys."""
        names = {size for node in nodes for size in (node.args["q"].type.shape[2], node.args["k"].type.shape[2])}
        odd = next((node for node in nodes if node.args["heads_last"]), None)
        if odd is not None:
            raise GraphError("its heads are last", where=odd.where, hint="put insert_kv_cache before heads_last")
        if len(names) != 1 or not isinstance(size := names.pop(), Dim) or size.name is None:
            raise GraphError(
                "its attentions are of several lengths, or of one that is no plain name: "
                "the caches of encoder-decoders are not made yet"
            )
        return size.name

    def _find_data(self) -> None:
        """Everything that depends on tokens: on an input along the sequence that is not the padding mask."""
        named = Dim.named(self.sequence)
        for name, value in self.graph.inputs.items():
            if named in value.type.shape and name not in self.graph.truths:
                self.data.add(value)
        for node in self.graph.nodes:
            if any(operand in self.data for operand in node.operands):
                self.data.update(node.outputs)

    def _require_causal(self, node: Node) -> None:
        args = node.args
        if not all(args[name] in self.data for name in ("q", "k", "v")):
            raise GraphError("its keys do not come from the tokens", where=node.where)
        if args["causal"] == "none":
            raise GraphError(
                "it is not proven to be causal: a token that comes later would change what earlier ones saw",
                where=node.where,
                hint="a cache is for causal models; see graphopt inspect --attention",
            )
        for name in ("bias", "key_mask", "segments", "prefix"):
            if args[name] in self.data:
                raise GraphError(
                    f"its {name} depends on the tokens, so it cannot be computed for the past", where=node.where
                )

    def _feed(self, node: Node) -> None:
        """Give a node of the tokens what belongs to the new ones."""
        if node.op == attentions.FUSED:
            changed = {
                name: self.tails.whole(node.args[name])
                for name in ("key_mask", "segments", "prefix")
                if node.args[name]
            }
            if node.args["bias"] is not None:
                changed["bias"] = self._rows(node.args["bias"])
            self.graph.set_args(node, changed)
            return
        changed = {
            name: map_arg(arg, lambda leaf: self._of_new(leaf, node) if isinstance(leaf, Value) else leaf)
            for name, arg in node.args.items()
        }
        self.graph.set_args(node, changed)

    def _rows(self, bias: Value) -> Value:
        """The rows of the new queries, with a column for every key."""
        row = len(bias.type.shape) - 2
        return self.tails.last(bias, row) if row >= 0 else self.tails.whole(bias)

    def _of_new(self, value: Value, node: Node) -> Value:
        if value in self.data or not self.tails.depends(value):
            return value
        axes = [axis for axis, size in enumerate(value.type.shape) if size == Dim.named(self.sequence)]
        if len(axes) > 1:
            what = f"%{value.name} is of positions by positions and meets tokens outside an attention"
            raise GraphError(what, where=node.where)
        if not axes and any(self.sequence in names_of(size) for size in value.type.shape):
            return value  # as many as there are tokens, in another order than theirs
        return self.tails.last(value, axes[0]) if axes else self.tails.whole(value)

    def _keep(self, node: Node, index: int) -> None:
        """Put the past before the keys and values of an attention."""
        joined = {}
        for name, part in (("k", "key"), ("v", "value")):
            new = node.args[name]
            batch, heads, _, size = new.type.shape
            type = TensorType(new.type.dtype, (batch, heads, Dim.named(self.past), size))
            past = self.graph.add_input(past_name(index, part), type)
            both = self.graph.insert(
                "aten.cat.default", {"tensors": (past, new), "dim": 2}, before=node, origin=(*node.origin, *self.origin)
            )
            joined[name] = both.output
            self.graph.outputs[present_name(index, part)] = both.output
        self.graph.set_args(node, {**joined, "causal": "lower_right"})

    def _swap_inputs(self) -> None:
        """The padding mask has the past's positions too; it takes its old place among the inputs."""
        graph = self.graph
        graph.prune()
        for name, value in list(graph.inputs.items()):
            whole = self.tails.inputs.get(value)
            if whole is not None:
                is_truth = name in graph.truths
                graph.remove_input(value)
                graph.rename_input(whole, name)
                graph.truths |= {name} if is_truth else set()
        order = [name for name in graph.inputs if not name.startswith("past_key_values.")]
        graph.inputs = {name: graph.inputs[name] for name in (*order, *(n for n in graph.inputs if n not in order))}
