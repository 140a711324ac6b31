"""Values of positions, computed for past and new ones, and their last rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from graphopt.dims import Dim, Size, evaluate, names_of
from graphopt.ir import Graph, Node, Value, leaves, map_arg
from graphopt.tensors import TensorType

#: Ops whose result at a position depends on their operands at that position.
ELEMENTWISE = frozenset(
    f"aten.{name}"
    for name in (
        "add", "sub", "rsub", "mul", "div", "neg", "cos", "sin", "exp", "log", "sqrt", "rsqrt", "pow", "abs", "to", "where",
        "masked_fill", "clamp", "maximum", "minimum", "floor_divide", "remainder", "le", "lt", "ge", "gt", "eq", "ne",
        "bitwise_and", "bitwise_or", "bitwise_not", "logical_and", "logical_or", "logical_not", "floor", "tanh", "sigmoid",
    )
)  # fmt: skip


@dataclass
class Tails:
    """Makes, before ``place``, what the graph's values are when there are ``total`` positions, the last of them being the
    ``sequence`` new ones. ``whole_input`` makes an input of the graph for all positions."""

    graph: Graph
    sequence: str
    total: Size
    place: Node
    whole_input: Callable[[Value, TensorType], Value]

    def __post_init__(self) -> None:
        self.new = Dim.named(self.sequence)
        self.start = self.total - self.new
        self._wholes: dict[Value, Value] = {}
        self._tails: dict[tuple[Value, int], Value] = {}
        self._depends: dict[Value, bool] = {}

    def depends(self, value: Value) -> bool:
        """Whether a value depends on how many positions there are."""
        if value not in self._depends:
            node = value.producer
            own = any(self.sequence in names_of(size) for size in value.type.shape)
            args = () if node is None else node.args.values()
            said = any(isinstance(leaf, Dim) and self.sequence in leaf.names for arg in args for leaf in leaves(arg))
            inner = node is not None and any(self.depends(operand) for operand in node.operands)
            self._depends[value] = own or said or inner
        return self._depends[value]

    def whole(self, value: Value) -> Value:
        """The value for all positions."""
        if value.producer is None and not self.depends(value):
            return value
        if value not in self._wholes:
            node = value.producer
            if node is None:
                shape = tuple(self.at_total(size) for size in value.type.shape)
                self._wholes[value] = self.whole_input(value, TensorType(value.type.dtype, shape))
            else:
                made = self._insert(node, {name: map_arg(arg, self._whole_leaf) for name, arg in node.args.items()})
                self._wholes.update(zip(node.outputs, made.outputs, strict=True))
        return self._wholes[value]

    def _whole_leaf(self, leaf: Any) -> Any:
        return self.whole(leaf) if isinstance(leaf, Value) else self.at_total(leaf)

    def at_total(self, leaf: Any) -> Any:
        """An argument that is a size, for all positions."""
        if not isinstance(leaf, Dim) or self.sequence not in leaf.names:
            return leaf
        return evaluate(leaf, {name: self.total if name == self.sequence else Dim.named(name) for name in leaf.names})

    def _insert(self, node: Node, args: dict[str, Any], type: TensorType | None = None) -> Node:
        types = None if type is None else [type]
        return self.graph.insert(node.op, args, types, before=self.place, origin=(*node.origin, "insert_kv_cache"))

    def last(self, value: Value, axis: int) -> Value:
        """The value for all positions, of which along ``axis`` only the new ones."""
        if value.type.shape[axis] != self.new:
            return self.whole(value)
        key = value, axis
        if key not in self._tails:
            node = value.producer
            made = None if node is None else self._pushed(node, value, axis)
            self._tails[key] = made if made is not None else self._cut(self.whole(value), axis)
        return self._tails[key]

    def _cut(self, whole: Value, axis: int) -> Value:
        args = {"self": whole, "dim": axis, "start": self.start, "end": self.total}
        return self.graph.insert("aten.slice.Tensor", args, before=self.place, origin=("insert_kv_cache",)).output

    def _pushed(self, node: Node, value: Value, axis: int) -> Value | None:
        """The tail computed from the operands' tails; None where the op is not known to allow that."""
        packet, args = node.op.rpartition(".")[0], node.args
        if packet == "aten.arange" and isinstance(args["start"], int) and isinstance(args["step"], int):
            start = args["start"] + self.start * args["step"]
            return self._insert(node, {**args, "start": start, "end": self.at_total(args["end"])}).output
        if packet in ELEMENTWISE:
            rank = len(value.type.shape)
            return self._insert(
                node, {name: map_arg(arg, lambda leaf: self._aligned(leaf, axis, rank)) for name, arg in args.items()}
            ).output
        if packet == "aten.unsqueeze" and args["dim"] != axis:
            inner = self.last(args["self"], axis - (axis > args["dim"]))
            return self._insert(node, {**args, "self": inner}).output
        if packet == "aten.transpose":
            a, b = args["dim0"], args["dim1"]
            inner = self.last(args["self"], b if axis == a else a if axis == b else axis)
            return self._insert(node, {**args, "self": inner}).output
        if packet == "aten.permute":
            return self._insert(node, {**args, "self": self.last(args["self"], args["dims"][axis])}).output
        if packet == "aten.embedding" and axis < len(args["indices"].type.shape):
            return self._insert(node, {**args, "indices": self.last(args["indices"], axis)}).output
        if packet == "aten.slice" and args["dim"] == axis and not self.depends(args["self"]):
            if (args["start"], args["end"], args["step"]) != (0, self.new, 1):
                return None
            rows = {"self": self.whole(args["self"]), "start": self.start, "end": self.total}
            return self._insert(node, {**args, **rows}, value.type).output
        if packet == "aten.slice" and args["dim"] != axis:
            sized = {key: self.at_total(args[key]) for key in ("start", "end")}
            return self._insert(node, {**args, **sized, "self": self.last(args["self"], axis)}).output
        if packet == "aten.expand":
            lead = len(value.type.shape) - len(args["self"].type.shape)
            inner = self.last(args["self"], axis - lead) if axis >= lead else self.whole(args["self"])
            size = tuple(self.new if place == axis else self.at_total(s) for place, s in enumerate(args["size"]))
            return self._insert(node, {**args, "self": inner, "size": size}).output
        return None

    def _aligned(self, leaf: Any, axis: int, rank: int) -> Any:
        """An operand of an element-wise op, broadcast from the last axis on."""
        if not isinstance(leaf, Value):
            return self.at_total(leaf)
        own = axis - (rank - len(leaf.type.shape))
        return self.last(leaf, own) if own >= 0 else self.whole(leaf)
