"""Rules: the pattern language."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from graphopt.ir import Graph
from graphopt.patterns import Hole, NumberHole, Ops, TensorHole
from graphopt.rewrite import Build, Match, RewriteLog, Rule, applies, apply_rules
from tests.graphs import graph_of


class Rewritten(Rule):
    """The pattern becomes tanh of the hole x; subclasses write the pattern."""

    def rewrite(self, op: Build, m: Match) -> Any:
        return op.tanh(m.x)


class Reads(Rule):
    """Changes nothing; keeps what it was matched with."""

    def __init__(self) -> None:
        self.seen: list[Match] = []

    def rewrite(self, op: Build, m: Match) -> Any:
        self.seen.append(m)
        applies(False)


def of(pattern: Callable[..., Any]) -> Rewritten:
    """A rule with this pattern, a function of op and holes."""
    return type("Made", (Rewritten,), {"pattern": lambda self, op, **holes: None, "compiled": _compiled(pattern)})()  # type: ignore[no-any-return]


def _compiled(pattern: Callable[..., Any]) -> Callable[[Any], tuple[Any, ...]]:
    import inspect

    names = list(inspect.signature(pattern).parameters)[1:]
    roots = pattern(Ops(), *(Hole(name) for name in names))
    return lambda self: roots if isinstance(roots, tuple) else (roots,)


def body(graph: Graph) -> list[str]:
    """The graph's nodes as text."""
    return [repr(node) for node in graph.nodes]


def matched(graph: Graph, rule: Rule) -> int:
    """How often a rule rewrites, on a copy; the copy computes what it may and verifies."""
    copy = graph.clone()
    log = apply_rules(copy, [rule], "test")
    copy.verify()
    return log.total


def unchanged(graph: Graph, rule: Rule) -> RewriteLog:
    """The log of a rule that must leave the graph as it is."""
    before = graph.text(origins=True)
    log = apply_rules(graph, [rule], "test")
    assert log.matches == {}
    assert graph.text(origins=True) == before
    graph.verify()
    return log


CHAIN = """
    %a: f32[s, 4] = aten.relu.default(self=%x)
    %b: f32[s, 4] = aten.neg.default(self=%a)
    %c: f32[s, 4] = aten.exp.default(self=%b)
    output y = %c
"""


# Matching


def test_a_pattern_is_the_program_it_matches() -> None:
    graph = graph_of(CHAIN)
    log = apply_rules(graph, [of(lambda op, x: op.exp(op.neg(x)))], "test")
    assert log.matches == {"Made": 1}
    assert body(graph) == [
        "%a: f32[s, 4] = aten.relu.default(self=%x)",
        "%c: f32[s, 4] = aten.tanh.default(self=%a)",
    ]


@pytest.mark.parametrize(
    "pattern",
    [
        lambda op, x: op.exp(op.relu(x)),
        lambda op, x: op.neg(op.exp(x)),
        lambda op, x: op.exp(op.neg(op.neg(x))),
        lambda op, x: op.graphopt.exp(x),
        lambda op, x: op.exp.out(x),
        lambda op, x: op.exp(x, x),
        lambda op, x: op.exp(x, unknown=1),
        lambda op, x: op.exp(3),
    ],
)
def test_other_programs_do_not_match(pattern: Callable[..., Any]) -> None:
    graph = graph_of(CHAIN)
    assert unchanged(graph, of(pattern)).refusals == []


def test_alternatives_back_track() -> None:
    """The first alternative matches by itself, but only the second lets the rest match."""
    graph = graph_of(
        """
        %m: f32[s, 4] = aten.mul.Tensor(self=%x, other=2.0)
        %n: f32[s, 4] = aten.neg.default(self=%m)
        %y: f32[s, 4] = aten.add.Tensor(self=%m, other=%n)
        output y = %y
        """
    )

    class Rule_(Reads):
        def pattern(self, op: Ops, x: TensorHole, scale: NumberHole) -> Any:
            scaled = op.mul(x, scale).tag(scaled=True) | x
            return op.add(scaled, op.neg(x))

    rule = Rule_()
    unchanged(graph, rule)
    (match,) = rule.seen
    assert match.x is graph.value("m")
    assert match.scale is None
    assert match.scaled is None


