"""Rotary embeddings as one op: halves or neighbours turned, whole heads or a part of them, in real or complex spelling."""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch

from graphopt.dims import Size
from graphopt.ir import Graph, Node, Value
from graphopt.patterns import Hole, NumberHole, Ops, TensorHole
from graphopt.rewrite import Build, Match, Rule, applies, require

#: Which features make a pair: ``(i, i + R/2)`` or ``(2i, 2i + 1)``.
Pairing: TypeAlias = Literal["halves", "neighbours"]


class FuseRotary(Rule):
    """x * cos + cat([-x2, x1]) * sin  ->  rotary_embedding(x, cos, sin)"""

    def pattern(
        self, op: Ops, x: TensorHole, a: TensorHole, b: TensorHole, cos: TensorHole, sin: TensorHole, shape: Hole
    ) -> Any:
        halves = op.cat([op.neg(b), a], 3).tag(pairing="halves")
        neighbours = op.reshape(op.stack([op.neg(b), a], 4), shape).tag(pairing="neighbours")
        return op.add(op.mul(x, cos), op.mul(halves | neighbours, sin))

    def rewrite(self, op: Build, m: Match) -> Value:
        found = _pair(op, m.a, m.b)
        require(found is not None and found[1] == m.pairing and found[0] is m.x, "what is turned are not parts of x")
        width = m.x.type.shape[3]
        angles: list[Value] = []
        for name, angle in (("cos", m.cos), ("sin", m.sin)):
            require(angle.type.shape[-1:] == (width,), f"{name} is not of {width} features")
            equal = are_equal(m.node.graph, angle, m.pairing)
            require(equal, f"the two {m.pairing} of {name} (%{angle.name}) are not shown to be equal")
            half = (0, width // 2, 1) if m.pairing == "halves" else (0, width, 2)
            angles.append(op.reuse("slice.Tensor", angle, len(angle.type.shape) - 1, *half))
        cos, sin = angles
        return _rotary(op, m.x, cos, sin, m.pairing)


class FusePairs(Rule):
    """cat([a * cos - b * sin, b * cos + a * sin])  ->  rotary_embedding(cat([a, b]), cos, sin)"""

    def pattern(
        self, op: Ops, a: TensorHole, b: TensorHole, cos: TensorHole, sin: TensorHole, axis: NumberHole, shape: Hole
    ) -> Any:
        parts = [op.sub(op.mul(a, cos), op.mul(b, sin)), op.add(op.mul(b, cos), op.mul(a, sin))]
        return op.cat(parts, axis).tag(pairing="halves") | op.reshape(op.stack(parts, axis), shape).tag(
            pairing="neighbours"
        )

    def rewrite(self, op: Build, m: Match) -> Value:
        found = _pair(op, m.a, m.b)
        applies(found is not None and m.axis == (3 if m.pairing == "halves" else 4))
        assert found is not None
        x, pairing = found
        if pairing != m.pairing:
            require(m.pairing == "halves", "halves are turned and put side by side")
            x = op.cat((m.a, m.b), 3)
        result = _rotary(op, x, m.cos, m.sin, m.pairing)
        shape = m.roots[0].type.shape
        whole: Value = result if result.type.shape == shape else op.reshape(result, shape)
        return whole


class FusePartialRotary(Rule):
    """cat([rotary_embedding(x[..., :R]), x[..., R:]])  ->  rotary_embedding(x)"""

    def pattern(
        self, op: Ops, x: TensorHole, cos: TensorHole, sin: TensorHole, rest: TensorHole, how: Hole, last: Hole
    ) -> Any:
        return op.cat([op.graphopt.rotary_embedding(x, cos, sin, interleaved=how, heads_last=last), rest], 3)

    def rewrite(self, op: Build, m: Match) -> Value:
        whole = _whole(m.x, m.rest)
        applies(whole is not None)
        result: Value = op.graphopt.rotary_embedding(whole, m.cos, m.sin, interleaved=m.how, heads_last=m.last)
        return result


ROTARY: tuple[Rule, ...] = (FuseRotary(), FusePairs(), FusePartialRotary())


def _rotary(op: Build, x: Value, cos: Value, sin: Value, pairing: Pairing) -> Value:
    require(x.type.dtype == cos.type.dtype == sin.type.dtype, "x, cos and sin differ in dtype")
    require(len(x.type.shape) == 4, f"x has {len(x.type.shape)} dimensions")
    for name, angle in (("cos", cos), ("sin", sin)):
        pairs = x.type.shape[3] // 2
        require(angle.type.shape[-1:] == (pairs,), f"{name} is {angle.type}, not one angle for each of {pairs} pairs")
    last = _heads_are_last(x, cos)
    batch, sequence = x.type.shape[0], x.type.shape[1 if last else 2]
    angles = [_angle(op, name, angle, batch, sequence, last) for name, angle in (("cos", cos), ("sin", sin))]
    require(angles[0].type == angles[1].type, "cos and sin differ in type")
    result: Value = op.graphopt.rotary_embedding(x, *angles, interleaved=pairing == "neighbours", heads_last=last)
    return result


def _heads_are_last(x: Value, angle: Value) -> bool:
    """Whether ``x`` is ``[B, S, H, D]``: then the angles have one head in the third place, and rows in the second."""
    shape = angle.type.shape
    return len(shape) >= 3 and shape[-2] == 1 and shape[-3] == x.type.shape[1] and x.type.shape[2] != 1


def _angle(op: Build, name: str, angle: Value, batch: Size, sequence: Size, heads_last: bool) -> Value:
    """``[B or 1, S, R/2]`` for an angle that broadcasts over heads."""
    shape = (1,) * (4 - len(angle.type.shape)) + tuple(angle.type.shape)
    head, row = (2, 1) if heads_last else (1, 2)
    fits = len(shape) == 4 and shape[head] == 1 and shape[row] == sequence and shape[0] in (1, batch)
    require(fits, f"{name} is {angle.type}, not one angle for each position and pair")
    return op.reuse("reshape.default", angle, (shape[0], sequence, shape[3]))


def _pair(op: Build, a: Value, b: Value) -> tuple[Value, Pairing] | None:
    """The tensor whose pairs of features are ``(a, b)``, and how they lie in it."""
    first, second = a.producer, b.producer
    if first is None or second is None or first.op != second.op or "self" not in first.args:
        return None
    source: Value = first.args["self"]
    if second.args["self"] is not source:
        return None
    last, width = len(source.type.shape) - 1, source.type.shape[-1]
    if first.op == "aten.slice.Tensor":
        places = tuple((n.args["dim"], n.args["start"], n.args["end"], n.args["step"]) for n in (first, second))
        return _sliced(source, places, last, width)
    if first is second and first.args.get("dim") == last and first.outputs == (a, b):
        return (source, "halves") if a.type == b.type else None
    if first.op == "aten.select.int" and (first.args["dim"], second.args["dim"]) == (last, last):
        if (first.args["index"], second.args["index"]) != (0, 1) or width != 2:
            return None
        joined: Value = op.reshape(source, (*source.type.shape[:-2], source.type.shape[-2] * 2))
        return joined, "neighbours"
    return None


def _sliced(source: Value, places: tuple[Any, ...], last: int, width: Size) -> tuple[Value, Pairing] | None:
    if not isinstance(width, int) or width % 2:
        return None
    half = width // 2
    if places == ((last, 0, half, 1), (last, half, width, 1)):
        return source, "halves"
    return (source, "neighbours") if places == ((last, 0, width, 2), (last, 1, width, 2)) else None


def _whole(first: Value, rest: Value) -> Value | None:
    """The tensor that is these two side by side."""
    a, b = first.producer, rest.producer
    if a is None or b is None:
        return None
    source = a.args.get("self")
    last, split = len(first.type.shape) - 1, first.type.shape[-1]
    if a is b and a.args.get("dim") == last and a.outputs == (first, rest):
        return source if isinstance(source, Value) else None
    if a.op != "aten.slice.Tensor" or b.op != a.op or b.args["self"] is not source or not isinstance(source, Value):
        return None
    places = tuple(tuple(n.args[key] for key in ("dim", "start", "end", "step")) for n in (a, b))
    return source if places == ((last, 0, split, 1), (last, split, source.type.shape[-1], 1)) else None


#: Ops that keep what the features of a pair have in common, where all their tensors have it.
_ELEMENTWISE = frozenset({"cos", "sin", "mul", "to", "neg", "div", "add"})
_MOVES = frozenset({"unsqueeze", "expand", "index_select", "index", "embedding"})


def are_equal(graph: Graph | None, value: Value, pairing: Pairing) -> bool:
    """Whether the two features of each pair are shown to be equal: ``cat([f, f])``, ``repeat_interleave(f, 2)``, a constant
    that is so, and what is computed from such element by element."""
    node = value.producer
    if node is None:
        return graph is not None and _table_is_equal(graph, value, pairing)
    last = len(value.type.shape) - 1
    name = node.op.removeprefix("aten.").split(".")[0]
    if _doubles(node, name, last) == pairing:
        return True
    if name in _ELEMENTWISE:
        tensors = [operand for operand in node.operands if operand.type.shape[-1:] == value.type.shape[-1:]]
        others = [operand for operand in node.operands if operand not in tensors]
        return (
            bool(tensors) and all(are_equal(graph, operand, pairing) for operand in tensors)
            and all(operand.type.shape[-1:] in ((), (1,)) for operand in others)
        )  # fmt: skip
    if name in _MOVES or name in ("slice", "transpose", "select"):
        table: Any = node.args.get("self", node.args.get("weight"))
        rank = len(table.type.shape)
        indexed = len(node.args["indices"]) if name == "index" else 0
        if rank - 1 in _axes(node) or last in _axes(node) or indexed == rank:
            return False
        return table.type.shape[-1:] == value.type.shape[-1:] and are_equal(graph, table, pairing)
    if name == "reshape" and node.args["self"].type.shape[-1:] == value.type.shape[-1:]:
        return are_equal(graph, node.args["self"], pairing)
    return False


def _axes(node: Node) -> tuple[Any, ...]:
    return tuple(node.args[key] for key in ("dim", "dim0", "dim1") if key in node.args)


def _doubles(node: Node, name: str, last: int) -> Pairing | None:
    """How a node puts each feature twice, if it does."""
    args = node.args
    if name == "cat" and args["dim"] == last:
        return "halves" if len(args["tensors"]) == 2 and args["tensors"][0] is args["tensors"][1] else None
    if name == "tile":
        return "halves" if args["dims"][-1:] == (2,) and math.prod(args["dims"]) == 2 else None
    if name == "repeat_interleave":
        return "neighbours" if args.get("repeats") == 2 and args.get("dim") == last else None
    if name == "reshape":
        stack = args["self"].producer
        if (
            stack is not None
            and stack.op == "aten.stack.default"
            and stack.args["dim"] == len(stack.output.type.shape) - 1 == last + 1
        ):
            tensors = stack.args["tensors"]
            return "neighbours" if len(tensors) == 2 and tensors[0] is tensors[1] else None
    return None


def _table_is_equal(graph: Graph, value: Value, pairing: Pairing) -> bool:
    weight = graph.weight_of(value)
    width = value.type.shape[-1:]
    if weight is None or not width or not isinstance(width[0], int) or width[0] % 2:
        return False
    table = weight.load()
    parts = table.chunk(2, -1) if pairing == "halves" else (table[..., 0::2], table[..., 1::2])
    return torch.equal(*parts)
