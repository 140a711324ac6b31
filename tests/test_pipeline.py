"""Passes: loading a list of them, their order, running them with proof, and what the reports say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field

from graphopt.errors import GraphError, NoMatchError, ParityError, PassError, PipelineError
from graphopt.ir import Graph, Value
from graphopt.parity import Contract, Probe
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.fuse_activation import FuseActivation
from graphopt.passes.fuse_attention import FuseAttention
from graphopt.patterns import NumberHole, Ops, TensorHole
from graphopt.pipeline import (
    Context,
    Pass,
    Proof,
    RulePass,
    Stopwatch,
    diff_text,
    first_difference,
    known_passes,
    load_passes,
    run_passes,
)
from graphopt.rewrite import Build, Match, Refused, RewriteLog, Rule, require
from graphopt.schemas.pipeline import Budget
from graphopt.schemas.report import PassReport, RefusalReport
from graphopt.tensors import TensorType, Weight
from tests.graphs import graph_of

BODY = """
    weight %w: f32[4]
    %a: f32[s, 4] = aten.add.Tensor(self=%x, other=%w)
    %h: f32[s, 4] = aten.div.Tensor(self=%a, other=4.0)  # layer.0 | model.py:7
    %z: f32[s, 4] = aten.div.Tensor(self=%h, other=0.0)
    %y: f32[s, 4] = aten.tanh.default(self=%h)
    output y = %y
    output z = %z
