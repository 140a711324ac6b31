"""merge_linears: linear products of one input as one product, where that is faster."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from graphopt.errors import NoMatchError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.merge_linears import MergeLinears
from graphopt.pipeline import Context, run_passes
from graphopt.tensors import Weight
from tests.rules import (
    SIZES,
    Applied,
    apply_pass,
    assert_close,
    assert_idempotent,
    inputs_of,
    pass_on,
    program,
    read,
)

X = """
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: f32[batch, sequence, 8]
"""
QKV = f"""{X}
    weight %layer.q.weight: f32[6, 8]
    weight %layer.q.bias: f32[6]
    weight %layer.k.weight: f32[4, 8]
    weight %layer.k.bias: f32[4]
    weight %layer.v.weight: f32[2, 8]
    weight %layer.v.bias: f32[2]
    %q: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%layer.q.weight, bias=%layer.q.bias)
    %k: f32[batch, sequence, 4] = aten.linear.default(input=%x, weight=%layer.k.weight, bias=%layer.k.bias)
    %v: f32[batch, sequence, 2] = aten.linear.default(input=%x, weight=%layer.v.weight, bias=%layer.v.bias)
    output q = %q
    output k = %k
    output v = %v
"""
MERGED = f"""{X}
    weight %layer.q.weight_and_k_and_v: f32[12, 8]
    weight %layer.q.bias_and_k_and_v: f32[12]
    %linear: f32[batch, sequence, 12] = aten.linear.default(input=%x, weight=%layer.q.weight_and_k_and_v, bias=%layer.q.bias_and_k_and_v)
    %q: f32[batch, sequence, 6], %k: f32[batch, sequence, 4], %v: f32[batch, sequence, 2] = aten.split_with_sizes.default(self=%linear, split_sizes=[6, 4, 2], dim=2)
    output q = %q
    output k = %k
    output v = %v
"""  # noqa: E501
GATE_UP = f"""{X}
    weight %gate.weight: f32[6, 8]
    weight %up.weight: f32[6, 8]
    %gate: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%gate.weight)
    %s: f32[batch, sequence, 6] = aten.silu.default(self=%gate)
    %up: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%up.weight)
    %y: f32[batch, sequence, 6] = aten.mul.Tensor(self=%s, other=%up)
    output y = %y
"""
GATE_UP_MERGED = f"""{X}
    weight %gate.weight_and_up: f32[12, 8]
    %linear: f32[batch, sequence, 12] = aten.linear.default(input=%x, weight=%gate.weight_and_up)
    %gate: f32[batch, sequence, 6], %up: f32[batch, sequence, 6] = aten.split_with_sizes.default(self=%linear, split_sizes=[6, 6], dim=2)
    %s: f32[batch, sequence, 6] = aten.silu.default(self=%gate)
    %y: f32[batch, sequence, 6] = aten.mul.Tensor(self=%s, other=%up)
    output y = %y
