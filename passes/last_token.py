"""Logits of each row's last new token only: what generation reads.

::

    %x: f32[batch, sequence, 576]                       %last = aten.slice.Tensor(self=%x, dim=1, start=sequence - 1)
    %logits = aten.linear(%norm(%x), %head)       ->    %logits: f32[batch, 1, 49152] = aten.linear(%norm(%last), %head)

The choice moves up through whatever works token by token: the head, the norm before it, the last layer's projections and
experts' gates, up to its attention, as long as nothing else reads what is cut.
"""

from __future__ import annotations

from typing import Any

import torch

from graphopt.dims import Dim
from graphopt.errors import GraphError
from graphopt.ir import Graph, Node, Value, map_arg
from graphopt.passes.tails import ELEMENTWISE
from graphopt.runtime.cache import LOGITS, NEW_LENGTHS
from graphopt.tensors import TensorType

_ORIGIN = ("insert_kv_cache",)
_TOKENWISE = ELEMENTWISE | {
    f"aten.{name}" for name in ("linear", "silu", "gelu", "relu", "softplus", "rms_norm", "layer_norm", "clone")
}
_REDUCTIONS = frozenset({"aten.mean", "aten.sum", "aten.amax", "aten.softmax", "aten.var"})


class LastToken:
    """Cuts ``logits`` down to one token a row.

    ``counted``: rows have different numbers of new tokens, which the input ``new_lengths`` ``[batch]`` says; else the last
    column is every row's last token."""

    def __init__(self, graph: Graph, sequence: str, counted: bool) -> None:
        self.graph, self.new, self.counted = graph, Dim.named(sequence), counted
        self._last: dict[Value, Value] = {}

    def run(self) -> None:
        """GraphError if there are no logits ``[batch, sequence, vocabulary]``."""
        logits = self.graph.outputs.get(LOGITS)
        if logits is None or len(logits.type.shape) != 3 or logits.type.shape[1] != self.new:
            raise GraphError(
                f"there is no output {LOGITS} [batch, {self.new}, vocabulary] to take the last token of",
                hint="set logits: all",
            )
        self.batch = logits.type.shape[0]
        if self.counted:
            self.lengths = self.graph.add_input(NEW_LENGTHS, TensorType(torch.int64, (self.batch,)))
        for node in reversed(self._serving(logits)):
            self._last[node.output] = self._moved(node)
        self.graph.outputs[LOGITS] = self._of(logits)
        self.graph.prune()

    def _serving(self, logits: Value) -> list[Node]:
        """Nodes that work token by token for the logits alone, the last one first."""
        found: dict[Node, None] = {}
        for node in reversed(list(self.graph.nodes)):
            values = node.outputs
            serves = all(user in found for value in values for user in value.users) and not any(
                self.graph.is_output(value) and value is not logits for value in values
            )
            if serves and self._is_tokenwise(node) and (values[0] is logits or values[0].users):
                found[node] = None
        return list(found)

    def _of(self, value: Value) -> Value:
        """A value of tokens, of the last ones only."""
        if value not in self._last:
            self._last[value] = self._cut(value)
        return self._last[value]

    def _is_tokens(self, leaf: Any) -> bool:
        return isinstance(leaf, Value) and leaf.type.shape[:2] == (self.batch, self.new)

    def _is_tokenwise(self, node: Node) -> bool:
        """Whether its result at a token depends on its operands at that token alone."""
        packet, shape = node.op.rpartition(".")[0], node.outputs[0].type.shape
        if not self._is_tokens(node.outputs[0]):
            return False
        if any(self.new in operand.type.shape and not self._is_tokens(operand) for operand in node.operands):
            return False
        if packet in _REDUCTIONS:
            dims = node.args["dim"]
            dims = dims if isinstance(dims, tuple) else (dims,)
            return all(isinstance(dim, int) and dim >= 2 for dim in dims) and len(shape) > 2
        same_rank = all(len(operand.type.shape) == len(shape) for operand in node.operands if self._is_tokens(operand))
        return packet in _TOKENWISE and same_rank and len(node.outputs) == 1

    def _moved(self, node: Node) -> Value:
        args = {
            name: map_arg(arg, lambda leaf: self._of(leaf) if self._is_tokens(leaf) else leaf)
            for name, arg in node.args.items()
        }
        made = self.graph.insert(node.op, args, before=node, origin=(*node.origin, *_ORIGIN))
        return made.output

    def _cut(self, value: Value) -> Value:
        place = self._after(value.producer)

        def insert(op: str, /, **args: object) -> Value:
            return self.graph.insert(op, args, before=place, origin=_ORIGIN).output

        if not self.counted:
            return insert("aten.slice.Tensor", self=value, dim=1, start=self.new - 1, end=self.new)
        count = insert("aten.arange.start_step", start=0, end=self.batch, step=1, dtype=torch.int64)
        rows = insert("aten.unsqueeze.default", self=count, dim=1)
        last = insert("aten.sub.Tensor", self=insert("aten.unsqueeze.default", self=self.lengths, dim=1), other=1)
        return insert("aten.index.Tensor", self=value, indices=(rows, last))

    def _after(self, node: Node | None) -> Node | None:
        """The node before which what uses ``node`` can stand; None for the end."""
        following = iter(self.graph.nodes)
        if node is None:
            return next(following, None)
        next(each for each in following if each is node)
        return next(following, None)