"""


def small() -> Graph:
    return graph_of(BODY, {"w": torch.ones(4)})


def proof(each_pass: int = 2) -> Proof:
    probes = [Probe({"s": size}, {"x": torch.rand(size, 4)}) for size in (3, 2)]
    references = []
    for probe in probes:
        h = (probe.inputs["x"] + 1) / 4
        references.append({"y": h.tanh(), "z": h / 0.0})
    return Proof(probes, references, each_pass)


class ByInverse(Rule):
    """x / c  ->  x * (c' / c)"""

    def __init__(self, error: float = 0.0) -> None:
        self.error = error

    def pattern(self, op: Ops, x: TensorHole, c: NumberHole) -> Any:
        return op.div(x, c)

    def rewrite(self, op: Build, m: Match) -> Value:
        require(m.c != 0, "division by zero")
        result: Value = op.mul.Tensor(m.x, (1 + self.error) / m.c)
        return result


class Invert(RulePass):
    """Multiply instead of dividing, a little wrong if asked for."""

    kind: Literal["invert"] = "invert"
    error: float = Field(default=0.0, ge=0)
    limit: float | None = None

    def contract(self) -> Contract:
        return Budget(metric="relative", limit=self.limit) if self.limit is not None else super().contract()

    def rules(self) -> Sequence[Rule]:
        return [ByInverse(self.error)]


class Nothing(Pass):
    kind: Literal["nothing"] = "nothing"

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        context.notes.append("nothing to do")
        return RewriteLog()


class Breaks(Pass):
    """Leaves a graph that does not verify."""

    kind: Literal["breaks"] = "breaks"

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        graph.value("h").type = TensorType(torch.float16, graph.value("h").type.shape)
        return RewriteLog({"Breaks": 1})


def fact(name: str, requires: str = "", provides: str = "", invalidates: str = "") -> type[Pass]:
    """A pass that only states facts."""
    return type(
        f"Fact_{name}",
        (Nothing,),
        {
            "__annotations__": {
                "kind": str,
                **dict.fromkeys(("requires", "provides", "invalidates"), ClassVar[frozenset[str]]),
            },
            "kind": name,
            "requires": frozenset(requires.split()),
            "provides": frozenset(provides.split()),
            "invalidates": frozenset(invalidates.split()),
            "__module__": __name__,
        },
    )


FACTS: dict[str, type[Pass]] = {
    "first": fact("first", provides="a"),
    "second": fact("second", requires="a", provides="b"),
    "third": fact("third", requires="a b"),
    "spoils": fact("spoils", invalidates="a"),
    "orphan": fact("orphan", requires="unheard_of"),
    "hen": fact("hen", requires="egg", provides="hen"),
    "egg": fact("egg", requires="hen", provides="egg"),
}


def order(*kinds: str) -> list[Pass]:
    return load_passes([{"kind": kind} for kind in kinds], extra=FACTS)


# Loading


def test_passes_are_found_by_kind_with_their_options() -> None:
    steps = load_passes([{"kind": "canonicalize"}, {"kind": "fuse_attention", "rotary": False}])
    assert [type(step) for step in steps] == [Canonicalize, FuseAttention]
    assert isinstance(steps[1], FuseAttention)
    assert (steps[1].rotary, steps[1].prove_masks, steps[1].allow_no_match) == (False, True, False)


def test_passes_may_be_given_as_objects() -> None:
    step = Invert(error=0.5)
    assert load_passes([step]) == [step]


def test_passes_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Invert().error = 1.0  # type: ignore[misc]


def test_installed_passes() -> None:
    known = known_passes()
    assert list(known) == sorted(known)
    assert known["fuse_activation"] is FuseActivation
    assert {kind: step.model_fields["kind"].default for kind, step in known.items()} == {kind: kind for kind in known}


def test_third_party_passes() -> None:
    (step,) = load_passes([{"kind": "invert", "error": 0.25}], extra={"invert": Invert})
    assert step == Invert(error=0.25)


@pytest.mark.parametrize(
    ("entry", "what", "where", "hint"),
    [
        (
            {"kind": "fuse_atention"},
            "there is no pass 'fuse_atention'",
            "p.yaml, passes[1]",
            "did you mean 'fuse_attention'? known: canonicalize, ",
        ),
        ({"kind": "zzz"}, "there is no pass 'zzz'", "p.yaml, passes[1]", "known: canonicalize, "),
        (
            {"kind": "fuse_attention", "rotery": True},
            "there is no option 'rotery'; did you mean 'rotary'? known: allow_no_match, kind, prove_masks, rotary",
            "p.yaml, passes[1] (fuse_attention)",
            None,
        ),
        (
            {"kind": "fuse_attention", "rotary": "perhaps"},
            "rotary: Input should be a valid boolean, unable to interpret input (got 'perhaps')",
            "p.yaml, passes[1] (fuse_attention)",
            None,
        ),
        (
            {"kind": "insert_kv_cache", "layout": "statik"},
            "layout: Input should be 'growing' or 'static' (got 'statik'); did you mean 'static'?",
            "p.yaml, passes[1] (insert_kv_cache)",
            None,
        ),
        (
            {"kind": "quantize", "scheme": "int8_token", "overrides": 3},
            "overrides: must be a mapping (got 3)",
            "p.yaml, passes[1] (quantize)",
            None,
        ),
        (
            {"kind": "invert", "error": -1},
            "error: Input should be greater than or equal to 0 (got -1)",
            "p.yaml, passes[1] (invert)",
            None,
        ),
    ],
)
def test_wrong_entries(entry: dict[str, Any], what: str, where: str, hint: str | None) -> None:
    with pytest.raises(PipelineError) as error:
        load_passes([{"kind": "canonicalize"}, entry], file="p.yaml", extra={"invert": Invert})
    assert (error.value.what, error.value.where) == (what, where)
    assert error.value.hint == hint or (hint is not None and str(error.value.hint).startswith(hint))


def test_an_entry_without_a_kind() -> None:
    with pytest.raises(PipelineError) as error:
        load_passes([{"rotary": True}])
    assert error.value.where == "the pipeline, passes[0]"


# Order


@pytest.mark.parametrize(
    "kinds",
    [(), ("first",), ("first", "second", "third"), ("spoils", "first", "second"), ("first", "second", "spoils")],
)
def test_orders_that_work(kinds: tuple[str, ...]) -> None:
    assert [step.kind for step in order(*kinds)] == list(kinds)


@pytest.mark.parametrize(
    ("kinds", "what", "index", "hint"),
    [
        (("second", "first"), "second needs a", 0, "this order works: first, second"),
        (("third", "second", "first"), "third needs a, b", 0, "this order works: first, second, third"),
        (("first", "third", "second"), "third needs b", 1, "this order works: first, second, third"),
        (("second",), "second needs a", 0, "add first before it"),
        (("third",), "third needs a, b", 0, "no installed pass provides that"),
        (("orphan",), "orphan needs unheard_of", 0, "no installed pass provides that"),
    ],
)
def test_wrong_orders(kinds: tuple[str, ...], what: str, index: int, hint: str) -> None:
    with pytest.raises(PipelineError) as error:
        order(*kinds)
    assert error.value.what == f"{what}, which nothing before it provides"
    assert error.value.where == f"the pipeline, passes[{index}]"
    assert error.value.hint == hint


@pytest.mark.parametrize(
    "kinds", [("first", "spoils", "second"), ("second", "spoils", "first"), ("spoils", "second", "first")]
)
def test_the_order_that_is_said_to_work_works(kinds: tuple[str, ...]) -> None:
    """Also where a pass between invalidates a fact."""
    with pytest.raises(PipelineError) as error:
        order(*kinds)
    hint = str(error.value.hint)
    assert hint.startswith("this order works: ")
    said = hint.removeprefix("this order works: ").split(", ")
    assert sorted(said) == sorted(kinds)
    assert [step.kind for step in order(*said)] == said


def test_passes_that_need_each_other_have_no_order() -> None:
    with pytest.raises(PipelineError) as error:
        order("hen", "egg")
    assert "this order works" not in str(error.value.hint)


def test_installed_passes_name_the_pass_that_is_missing() -> None:
    with pytest.raises(PipelineError, match="fuse_attention needs canonical") as error:
        load_passes([{"kind": "fuse_attention"}])
    assert error.value.hint == "add canonicalize before it"


# Running


def test_a_report() -> None:
    graph = small()
    (report,) = run_passes(graph, [Invert(error=0)])
    assert report.seconds > 0
    assert report == PassReport(
        kind="invert",
        options={"allow_no_match": False, "error": 0.0, "limit": None},
        matches={"ByInverse": 1},
        refusals=[RefusalReport(rule="ByInverse", where="%z = aten.div.Tensor", reason="division by zero")],
        nodes_before=4,
        nodes_after=4,
        bytes_before=16,
        bytes_after=16,
        parameters_before=4,
        parameters_after=4,
        seconds=report.seconds,
        diff=(
            "--- before\n+++ after\n"
            "-  %h: f32[s, 4] = aten.div.Tensor(self=%a, other=4.0)\n"
            "+  %h: f32[s, 4] = aten.mul.Tensor(self=%a, other=0.25)"
        ),
    )
    assert report.changes == 1


class Shrinks(Pass):
    """Stores the weight in half precision, and leaves out the output z."""

    kind: Literal["shrinks"] = "shrinks"

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        a = graph.value("a").producer
        assert a is not None
        half = graph.add_weight("half", Weight.of(graph.weights["w"].load().half()))
        wide = graph.insert("aten.to.dtype", {"self": half, "dtype": torch.float32}, before=a).output
        graph.replace(graph.value("w"), wide)
        del graph.outputs["z"]
        graph.prune()
        context.notes.append("f16 weights")
        return RewriteLog({"weights": 1}, [Refused("weights", "%z", "an output")])


def test_a_report_counts_nodes_bytes_and_parameters() -> None:
    (report,) = run_passes(small(), [Shrinks()])
    assert (report.nodes_before, report.nodes_after) == (4, 4)
    assert (report.bytes_before, report.bytes_after) == (16, 8)
    assert (report.parameters_before, report.parameters_after) == (4, 4)
    assert report.notes == ["f16 weights"]
    assert report.refusals == [RefusalReport(rule="weights", where="%z", reason="an output")]


def test_notes_belong_to_their_pass() -> None:
    first, second = run_passes(small(), [Shrinks(), Nothing(allow_no_match=True)])
    assert (first.notes, second.notes) == (["f16 weights"], ["nothing to do"])


def test_a_pass_may_time_on_the_target() -> None:
    class Watch:
        def milliseconds(self, graph: Graph) -> float:
            return float(len(graph))

    class Times(Nothing):
        def run(self, graph: Graph, context: Context) -> RewriteLog:
            assert context.stopwatch is not None
            context.notes.append(f"{context.stopwatch.milliseconds(graph)} ms")
            return RewriteLog()

    watch: Stopwatch = Watch()
    (report,) = run_passes(small(), [Times(allow_no_match=True)], context=Context(watch))
    assert report.notes == ["4.0 ms"]


def test_instruments_are_called_before_and_after() -> None:
    calls: list[tuple[str, str, bool]] = []

    class Instrument:
        def before(self, step: Pass, graph: Graph) -> None:
            calls.append(("before", step.kind, "aten.mul.Tensor" in graph.op_counts()))

        def after(self, step: Pass, graph: Graph, report: PassReport) -> None:
            calls.append(("after", report.kind, "aten.mul.Tensor" in graph.op_counts()))

    run_passes(small(), [Invert(), Nothing(allow_no_match=True)], instruments=[Instrument()])
    assert calls == [
        ("before", "invert", False),
        ("after", "invert", True),
        ("before", "nothing", True),
        ("after", "nothing", True),
    ]


def test_a_pass_that_changes_nothing_is_an_error() -> None:
    with pytest.raises(NoMatchError) as error:
        run_passes(small(), [Nothing()])
    assert (error.value.what, error.value.where) == ("nothing changed nothing", None)
    assert error.value.hint == "take the pass out, or set allow_no_match: true"


def test_a_pass_that_refused_everything_says_why() -> None:
    graph = graph_of("%z: f32[s, 4] = aten.div.Tensor(self=%x, other=0.0)  # head\noutput z = %z")
    with pytest.raises(NoMatchError) as error:
        run_passes(graph, [Invert()])
    assert error.value.what == "invert changed nothing (ByInverse: division by zero)"
    assert error.value.where == "%z = aten.div.Tensor, from head"


def test_a_pass_may_be_allowed_to_change_nothing() -> None:
    (report,) = run_passes(small(), [Nothing(allow_no_match=True)])
    assert (report.changes, report.matches, report.diff) == (0, {}, "")


def test_a_pass_that_leaves_a_wrong_graph_is_an_error() -> None:
    with pytest.raises(GraphError, match=r"the type is f32\[3, 4\], declared is f16\[3, 4\]"):
        run_passes(small(), [Breaks()])


def test_rule_passes_prune() -> None:
    graph = small()
    graph.insert("aten.relu.default", {"self": graph.value("x")})
    (report,) = run_passes(graph, [Invert()])
    assert (report.nodes_before, report.nodes_after) == (5, 4)


def test_diff_text() -> None:
    assert diff_text("a\nb\nc", "a\nB\nc\nd") == "--- before\n+++ after\n-b\n+B\n+d"
    assert diff_text("a", "a") == ""


# Parity


def test_parity_is_reported_for_every_pass() -> None:
    first, second = run_passes(small(), [Invert(), Nothing(allow_no_match=True)], proof=proof())
    assert first.parity is not None
    assert first.parity.holds
    assert (first.parity.contract, first.parity.metric) == ("exact", "relative")
    assert [probe.sizes for probe in first.parity.probes] == [{"s": 3}, {"s": 2}]
    assert second.parity == first.parity


def test_a_first_pass_that_changes_nothing_is_compared_all_the_same() -> None:
    (report,) = run_passes(small(), [Nothing(allow_no_match=True)], proof=proof())
    assert report.parity is not None
    assert report.parity.holds


class Doubles(Pass):
    """Changes weights, and tells of nothing."""

    kind: Literal["doubles"] = "doubles"
    allow_no_match: bool = True

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        for name, weight in list(graph.weights.items()):
            graph.set_weight(name, Weight.of(weight.load() * 2))
        return RewriteLog()


def test_a_pass_that_tells_of_no_matches_is_measured_where_it_changed_something() -> None:
    with pytest.raises(ParityError, match="doubles breaks its contract"):
        run_passes(small(), [Invert(), Doubles()], proof=proof())


def test_a_pass_that_returns_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Nothing, "run", lambda self, graph, context: None)
    with pytest.raises(PassError, match="nothing returned a NoneType"):
        run_passes(small(), [Nothing(allow_no_match=True)])


