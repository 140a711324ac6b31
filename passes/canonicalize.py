"""One spelling for everything: what the other passes start from.

::

    %a = aten.add.Tensor(self=%x, other=0)
    %v = aten.view.default(self=%a, size=[batch, -1])       ->     %v = aten.reshape.default(self=%x, shape=[batch, 384])
    %w = aten.view.default(self=%x, size=[batch, 384])

No-ops go, every op is put into its normal form (:mod:`graphopt.normalize`), constants are folded, and of equal
sub-graphs one is kept.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from graphopt import operators
from graphopt.execution import run
from graphopt.ir import Graph, Node, Value, leaves
from graphopt.normalize import normalize
from graphopt.passes.moves import MOVES, same_type
from graphopt.patterns import Hole, Ops, TensorHole
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Build, Match, RewriteLog, Rule, applies, apply_rules, require
from graphopt.tensors import TensorType, Weight


class DropAddZero(Rule):
    """x + 0, x - 0  ->  x"""

    def pattern(self, op: Ops, x: TensorHole, alpha: Hole) -> Any:
        return op.add(x, 0, alpha=alpha) | op.sub(x, 0, alpha=alpha)

    def rewrite(self, op: Build, m: Match) -> Value:
        return same_type(m)


class DropMulOne(Rule):
    """x * 1, x / 1, x ** 1  ->  x"""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        return op.mul(x, 1) | op.div(x, 1) | op.pow(x, 1)

    def rewrite(self, op: Build, m: Match) -> Value:
        return same_type(m)


class DropAndTrue(Rule):
    """x & true, x | false  ->  x"""

    def pattern(self, op: Ops, x: TensorHole, size: Hole, dtype: Hole) -> Any:
        true = op.full(size, 1, dtype=dtype).shared() | op.full(size, True, dtype=dtype).shared()
        false = op.full(size, 0, dtype=dtype).shared() | op.full(size, False, dtype=dtype).shared()
        return op.bitwise_and(x, true) | op.bitwise_or(x, false)

    def rewrite(self, op: Build, m: Match) -> Value:
        applies(m.x.type.dtype == torch.bool)
        return same_type(m)


class LinearOfAddmm(Rule):
    """addmm(bias, x, w)  ->  linear(x, w.T, bias), for a constant w: the transposed one takes its place"""

    def pattern(self, op: Ops, bias: TensorHole, x: TensorHole, w: TensorHole) -> Any:
        return op.addmm(bias, x, w)

    def rewrite(self, op: Build, m: Match) -> Value:
        assert m.node.graph is not None
        applies(m.node.graph.weight_of(m.w) is not None and len(m.bias.type.shape) == 1)
        result: Value = op.linear(m.x, op.transpose.int(m.w, 0, 1), m.bias)
        return result


class NumberOperand(Rule):
    """x * c, where(m, x, c) and others with a constant tensor of one number  ->  the number itself"""

    def pattern(self, op: Ops, x: TensorHole, c: TensorHole, mask: TensorHole) -> Any:
        return (
            op.mul.Tensor(x, c).tag(op="mul.Tensor")
            | op.div.Tensor(x, c).tag(op="div.Tensor")
            | op.add.Tensor(x, c).tag(op="add.Tensor")
            | op.where.self(mask, x, c).tag(op="where.ScalarOther", order="mask x c")
            | op.where.self(mask, c, x).tag(op="where.ScalarSelf", order="mask c x")
            | op.masked_fill.Tensor(x, mask, c).tag(op="masked_fill.Scalar", order="x mask c")
        )

    def rewrite(self, op: Build, m: Match) -> Value:
        assert m.node.graph is not None
        weight = m.node.graph.weight_of(m.c)
        applies(weight is not None and m.c.type.shape == ())
        assert weight is not None
        operands = {"x": m.x, "mask": m.mask, "c": weight.load().item()}
        ordered = [operands[name] for name in (m.order or "x c").split()]
        result: Value = op.node(f"aten.{m.op}", ordered, {}).output
        require(result.type == m.roots[0].type, "the dtype would change")
        return result


class Canonicalize(Pass):
    """Drop no-ops, normalize spellings, fold constants, share equal sub-graphs."""

    kind: Literal["canonicalize"] = "canonicalize"
    fold_bytes: int = 1 << 20
    """Fold a constant only if it is no larger than this, or than what it is computed from."""

    provides: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        _normalize_all(graph, log)
        rules = [DropAddZero(), DropMulOne(), DropAndTrue(), *MOVES, LinearOfAddmm(), NumberOperand()]
        _fold_constants(graph, log, self.fold_bytes)
        found = apply_rules(graph, rules, self.kind)
        log.matches.update(found.matches)
        _fold_constants(graph, log, self.fold_bytes)
        _share_equal(graph, log)
        removed = graph.prune()
        if removed:
            log.matches["dead"] = removed
        return log


def _count(log: RewriteLog, what: str) -> None:
    log.matches[what] = log.matches.get(what, 0) + 1


def _normalize_all(graph: Graph, log: RewriteLog) -> None:
    for node in graph.nodes:
        types = tuple(value.type for value in node.outputs)
        form = normalize(node.op, node.args, types)
        if isinstance(form, Value):
            graph.replace(node.output, form)
            graph.remove(node)
            _count(log, "no-op")
        elif form.op != node.op or operators.bind(form.op, (), form.args) != node.args:
            new = graph.insert(form.op, form.args, types, before=node, origin=node.origin)
            for old, value in zip(node.outputs, new.outputs, strict=True):
                graph.replace(old, value)
                graph.take_name(value, old)
            graph.remove(node)
            _count(log, "spelling")


def _fold_constants(graph: Graph, log: RewriteLog, limit: int) -> None:
    """Make a weight of every value that depends on weights alone. Its data are computed when they are read."""
    for node in graph.nodes:
        operands = list(node.operands)
        if operators.is_random(node.op, node.args):
            continue
        if len(node.outputs) != 1 or not operands or any(graph.weight_of(operand) is None for operand in operands):
            continue
        if node.output.type.names or any(_is_dim(leaf) for arg in node.args.values() for leaf in leaves(arg)):
            continue
        size = Weight(node.output.type, torch.Tensor).nbytes
        if size > max(limit, sum(graph.weights[operand.name].nbytes for operand in operands)):
            continue
        name = node.output.name
        folded = _folded(graph, node)
        graph.rename(node.output, graph.unique(f"{name}_unfolded"))
        graph.replace(node.output, graph.add_weight(graph.unique(name), folded))
        graph.remove(node)
        _count(log, "constant")


def _is_dim(leaf: Any) -> bool:
    return hasattr(leaf, "names") and not isinstance(leaf, (Value, TensorType))


def _folded(graph: Graph, node: Node) -> Weight:
    single = Graph()
    args = {}
    for key, arg in node.args.items():
        args[key] = _import_weights(single, graph, arg)
    made = single.insert(node.op, args, [node.output.type])
    single.outputs["folded"] = made.output
    return Weight(node.output.type, lambda: run(single, {})["folded"])


def _import_weights(single: Graph, graph: Graph, arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(_import_weights(single, graph, item) for item in arg)
    if isinstance(arg, Value):
        if arg.name in single.weights:
            return single.value(arg.name)
        return single.add_weight(arg.name, graph.weights[arg.name])
    return arg


def _share_equal(graph: Graph, log: RewriteLog) -> None:
    """Of nodes with the same op and arguments keep the first."""
    seen: dict[Any, Node] = {}
    for node in graph.nodes:
        if operators.is_random(node.op, node.args):
            continue
        key = node.op, tuple((name, _key(arg)) for name, arg in node.args.items())
        first = seen.setdefault(key, node)
        if first is node:
            continue
        for old, value in zip(node.outputs, first.outputs, strict=True):
            graph.replace(old, value)
        graph.remove(node)
        _count(log, "duplicate")


def _key(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(_key, arg))
    return id(arg) if isinstance(arg, Value) else (type(arg), arg)
