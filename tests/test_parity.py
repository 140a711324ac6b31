"""Comparing with a reference: the numbers, the contracts, the first value that differs, and what is compared on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from graphopt.errors import ParityError
from graphopt.execution import run
from graphopt.parity import Probe, bisect, compare, describe, judge, select
from graphopt.pipeline import Proof
from graphopt.schemas.pipeline import Budget, Exact, Metric
from graphopt.schemas.report import OutputParity
from tests.graphs import graph_of

inf, nan = math.inf, math.nan


def one(expected: Any, got: Any, mask: Any = None) -> OutputParity:
    return compare({"y": expected}, {"y": got}, mask)["y"]


# compare


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([torch.float32, torch.float64]), st.floats(1e-6, 1.0))
def test_metrics_are_their_formulas(seed: int, dtype: torch.dtype, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, e = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = a.to(dtype), (a + noise * e).to(dtype)
    found = one(a, b)
    x, y = a.double(), b.double()
    difference = x - y
    assert found.max_abs == pytest.approx(float(difference.abs().max()), rel=1e-6)
    assert found.relative == pytest.approx(float(difference.abs().max() / x.abs().max()), rel=1e-6)
    cosine = float(functional.cosine_similarity(x.flatten(), y.flatten(), dim=0))
    assert found.cosine == pytest.approx(cosine, abs=1e-6)
    snr = float(10 * torch.log10(x.square().sum() / difference.square().sum()))
    assert found.snr == pytest.approx(snr, abs=1e-2)
    assert (found.compared, found.left_out) == (15, 0)


def test_metrics_by_hand() -> None:
    found = one(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -2.0]))
    assert (found.max_abs, found.relative) == (2.0, 0.5)
    assert found.cosine == pytest.approx(17 / (5 * math.sqrt(13)))
    assert found.snr == pytest.approx(20 * math.log10(5 / 2))


def test_equal_outputs() -> None:
    found = one(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert found == OutputParity(max_abs=0, relative=0, cosine=1, snr=inf, compared=2, left_out=0)


@pytest.mark.parametrize(
    ("expected", "got", "cosine", "snr"),
    [([0.0, 0.0], [0.0, 0.0], 1.0, inf), ([0.0, 0.0], [1.0, 0.0], 0.0, -inf), ([1.0, 0.0], [0.0, 0.0], 0.0, 0.0)],
)
def test_zeros(expected: list[float], got: list[float], cosine: float, snr: float) -> None:
    found = one(torch.tensor(expected), torch.tensor(got))
    assert (found.cosine, found.snr) == (cosine, snr)
    assert found.relative == max(abs(a - b) for a, b in zip(expected, got, strict=True))


def test_opposite_outputs() -> None:
    assert one(torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])).cosine == pytest.approx(-1)


def test_numpy_and_torch_alike() -> None:
    a, b = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    expected = one(torch.from_numpy(a), b)
    assert expected.max_abs == 1.0
    assert one(a, b) == one(a, b.numpy()) == expected
    assert one(a.T, b.T) == one(a.T, np.asfortranarray(b.numpy().T)) == expected


def test_numpy_scalars_stay_scalars() -> None:
    assert one(torch.tensor(2.0), np.array(1.0, np.float32)).max_abs == 1.0


def test_numpy_arrays_that_cannot_be_written() -> None:
    array = np.ones(3, np.float32)
    array.setflags(write=False)
    assert one(torch.ones(3), array).max_abs == 0


def test_numpy_bfloat16() -> None:
    assert one(torch.ones(3, dtype=torch.bfloat16), np.ones(3, ml_dtypes.bfloat16)).max_abs == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_other_dtypes(dtype: torch.dtype) -> None:
    a, b = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 1, 1]).to(dtype)
    assert one(a, b).max_abs == 1.0
    assert one(a, b).relative == 1.0


def test_large_integers_differ_by_one() -> None:
    assert one(torch.tensor([2**40]), torch.tensor([2**40 + 1])).max_abs == 1.0


def test_gradients_are_no_obstacle() -> None:
    assert one(torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)).max_abs == 0


def test_outputs_that_do_not_match() -> None:
    y = torch.ones(2)
    with pytest.raises(ParityError, match="output 'y' is missing") as error:
        compare({"y": y}, {"z": y, "w": y})
    assert error.value.hint == "there are z, w"
    with pytest.raises(ParityError, match=r"output 'y' has shape \[3\], the reference \[2\]"):
        one(y, torch.ones(3))
    with pytest.raises(ParityError, match=r"output 'y' is torch.float64, the reference torch.float32"):
        one(y, y.double())


def test_outputs_that_only_the_candidate_has_do_not_matter() -> None:
    assert list(compare({"y": torch.ones(1)}, {"y": torch.ones(1), "z": torch.ones(2)})) == ["y"]


MASK = torch.tensor([[1, 1, 0], [0, 1, 1]])


def test_masked_positions_are_left_out_and_counted() -> None:
    a = torch.ones(2, 3, 4)
    b = torch.where(MASK.bool()[..., None], a, 100.0)
    b[1, 2, 3] = 1.5
    for mask in (MASK, MASK.bool(), MASK.float(), MASK.numpy()):
        found = one(a, b, mask)
        assert (found.max_abs, found.compared, found.left_out) == (0.5, 16, 8)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (3, 2, 4), (2, 4, 3)])
def test_outputs_that_do_not_begin_with_the_masks_axes_are_compared_whole(shape: tuple[int, ...]) -> None:
    a = torch.ones(shape)
    found = one(a, a, MASK)
    assert (found.compared, found.left_out) == (a.numel(), 0)
    assert select(a, MASK.bool()) is a


def test_a_mask_that_leaves_out_all() -> None:
    found = one(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 3))
    assert found == OutputParity(max_abs=0, relative=0, cosine=1, snr=inf, compared=0, left_out=6)


@pytest.mark.parametrize("special", [nan, inf, -inf])
def test_equal_special_values_are_no_difference(special: float) -> None:
    found = one(torch.tensor([special, 2.0, 4.0]), torch.tensor([special, 2.0, 3.0]))
    assert (found.max_abs, found.relative, found.compared) == (1.0, 0.25, 3)
    assert one(torch.tensor([special, 2.0]), torch.tensor([special, 2.0])).cosine == 1.0


@pytest.mark.parametrize(("a", "b"), [(nan, 1.0), (1.0, nan), (inf, 1.0), (1.0, -inf), (inf, -inf), (nan, inf)])
def test_other_special_values_are_an_infinite_difference(a: float, b: float) -> None:
    found = one(torch.tensor([a, 2.0]), torch.tensor([b, 2.0]))
    assert (found.max_abs, found.relative, found.snr) == (inf, inf, -inf)
    assert found.cosine < 0.9


# judge


PROBE = Probe({}, {})


def verdict(contract: Exact | Budget, expected: Tensor, got: Tensor, mask: Tensor | None = None) -> tuple[bool, float]:
    found = judge(contract, [Probe({"s": 3}, {}, mask)], [{"y": expected}], [{"y": got}])
    return found.holds, found.worst


def kl(expected: Tensor, got: Tensor) -> float:
    p, q = expected.double().softmax(-1), got.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]])
B = torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 1.0]])
MEASURED: dict[Metric, float] = {
    "max_abs": 2.0,
    "relative": 2.0 / 3.0,
    "cosine": float(functional.cosine_similarity(A.flatten(), B.flatten(), dim=0)),
    "snr": float(10 * torch.log10(A.square().sum() / (A - B).square().sum())),
    "kl": kl(A, B),
    "top1": 0.5,
}


@pytest.mark.parametrize(("metric", "value"), MEASURED.items())
def test_budgets_bound_every_metric_on_the_right_side(metric: Metric, value: float) -> None:
    better = 1 if metric in ("cosine", "snr", "top1") else -1
    step = 1e-3
    holds, worst = verdict(Budget(metric=metric, limit=value - better * step), A, B)
    assert holds
    assert worst == pytest.approx(value, abs=1e-5)
    assert not verdict(Budget(metric=metric, limit=value + better * step), A, B)[0]


def test_a_budget_holds_at_its_limit() -> None:
    assert verdict(Budget(metric="max_abs", limit=2.0), A, B) == (True, 2.0)
    assert verdict(Budget(metric="top1", limit=0.5), A, B) == (True, 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exact_allows_rounding(dtype: torch.dtype) -> None:
    a = torch.ones(4, dtype=dtype)
    epsilon = torch.finfo(dtype).eps
    found = judge(Exact(rounding=4), [PROBE], [{"y": a}], [{"y": a + 4 * epsilon}])
    assert (found.metric, found.limit, found.holds) == ("relative", 4 * epsilon, True)
    assert not judge(Exact(rounding=4), [PROBE], [{"y": a}], [{"y": a + 8 * epsilon}]).holds


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float16, 16), (torch.bfloat16, 8), (torch.float32, 1000)])
def test_in_half_precision_few_roundings_are_exact(dtype: torch.dtype, roundings: int) -> None:
    """Whatever the other outputs are: fp32 is not held to what half precision is."""
    a, limit = torch.ones(4, dtype=dtype), roundings * torch.finfo(dtype).eps
    found = judge(Exact(), [PROBE], [{"y": a}], [{"y": a + limit}])
    assert (found.limit, found.holds) == (limit, True)
    found = judge(Exact(), [PROBE], [{"y": a}], [{"y": a + 2 * limit}])
    assert (found.limit, found.holds) == (limit, False)
    other = torch.ones(2, dtype=torch.float16)
    found = judge(Exact(), [PROBE], [{"y": a, "z": other}], [{"y": a + 2 * limit, "z": other}])
    assert (found.worst, found.limit, found.holds) == (2 * limit, limit, False)


def test_complex_outputs_and_large_integers() -> None:
    assert one(torch.tensor([1 + 2j]), torch.tensor([1 + 99j])).max_abs == 97
    assert one(torch.tensor([1 + 2j]), torch.tensor([1 + 2j])).compared == 1
    assert one(torch.tensor([2**60]), torch.tensor([2**60 + 1])).max_abs == 1


@pytest.mark.parametrize(
    ("metric", "limit"),
    [("cosine", 2.0), ("max_abs", -1.0), ("relative", float("nan")), ("top1", 1.5), ("snr", float("inf"))],
)
def test_limits_that_nothing_can_hold(metric: Metric, limit: float) -> None:
    with pytest.raises(ValueError, match=r"from .* to|finite"):
        Budget(metric=metric, limit=limit)


def test_exact_integers_are_equal() -> None:
    a = torch.tensor([1, 2])
    assert judge(Exact(), [PROBE], [{"y": a}], [{"y": a}]).holds
    assert not judge(Exact(), [PROBE], [{"y": a}], [{"y": a + 1}]).holds


def test_the_worst_output_of_all_probes_counts() -> None:
    references = [{"y": A, "z": A}, {"y": A, "z": A}]
    candidates = [{"y": A, "z": A + 0.25}, {"y": A + 0.125, "z": A}]
    found = judge(Budget(metric="max_abs", limit=1), [Probe({"s": 2}, {}), Probe({"s": 3}, {})], references, candidates)
    assert found.worst == found.max_abs == 0.25
    assert [probe.sizes for probe in found.probes] == [{"s": 2}, {"s": 3}]
    assert [[output.max_abs for output in probe.outputs.values()] for probe in found.probes] == [[0, 0.25], [0.125, 0]]
    assert found.contract == "max_abs 1"
    found = judge(Budget(metric="top1", limit=0.4), [PROBE, PROBE], [{"y": A}] * 2, [{"y": A}, {"y": B}])
    assert (found.worst, found.holds) == (0.5, True)


@pytest.mark.parametrize("metric", ["kl", "top1", "max_abs"])
def test_masked_positions_do_not_count(metric: Metric) -> None:
    mask = torch.tensor([[1, 0]])
    a, b = A[None], torch.where(mask.bool()[..., None], A[None], -9 * A[None])
    assert verdict(Budget(metric=metric, limit=1 if metric == "top1" else 0), a, b, mask)[0]
    assert not verdict(Budget(metric=metric, limit=1 if metric == "top1" else 0), a, b)[0]


def test_logits_metrics_need_a_floating_output() -> None:
    with pytest.raises(ParityError, match="the metric top1 needs a floating output"):
        verdict(Budget(metric="top1", limit=1), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("metric", "limit"), [("kl", 1.0), ("top1", 0.5), ("max_abs", 1.0), ("cosine", 0.5), ("snr", 0.0)]
)
@pytest.mark.parametrize("first", [True, False])
def test_nan_breaks_every_budget(metric: Metric, limit: float, first: bool) -> None:
    bad = {"y": torch.full_like(A, nan)}
    candidates = [bad, {"y": A}] if first else [{"y": A}, bad]
    assert not judge(Budget(metric=metric, limit=limit), [PROBE, PROBE], [{"y": A}] * 2, candidates).holds


def test_logits_that_are_minus_infinity_on_both_sides_have_no_divergence() -> None:
    logits = torch.tensor([[1.0, -inf, 2.0]])
    assert verdict(Budget(metric="kl", limit=1e-9), logits, logits.clone()) == (True, 0.0)


def test_contracts_in_words() -> None:
    assert describe(Exact()) == "exact"
    assert describe(Budget(metric="cosine", limit=0.999)) == "cosine 0.999"


# bisect


CHAIN = """
    %a: f32[s, 4] = aten.sin.default(self=%x)
    %b: f32[s, 4] = aten.{}.default(self=%a)  # layer.1 | model.py:4 | broken_pass
    %c: f32[s, 4] = aten.exp.default(self=%b)
    output y = %c
