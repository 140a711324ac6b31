"""Activations as one op each, gated ones with their product.

::

    %h = aten.div.Tensor(self=%x, other=1.4142135623730951)
    %e = aten.erf.default(self=%h)                           ->   %g = aten.gelu.default(self=%x)
    %o = aten.add.Tensor(self=%e, other=1.0)
    %m = aten.mul.Tensor(self=%x, other=0.5)
    %g = aten.mul.Tensor(self=%m, other=%o)

    %s = aten.silu.default(self=%gate)                       ->   %y = graphopt.gated_activation.default(
    %y = aten.mul.Tensor(self=%s, other=%up)                           gate=%gate, up=%up, activation="silu")
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from graphopt.ir import Value
from graphopt.patterns import NumberHole, Ops, Pattern, TensorHole
from graphopt.pipeline import RulePass
from graphopt.rewrite import Build, Match, Rule, require


def _half_of(op: Ops, x: Pattern, factor: Pattern) -> Pattern:
    """``0.5 * x * factor`` in any grouping."""
    return op.mul(op.mul(x, 0.5), factor) | op.mul(x, op.mul(factor, 0.5)) | op.mul(op.mul(x, factor), 0.5)


class FuseGeluErf(Rule):
    """0.5 * x * (1 + erf(x / sqrt(2)))  ->  gelu(x)"""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        inner = op.div(x, math.sqrt(2)) | op.mul(x, math.sqrt(0.5))
        return _half_of(op, x, op.add(op.erf(inner), 1))

    def rewrite(self, op: Build, m: Match) -> Value:
        result: Value = op.gelu(m.x)
        return result


class FuseGeluTanh(Rule):
    """0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x ** 3)))  ->  gelu(x, approximate="tanh")"""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        root = math.sqrt(2 / math.pi)
        cubic = op.mul(op.add(x, op.mul(op.pow(x, 3), 0.044715)), root)
        factored = op.mul(op.mul(x, root), op.add(op.mul(op.mul(x, x), 0.044715), 1))
        nested = op.mul(op.mul(x, root), op.add(op.mul(op.mul(x, 0.044715), x), 1))
        return _half_of(op, x, op.add(op.tanh(cubic | factored | nested), 1))

    def rewrite(self, op: Build, m: Match) -> Value:
        result: Value = op.gelu(m.x, approximate="tanh")
        return result


class FuseSilu(Rule):
    """x * sigmoid(x)  ->  silu(x)"""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        return op.mul(x, op.sigmoid(x))

    def rewrite(self, op: Build, m: Match) -> Value:
        result: Value = op.silu(m.x)
        return result


class FuseQuickGelu(Rule):
    """x * sigmoid(alpha * x)  ->  quick_gelu(x, alpha)"""

    def pattern(self, op: Ops, x: TensorHole, alpha: NumberHole) -> Any:
        return op.mul(x, op.sigmoid(op.mul(x, alpha)))

    def rewrite(self, op: Build, m: Match) -> Value:
        result: Value = op.graphopt.quick_gelu(m.x, alpha=float(m.alpha))
        return result


class FuseGated(Rule):
    """activation(gate) * up  ->  gated_activation(gate, up)"""

    def pattern(self, op: Ops, gate: TensorHole, up: TensorHole) -> Any:
        activated = (
            op.silu(gate).tag(activation="silu")
            | op.gelu(gate).tag(activation="gelu")
            | op.gelu(gate, approximate="tanh").tag(activation="gelu_tanh")
        )
        return op.mul(activated, up)

    def rewrite(self, op: Build, m: Match) -> Value:
        require(m.gate.type == m.up.type, f"gate and up differ in type: {m.gate.type} and {m.up.type}")
        result: Value = op.graphopt.gated_activation(m.gate, m.up, activation=m.activation)
        return result


class FuseActivation(RulePass):
    """Spell GELU (exact, tanh, quick), SiLU and gated units (SwiGLU, GeGLU) as one op each."""

    kind: Literal["fuse_activation"] = "fuse_activation"
    gated: bool = True
    """Fuse the product of a gated unit into its activation."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"activations"})

    def rules(self) -> list[Rule]:
        rules: list[Rule] = [FuseGeluErf(), FuseGeluTanh(), FuseSilu(), FuseQuickGelu()]
        return rules + [FuseGated()] * self.gated