def test_alternatives_back_track_through_nested_choices() -> None:
    graph = graph_of(
        """
        weight %w: f32[4]
        %a: f32[s, 4] = aten.add.Tensor(self=%x, other=%w)
        %b: f32[s, 4] = aten.add.Tensor(self=%a, other=%w)
        %y: f32[s, 4] = aten.mul.Tensor(self=%b, other=%a)
        output y = %y
        """
    )

    class Rule_(Reads):
        def pattern(self, op: Ops, x: TensorHole, w: TensorHole) -> Any:
            inner = op.add(x, w).shared().tag(inner="add") | x
            outer = op.add(inner, w).tag(outer="add") | inner
            return op.mul(outer, x)

    rule = Rule_()
    unchanged(graph, rule)
    assert next((m.x.name, m.w.name, m.inner, m.outer) for m in rule.seen) == ("a", "w", None, "add")


def test_tags_record_the_choice() -> None:
    class Rule_(Reads):
        def pattern(self, op: Ops, x: TensorHole, c: NumberHole) -> Any:
            return op.exp(op.div(x, c).tag(divides=True, way=1) | op.mul(x, c).tag(divides=False) | x)

    for node, tags in (("div", (True, 1)), ("mul", (False, None)), ("sub", (None, None))):
        rule = Rule_()
        unchanged(
            graph_of(
                f"""
                %h: f32[s, 4] = aten.{node}.Tensor(self=%x, other=2.0)
                %y: f32[s, 4] = aten.exp.default(self=%h)
                output y = %y
                """
            ),
            rule,
        )
        assert (rule.seen[0].divides, rule.seen[0].way) == tags


def test_a_plain_value_may_stand_on_either_side_of_a_choice() -> None:
    graph = graph_of(
        "%y: f32[s, 1] = aten.sum.dim_IntList(self=%x, dim=[1], keepdim=True)\noutput y = %y", shape="s, 4"
    )

    class Rule_(Reads):
        def pattern(self, op: Ops, x: TensorHole, axis: Hole) -> Any:
            return op.sum(x, [1] | axis, keepdim=True)

    rule = Rule_()
    unchanged(graph, rule)
    assert [m.axis for m in rule.seen] == [None, (1,)]


def test_unmentioned_arguments_must_have_their_default() -> None:
    plain = graph_of("%y: f32[s, 4] = aten.gelu.default(self=%x)\noutput y = %y")
    other = graph_of('%y: f32[s, 4] = aten.gelu.default(self=%x, approximate="tanh")\noutput y = %y')
    strict, waived = of(lambda op, x: op.gelu(x)), of(lambda op, x: op.gelu(x, ...))
    written = of(lambda op, x: op.gelu(x, approximate="tanh"))
    assert [matched(plain, rule) for rule in (strict, waived, written)] == [1, 1, 0]
    assert [matched(other, rule) for rule in (strict, waived, written)] == [0, 1, 1]


def test_unmentioned_arguments_without_a_default_do_not_match() -> None:
    graph = graph_of("%y: f32[s, 4] = aten.softmax.int(self=%x, dim=1)\noutput y = %y")
    assert matched(graph, of(lambda op, x: op.softmax(x))) == 0
    assert matched(graph, of(lambda op, x: op.softmax(x, ...))) == 1
    assert matched(graph, of(lambda op, x: op.softmax(x, 1))) == 1
    assert matched(graph, of(lambda op, x: op.softmax(x, 0))) == 0


def test_waiving_does_not_reach_inner_calls() -> None:
    graph = graph_of(
        """
        %g: f32[s, 4] = aten.gelu.default(self=%x, approximate="tanh")
        %y: f32[s, 4] = aten.softmax.int(self=%g, dim=1)
        output y = %y
        """
    )
    assert matched(graph, of(lambda op, x: op.softmax(op.gelu(x), ...))) == 0
    assert matched(graph, of(lambda op, x: op.softmax(op.gelu(x, ...), ...))) == 1