def test_without_proof_there_is_no_parity() -> None:
    (report,) = run_passes(small(), [Invert()])
    assert report.parity is None


def test_a_pass_that_breaks_parity_is_an_error() -> None:
    graph = small()
    with pytest.raises(ParityError) as error:
        run_passes(graph, [Invert(error=0.5)], proof=proof())
    assert error.value.what.startswith("invert breaks its contract (exact): relative is ")
    assert error.value.what.endswith(", the limit 1.2e-04")
    where = str(error.value.where)
    assert where.startswith("%h differs by 0.")
    assert where.endswith("from layer.0 | model.py:7 | invert")
    assert error.value.hint == "take the pass out, widen its budget, or build with force to record it in the manifest"


def test_with_force_a_broken_contract_is_only_recorded() -> None:
    (report,) = run_passes(small(), [Invert(error=0.5)], proof=proof(), force=True)
    assert report.parity is not None
    assert not report.parity.holds
    assert report.parity.worst > report.parity.limit


def test_a_pass_within_its_budget() -> None:
    (report,) = run_passes(small(), [Invert(error=0.01, limit=0.1)], proof=proof())
    assert report.parity is not None
    assert (report.parity.contract, report.parity.limit, report.parity.holds) == ("relative 0.1", 0.1, True)
    assert 0.001 < report.parity.worst < 0.1


