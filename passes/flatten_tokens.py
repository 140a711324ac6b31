"""Linears and what lies between them on ``[tokens, features]``, so that a backend runs them as plain matrix products.

::

    %l = aten.linear.default(input=%x, weight=%w)                %f = aten.reshape.default(self=%x, shape=[batch*sequence, 384])
    %g = aten.gelu.default(self=%l)                       ->     %l = aten.linear.default(input=%f, weight=%w)
                                                                 %g = aten.gelu.default(self=%l)
                                                                 %r = aten.reshape.default(self=%g, shape=[batch, sequence, 384])

Reshapes move down through whatever works token by token and meet the next linear's, where both go.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from graphopt.dims import Size
from graphopt.ir import Value
from graphopt.passes.moves import MergeReshapes
from graphopt.patterns import Hole, Ops, Pattern, TensorHole
from graphopt.pipeline import RulePass
from graphopt.rewrite import Build, Match, Rule, applies, require

UNARY = ("gelu", "silu", "relu", "tanh", "sigmoid", "neg", "graphopt.quick_gelu")
NORMS = ("layer_norm", "rms_norm")
BINARY = ("add", "mul", "graphopt.gated_activation")
ADD_NORMS = ("graphopt.add_layer_norm", "graphopt.add_rms_norm")


def _named(op: Ops, path: str) -> Any:
    return functools.reduce(getattr, path.split("."), op)


def _any_of(patterns: Iterable[Pattern]) -> Pattern:
    return functools.reduce(operator.or_, patterns)


def _only_tokens(flat: Value, value: Value) -> None:
    """``value`` is ``flat``, ``[tokens, features]``, with the tokens split into several axes."""
    applies(len(flat.type.shape) == 2 and len(value.type.shape) > 2)
    applies(flat.type.shape[1] == value.type.shape[-1])


def _only_features(m: Match) -> None:
    """A norm works token by token if it is over the last axis alone."""
    applies(len(m.node.args.get("normalized_shape", (1,))) == 1)


def _tokens(shape: tuple[Size, ...]) -> Size:
    return functools.reduce(operator.mul, shape[:-1], 1)


class FlattenLinear(Rule):
    """linear(x)  ->  reshape(linear(reshape(x, [tokens, features])))"""

    def pattern(self, op: Ops, x: TensorHole, weight: TensorHole, bias: Hole) -> Any:
        return op.linear(x, weight, bias)

    def rewrite(self, op: Build, m: Match) -> Value:
        shape = m.x.type.shape
        applies(len(shape) > 2)
        flat = op.reuse("reshape.default", m.x, (_tokens(shape), shape[-1]))
        result: Value = op.reshape(op.linear(flat, m.weight, m.bias), m.roots[0].type.shape)
        return result


class FlattenUnary(Rule):
    """f(reshape(x))  ->  reshape(f(x)) for f token by token"""

    def pattern(self, op: Ops, x: TensorHole, shape: Hole) -> Any:
        return _any_of(_named(op, path)(op.reshape(x, shape).shared(), ...) for path in UNARY + NORMS)

    def rewrite(self, op: Build, m: Match) -> Value:
        first = next(iter(m.node.args))
        _only_tokens(m.x, m.node.args[first])
        _only_features(m)
        (flat,) = op.call(m.node.op, m.node.args | {first: m.x})
        result: Value = op.reshape(flat, m.roots[0].type.shape)
        return result


class FlattenBinary(Rule):
    """f(reshape(a), b)  ->  reshape(f(a, reshape(b))) for f token by token"""

    def pattern(self, op: Ops, a: TensorHole, b: TensorHole, shape: Hole) -> Any:
        flat = op.reshape(a, shape).shared()
        return _any_of(_named(op, path)(flat, b, ...) | _named(op, path)(b, flat, ...) for path in BINARY)

    def rewrite(self, op: Build, m: Match) -> Value:
        (flat,) = _flatten_pair(op, m)
        result: Value = op.reshape(flat, m.roots[0].type.shape)
        return result


class FlattenChunks(Rule):
    """chunk(reshape(x), last axis)  ->  reshape of each of chunk(x), as gates are cut off a product"""

    def __init__(self, count: int) -> None:
        self.count = count

    def pattern(self, op: Ops, x: TensorHole, shape: Hole, dim: Hole) -> Any:
        parts = op.chunk(op.reshape(x, shape).shared(), self.count, dim)
        return tuple(parts[index] for index in range(self.count))

    def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
        whole = m.node.args["self"]
        _only_tokens(m.x, whole)
        applies(m.dim in (-1, len(whole.type.shape) - 1))
        flat = op.call(m.node.op, m.node.args | {"self": m.x, "dim": 1})
        return tuple(op.reshape(part, root.type.shape) for part, root in zip(flat, m.roots, strict=True))


class FlattenAddNorm(Rule):
    """add_norm(reshape(a), b)  ->  reshape(add_norm(a, reshape(b)))"""

    def __init__(self, path: str, flat: int) -> None:
        self.path, self.flat = path, flat

    def pattern(self, op: Ops, a: TensorHole, b: TensorHole, shape: Hole) -> Any:
        pair = [op.reshape(a, shape).shared(), b]
        call = _named(op, self.path)(*(pair if self.flat == 0 else reversed(pair)), ...)
        return call[0], call[1]

    def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
        return tuple(op.reshape(flat, m.roots[0].type.shape) for flat in _flatten_pair(op, m))


def _flatten_pair(op: Build, m: Match) -> tuple[Value, ...]:
    """The matched op with both of its first operands flat."""
    names = list(m.node.args)[:2]
    split = next(node.output for node in m.found.nodes.values() if node.op == "aten.reshape.default")
    _only_tokens(m.a, split)
    _only_features(m)
    require(m.b.type == split.type, "the operands differ in type")
    other = op.reuse("reshape.default", m.b, m.a.type.shape)
    pair = (m.a, other) if m.node.args[names[0]] is split else (other, m.a)
    return op.call(m.node.op, m.node.args | dict(zip(names, pair, strict=True)))


class FlattenTokens(RulePass):
    """Run linears, norms and activations on two axes: tokens and features."""

    kind: Literal["flatten_tokens"] = "flatten_tokens"

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"flat_tokens"})

    def rules(self) -> list[Rule]:
        add_norms = [FlattenAddNorm(path, flat) for path in ADD_NORMS for flat in (0, 1)]
        chunks = [FlattenChunks(count) for count in (2, 3)]
        return [FlattenLinear(), FlattenUnary(), FlattenBinary(), *chunks, *add_norms, MergeReshapes()]
