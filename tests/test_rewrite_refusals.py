"""Rules: several roots, refusals, sizes, and what a rewrite leaves behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.errors import GraphError
from graphopt.execution import run
from graphopt.ir import Value
from graphopt.patterns import NumberHole, Ops, TensorHole
from graphopt.rewrite import Build, Match, Refused, RewriteLog, Rule, applies, apply_rules, require
from graphopt.tensors import Weight
from tests.graphs import graph_of
from tests.test_rewrite import CHAIN, body, matched, of, unchanged

# Several roots, escapes


def test_inner_values_that_others_use_are_refused() -> None:
    graph = graph_of(CHAIN.replace("output y", "%d: f32[s, 4] = aten.abs.default(self=%b)\noutput d = %d\noutput y"))
    log = unchanged(graph, of(lambda op, x: op.exp(op.neg(x))))
    assert log.refusals == [
        Refused("Made", "%c = aten.exp.default", "%b (aten.neg.default) is also used by aten.abs.default")
    ]


def test_inner_values_that_are_outputs_are_refused() -> None:
    graph = graph_of(CHAIN + "output inner = %b\n")
    log = unchanged(graph, of(lambda op, x: op.exp(op.neg(x))))
    assert [refused.reason for refused in log.refusals] == ["%b (aten.neg.default) is also used by an output"]


def test_shared_values_may_be_used_elsewhere() -> None:
    graph = graph_of(CHAIN + "output inner = %b\n")
    apply_rules(graph, [of(lambda op, x: op.exp(op.neg(x).shared()))], "test")
    assert body(graph) == [
        "%a: f32[s, 4] = aten.relu.default(self=%x)",
        "%b: f32[s, 4] = aten.neg.default(self=%a)",
        "%c: f32[s, 4] = aten.tanh.default(self=%a)",
    ]
    graph.verify()


def test_a_value_that_the_pattern_itself_uses_twice_does_not_escape() -> None:
    graph = graph_of(
        """
        %a: f32[s, 4] = aten.relu.default(self=%x)
        %b: f32[s, 4] = aten.neg.default(self=%a)
        %y: f32[s, 4] = aten.sub.Tensor(self=%b, other=%a)
        output y = %y
        """
    )

    def pattern(op: Ops, x: Any) -> Any:
        h = op.relu(x)
        return op.sub(op.neg(h), h)

    assert matched(graph, of(pattern)) == 1


class NegThenExp(Rule):
    """Both values live on: exp(neg(x)) and neg(x)."""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        inner = op.neg(x)
        return op.exp(inner), inner

    def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
        return op.tanh(m.x), op.sin(m.x)


def test_several_roots_are_replaced_together() -> None:
    graph = graph_of(CHAIN + "output inner = %b\n")
    log = apply_rules(graph, [NegThenExp()], "test")
    assert log.matches == {"NegThenExp": 1}
    assert body(graph) == [
        "%a: f32[s, 4] = aten.relu.default(self=%x)",
        "%c: f32[s, 4] = aten.tanh.default(self=%a)",
        "%b: f32[s, 4] = aten.sin.default(self=%a)",
    ]
    assert {name: value.name for name, value in graph.outputs.items()} == {"y": "c", "inner": "b"}
    graph.verify()


def test_several_roots_are_refused_when_an_operand_comes_too_late() -> None:
    graph = graph_of(
        """
        %a: f32[s, 4] = aten.neg.default(self=%x)
        %late: f32[s, 4] = aten.relu.default(self=%a)
        %y: f32[s, 4] = aten.sub.Tensor(self=%a, other=%late)
        output y = %y
        output a = %a
        """
    )

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole, late: TensorHole) -> Any:
            a = op.neg(x)
            return op.sub(a, late), a

        def rewrite(self, op: Build, m: Match) -> tuple[Value, ...]:
            return op.mul.Tensor(m.x, m.late), op.sin(m.x)

    log = unchanged(graph, Rule_())
    assert [refused.reason for refused in log.refusals] == ["late is computed after %a"]


def test_a_root_may_be_one_of_several_outputs() -> None:
    graph = graph_of(
        """
        %v: f32[s, 4], %i: i64[s, 4] = aten.sort.default(self=%x, dim=1)
        %y: f32[s, 4] = aten.relu.default(self=%v)
        output y = %y
        """
    )

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.sort(x, 1)[0]

        def rewrite(self, op: Build, m: Match) -> Value:
            result: Value = op.tanh(m.x)
            return result

    apply_rules(graph, [Rule_()], "test")
    assert body(graph) == ["%v: f32[s, 4] = aten.tanh.default(self=%x)", "%y: f32[s, 4] = aten.relu.default(self=%v)"]


# Refusals


class Refuses(Rule):
    """Makes nodes and a weight, then refuses."""

    def pattern(self, op: Ops, x: TensorHole) -> Any:
        return op.exp(op.neg(x))

    def rewrite(self, op: Build, m: Match) -> Value:
        first = op.tanh(m.x)
        second = op.sin(first)
        require(second is None, "no sine here")
        raise AssertionError


def test_a_refusal_leaves_the_graph_as_it_was() -> None:
    log = unchanged(graph_of(CHAIN), Refuses())
    assert log.refusals == [Refused("Refuses", "%c = aten.exp.default", "no sine here")]
    assert log.total == 0


def test_a_refusal_takes_back_weights_too() -> None:
    class Rule_(Refuses):
        def rewrite(self, op: Build, m: Match) -> Value:
            op.weight("table", Weight.of(torch.ones(3)))
            return super().rewrite(op, m)

    unchanged(graph_of(CHAIN), Rule_())


def test_a_refusal_names_where_the_node_came_from() -> None:
    graph = graph_of(
        CHAIN.replace(
            "%c: f32[s, 4] = aten.exp.default(self=%b)", "%c: f32[s, 4] = aten.exp.default(self=%b)  # act | m.py:3"
        )
    )
    (refused,) = unchanged(graph, Refuses()).refusals
    assert refused.where == "%c = aten.exp.default, from act | m.py:3"


def test_applies_is_silent() -> None:
    class Rule_(Refuses):
        def rewrite(self, op: Build, m: Match) -> Value:
            op.tanh(m.x)
            applies(False)
            raise AssertionError

    assert unchanged(graph_of(CHAIN), Rule_()).refusals == []


def test_the_next_way_to_match_is_tried_after_a_refusal() -> None:
    graph = graph_of(
        """
        %n: f32[s, 4] = aten.neg.default(self=%x)
        %y: f32[s, 4] = aten.add.Tensor(self=%n, other=%x)
        output y = %y
        """
    )

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole, y: TensorHole) -> Any:
            return op.add(x, y)

        def rewrite(self, op: Build, m: Match) -> Value:
            require(m.x.name == "x", "not the input")
            result: Value = op.sub.Tensor(m.x, m.y)
            return result

    log = apply_rules(graph, [Rule_()], "test")
    assert body(graph)[-1] == "%y: f32[s, 4] = aten.sub.Tensor(self=%x, other=%n)"
    assert log == RewriteLog({"Rule_": 1}, [])


def test_a_refused_node_is_reported_once() -> None:
    """Though it is looked at again after its operand was rewritten."""

    class NegToSin(Rule):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.relu(x)

        def rewrite(self, op: Build, m: Match) -> Value:
            result: Value = op.sin(m.x)
            return result

    class Never(Rule):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.neg(x)

        def rewrite(self, op: Build, m: Match) -> Value:
            require(False, "never")
            raise AssertionError

    log = apply_rules(graph_of(CHAIN), [Never(), NegToSin()], "test")
    assert [refused.reason for refused in log.refusals] == ["never"]
    assert log.matches == {"NegToSin": 1}


def test_other_errors_leave_the_graph_as_it_was() -> None:
    class Rule_(Refuses):
        def rewrite(self, op: Build, m: Match) -> Value:
            op.tanh(m.x)
            result: Value = op.matmul(m.x, m.x)
            return result

    graph = graph_of(CHAIN)
    before = graph.text()
    with pytest.raises(GraphError, match=r"aten.matmul.default\(self=f32\[s, 4\], other=f32\[s, 4\]\)"):
        apply_rules(graph, [Rule_()], "test")
    assert graph.text() == before


# Dims


def match_of(shapes: dict[str, str]) -> Match:
    """A match of ``add(q, k)`` where q and k have these shapes."""
    from graphopt.patterns import Found
    from graphopt.text import parse

    declared = "\n".join(f"input %{name}: f32[{shape}]" for name, shape in shapes.items())
    graph = parse(f"graph {{\n{declared}\ninput %z: f32[1]\n%n: f32[1] = aten.neg.default(self=%z)\noutput n = %n\n}}")
    return Match(Found({name: graph.value(name) for name in shapes}), (graph.value("n"),))


def test_dims_unify_by_name() -> None:
    sizes = match_of({"q": "b, 4, s, 8", "k": "b, 4, 2*t, 8"}).dims(q="b h s d", k="b h t d")
    assert {name: str(size) for name, size in sizes.items()} == {"b": "b", "h": "4", "s": "s", "t": "2*t", "d": "8"}
    assert match_of({"q": "b, 1, 4"}).dims(q="b 1 4").keys() == {"b"}


@pytest.mark.parametrize(
    ("layouts", "reason"),
    [
        ({"q": "b s", "k": "b t"}, "q has 3 dimensions, not 2 (b s)"),
        ({"q": "b s d", "k": "b s d"}, "k is t at s, expected s"),
        ({"q": "b s 9"}, "q is 8 at 9, expected 9"),
        ({"q": "b s s"}, "q is 8 at s, expected s"),
    ],
)
def test_dims_that_do_not_fit_are_refused(layouts: dict[str, str], reason: str) -> None:
    from graphopt.rewrite import Refusal

    with pytest.raises(Refusal) as error:
        match_of({"q": "b, s, 8", "k": "b, t, 8"}).dims(**layouts)
    assert str(error.value) == reason


# What a rewrite leaves


def test_origin_is_extended_and_names_are_taken_over() -> None:
    graph = graph_of(
        """
        %a: f32[s, 4] = aten.neg.default(self=%x)  # encoder | model.py:1
        %c: f32[s, 4] = aten.exp.default(self=%a)  # encoder | model.py:2
        output y = %c
        """
    )

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.exp(op.neg(x))

        def rewrite(self, op: Build, m: Match) -> Value:
            result: Value = op.sin(op.tanh(m.x))
            return result

    apply_rules(graph, [Rule_()], "fuse")
    lines = [line.strip() for line in graph.text(origins=True).splitlines()]
    assert lines[3:5] == [
        "%tanh: f32[s, 4] = aten.tanh.default(self=%x)  # encoder | model.py:2 | fuse",
        "%c: f32[s, 4] = aten.sin.default(self=%tanh)  # encoder | model.py:2 | fuse",
    ]


def test_one_pass_is_written_into_the_origin_once() -> None:
    graph = graph_of(CHAIN)
    swaps = {"exp": "sin", "sin": "tan"}
    rules = [swap(old, new) for old, new in swaps.items()]
    log = apply_rules(graph, rules, "fuse")
    assert log.matches == {"exp_to_sin": 1, "sin_to_tan": 1}
    assert [node.origin for node in graph.nodes][-1] == ("fuse",)
    apply_rules(graph, [swap("tan", "cos")], "other")
    assert [node.origin for node in graph.nodes][-1] == ("fuse", "other")


def swap(old: str, new: str) -> Rule:
    class Swap(Rule):
        name = f"{old}_to_{new}"

        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return getattr(op, old)(x)

        def rewrite(self, op: Build, m: Match) -> Value:
            result: Value = getattr(op, new)(m.x)
            return result

    return Swap()


def test_a_rule_may_return_a_value_that_was_there() -> None:
    graph = graph_of(CHAIN)

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.exp(op.neg(x))

        def rewrite(self, op: Build, m: Match) -> Value:
            op.sin(m.x)
            value: Value = m.x
            return value

    apply_rules(graph, [Rule_()], "test")
    assert body(graph) == ["%a: f32[s, 4] = aten.relu.default(self=%x)"]
    assert graph.outputs["y"] is graph.value("a")


def test_rewriting_goes_on_until_nothing_matches() -> None:
    graph = graph_of(
        """
        %a: f32[s, 4] = aten.neg.default(self=%x)
        %b: f32[s, 4] = aten.neg.default(self=%a)
        %c: f32[s, 4] = aten.neg.default(self=%b)
        %d: f32[s, 4] = aten.neg.default(self=%c)
        output y = %d
        """
    )

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole) -> Any:
            return op.neg(op.neg(x))

        def rewrite(self, op: Build, m: Match) -> Value:
            value: Value = m.x
            return value

    assert apply_rules(graph, [Rule_()], "test").total == 2
    assert body(graph) == []
    assert graph.outputs["y"] is graph.value("x")


def test_the_result_computes_the_same() -> None:
    graph = graph_of(
        """
        weight %w: f32[4]
        %a: f32[s, 4] = aten.add.Tensor(self=%x, other=%w)
        %b: f32[s, 4] = aten.div.Tensor(self=%a, other=4.0)
        output y = %b
        """,
        {"w": torch.arange(4.0)},
    )

    class Rule_(Rule):
        def pattern(self, op: Ops, x: TensorHole, c: NumberHole) -> Any:
            return op.div(x, c)

        def rewrite(self, op: Build, m: Match) -> Value:
            factor = op.weight("w", Weight.of(torch.tensor(1 / m.c)))
            result: Value = op.mul.Tensor(m.x, factor)
            return result

    apply_rules(graph, [Rule_()], "test")
    assert list(graph.weights) == ["w", "w_1"]
    for size in (2, 5):
        x = torch.randn(size, 4)
        torch.testing.assert_close(run(graph, {"x": x})["y"], (x + torch.arange(4.0)) / 4)


def test_build_makes_ops_of_every_spelling() -> None:
    graph = graph_of("output y = %x")
    node = graph.insert("aten.relu.default", {"self": graph.value("x")})
    build, x = Build(graph, node, ("here",)), graph.value("x")
    assert build.tanh(x).producer.op == "aten.tanh.default"
    assert build.mul.Tensor(x, 2).producer.args == {"self": x, "other": 2}
    assert build.aten.mul.Tensor(x, 2).producer.op == "aten.mul.Tensor"
    assert build.graphopt.quick_gelu(x, alpha=1.0).producer.op == "graphopt.quick_gelu.default"
    assert [value.name for value in build.topk(x, 2)] == ["topk", "topk_1"]
    assert len(build.call("aten.relu.default", {"self": x})) == 1
    assert len(build.made) == 6
    assert {made.origin for made in build.made} == {("here",)}
    assert list(graph.nodes)[-1] is node


def test_build_reuses_what_stands_earlier() -> None:
    graph = graph_of(
        "%a: bool[s, 4] = aten.to.dtype(self=%x, dtype=bool)\n%b: f32[s, 4] = aten.relu.default(self=%x)\noutput y = %b"
    )
    late = graph.insert("aten.to.dtype", {"self": graph.value("x"), "dtype": torch.float16})
    x, place = graph.value("x"), graph.value("b").producer
    assert place is not None
    build = Build(graph, place, ())
    assert build.reuse("to.dtype", x, torch.bool) is graph.value("a")
    made = build.reuse("to.dtype", x, torch.float16)
    assert made is not late.output
    assert graph.precedes(build.made[0], place)
    assert build.reuse("aten.to.dtype", x, torch.float16) is made
    assert len(build.made) == 1
