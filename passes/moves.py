"""Rules for ops that only move elements: two in a row are one, or none."""

from __future__ import annotations

from typing import Any

from graphopt.ir import Value
from graphopt.patterns import Hole, NumberHole, Ops, TensorHole
from graphopt.rewrite import Build, Match, Rule, require


def same_type(m: Match) -> Value:
    """``x`` itself, if it is what the match gives."""
    require(m.x.type == m.roots[0].type, f"the result is {m.roots[0].type}, not {m.x.type}")
    found: Value = m.x
    return found


class MergeReshapes(Rule):
    """reshape(reshape(x))  ->  reshape(x)"""

    def pattern(self, op: Ops, x: TensorHole, inner: Hole, outer: Hole) -> Any:
        return op.reshape(op.reshape(x, inner).shared(), outer)

    def rewrite(self, op: Build, m: Match) -> Value:
        if m.x.type == m.roots[0].type:
            return same_type(m)
        result: Value = op.reshape(m.x, m.outer)
        return result


class MergePermutations(Rule):
    """transpose(permute(x))  ->  permute(x), transpose(x) or x"""

    def pattern(
        self, op: Ops, x: TensorHole, a: NumberHole, b: NumberHole, c: NumberHole, d: NumberHole, first: Hole, then: Hole
    ) -> Any:  # fmt: skip
        inner = op.transpose(x, a, b).shared() | op.permute(x, first).shared()
        return op.transpose(inner, c, d) | op.permute(inner, then)

    def rewrite(self, op: Build, m: Match) -> Value:
        rank = len(m.x.type.shape)
        first = m.first if m.first is not None else _swapped(rank, m.a, m.b)
        then = m.then if m.then is not None else _swapped(rank, m.c, m.d)
        return permuted(op, m.x, tuple(first[axis] for axis in then))


def _swapped(rank: int, a: int, b: int) -> tuple[int, ...]:
    return tuple(b if axis == a else a if axis == b else axis for axis in range(rank))


def permuted(op: Build, x: Value, order: tuple[int, ...]) -> Value:
    """``x`` with its axes in this order, in the normal spelling."""
    moved = [axis for axis, source in enumerate(order) if axis != source]
    if not moved:
        return x
    result: Value = op.transpose.int(x, moved[0], moved[1]) if len(moved) == 2 else op.permute(x, order)
    return result


MOVES: tuple[Rule, ...] = (MergeReshapes(), MergePermutations())
