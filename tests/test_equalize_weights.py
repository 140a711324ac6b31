"""equalize_weights: linears that follow each other with ranges alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from graphopt.compiler import make_proof
from graphopt.errors import NoMatchError, PassError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.equalize_weights import EqualizeWeights
from graphopt.passes.rescaling import evening
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.tensors import Weight
from tests.rules import apply_pass, program, read
from tests.tiny import tiny_llama

GATED = """
    dim batch in [1, ...]
    input %x: f32[batch, 8]
    weight %gate.weight: f32[6, 8]
    weight %up.weight: f32[6, 8]
    weight %up.bias: f32[6]
    weight %down.weight: f32[8, 6]
    %gate = aten.linear.default(input=%x, weight=%gate.weight)
    %up = aten.linear.default(input=%x, weight=%up.weight, bias=%up.bias)
    %h = graphopt.gated_activation.default(gate=%gate, up=%up, activation="silu")
    %y = aten.linear.default(input=%h, weight=%down.weight)
    output y = %y
"""
ACROSS = "no linear of its own makes the channels of its input"


def step_of(**options: Any) -> EqualizeWeights:
    (step,) = load_passes([{"kind": "canonicalize"}, {"kind": "equalize_weights", **options}])[1:]
    assert isinstance(step, EqualizeWeights)
    return step


def uneven() -> Graph:
    """Rows of ``up`` whose magnitudes are far apart, one of them 0."""
    graph = read(GATED)
    spread = torch.tensor([100.0, 1.0, 0.01, 10.0, 0.0, 1.0])
    weight = graph.weights["up.weight"].load() * spread[:, None]
    graph.set_weight("up.weight", Weight.of(weight))
    return graph


def test_nothing_but_weights_changes() -> None:
    assert apply_pass(GATED, step_of(), Context()).text == program(GATED)


@pytest.mark.parametrize("batch", [2, 5])
def test_the_function_is_the_same(batch: int) -> None:
    graph, before = uneven(), uneven()
    run_passes(graph, [step_of()], context=Context())
    inputs = {"x": torch.randn(batch, 8)}
    expected = run(before, inputs)["y"]
    torch.testing.assert_close(run(graph, inputs)["y"], expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_ranges_are_alike_afterwards() -> None:
    graph = uneven()
    run_passes(graph, [step_of()], context=Context())
    rows, columns = graph.weights["up.weight"].load().abs().amax(1), graph.weights["down.weight"].load().abs().amax(0)
    there = rows > 0
    torch.testing.assert_close(rows[there], columns[there])
    assert int(there.sum()) == 5


def test_factors_are_the_formula_s() -> None:
    factors = evening(torch.tensor([[4.0, -16.0], [0.0, 0.0]]), torch.tensor([[1.0, 3.0], [-4.0, 0.0]]))
    assert factors.tolist() == [2.0, 1.0]


def test_only_pairs_match() -> None:
    applied = apply_pass(GATED, step_of(), Context())
    assert applied.matches == {"pair": 1}
    assert applied.reasons == [ACROSS]


def test_channels_that_others_read_stay() -> None:
    with pytest.raises(NoMatchError, match=ACROSS):
        run_passes(read(f"{GATED}\noutput h = %h"), [step_of()], context=Context())


def test_an_unknown_module_is_refused_with_the_nearest() -> None:
    with pytest.raises(PassError, match="no linear's module matches 'dwn'") as refused:
        run_passes(read(GATED), [step_of(modules=("dwn",))], context=Context())
    assert "down" in str(refused.value)


def test_channels_lose_less_in_few_bits() -> None:
    """By one scale for each row of the later linear, small channels of large weights no longer drown."""
    before, graph = uneven(), uneven()
    run_passes(graph, [step_of()], context=Context())
    x = {"x": torch.randn(64, 8, generator=torch.Generator().manual_seed(1))}
    expected = run(before, x)["y"]

    quantize = load_passes([{"kind": "canonicalize"}, {"kind": "quantize", "scheme": "weight_only", "group": 16}])[1]

    def off(own: Graph) -> float:
        made = own.clone()
        run_passes(made, [quantize], context=Context())
        return float((run(made, x)["y"] - expected).norm())

    assert off(graph) < off(before)


def refused(body: str) -> list[str]:
    return apply_pass(body, step_of(allow_no_match=True), Context()).reasons


def test_numbers_before_and_after() -> None:
    """Channel j of rows and columns both have the geometric mean of their ranges; the bias goes with its rows."""
    before, graph = uneven(), uneven()
    run_passes(graph, [step_of()], context=Context())
    up, down = (before.weights[name].load() for name in ("up.weight", "down.weight"))
    mean = (up.abs().amax(1) * down.abs().amax(0)).sqrt()
    there = mean > 0
    factors = torch.where(there, up.abs().amax(1) / torch.where(there, mean, 1.0), 1.0)
    torch.testing.assert_close(graph.weights["up.weight"].load().abs().amax(1)[there], mean[there])
    torch.testing.assert_close(graph.weights["down.weight"].load(), down * factors)
    torch.testing.assert_close(graph.weights["up.bias"].load(), before.weights["up.bias"].load() / factors)
    torch.testing.assert_close(graph.weights["gate.weight"].load(), before.weights["gate.weight"].load())
    spread = [float(own.max() / own.min()) for own in (up.abs().amax(1)[there], mean[there])]
    assert spread[1] < 0.1 * spread[0]


def test_rows_and_columns_of_zeros_stay_as_they_are() -> None:
    graph = uneven()
    column = graph.weights["down.weight"].load().clone()
    column[:, 2] = 0
    graph.set_weight("down.weight", Weight.of(column))
    before = {name: weight.load().clone() for name, weight in graph.weights.items()}
    run_passes(graph, [step_of()], context=Context())
    after = {name: weight.load() for name, weight in graph.weights.items()}
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    for channel in (2, 4):
        assert torch.equal(after["up.weight"][channel], before["up.weight"][channel])
        assert torch.equal(after["up.bias"][channel], before["up.bias"][channel])
        assert torch.equal(after["down.weight"][:, channel], before["down.weight"][:, channel])


def test_a_weight_that_is_read_elsewhere_is_refused() -> None:
    body = GATED.replace("output y", "%w = aten.relu.default(self=%down.weight)\noutput w = %w\noutput y")
    assert refused(body) == [ACROSS, "%down.weight is read elsewhere as well"]


@pytest.mark.parametrize(
    "more",
    [
        "output up = %up",
        "%r = aten.relu.default(self=%up)\noutput r = %r",
        "%r = aten.relu.default(self=%h)\noutput r = %r",
        "%z = aten.linear.default(input=%x, weight=%up.weight)\noutput z = %z",
        "output bias = %up.bias",
    ],
    ids=["up is an output", "up is read", "its product is read", "up's weight is read", "up's bias is an output"],
)
def test_channels_and_weights_that_others_read_are_refused(more: str) -> None:
    made = apply_pass(GATED.replace("output y", f"{more}\noutput y"), step_of(allow_no_match=True), Context())
    assert (made.matches, set(made.reasons)) == ({}, {ACROSS})


def test_an_activation_between_is_refused() -> None:
    gated = GATED.replace('graphopt.gated_activation.default(gate=%gate, up=%up, activation="silu")', "%s")
    body = gated.replace("%h = %s", "%h = aten.gelu.default(self=%up)").replace(
        "%gate = aten.linear.default(input=%x, weight=%gate.weight)", ""
    )
    assert refused(body.replace("weight %gate.weight: f32[6, 8]", "")) == [ACROSS, ACROSS]


def test_every_mlp_of_a_llama_matches() -> None:
    """And the function is eager's, at two sizes, one of them not the traced one."""
    source = tiny_llama()
    graph = graphopt.trace(source.module, source.inputs, source.axes, {}, source.dims, source.truths)
    proof = make_proof(source, graph)
    kinds = ("canonicalize", "fuse_attention", "fuse_norm", "fuse_activation", "equalize_weights")
    steps = load_passes([{"kind": kind, "allow_no_match": True} for kind in kinds])
    *_, report = run_passes(graph, steps, context=Context(source=source), proof=proof)
    assert report.matches == {"pair": 2}
    assert report.parity is not None
    assert report.parity.holds
    ups = sorted(name for name in graph.weights if name.endswith("up_proj.weight"))
    assert len(ups) == 2
    for name in ups:
        rows = graph.weights[name].load().abs().amax(1)
        columns = graph.weights[name.replace("up_proj", "down_proj")].load().abs().amax(0)
        torch.testing.assert_close(rows, columns)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_token"])
def test_int8_gets_no_worse(scheme: str) -> None:
    before, graph = uneven(), uneven()
    run_passes(graph, [step_of()], context=Context())
    x = {"x": torch.randn(64, 8, generator=torch.Generator().manual_seed(1))}
    expected = run(before, x)["y"]
    quantize = load_passes([{"kind": "canonicalize"}, {"kind": "quantize", "scheme": scheme}])[1]

    def signal_to_noise(own: Graph) -> float:
        made = own.clone()
        run_passes(made, [quantize], context=Context())
        return float(20 * (expected.norm() / (run(made, x)["y"] - expected).norm()).log10())

    assert signal_to_noise(graph) >= signal_to_noise(before)