"""  # noqa: E501
ALWAYS = MergeLinears(decide="always")


@dataclass
class FakeStopwatch:
    """Says these times, in this order, and keeps what it was asked to time."""

    times: list[float]
    seen: list[Graph] = field(default_factory=list)

    def milliseconds(self, graph: Graph) -> float:
        self.seen.append(graph)
        return self.times[len(self.seen) - 1]


def timed(body: str, *times: float, **options: float) -> tuple[Applied, FakeStopwatch, list[str]]:
    """The pass on a target where products take these times: apart, merged, apart, ..."""
    watch = FakeStopwatch(list(times))
    context = Context(watch)
    applied = apply_pass(body, MergeLinears(allow_no_match=True, **options), context)
    return applied, watch, context.notes


def assert_merging_is_equal(body: str) -> None:
    before, after = read(body), read(body)
    run_passes(after, [ALWAYS])
    for size in SIZES:
        inputs = inputs_of(before, size)
        expected, got = run(before, inputs), run(after, inputs)
        for name, tensor in expected.items():
            assert_close(got[name], tensor)


@pytest.mark.parametrize(("before", "after"), [(QKV, MERGED), (GATE_UP, GATE_UP_MERGED)])
def test_fires(before: str, after: str) -> None:
    applied = apply_pass(before, ALWAYS)
    assert applied.text == program(after)
    assert applied.matches == {"MergeLinears": 1}
    assert applied.reasons == []


@pytest.mark.parametrize("body", [QKV, GATE_UP])
def test_equal(body: str) -> None:
    assert_merging_is_equal(body)


def test_every_group_is_merged() -> None:
    body = GATE_UP.replace("output y = %y", "") + "\n".join(
        f"%{name}: f32[batch, sequence, 8] = aten.linear.default(input=%y, weight=%{name}.weight)\noutput {name} = %{name}"
        for name in ("a", "b")
    )
    body = body.replace("weight %gate", "weight %a.weight: f32[8, 6]\nweight %b.weight: f32[8, 6]\nweight %gate", 1)
    body = body.replace("output a = %a\n", "") + "\noutput a = %a"
    assert apply_pass(body, ALWAYS).matches == {"MergeLinears": 2}
    assert_merging_is_equal(body)


def test_a_weight_that_is_used_elsewhere_stays() -> None:
    body = f"{GATE_UP}output w = %gate.weight"
    applied = apply_pass(body, ALWAYS)
    assert "weight %gate.weight: f32[6, 8]" in applied.text
    assert "weight %up.weight:" not in applied.text
    assert_merging_is_equal(body)


def test_the_same_weight_twice_is_equal() -> None:
    assert_merging_is_equal(GATE_UP.replace("weight %up.weight: f32[6, 8]", "").replace("%up.weight", "%gate.weight"))


def test_the_merged_weight_is_put_together_when_it_is_loaded() -> None:
    graph = read(GATE_UP)
    loads: list[str] = []

    def counted(name: str, weight: Weight) -> Weight:
        def load() -> torch.Tensor:
            loads.append(name)
            return weight.load()

        return Weight(weight.type, load)

    parts = dict(graph.weights)
    graph.weights.update({name: counted(name, weight) for name, weight in parts.items()})
    run_passes(graph, [ALWAYS])
    assert loads == []
    merged = graph.weights["gate.weight_and_up"].load()
    assert loads == ["gate.weight", "up.weight"]
    assert torch.equal(merged, torch.cat([parts["gate.weight"].load(), parts["up.weight"].load()]))


SOME_BIAS = QKV.replace(", bias=%layer.k.bias", "").replace("weight %layer.k.bias: f32[4]\n", "")


def test_refuses_some_with_a_bias_and_some_without() -> None:
    applied = apply_pass(SOME_BIAS, MergeLinears(decide="always", allow_no_match=True))
    assert applied.reasons == ["some have a bias and some have none"]
    assert applied.text == program(SOME_BIAS)


OTHER_INPUTS = f"""{X}
    input %z: f32[batch, sequence, 8]
    weight %w: f32[6, 8]
    weight %v: f32[6, 8]
    %a: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%w)
    %b: f32[batch, sequence, 6] = aten.linear.default(input=%z, weight=%v)
    output a = %a
    output b = %b
