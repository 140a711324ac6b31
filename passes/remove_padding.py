"""Work on real tokens only: padding is left out of every linear, norm and activation.

::

    %f = aten.reshape.default(self=%x, shape=[batch*sequence, 384])      %f = graphopt.pack_tokens.default(x=%x, mask=%mask)
    %l = aten.linear.default(input=%f, weight=%w)                  ->    %l = aten.linear.default(input=%f, weight=%w)
    %q = aten.reshape.default(self=%l, shape=[batch, sequence, 12, 32])  %u = graphopt.unpack_tokens.default(x=%l, mask=%mask)
                                                                         %q = aten.reshape.default(self=%u, shape=[...])

What is computed at padding means nothing, and after this pass it is something else: the outputs there are not eager's. The
pass makes sure that nothing else depends on them: attention must hide padding by a proven key mask, and whatever reads
tokens across positions must be attention, an output, or the first position (which is always kept). An engine then takes
time for the tokens there are: with 30 % padding, about 30 % less.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from graphopt.ir import Graph, Node, Value
from graphopt.passes.flatten_tokens import ADD_NORMS, BINARY, NORMS, UNARY
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refusal, Refused, RewriteLog, require

TOKEN_BY_TOKEN = frozenset(
    path if "." in path else f"aten.{path}" for path in (*UNARY, *NORMS, *BINARY, *ADD_NORMS, "linear")
)


class RemovePadding(Pass):
    """Leave padding out of everything that works token by token."""

    kind: Literal["remove_padding"] = "remove_padding"

    requires: ClassVar[frozenset[str]] = frozenset({"attention", "flat_tokens"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        try:
            mask = _mask_of(graph)
            entries, exits = _borders(graph, mask)
        except Refusal as refusal:
            log.refusals.append(Refused("RemovePadding", "the graph", str(refusal)))
            return log
        for node in entries:
            _pack(graph, node, mask, self.kind)
        for node in exits:
            _unpack(graph, node, mask, self.kind)
        log.matches = {"pack": len(entries), "unpack": len(exits)}
        graph.prune()
        return log


def _mask_of(graph: Graph) -> Value:
    """The key mask that all attention shares."""
    nodes = [node for node in graph.nodes if node.op == "graphopt.attention.default"]
    require(nodes, "there is no attention")
    masks = {node.args["key_mask"] for node in nodes}
    require(None not in masks, "an attention has no proven key mask, so it sees padding")
    require(len(masks) == 1, "attentions have different key masks")
    found: Value = masks.pop()
    return found


def _borders(graph: Graph, mask: Value) -> tuple[list[Node], list[Node]]:
    """The reshapes from ``[batch, sequence, ...]`` to flat tokens, and those back. Refusal if anything else would see a
    difference."""
    batch, sequence = mask.type.shape
    tokens = batch * sequence
    flat = {v for v in graph.values.values() if len(v.type.shape) == 2 and v.type.shape[0] == tokens}
    require(flat, "no tokens are flat")
    entries: list[Node] = []
    exits: list[Node] = []
    for node in graph.nodes:
        gives = any(value in flat for value in node.outputs)
        takes = any(operand in flat for operand in node.operands)
        if node.op == "aten.reshape.default" and gives != takes:
            source, result = node.args["self"], node.output
            split = source if gives else result
            require(
                split.type.shape[:2] == (batch, sequence),
                f"%{result.name} regroups tokens: {source.type} to {result.type}",
            )
            (entries if gives else exits).append(node)
        elif gives or takes:
            require(_is_token_by_token(node), f"{node.where} does not work token by token")
    for name, value in graph.outputs.items():
        require(value not in flat, f"the output {name!r} is flat")
    for node in exits:
        _check_readers(graph, node.output, mask)
    return entries, exits


def _is_token_by_token(node: Node) -> bool:
    """Of flat tokens; a product that was merged is split by its features."""
    if node.op == "aten.split_with_sizes.default":
        return node.args["dim"] in (1, -1)
    return node.op.rpartition(".")[0] in TOKEN_BY_TOKEN


def _check_readers(graph: Graph, value: Value, mask: Value) -> None:
    """Whoever reads unpacked tokens must not let padding touch real ones."""
    for reader in value.users:
        if reader.op == "graphopt.attention.default" and reader.args["heads_last"]:
            continue  # queries stay where they are, keys are masked
        if reader.op == "graphopt.rotary_embedding.default" or _keeps_positions(reader, mask):
            for result in reader.outputs:
                _check_readers(graph, result, mask)
            continue
        first = reader.op == "aten.select.int" and reader.args["dim"] == 1 and reader.args["index"] == 0
        require(first, f"{reader.where} reads tokens across positions")


def _keeps_positions(node: Node, mask: Value) -> bool:
    """Whether a node only splits or groups the features of ``[batch, sequence, ...]``."""
    if node.op == "aten.split_with_sizes.default":
        return bool(node.args["dim"] % len(node.args["self"].type.shape) >= 2)
    return node.op == "aten.reshape.default" and node.output.type.shape[:2] == mask.type.shape


def _pack(graph: Graph, node: Node, mask: Value, label: str) -> None:
    origin = (*node.origin, label)
    rows, shape = node.args["self"], (*mask.type.shape, node.output.type.shape[1])
    if rows.type.shape != shape:
        rows = graph.insert("aten.reshape.default", {"self": rows, "shape": shape}, before=node, origin=origin).output
    args = {"x": rows, "mask": mask}
    graph.stand_in(graph.insert("graphopt.pack_tokens.default", args, before=node, origin=origin).output, node)


def _unpack(graph: Graph, node: Node, mask: Value, label: str) -> None:
    origin = (*node.origin, label)
    args = {"x": node.args["self"], "mask": mask}
    unpacked = graph.insert("graphopt.unpack_tokens.default", args, before=node, origin=origin).output
    if unpacked.type == node.output.type:
        graph.stand_in(unpacked, node)
    else:
        graph.set_args(node, {"self": unpacked})
