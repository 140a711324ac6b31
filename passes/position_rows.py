"""Values of positions at each row's own positions: a batch whose rows are of different lengths.

What a trace computes for positions ``0 .. sequence - 1`` is one for the whole batch, ``[sequence, ...]``. Where row b's new
tokens stand at ``positions[b]``, it is taken there, with the batch in front: ``[batch, sequence, ...]``. Tables that are known
before the run are computed for all positions and looked up; what is of queries by keys (a relative bias) is computed from
the positions instead, so that nothing has a row for every position and a column for every other one.
"""

from __future__ import annotations

from typing import Any

from graphopt.dims import Size
from graphopt.errors import GraphError
from graphopt.ir import Node, Value, map_arg
from graphopt.passes.tails import ELEMENTWISE, Tails

_MOVES = frozenset({"aten.arange", "aten.unsqueeze", "aten.transpose", "aten.permute", "aten.embedding", "aten.expand"})


class PositionRows:
    """Takes, before the tails' place, values at ``positions`` ``[batch, sequence]``.

    ``padded``: values that follow the columns of a padding mask instead; of those the last columns are taken."""

    def __init__(self, tails: Tails, positions: Value, padded: set[Value]) -> None:
        self.tails, self.positions, self.padded = tails, positions, padded
        self.batch = positions.type.shape[0]
        if isinstance(self.batch, int) and self.batch > 1:
            raise GraphError(f"the batch is fixed at {self.batch}", hint="let it be dynamic: name its axis")
        self.are_tables = isinstance(tails.total, int)
        self._picked: dict[tuple[Value, int], Value] = {}

    def at(self, value: Value, axis: int, rank: int) -> Value:
        """The value for the new tokens of each row, to meet a tensor of ``rank`` whose first axis is the batch."""
        return self._fit(self._at(value, axis), value, rank)

    def _owns(self, value: Value) -> bool:
        """Whether its first axis is the batch already."""
        shape = value.type.shape
        return bool(shape) and shape[0] == self.batch

    def _at(self, value: Value, axis: int) -> Value:
        """Of the value's own rank if that has a batch, with the batch in front otherwise."""
        key = value, axis
        if key not in self._picked:
            node = value.producer
            made = None if node is None or not self._is_cheap(node, value) else self._pushed(node, value, axis)
            self._picked[key] = made if made is not None else self._taken(value, axis)
        return self._picked[key]

    def _is_cheap(self, node: Node, value: Value) -> bool:
        """Whether to compute it for the new tokens only rather than to look it up in a table."""
        packet = node.op.rpartition(".")[0]
        rows = sum(size == self.tails.new for size in value.type.shape)
        return not self.are_tables or rows > 1 or self._owns(value) or packet in _MOVES or packet == "aten.slice"

    def _fit(self, picked: Value, value: Value, rank: int) -> Value:
        """Ones between the batch and the rest, up to ``rank``."""
        own = len(value.type.shape)
        if self._owns(value):
            if own not in (rank, rank - 1):
                raise GraphError(f"%{value.name} has the batch where what it meets has not")
            return picked
        batch, *rest = picked.type.shape
        if own == rank:
            if rest[0] != 1:
                raise GraphError(f"%{value.name} differs along the batch's axis, and cannot be taken for each row")
            rest = rest[1:]
        return self._shaped(picked, (batch, *[1] * (rank - 1 - len(rest)), *rest))

    def _shaped(self, value: Value, shape: tuple[Size, ...]) -> Value:
        node = value.producer
        if value.type.shape != shape and node is not None and node.op == "aten.reshape.default":
            value = node.args["self"]
        return value if value.type.shape == shape else self._insert("aten.reshape.default", self=value, shape=shape)

    def _insert(self, op: str, /, **args: Any) -> Value:
        return self.tails.graph.insert(op, args, before=self.tails.place, origin=("insert_kv_cache",)).output

    def _taken(self, value: Value, axis: int) -> Value:
        """Rows of the value for all positions."""
        if value in self.padded:
            last = self.tails.last(value, axis)
            return last if self._owns(value) else self._insert("aten.unsqueeze.default", self=last, dim=0)
        whole = self.tails.whole(value)
        if self._owns(value):
            first = whole if axis == 1 else self._insert("aten.transpose.int", self=whole, dim0=1, dim1=axis)
            count = self._insert(
                "aten.arange.start_step", start=0, end=self.batch, step=1, dtype=self.positions.type.dtype
            )
            rows = self._insert("aten.unsqueeze.default", self=count, dim=1)
            found = self._insert("aten.index.Tensor", self=first, indices=(rows, self.positions))
            return found if axis == 1 else self._insert("aten.transpose.int", self=found, dim0=1, dim1=axis)
        return self._looked_up(whole, axis)

    def _looked_up(self, table: Value, axis: int) -> Value:
        self._check_rows(table.type.shape[axis])
        ones, rest = table.type.shape[:axis], table.type.shape[axis:]
        if all(size == 1 for size in ones):
            found = self._insert("aten.index.Tensor", self=self._shaped(table, rest), indices=(self.positions,))
            batch, sequence, *inner = found.type.shape
            return self._shaped(found, (batch, *ones, sequence, *inner))
        found = self._insert("aten.index.Tensor", self=table, indices=(*[None] * axis, self.positions))
        if axis == 0:
            return found
        order = (axis, *(place for place in range(len(found.type.shape)) if place != axis))
        return self._insert("aten.permute.default", self=found, dims=order)

    def _check_rows(self, rows: Size) -> None:
        """A table of positions must have one for every token of a static cache."""
        total = self.tails.total
        if isinstance(rows, int) and isinstance(total, int) and rows < total:
            raise GraphError(
                f"the model has positions for {rows} tokens, a cache of {total} is longer",
                hint=f"set max_length to {rows} at most",
            )

    def _pushed(self, node: Node, value: Value, axis: int) -> Value | None:
        """Computed from the operands at the positions; None where the op is not known to allow that."""
        packet, args = node.op.rpartition(".")[0], node.args
        if packet == "aten.arange":
            return self._counted(node, value)
        if packet in ELEMENTWISE:
            rank = len(value.type.shape)
            changed = {
                name: map_arg(arg, lambda leaf: self._aligned(leaf, axis, rank, self._owns(value)))
                for name, arg in args.items()
            }
            return self._remade(node, changed)
        if packet == "aten.slice" and args["dim"] == axis:
            table = args["self"]
            is_head = (args["start"], args["end"], args["step"]) == (0, self.tails.new, 1)
            return self._looked_up(table, axis) if is_head and not self.tails.depends(table) else None
        if packet == "aten.expand":
            return self._expanded(node, value, axis)
        if packet == "aten.embedding" and axis < len(args["indices"].type.shape):
            self._check_rows(args["weight"].type.shape[0])
            return self._remade(node, args | {"indices": self._at(args["indices"], axis)})
        return self._moved(node, value, axis)

    def _counted(self, node: Node, value: Value) -> Value | None:
        """``start, start + step, ...`` is ``start + step * position``."""
        start, step = node.args["start"], node.args["step"]
        if not isinstance(start, int) or not isinstance(step, int) or value.type.shape != (self.tails.new,):
            return None
        found = self.positions
        if step != 1:
            found = self._insert("aten.mul.Tensor", self=found, other=step)
        if start != 0:
            found = self._insert("aten.add.Tensor", self=found, other=start)
        if found.type.dtype != value.type.dtype:
            found = self._insert("aten.to.dtype", self=found, dtype=value.type.dtype)
        return found

    def _moved(self, node: Node, value: Value, axis: int) -> Value | None:
        """Ops that only move axes: the same, one axis further where the batch comes in front."""
        packet, args = node.op.rpartition(".")[0], node.args
        source = args.get("self")
        if not isinstance(source, Value) or self._owns(source) != self._owns(value):
            return None
        lead = 0 if self._owns(source) else 1
        if packet == "aten.unsqueeze" and args["dim"] != axis and (lead or args["dim"] != 0):
            inner = self._at(source, axis - (axis > args["dim"]))
            return self._remade(node, args | {"self": inner, "dim": args["dim"] + lead})
        if packet == "aten.transpose" and (lead or 0 not in (args["dim0"], args["dim1"])):
            a, b = args["dim0"], args["dim1"]
            inner = self._at(source, b if axis == a else a if axis == b else axis)
            return self._remade(node, args | {"self": inner, "dim0": a + lead, "dim1": b + lead})
        if packet == "aten.permute" and (lead or args["dims"][0] == 0):
            inner = self._at(source, args["dims"][axis])
            dims = tuple(dim + lead for dim in args["dims"])
            return self._remade(node, args | {"self": inner, "dims": (*range(lead), *dims)})
        if packet == "aten.slice" and args["dim"] != axis and (lead or args["dim"] != 0):
            sized = {key: self.tails.at_total(args[key]) for key in ("start", "end")}
            return self._remade(node, args | sized | {"self": self._at(source, axis), "dim": args["dim"] + lead})
        return None

    def _expanded(self, node: Node, value: Value, axis: int) -> Value:
        source = node.args["self"]
        rank, own = len(value.type.shape), self._owns(value)
        target = rank if own else rank + 1
        inner = self._aligned(source, axis, rank, own)
        size: tuple[Size, ...] = tuple(
            self.tails.new if place == axis else self.tails.at_total(given)
            for place, given in enumerate(value.type.shape)
        )
        if len(size) < target:
            size = (self.batch, *size)
        return self._insert("aten.expand.default", self=inner, size=size)

    def _aligned(self, leaf: Any, axis: int, rank: int, owned: bool) -> Any:
        """An operand of an op that broadcasts from the last axis on, for a result of ``rank``."""
        if not isinstance(leaf, Value):
            return self.tails.at_total(leaf)
        own = axis - (rank - len(leaf.type.shape))
        if own < 0 or leaf.type.shape[own] != self.tails.new or not self.tails.depends(leaf):
            return self.tails.whole(leaf)
        return self._fit(self._at(leaf, own), leaf, rank if owned else rank + 1)

    def _remade(self, node: Node, args: dict[str, Any]) -> Value:
        return self.tails.graph.insert(
            node.op, args, before=self.tails.place, origin=(*node.origin, "insert_kv_cache")
        ).output
