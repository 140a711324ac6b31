"""Einstein sums that are a batched product, as that product."""

from __future__ import annotations

from typing import Any

from graphopt.ir import Value
from graphopt.passes.moves import permuted
from graphopt.patterns import Hole, Ops, TensorHole
from graphopt.rewrite import Build, Match, Rule, applies


class ProductOfEinsum(Rule):
    """einsum("bhid,bhjd->bhij", [a, b])  ->  matmul(a, transpose(b, 2, 3))"""

    def pattern(self, op: Ops, equation: Hole, a: TensorHole, b: TensorHole) -> Any:
        return op.einsum(equation, [a, b], ...)

    def rewrite(self, op: Build, m: Match) -> Value:
        left, right, result = _letters(m.equation, len(m.a.type.shape), len(m.b.type.shape))
        applies(all(len(set(letters)) == len(letters) for letters in (left, right, result)))
        batch = [letter for letter in result if letter in left and letter in right]
        rows = [letter for letter in left if letter not in right]
        columns = [letter for letter in right if letter not in left]
        summed = [letter for letter in left if letter in right and letter not in result]
        applies(len(rows) == len(columns) == len(summed) == 1)
        applies(sorted(result) == sorted([*batch, *rows, *columns]))
        sizes_a, sizes_b = dict(zip(left, m.a.type.shape, strict=True)), dict(zip(right, m.b.type.shape, strict=True))
        applies(all(sizes_a[letter] == sizes_b[letter] for letter in (*batch, *summed)))
        a = permuted(op, m.a, tuple(left.index(letter) for letter in (*batch, *rows, *summed)))
        b = permuted(op, m.b, tuple(right.index(letter) for letter in (*batch, *summed, *columns)))
        made = (*batch, *rows, *columns)
        return permuted(op, op.matmul(a, b), tuple(made.index(letter) for letter in result))


def _letters(equation: str, rank_a: int, rank_b: int) -> tuple[str, str, str]:
    """The letters of each operand and of the result; those behind an ellipsis are digits."""
    operands, arrow, result = equation.replace(" ", "").partition("->")
    left, _, right = operands.partition(",")
    applies(bool(arrow) and right)
    hidden = rank_a - len(left.replace("...", "")) if "..." in left else 0
    applies(
        ("..." in right) == ("..." in left) and (hidden == rank_b - len(right.replace("...", "")) or "..." not in right)
    )
    digits = "".join(map(str, range(hidden)))
    left, right, result = (part.replace("...", digits) for part in (left, right, result))
    return left, right, result
