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

With ``attention: packed``, for targets with kernels for texts one behind the other, nothing is unpacked in between::

    %u = graphopt.unpack_tokens.default(x=%l, mask=%mask)
    %q = aten.reshape.default(self=%u, shape=[batch, sequence, 12, 32])   ->   %q = aten.reshape.default(self=%l, shape=[...])
    %a = graphopt.attention.default(q=%q, ..., key_mask=%mask)                 %a = graphopt.packed_attention.default(
    %p = graphopt.pack_tokens.default(x=%a..., mask=%mask)                             q=%q, ..., mask=%mask)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import model_validator

from graphopt.attentions import FUSED, PACKED
from graphopt.dims import Size
from graphopt.ir import Graph, Node, Value, map_arg
from graphopt.passes.flatten_tokens import ADD_NORMS, BINARY, NORMS, UNARY
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refusal, Refused, RewriteLog, require


def _packets(*paths: str) -> frozenset[str]:
    return frozenset(path if "." in path else f"aten.{path}" for path in paths)


_OF_TWO = _packets(*BINARY, *ADD_NORMS)
TOKEN_BY_TOKEN = _OF_TWO | _packets(*UNARY, *NORMS, "linear", "to", "graphopt.quantize", "graphopt.static_linear")
_PARTS = "aten.split_with_sizes.default", "aten.chunk.default"
_RESHAPE, _PACK, _UNPACK = "aten.reshape.default", "graphopt.pack_tokens.default", "graphopt.unpack_tokens.default"


class RemovePadding(Pass):
    """Leave padding out of everything that works token by token."""

    kind: Literal["remove_padding"] = "remove_padding"
    attention: Literal["unpacked", "packed"] = "unpacked"
    """``packed``: attention reads and gives packed tokens, for ``backend: tensorrt``."""
    padding: Literal["anywhere", "behind"] = "anywhere"
    """``behind``: a promise that padding lies behind texts only, on which packed attention needs to rely where the first position
    is read. Nothing is then compared on other batches."""

    requires: ClassVar[frozenset[str]] = frozenset({"attention", "flat_tokens"})

    @model_validator(mode="after")
    def _promise_is_used(self) -> RemovePadding:
        if self.padding == "behind" and self.attention == "unpacked":
            raise ValueError("padding: behind is a promise for attention: packed, the other needs none")
        return self

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        if self.attention == "packed":
            trial = self._rewrite(graph.clone())
            if "attention" not in trial.matches:  # nothing of what was asked for
                return RewriteLog(refusals=trial.refusals)
        return self._rewrite(graph)

    def _rewrite(self, graph: Graph) -> RewriteLog:
        log = RewriteLog()
        try:
            mask = _mask_of(graph)
            is_first_known = self.attention == "unpacked" or self.padding == "behind"
            entries, exits = _borders(graph, mask, is_first_known)
            mask = _before(graph, mask, entries[0], self.kind)
        except Refusal as refusal:
            log.refusals.append(Refused("RemovePadding", "the graph", str(refusal)))
            return log
        for node in entries:
            _pack(graph, node, mask, self.kind)
        for node in exits:
            _unpack(graph, node, mask, self.kind)
        if self.attention == "packed":
            log.refusals += _pack_attentions(graph, self.kind)
        graph.prune()
        ops = graph.op_counts()
        made = {"pack": _PACK, "unpack": _UNPACK, "attention": PACKED}
        log.matches = {name: ops[op] for name, op in made.items() if op in ops}
        return log


def _mask_of(graph: Graph) -> Value:
    """The key mask that all attention shares."""
    nodes = [node for node in graph.nodes if node.op == FUSED]
    require(nodes, "there is no attention")
    masks = {node.args["key_mask"] for node in nodes}
    require(None not in masks, "an attention has no proven key mask, so it sees padding")
    require(len(masks) == 1, "attentions have different key masks")
    found: Value = masks.pop()
    return found