"""


def test_bisect_finds_the_first_value_that_differs() -> None:
    probe = Probe({"s": 3}, {"x": torch.ones(3, 4)})
    found = bisect(graph_of(CHAIN.format("cos")), graph_of(CHAIN.format("tanh")), probe)
    assert found is not None
    assert (found.name, found.origin) == ("b", ("layer.1", "model.py:4", "broken_pass"))
    expected = abs(math.cos(math.sin(1)) - math.tanh(math.sin(1)))
    assert found.parity.max_abs == pytest.approx(expected, rel=1e-4)
    text = f"%b differs by {found.parity.max_abs:.3g} ({found.parity.relative:.3g} of its scale)"
    assert str(found) == f"{text}, from layer.1 | model.py:4 | broken_pass"


def test_bisect_finds_nothing_where_all_is_equal() -> None:
    graph = graph_of(CHAIN.format("cos"))
    assert bisect(graph, graph.clone(), Probe({"s": 3}, {"x": torch.ones(3, 4)})) is None


@pytest.mark.parametrize(("tolerance", "name"), [(1e-4, "b"), (0.5, None)])
def test_bisect_keeps_to_its_tolerance(tolerance: float, name: str | None) -> None:
    probe = Probe({"s": 3}, {"x": torch.ones(3, 4)})
    found = bisect(graph_of(CHAIN.format("cos")), graph_of(CHAIN.format("tanh")), probe, tolerance)
    assert (found.name if found else None) == name


def test_bisect_passes_over_values_of_another_name_or_shape() -> None:
    candidate = graph_of(CHAIN.format("tanh"))
    candidate.rename(candidate.value("b"), "renamed")
    found = bisect(graph_of(CHAIN.format("cos")), candidate, Probe({"s": 3}, {"x": torch.ones(3, 4)}))
    assert found is not None
    assert found.name == "c"


def test_bisect_takes_a_function_of_inputs() -> None:
    graph = graph_of(CHAIN.format("cos"))

    def engine(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        a = inputs["x"].sin()
        return {"a": a, "b": a.cos() + 1, "unknown": a}

    found = bisect(graph, engine, Probe({"s": 3}, {"x": torch.ones(3, 4)}))
    assert found is not None
    assert (found.name, found.origin) == ("b", ("layer.1", "model.py:4", "broken_pass"))


def test_bisect_leaves_out_masked_positions_also_behind_the_heads() -> None:
    """``[batch, heads, sequence, ...]`` is masked along its third axis."""
    text = """
        %t: f32[2, 4, s, 5] = aten.transpose.int(self=%x, dim0=1, dim1=2)
        %n: f32[2, 4, s, 5] = aten.{}.default(self=%t)
        output n = %n
    """
    x = torch.rand(2, 3, 4, 5)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    reference, candidate = (graph_of(text.format(op), shape="2, s, 4, 5") for op in ("relu", "floor"))
    x[mask.bool()] = 2.0
    assert bisect(reference, candidate, Probe({"s": 3}, {"x": x}, mask)) is None
    x[1, 0] = 0.5
    found = bisect(reference, candidate, Probe({"s": 3}, {"x": x}, mask))
    assert found is not None
    assert (found.name, found.parity.left_out) == ("n", 3 * 4 * 5)


def test_bisect_finds_where_nan_comes_from() -> None:
    probe = Probe({"s": 3}, {"x": -torch.ones(3, 4)})
    found = bisect(graph_of(CHAIN.format("cos")), graph_of(CHAIN.format("log")), probe)
    assert found is not None
    assert found.name == "b"


# Proof


def proof() -> Proof:
    probes = [Probe({"s": size}, {"x": torch.randn(size, 4)}) for size in (2, 3, 5)]
    return Proof(probes, [{"y": probe.inputs["x"].sin().cos().exp()} for probe in probes])


def test_proof_of_a_graph() -> None:
    right, wrong = graph_of(CHAIN.format("cos")), graph_of(CHAIN.format("tanh"))
    assert proof().of_graph(right, Exact()).holds
    assert [probe.sizes["s"] for probe in proof().of_graph(right, Exact()).probes] == [2, 3, 5]
    assert not proof().of_graph(wrong, Exact()).holds


def test_proof_of_a_pass_takes_two_sizes() -> None:
    found = proof().of_pass(graph_of(CHAIN.format("cos")), Exact())
    assert found.holds
    assert [probe.sizes["s"] for probe in found.probes] == [2, 3]


def test_proof_of_an_engine() -> None:
    graph = graph_of(CHAIN.format("cos"))
    assert proof().of_engine(lambda **inputs: run(graph, inputs), Exact()).holds
    found = proof().of_engine(lambda x: {"y": x.sin().cos().exp() + 0.5}, Budget(metric="max_abs", limit=0.1))
    assert not found.holds
    assert found.worst == pytest.approx(0.5)


@pytest.mark.parametrize("contract", [Exact(), Budget(metric="cosine", limit=0.9)], ids=["exact", "budget"])
def test_an_output_that_is_compared_nowhere_is_no_proof(contract: Exact | Budget) -> None:
    """In all probes; a single one may be padding alone."""
    inputs, mask = {"x": torch.ones(1, 3)}, torch.ones(1, 3)
    hidden, seen = (Probe({}, inputs, own) for own in (mask * 0, mask))
    outputs = {"y": torch.ones(1, 3)}
    with pytest.raises(ParityError, match="the mask leaves out all of output 'y'"):
        judge(contract, [hidden, hidden], [outputs] * 2, [outputs] * 2)
    assert judge(contract, [hidden, seen], [outputs] * 2, [outputs] * 2).holds