def test_a_pass_beyond_its_budget() -> None:
    with pytest.raises(
        ParityError, match=r"invert breaks its contract \(relative 0.001\): relative is .*e-03, the limit 1"
    ):
        run_passes(small(), [Invert(error=0.01, limit=0.001)], proof=proof())


class ToSigmoid(RulePass):
    """An exact rewrite that comes later: tanh(x) -> 2 * sigmoid(2 * x) - 1."""

    kind: Literal["to_sigmoid"] = "to_sigmoid"

    def rules(self) -> Sequence[Rule]:
        class Rule_(Rule):
            def pattern(self, op: Ops, x: TensorHole) -> Any:
                return op.tanh(x)

            def rewrite(self, op: Build, m: Match) -> Value:
                result: Value = op.sub.Tensor(op.mul.Tensor(op.sigmoid(op.mul.Tensor(m.x, 2)), 2), 1)
                return result

        return [Rule_()]


def test_after_a_budget_exact_passes_are_held_to_it() -> None:
    first, second = run_passes(small(), [Invert(error=0.01, limit=0.1), ToSigmoid()], proof=proof())
    assert first.parity is not None
    assert second.parity is not None
    assert second.parity.contract == first.parity.contract == "relative 0.1"


def test_a_budget_overrides_the_passes_own() -> None:
    loose, tight = Budget(metric="relative", limit=0.5), Budget(metric="relative", limit=1e-5)
    (report,) = run_passes(small(), [Invert(error=0.01)], proof=proof(), override=loose)
    assert report.parity is not None
    assert (report.parity.contract, report.parity.holds) == ("relative 0.5", True)
    with pytest.raises(ParityError, match=r"invert breaks its contract \(relative 1e-05\)"):
        run_passes(small(), [Invert(error=0.01, limit=0.5)], proof=proof(), override=tight)


def test_the_broken_pass_is_named_not_one_before_it() -> None:
    with pytest.raises(ParityError, match=r"^invert breaks its contract") as error:
        run_passes(small(), [ToSigmoid(), Invert(error=0.5)], proof=proof())
    assert str(error.value.where).startswith("%h differs by ")


def test_first_difference_is_between_the_two_graphs() -> None:
    before, after = small(), small()
    assert first_difference(before, after, proof()) is None
    run_passes(after, [Invert(error=0.5)])
    found = first_difference(before, after, proof())
    assert found is not None
    assert found.name == "h"


@pytest.mark.parametrize("make", [Invert, Nothing, ToSigmoid])
def test_every_pass_has_a_kind_and_is_a_pass(make: Callable[[], Pass]) -> None:
    step = make()
    assert step.kind == type(step).model_fields["kind"].default
    assert step.contract().model_dump() == {"rounding": 1000.0}
