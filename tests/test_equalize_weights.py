"""equalize_weights: linears that follow each other with ranges alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from graphopt.errors import NoMatchError, PassError
from graphopt.execution import run
from graphopt.ir import Graph, Weight
from graphopt.passes.equalize_weights import EqualizeWeights
from graphopt.passes.rescaling import evening
from graphopt.pipeline import Context, load_passes, run_passes
from tests.rules import apply_pass, program, read

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