def test_overloads() -> None:
    graph = graph_of("%y: f32[s, 4] = aten.pow.Tensor_Scalar(self=%x, exponent=2)\noutput y = %y")
    assert matched(graph, of(lambda op, x: op.pow(x, 2))) == 1
    assert matched(graph, of(lambda op, x: op.pow.Tensor_Scalar(x, 2))) == 1
    assert matched(graph, of(lambda op, x: op.aten.pow.Tensor_Scalar(x, 2))) == 1
    assert matched(graph, of(lambda op, x: op.pow.Tensor_Tensor(x, 2))) == 0


def test_holes_that_repeat_are_one_thing() -> None:
    graph = graph_of(
        """
        %a: f32[s, 4] = aten.relu.default(self=%x)
        %same: f32[s, 4] = aten.sub.Tensor(self=%a, other=%a)
        %other: f32[s, 4] = aten.sub.Tensor(self=%a, other=%x)
        output same = %same
        output other = %other
        """
    )
    assert matched(graph, of(lambda op, x: op.sub(x, x))) == 1
    assert matched(graph, of(lambda op, x, y: op.sub(x, y))) == 2
    numbers = graph_of(
        """
        %a: f32[s, 4] = aten.div.Tensor(self=%x, other=3.0)
        %b: f32[s, 4] = aten.mul.Tensor(self=%a, other=3)
        output y = %b
        """
    )
    assert matched(numbers, of(lambda op, x, c: op.mul(op.div(x, c), c))) == 1


def test_a_call_that_repeats_is_one_node() -> None:
    def pattern(op: Ops, x: Any) -> Any:
        h = op.relu(x)
        return op.sub(op.neg(h), h)

    lines = "%a: f32[s, 4] = aten.relu.default(self=%x)\n%b: f32[s, 4] = aten.relu.default(self=%x)\n"
    tail = (
        "%n: f32[s, 4] = aten.neg.default(self=%a)\n%y: f32[s, 4] = aten.sub.Tensor(self=%n, other=%{})\noutput y = %y"
    )
    assert matched(graph_of(lines + tail.format("a")), of(pattern)) == 1
    assert matched(graph_of(lines + tail.format("b")), of(pattern)) == 0


@pytest.mark.parametrize(
    ("hole", "kinds"),
    [(TensorHole, {"tensor"}), (NumberHole, {"int", "float"}), (Hole, {"tensor", "int", "float", "bool", "dim"})],
)
def test_kinds_of_holes(hole: type[Hole], kinds: set[str]) -> None:
    others = {"tensor": "%x", "int": "2", "float": "0.5", "bool": "True", "dim": "s"}
    found = set()
    for kind, text in others.items():
        graph = graph_of(f"%y: f32[s, 4] = aten.sub.Tensor(self=%x, other={text})\noutput y = %y")

        class Rule_(Rewritten):
            def pattern(self, op: Ops, x: TensorHole) -> Any:
                return op.sub(x, hole("c"))

        if apply_rules(graph, [Rule_()], "test").total:
            found.add(kind)
    assert found == kinds


def test_hole_types_come_from_annotations() -> None:
    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole, c: NumberHole, h: Hole, plain) -> Any:  # type: ignore[no-untyped-def]  # noqa: ANN001
            self.holes = (x, c, h, plain)
            return op.sub(x, c)

    rule = Rule_()
    rule.compiled()
    assert [type(hole) for hole in rule.holes] == [TensorHole, NumberHole, Hole, Hole]
    assert [hole.name for hole in rule.holes] == ["x", "c", "h", "plain"]


def test_a_hole_may_be_annotated_any() -> None:
    class Rule_(Rewritten):
        def pattern(self, op: Ops, x: Any) -> Any:
            return op.exp(x)

    assert matched(graph_of(CHAIN), Rule_()) == 1


