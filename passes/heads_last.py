"""Attention and rotary embedding on ``[batch, sequence, heads, size]``, so that the transposes around them go.

::

    %t = aten.transpose.int(self=%q, dim0=1, dim1=2)                   %a = graphopt.attention.default(
    ...                                                          ->            q=%q, k=%k, v=%v, ..., heads_last=True)
    %a = graphopt.attention.default(q=%t, k=%u, v=%w, ...)
    %o = aten.transpose.int(self=%a, dim0=1, dim1=2)

That layout is a plain view of what the projections give and take: backends whose kernels read it copy nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from graphopt.ir import Value
from graphopt.passes.moves import MergePermutations
from graphopt.patterns import Ops, TensorHole
from graphopt.pipeline import RulePass
from graphopt.rewrite import Build, Match, Rule, applies


class TurnRotary(Rule):
    """rotary_embedding(transpose(x, 1, 2))  ->  transpose(rotary_embedding(x, heads_last=True), 1, 2)"""

    def pattern(self, op: Ops, x: TensorHole, cos: TensorHole, sin: TensorHole) -> Any:
        return op.graphopt.rotary_embedding(op.transpose(x, 1, 2).shared(), cos, sin, ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        applies(not m.node.args["heads_last"])
        turned = op.graphopt.rotary_embedding(**(m.node.args | {"x": m.x, "heads_last": True}))
        result: Value = op.transpose.int(turned, 1, 2)
        return result


class TurnAttention(Rule):
    """attention(transpose(q), transpose(k), transpose(v))  ->  transpose(attention(q, k, v, heads_last=True))"""

    def pattern(self, op: Ops, q: TensorHole, k: TensorHole, v: TensorHole) -> Any:
        turned = (op.transpose(each, 1, 2).shared() for each in (q, k, v))
        return op.graphopt.attention(*turned, ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        applies(not m.node.args["heads_last"])
        turned = op.graphopt.attention(**(m.node.args | {"q": m.q, "k": m.k, "v": m.v, "heads_last": True}))
        result: Value = op.transpose.int(turned, 1, 2)
        return result


class HeadsLast(RulePass):
    """Read and write attention's heads in place instead of transposing them."""

    kind: Literal["heads_last"] = "heads_last"

    requires: ClassVar[frozenset[str]] = frozenset({"attention"})

    def rules(self) -> list[Rule]:
        return [TurnRotary(), TurnAttention(), MergePermutations()]
