"""A pass of one's own in twenty lines: division by a number becomes multiplication by its inverse.

    python examples/custom_pass.py

A package registers its passes by an entry point of the group ``graphopt.passes``; then pipelines in YAML can name them.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from graphopt import parse
from graphopt.ir import Value
from graphopt.patterns import NumberHole, Ops, TensorHole
from graphopt.pipeline import RulePass, run_passes
from graphopt.rewrite import Build, Match, Rule, require


class MultiplyByInverse(Rule):
    """x / c  ->  x * (1 / c)"""

    def pattern(self, op: Ops, x: TensorHole, c: NumberHole) -> Any:
        return op.div(x, c)

    def rewrite(self, op: Build, m: Match) -> Value:
        require(m.c != 0, "division by zero")
        result: Value = op.mul.Tensor(m.x, 1 / m.c)
        return result


class InvertDivisions(RulePass):
    """Multiply instead of dividing."""

    kind: Literal["invert_divisions"] = "invert_divisions"
    requires: ClassVar[frozenset[str]] = frozenset()

    def rules(self) -> list[Rule]:
        return [MultiplyByInverse()]


GRAPH = """graph {
  dim batch in [1, 64]
  input %x: f32[batch, 16]
  %half: f32[batch, 16] = aten.div.Tensor(self=%x, other=2.0)
  output y = %half
}
"""


def main() -> None:
    graph = parse(GRAPH)
    (report,) = run_passes(graph, [InvertDivisions()])
    print(graph)
    print(report.matches, "", report.diff, sep="\n")


if __name__ == "__main__":
    main()