@pytest.mark.parametrize("op", ["add", "mul", "eq", "ne", "logical_and"])
def test_commutative_operands_match_in_either_order(op: str) -> None:
    type_ = "bool" if op in ("eq", "ne", "logical_and") else "f32"
    overload = "default" if op == "logical_and" else "Tensor"
    graph = graph_of(
        f"""
        %n: f32[s, 4] = aten.neg.default(self=%x)
        %y: {type_}[s, 4] = aten.{op}.{overload}(self=%n, other=%x)
        output y = %y
        """
    )

    def rule(pattern: Callable[..., Any]) -> Reads:
        made: Reads = type("Made", (Reads,), {"compiled": _compiled(pattern)})()
        return made

    for pattern in (lambda o, x: getattr(o, op)(x, o.neg(x)), lambda o, x: getattr(o, op)(o.neg(x), x)):
        reads = rule(pattern)
        unchanged(graph, reads)
        assert len(reads.seen) == 1


def test_other_operands_match_in_their_order_only() -> None:
    graph = graph_of(
        """
        %n: f32[s, 4] = aten.neg.default(self=%x)
        %y: f32[s, 4] = aten.sub.Tensor(self=%n, other=%x)
        output y = %y
        """
    )
    assert matched(graph, of(lambda op, x: op.sub(x, op.neg(x)))) == 0
    assert matched(graph, of(lambda op, x: op.sub(op.neg(x), x))) == 1


@pytest.mark.parametrize(
    "pattern", [lambda op, x, y: op.add(x, op.neg(y), alpha=2), lambda op, x, y: op.add(x, op.neg(y), ...)]
)
def test_add_with_a_factor_does_not_commute(pattern: Callable[..., Any]) -> None:
    """``add(a, b, alpha=2)`` is a + 2 * b."""
    graph = graph_of(
        """
        %n: f32[s, 4] = aten.neg.default(self=%x)
        %y: f32[s, 4] = aten.add.Tensor(self=%n, other=%x, alpha=2)
        output y = %y
        """
    )
    assert matched(graph, of(pattern)) == 0


def test_lists_match_item_by_item() -> None:
    graph = graph_of(
        """
        %n: f32[s, 4] = aten.neg.default(self=%x)
        %y: f32[s, 8] = aten.cat.default(tensors=[%n, %x], dim=1)
        output y = %y
        """
    )

    class Rule_(Reads):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.cat([op.neg(x), x], 1) | op.cat((x, op.neg(x)), 1) | op.cat([x], 1)

    rule = Rule_()
    unchanged(graph, rule)
    assert len(rule.seen) == 1


@pytest.mark.parametrize(
    ("written", "constant", "same"),
    [
        ("2", 2.0, True),
        ("0.7071067811865476", 0.70710678, True),
        ("0.7071067811865476", 0.7071, False),
        ("1", True, False),
        ("True", 1, False),
        ("inf", float("inf"), True),
        ("s", 1, False),
        ("1000001", 1000000, False),
    ],
)
def test_constants(written: str, constant: Any, same: bool) -> None:
    graph = graph_of(f"%y: f32[s, 4] = aten.sub.Tensor(self=%x, other={written})\noutput y = %y")
    assert matched(graph, of(lambda op, x: op.sub(x, constant))) == same


TOPK = """
    %v: f32[s, 4], %i: i64[s, 4] = aten.sort.default(self=%x, dim=1)
    %n: f32[s, 4] = aten.neg.default(self=%v)
    %m: i64[s, 4] = aten.neg.default(self=%i)
    output n = %n
    output m = %m
"""


def test_items_of_ops_with_several_outputs() -> None:
    graph = graph_of(TOPK)

    class Rule_(Reads):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.neg(op.sort(x, 1)[1].tag(second=True) | op.sort(x, 1).tag(second=False))

    rule = Rule_()
    log = unchanged(graph, rule)
    assert rule.seen == []
    assert [refused.reason for refused in log.refusals] == [
        "%i (aten.sort.default) is also used by aten.neg.default"
    ] * 1 + ["%v (aten.sort.default) is also used by aten.neg.default"]


def test_an_item_does_not_match_an_op_with_fewer_outputs() -> None:
    graph = graph_of(CHAIN)
    assert unchanged(graph, of(lambda op, x: op.exp(op.sort(x, 1)[1]))).refusals == []
