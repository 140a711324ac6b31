"""Where a graph attends: by what its values mean, not by how the ops are spelled.

An attention is a softmax over scores that come from a product of two activations, whose result weighs other values in a
product; or an op that is one. ``fuse_attention`` turns the first into the second, and is judged by what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from graphopt.ir import Graph, Node, Value
from graphopt.schemas.report import AttentionReport, RefusalReport

FUSED = "graphopt.attention.default"
PACKED = "graphopt.packed_attention.default"
PROOF = "ProveMask"  # the rule that says why a mask stays a bias
_SDPA = "aten.scaled_dot_product_attention"
_SOFTMAX = frozenset({"aten.softmax", "aten._softmax", "aten._safe_softmax"})
_PRODUCTS = frozenset({"aten.matmul", "aten.bmm", "aten.baddbmm", "aten.einsum"})
#: Ops between a product and its softmax that keep scores scores: element-wise ones and moves.
_CARRIES = frozenset(
    f"aten.{name}"
    for name in (
        "add", "sub", "mul", "div", "neg", "tanh", "where", "masked_fill", "clamp", "maximum", "minimum",
        "max", "min", "amax", "to", "pow",
        "reshape", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "cat", "gather", "pad",
        "constant_pad_nd", "index", "roll", "flip", "as_strided", "nan_to_num", "slice_scatter", "select_scatter", "copy",
        "split", "split_with_sizes", "chunk", "unbind", "clone", "contiguous", "view", "dropout", "index_put",
    )
)  # fmt: skip


def fused(graph: Graph) -> list[Node]:
    """The attentions that are one op."""
    return [node for node in graph.nodes if node.op in (FUSED, PACKED)]


def unfused(graph: Graph) -> list[Node]:
    """The softmax of each attention that is spelled out, or the framework's own op."""
    return [node for node in graph.nodes if _packet(node) == _SDPA or (_packet(node) in _SOFTMAX and _attends(node))]


def _packet(node: Node) -> str:
    return node.op.rpartition(".")[0]


def _attends(softmax: Node) -> bool:
    operand = softmax.args.get("self", softmax.args.get("input"))
    assert isinstance(operand, Value)
    scored = _reached([operand.producer] if operand.producer else [], _producers)
    return bool(scored and weighed(softmax))


def weighed(softmax: Node) -> list[Node]:
    """The products that a softmax's weights go into; an attention op is its own."""
    return [softmax] if _packet(softmax) == _SDPA else _reached(_users(softmax), _users)


def _reached(start: Iterable[Node], follow: Callable[[Node], Iterable[Node]]) -> list[Node]:
    """The products of activations that lie in this direction, with nothing but carrying ops between."""
    waiting, seen, found = list(start), set(), []
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if _packet(node) in _PRODUCTS:
            found.append(node)
        elif _packet(node) in _CARRIES:
            waiting.extend(follow(node))
    return found


def _producers(node: Node) -> Iterator[Node]:
    yield from (operand.producer for operand in node.operands if operand.producer is not None)


def _users(node: Node) -> Iterator[Node]:
    for value in node.outputs:
        yield from value.users


def table(graph: Graph, refusals: Iterable[RefusalReport]) -> list[AttentionReport]:
    """Every attention of a graph in its order: fused ones as they are, the others with the reason they are not."""
    reasons: dict[tuple[str, bool], str] = {}
    for refusal in refusals:
        reasons.setdefault((_place(refusal.where), refusal.rule == PROOF), refusal.reason)
    left = unfused(graph)
    rows = []
    for node in graph.nodes:
        if node.op == FUSED:
            has_bias = node.args["bias"] is not None
            unproven = reasons.get((_place(node.where), True), "") if has_bias else ""
            rows.append(describe(node).model_copy(update={"unproven": unproven}))
        elif node.op == PACKED:
            rows.append(_describe_packed(node))
        elif node in left:
            product = weighed(node)[0]
            reason = reasons.get((_place(product.where), False), "fuse_attention was not run")
            rows.append(AttentionReport(name=product.output.name, where=product.where, refusal=reason))
    return rows


def _place(where: str) -> str:
    """The module and source line of a node's place, which stay when passes rename it; its name where there are none."""
    name, _, origin = where.partition(", from ")
    lines = [part for part in origin.split(" | ") if ":" in part or "." in part]
    return " | ".join(lines) or name


def describe(node: Node) -> AttentionReport:
    """A fused attention for people."""
    args = node.args
    q, k, v = args["q"], args["k"], args["v"]
    sequence, head = (1, 2) if args["heads_last"] else (2, 1)
    return AttentionReport(
        name=node.output.name,
        where=node.where,
        heads=str(q.type.shape[head]),
        kv_heads=str(k.type.shape[head]),
        size=str(q.type.shape[3]),
        value_size=str(v.type.shape[3]),
        queries=str(q.type.shape[sequence]),
        keys=str(k.type.shape[sequence]),
        mask=", ".join(_mask_parts(node)) or "none",
        extras=[name for name in ("softcap", "sinks") if args[name] not in (None, 0.0)],
    )


def _describe_packed(node: Node) -> AttentionReport:
    q, k, v = (node.args[name].type.shape for name in "qkv")
    length = str(node.args["mask"].type.shape[1])
    return AttentionReport(
        name=node.output.name, where=node.where, heads=str(q[1]), kv_heads=str(k[1]), size=str(q[2]), value_size=str(v[2]),
        queries=length, keys=length, mask="padding, packed",
    )  # fmt: skip


def _mask_parts(node: Node) -> Iterator[str]:
    args = node.args
    if args["causal"] != "none":
        yield "causal" if args["causal"] == "upper_left" else "causal (lower right)"
    for side in ("left", "right"):
        if args[f"window_{side}"] >= 0:
            yield f"window {side} {args[f'window_{side}']}"
    if args["chunk"]:
        yield f"chunks of {args['chunk']}"
    for operand, words in _OPERANDS.items():
        if args[operand] is not None:
            yield words


_OPERANDS = {
    "prefix": "prefix", "segments": "segments", "key_mask": "key padding", "kv_lengths": "key lengths", "bias": "bias",
}  # fmt: skip