def _borders(graph: Graph, mask: Value, is_first_known: bool) -> tuple[list[Node], list[Node]]:
    """The reshapes from ``[batch, sequence, ...]`` to flat tokens, and those back. Refusal if anything else would see a
    difference. ``is_first_known``: whether the first position of every row is computed as before."""
    batch, sequence = mask.type.shape
    flat: set[Value] = set()
    entries: list[Node] = []
    exits: list[Node] = []
    for node in graph.nodes:
        takes = any(operand in flat for operand in node.operands)
        gives = not takes and node.op == _RESHAPE and _are_rows(node.output, batch * sequence)
        if node.op == _RESHAPE and (takes or gives):
            source, result = node.args["self"].type, node.output.type
            split = source if gives else result
            require(split.shape[:2] == (batch, sequence), f"%{node.output.name} regroups tokens: {source} to {result}")
            (entries if gives else exits).append(node)
        elif takes:
            require(_is_token_by_token(node, flat), f"{node.where} does not work token by token")
        if gives or (takes and node.op != _RESHAPE):
            flat.update(node.outputs)
    require(entries, "no tokens are flat")
    for name, value in graph.outputs.items():
        require(value not in flat, f"the output {name!r} is flat")
    for node in exits:
        _check_readers(node.output, mask, is_first_known, set(entries))
    return entries, exits


def _are_rows(value: Value, tokens: Size) -> bool:
    return len(value.type.shape) == 2 and value.type.shape[0] == tokens


def _is_token_by_token(node: Node, flat: set[Value]) -> bool:
    """Of flat tokens, with nothing beside them that has a row for each position; a merged product is split by its features."""
    if node.op in _PARTS:
        return node.args["dim"] in (1, -1)
    packet = node.op.rpartition(".")[0]
    operands = list(node.args.values())
    rows, others = (operands[:2], operands[2:]) if packet in _OF_TWO else (operands[:1], operands[1:])
    beside = [value for value in rows if isinstance(value, Value) and value not in flat]
    return (
        packet in TOKEN_BY_TOKEN
        and all(len(value.type.shape) < 2 or value.type.shape[-2] == 1 for value in beside)
        and not any(value in flat for value in others if isinstance(value, Value))
    )


def _check_readers(value: Value, mask: Value, is_first_known: bool, entries: set[Node]) -> None:
    """Whoever reads unpacked tokens must not let padding touch real ones."""
    for reader in value.users:
        if reader in entries:
            continue
        if _moves_or_attends(reader, value, mask):
            for result in reader.outputs:
                _check_readers(result, mask, is_first_known, entries)
            continue
        first = reader.op == "aten.select.int" and reader.args["dim"] == 1 and reader.args["index"] == 0
        require(first, f"{reader.where} is not known to leave tokens apart")
        require(
            is_first_known,
            f"{reader.where} reads the first position, which packed attention may take for padding: set padding: behind",
        )


def _moves_or_attends(node: Node, value: Value, mask: Value) -> bool:
    """Whether a node of ``[batch, sequence, ...]`` turns, splits or groups features, or is an attention that hides padding:
    queries stay where they are, keys are masked."""
    if node.op == FUSED:
        return bool(node.args["heads_last"]) and any(node.args[name] is value for name in "qkv")
    if node.op in (*_PARTS, "aten.unbind.int"):
        return bool(node.args["dim"] % len(node.args["self"].type.shape) >= 2)
    if node.op == _RESHAPE:
        return node.output.type.shape[:2] == mask.type.shape
    return node.op == "aten.to.dtype" or (node.op == "graphopt.rotary_embedding.default" and node.args["x"] is value)


