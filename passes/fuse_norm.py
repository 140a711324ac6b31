"""Normalizations as one op each, with the residual sum that comes before.

::

    %p = aten.pow.Tensor_Scalar(self=%x, exponent=2)
    %m = aten.mean.dim(self=%p, dim=[2], keepdim=True)
    %e = aten.add.Tensor(self=%m, other=1e-05)               ->   %n = aten.rms_norm.default(
    %r = aten.rsqrt.default(self=%e)                                   input=%x, normalized_shape=[576],
    %y = aten.mul.Tensor(self=%x, other=%r)                            weight=%w, eps=1e-05)
    %n = aten.mul.Tensor(self=%w, other=%y)

    %s = aten.add.Tensor(self=%x, other=%residual)           ->   %n, %s = graphopt.add_layer_norm.default(
    %n = aten.layer_norm.default(input=%s, ...)                        x=%x, residual=%residual, ...)
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from graphopt.ir import Value
from graphopt.patterns import Hole, NumberHole, Ops, TensorHole
from graphopt.pipeline import RulePass
from graphopt.rewrite import Build, Match, Rule, require


def _require_last_axis(m: Match) -> None:
    last = len(m.x.type.shape) - 1
    require(m.axis == (last,), "it does not normalize over the last axis")
    require(isinstance(m.x.type.shape[last], int), "the normalized size is dynamic")


def _require_vector(m: Match, name: str, value: Value) -> None:
    require(value.type.shape == m.x.type.shape[-1:], f"{name} is {value.type}, not one number for each feature")
    require(value.type.dtype == m.x.type.dtype, f"{name} and input differ in dtype")


class FuseRmsNorm(Rule):
    """weight * (x * rsqrt(mean(x ** 2) + eps))  ->  rms_norm(x, weight)"""

    def pattern(self, op: Ops, x: TensorHole, weight: TensorHole, axis: Hole, eps: NumberHole) -> Any:
        square = op.pow(x, 2) | op.mul(x, x)
        root = op.rsqrt(op.add(op.mean(square, axis, True), eps))
        return op.mul(weight, op.mul(x, root))

    def rewrite(self, op: Build, m: Match) -> Value:
        _require_last_axis(m)
        _require_vector(m, "weight", m.weight)
        result: Value = op.rms_norm(m.x, m.x.type.shape[-1:], m.weight, m.eps)
        return result


class FuseLayerNorm(Rule):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias  ->  layer_norm(x, weight, bias)"""

    def pattern(self, op: Ops, x: TensorHole, weight: TensorHole, bias: TensorHole, axis: Hole, eps: NumberHole) -> Any:
        centred = op.sub(x, op.mean(x, axis, True))
        variance = op.add(op.mean(op.pow(centred, 2) | op.mul(centred, centred), axis, True), eps)
        unit = op.div(centred, op.sqrt(variance)) | op.mul(centred, op.rsqrt(variance))
        return op.add(op.mul(unit, weight), bias)

    def rewrite(self, op: Build, m: Match) -> Value:
        _require_last_axis(m)
        _require_vector(m, "weight", m.weight)
        _require_vector(m, "bias", m.bias)
        result: Value = op.layer_norm(m.x, m.x.type.shape[-1:], m.weight, m.bias, m.eps)
        return result


def _require_one_shape(m: Match) -> None:
    require(m.x.type == m.residual.type, f"the summands differ in type: {m.x.type} and {m.residual.type}")
    require(len(m.shape) == 1, "it normalizes over several axes")


class FuseAddLayerNorm(Rule):
    """layer_norm(x + residual)  ->  add_layer_norm(x, residual)"""

    def pattern(
        self, op: Ops, x: TensorHole, residual: TensorHole, shape: Hole, weight: Hole, bias: Hole, eps: NumberHole
    ) -> Any:
        total = op.add(x, residual)
        return op.layer_norm(total, shape, weight, bias, eps), total

    def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
        _require_one_shape(m)
        return tuple(op.graphopt.add_layer_norm(m.x, m.residual, m.shape, m.weight, m.bias, m.eps))


class FuseAddRmsNorm(Rule):
    """rms_norm(x + residual)  ->  add_rms_norm(x, residual)"""

    def pattern(self, op: Ops, x: TensorHole, residual: TensorHole, shape: Hole, weight: Hole, eps: Hole) -> Any:
        total = op.add(x, residual)
        return op.rms_norm(total, shape, weight, eps), total

    def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
        _require_one_shape(m)
        return tuple(op.graphopt.add_rms_norm(m.x, m.residual, m.shape, m.weight, m.eps))


class FuseNorm(RulePass):
    """Spell RMSNorm and LayerNorm as one op, together with the residual sum before them."""

    kind: Literal["fuse_norm"] = "fuse_norm"
    residual: bool = True
    """Fuse the sum before a normalization into it."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"norms"})

    def rules(self) -> list[Rule]:
        rules: list[Rule] = [FuseRmsNorm(), FuseLayerNorm()]
        return rules + [FuseAddLayerNorm(), FuseAddRmsNorm()] * self.residual