"""
GIVEN_WEIGHT = OTHER_INPUTS.replace("%z: f32[batch, sequence, 8]", "%v: f32[6, 8]").replace("=%z", "=%x").replace(
    "weight %v: f32[6, 8]", ""
)  # fmt: skip


@pytest.mark.parametrize("body", [OTHER_INPUTS, GIVEN_WEIGHT])
def test_does_not_match(body: str) -> None:
    applied = apply_pass(body, MergeLinears(decide="always", allow_no_match=True))
    assert (applied.text, applied.matches, applied.reasons) == (program(body), {}, [])


def test_a_weight_of_one_dimension_is_no_crash() -> None:
    body = GATE_UP.replace("f32[6, 8]", "f32[8]").replace("f32[batch, sequence, 6]", "f32[batch, sequence]")
    before = read(body)
    pass_on(read(body), MergeLinears(decide="always", allow_no_match=True))
    assert run(before, inputs_of(before, SIZES[0]))["y"].shape == (2, 6)


# Timing


def test_timed_merges_where_the_target_is_faster() -> None:
    applied, watch, notes = timed(QKV, 1.0, 0.5)
    assert applied.text == program(MERGED)
    assert notes == ["3 products of f32[batch, sequence, 8]: 1.000 ms apart, 0.500 ms merged"]
    assert len(watch.seen) == 2


def test_timed_leaves_what_is_not_faster() -> None:
    applied, _, notes = timed(QKV, 1.0, 1.5)
    assert applied.text == program(QKV)
    assert applied.reasons == ["not faster (1.000 ms apart, 1.500 ms merged)"]
    assert notes == ["3 products of f32[batch, sequence, 8]: 1.000 ms apart, 1.500 ms merged"]


@pytest.mark.parametrize(
    ("merged", "gain", "merges"),
    [(0.96, 0.03, 1), (0.98, 0.03, 0), (0.96, 0.1, 0), (0.89, 0.1, 1), (0.999, 0.0, 1), (1.0, 0.0, 0)],
)
def test_merging_must_gain_its_share(merged: float, gain: float, merges: int) -> None:
    applied, _, _ = timed(QKV, 1.0, merged, gain=gain)
    assert applied.matches.get("MergeLinears", 0) == merges


def test_what_is_timed_is_the_group_alone() -> None:
    _, watch, _ = timed(QKV, 1.0, 0.5)
    apart, merged = watch.seen
    assert apart.op_counts() == {"aten.linear.default": 3}
    assert merged.op_counts() == {"aten.linear.default": 1, "aten.split_with_sizes.default": 1}
    assert list(apart.dims) == list(merged.dims) == ["batch", "sequence"]
    for graph in watch.seen:
        graph.verify()
    inputs = inputs_of(apart, SIZES[1])
    expected, got = run(apart, inputs), run(merged, inputs)
    assert list(expected) == ["y0", "y1", "y2"]
    for name, tensor in expected.items():
        assert_close(got[name], tensor)


def test_groups_are_decided_one_by_one() -> None:
    second = """
        %a: f32[batch, sequence, 8] = aten.linear.default(input=%y, weight=%a.weight)
        %b: f32[batch, sequence, 8] = aten.linear.default(input=%y, weight=%b.weight)
        output a = %a
        output b = %b"""
    body = GATE_UP.replace("output y = %y", "") + second
    body = body.replace("weight %gate", "weight %a.weight: f32[8, 6]\nweight %b.weight: f32[8, 6]\nweight %gate", 1)
    applied, watch, notes = timed(body, 1.0, 2.0, 1.0, 0.5)
    assert applied.matches == {"MergeLinears": 1}
    assert "%a: f32[batch, sequence, 8], %b: f32[batch, sequence, 8] = aten.split_with_sizes" in applied.text
    assert applied.reasons == ["not faster (1.000 ms apart, 2.000 ms merged)"]
    assert len(watch.seen) == 4
    assert len(notes) == 2


def test_always_times_nothing() -> None:
    watch = FakeStopwatch([])
    apply_pass(QKV, ALWAYS, Context(watch))
    assert watch.seen == []


FIXED = "the target's tactics are fixed, so nothing is timed: set decide: always to merge"


def test_without_a_stopwatch_nothing_is_merged() -> None:
    applied = apply_pass(QKV, MergeLinears(allow_no_match=True))
    assert applied.text == program(QKV)
    assert applied.reasons == [FIXED]


def test_nothing_merged_is_an_error_with_its_reason() -> None:
    with pytest.raises(NoMatchError, match=f"merge_linears changed nothing .MergeLinears: {FIXED}"):
        apply_pass(QKV, MergeLinears())


@pytest.mark.parametrize("body", [QKV, GATE_UP])
def test_idempotent(body: str) -> None:
    assert_idempotent(body, ALWAYS)


SPLIT_READER = f"""{X}
    weight %router.weight: f32[6, 8]
    weight %gate.weight: f32[6, 8]
    %logits: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%router.weight)
    %top: f32[batch, sequence, 2], %experts: i64[batch, sequence, 2] = aten.topk.default(self=%logits, k=2)
    %sum: f32[batch, sequence] = aten.sum.dim_IntList(self=%top, dim=[-1])
    %gate: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%gate.weight)
    output y = %sum
    output experts = %experts
    output gate = %gate
"""


def test_a_reader_with_several_outputs_is_no_attention() -> None:
    applied, _, _ = timed(SPLIT_READER, 1.0, 2.0)
    assert applied.reasons == ["not faster (1.000 ms apart, 2.000 ms merged)"]