def _before(graph: Graph, value: Value, first: Node, label: str) -> Value:
    """A value that is there before a node: what makes it is moved, which works for what comes from inputs."""
    node = value.producer
    if node is None or graph.precedes(node, first):
        return value
    require(len(node.outputs) == 1 and node is not first, f"%{value.name} depends on the tokens that it hides")

    def earlier(arg: Any) -> Any:
        return _before(graph, arg, first, label) if isinstance(arg, Value) else arg

    args = {name: map_arg(arg, earlier) for name, arg in node.args.items()}
    moved = graph.insert(node.op, args, before=first, origin=(*node.origin, label)).output
    graph.stand_in(moved, node)
    return moved


def _pack(graph: Graph, node: Node, mask: Value, label: str) -> None:
    origin = (*node.origin, label)
    rows, shape = node.args["self"], (*mask.type.shape, node.output.type.shape[1])
    if rows.type.shape != shape:
        rows = graph.insert("aten.reshape.default", {"self": rows, "shape": shape}, before=node, origin=origin).output
    args = {"x": rows, "mask": mask}
    graph.stand_in(graph.insert(_PACK, args, before=node, origin=origin).output, node)


def _unpack(graph: Graph, node: Node, mask: Value, label: str) -> None:
    origin = (*node.origin, label)
    args = {"x": node.args["self"], "mask": mask}
    unpacked = graph.insert(_UNPACK, args, before=node, origin=origin).output
    if unpacked.type == node.output.type:
        graph.stand_in(unpacked, node)
    else:
        graph.set_args(node, {"self": unpacked})


# Attention of packed tokens


def _pack_attentions(graph: Graph, label: str) -> list[Refused]:
    refused = []
    for node in [node for node in graph.nodes if node.op == FUSED]:
        try:
            _pack_attention(graph, node, label)
        except Refusal as refusal:
            refused.append(Refused("PackAttention", node.where, str(refusal)))
    return refused


def _pack_attention(graph: Graph, node: Node, label: str) -> None:
    """Refusal if it does more than hide padding, or is read by others than a pack."""
    plain = {"causal": "none", "window_left": -1, "window_right": -1, "chunk": 0, "softcap": 0.0, "heads_last": True}
    others = ("bias", "kv_lengths", "sinks", "segments", "prefix", "starts")
    odd = [name for name, value in plain.items() if node.args[name] != value]
    odd += [name for name in others if node.args[name] is not None]
    require(not odd, f"packed attention has no {', '.join(odd)}")
    packed = {name: _packed(node.args[name]) for name in "qkv"}
    packs = _packs_behind(graph, node.output)
    require(packs, "its result is read unpacked")
    origin = (*node.origin, label)

    def reshaped(value: Value, shape: tuple[Size, ...], before: Node) -> Value:
        return graph.insert(_RESHAPE, {"self": value, "shape": shape}, before=before, origin=origin).output

    heads = {name: (rows, (rows.type.shape[0], *node.args[name].type.shape[2:])) for name, rows in packed.items()}
    split = {part: reshaped(*part, before=node) for part in dict.fromkeys(heads.values())}
    args = {name: split[part] for name, part in heads.items()}
    args |= {"mask": node.args["key_mask"], "scale": node.args["scale"]}
    made = graph.insert(PACKED, args, before=node, origin=origin).output
    for pack in packs:
        graph.stand_in(reshaped(made, pack.output.type.shape, before=pack), pack)


def _packs_behind(graph: Graph, value: Value) -> list[Node]:
    """The packs that read a value, as it is or with its heads put together; none if anything else does."""
    found = []
    for user in value.users:
        packs = _packs_behind(graph, user.output) if user.op == _RESHAPE else [user] if user.op == _PACK else []
        if not packs:
            return []
        found += packs
    return [] if graph.is_output(value) else found


def _packed(value: Value) -> Value:
    """The packed tokens that are unpacked and split into heads as ``value``."""
    split = value.producer
    unpack = split.args["self"].producer if split is not None and split.op == _RESHAPE else None
    if unpack is None or unpack.op != _UNPACK:
        raise Refusal(f"%{value.name} is more than unpacked tokens split into heads")
    rows: Value = unpack.args["x"]
    return rows
