"""Which number of few bits each weight becomes: grids, GPTQ on them, and packing, against plain Python and numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from torch import Tensor

from graphopt.errors import PassError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.ops.quantization import unpacked
from graphopt.passes import quantize as quantize_module
from graphopt.passes.quantized_weights import NF4, Packing, nearest_groups, nf4_groups
from graphopt.passes.rounding import Grid, gptq, grid_of, pack
from graphopt.tensors import Weight
from tests.rules import load, program, read
from tests.test_quantize import BEFORE, TABLE, TIED
from tests.test_quantize_schemes import DATA, DEEP, IDS, OPTIONS, OUTLIERS, applied, by_moment, by_row, tokens
from tests.test_quantize_schemes import weights as of_layers

Floats = NDArray[np.float32]
KINDS = [(4, True), (4, False), (8, True), (8, False)]
kinds = pytest.mark.parametrize(("bits", "symmetric"), KINDS)
small = settings(deadline=None, max_examples=40, derandomize=True)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps_of(grid: Grid, features: int) -> Tensor:
    return grid.scales.abs().repeat_interleave(grid.size, 1)[:, :features]


@st.composite
def weights(draw: st.DrawFn) -> Floats:
    """Of a few rows, with zeros, in any order of magnitude."""
    number = st.floats(-1, 1, width=32).map(lambda x: x if abs(x) > 1e-6 else 0.0)
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 40)))
    made: Floats = draw(arrays(np.float32, shape, elements=number))
    return made * np.float32(10.0 ** draw(st.integers(-10, 10)))


# Grids


def ends_of(part: Floats, bits: int, symmetric: bool) -> tuple[float, float]:
    """Scale and zero of a group."""
    if symmetric:
        extreme = float(part[np.argmax(np.abs(part))])
        return (extreme or 1.0) / -(2 ** (bits - 1)), 2 ** (bits - 1)
    low, high = min(0.0, float(np.min(part))), max(0.0, float(np.max(part)))
    scale = (high - low or 1.0) / (2**bits - 1)
    return scale, round(-low / scale)


@kinds
@pytest.mark.parametrize("features", [1, 16, 33, 40])
def test_a_grid_has_each_group_s_ends(bits: int, symmetric: bool, features: int) -> None:
    weight = seeded(4, features)
    weight[1] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    grid = grid_of(weight, bits, 16, symmetric=symmetric)
    assert grid.scales.shape == grid.zeros.shape == (4, math.ceil(features / 16))
    for row, place in np.ndindex(*grid.scales.shape):
        scale, zero = ends_of(weight[row, place * 16 : (place + 1) * 16].numpy(), bits, symmetric)
        assert float(grid.scales[row, place]) == pytest.approx(scale, rel=1e-6)
        assert float(grid.zeros[row, place]) == zero


@kinds
@small
@given(weight=weights(), size=st.sampled_from([1, 5, 16, 64]))
def test_the_nearest_number_is_within_half_a_step(bits: int, symmetric: bool, weight: Floats, size: int) -> None:
    """But for what is cut off: opposite to the largest, less than a step (and what rounding the zero shifts)."""
    own = torch.from_numpy(weight)
    grid = grid_of(own, bits, size, symmetric=symmetric)
    numbers = grid.numbers(own)
    assert numbers.shape == own.shape
    assert bool(((numbers >= 0) & (numbers < 2**bits) & (numbers == numbers.round())).all())
    off, step = (grid.values(numbers) - own).abs(), steps_of(grid, own.shape[1])
    inner = (numbers > 0) & (numbers < 2**bits - 1)
    assert bool((off <= step * torch.where(inner, 0.501, 1.001)).all())
    assert bool((grid.values(numbers)[own == 0] == 0).all())


@kinds
def test_no_other_number_of_the_grid_is_nearer(bits: int, symmetric: bool) -> None:
    weight = seeded(3, 20)
    grid = grid_of(weight, bits, 16, symmetric=symmetric)
    off = (grid.values(grid.numbers(weight)) - weight).abs()
    for number in range(2**bits):
        assert bool((off <= (grid.values(torch.full_like(weight, number)) - weight).abs() + 1e-6).all())


@kinds
def test_zeros_stay_zeros(bits: int, symmetric: bool) -> None:
    weight = torch.zeros(2, 20)
    grid = grid_of(weight, bits, 16, symmetric=symmetric, importance=torch.ones(20))
    assert bool((grid.scales != 0).all())
    assert torch.equal(grid.values(grid.numbers(weight)), weight)


@kinds
@small
@given(weight=weights(), seed=st.integers(0, 1000))
def test_importance_never_loses_weighted_error(bits: int, symmetric: bool, weight: Floats, seed: int) -> None:
    """Group by group and row by row, with features that do not count at all among them."""
    own = torch.from_numpy(weight)
    counts = (seeded(own.shape[1], seed=seed)).clamp(min=0)

    def error(importance: Tensor | None) -> Tensor:
        grid = grid_of(own, bits, 16, symmetric=symmetric, importance=importance)
        off = (grid.values(grid.numbers(own)) - own).double().square() * counts
        return torch.stack([part.sum(1) for part in torch.split(off, 16, 1)], 1)

    least = error(None)
    assert bool((error(counts) <= least * (1 + 1e-4) + 1e-30).all())


def test_importance_gains_where_an_outlier_does_not_count() -> None:
    """A range that cuts it off is finer for the others: 0.6 of it."""
    weight = seeded(1, 16).clamp(-2, 2)
    weight[0, 3] = 4.0
    counts = torch.ones(16)
    counts[3] = 0
    plain, searched = (grid_of(weight, 4, 16, symmetric=True, importance=given) for given in (None, counts))
    assert (float(plain.scales), float(searched.scales)) == pytest.approx((-0.5, -0.3))


@small
@given(seed=st.integers(0, 10**6), features=st.integers(32, 100), bits=st.sampled_from([4, 8]))
def test_fractions_hold_what_stands_between_two_ends(seed: int, features: int, bits: int) -> None:
    """Weights of a step and a minimum for each group (llama.cpp's Q4_1): rounded to nearest they stay, up to what few bits say
    of the minimum; whole zeros lose half a step."""
    numbers = torch.randint(0, 2**bits, (6, features), generator=torch.Generator().manual_seed(seed)).float()
    numbers[:, ::32], numbers[:, 1::32] = 0, 2**bits - 1
    minimum = -numbers.amax() * (0.3 + 0.4 * torch.rand(6, 1, generator=torch.Generator().manual_seed(seed)))
    weight = (numbers + minimum)[:, : features // 32 * 32] * 0.01
    grid = grid_of(weight, bits, 32, symmetric=False, fractions=True)
    off = (grid.values(grid.numbers(weight)) - weight).abs()
    assert float(off.max()) < 0.01 / 2 / 2 ** (bits - 1) + 1e-6


@kinds
def test_whole_zeros_lie_at_most_half_a_step_off(bits: int, symmetric: bool) -> None:
    grid = grid_of(seeded(8, 96), bits, 16, symmetric=symmetric, fractions=not symmetric)
    if symmetric:
        assert grid.whole is None
    else:
        assert grid.whole is not None
        assert bool((grid.whole == grid.whole.round()).all())
        assert bool(((grid.whole - grid.zeros).abs() <= 0.5 + 1 / 16).all())
        of_rests = grid.of_rests()
        torch.testing.assert_close(of_rests.values(of_rests.numbers(grid.rests)), grid.rests)


@kinds
@small
@given(weight=weights())
def test_scales_of_fp16_are_never_zero(bits: int, symmetric: bool, weight: Floats) -> None:
    own = torch.from_numpy(weight)
    if np.abs(weight).max() > 65504 * 2 ** (bits - 1) / 2:
        return
    grid = grid_of(own, bits, 16, symmetric=symmetric, half=True)
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert bool((grid.scales != 0).all())
    assert bool(grid.values(grid.numbers(own)).isfinite().all())


def test_scales_that_fp16_does_not_hold_are_refused() -> None:
    with pytest.raises(PassError, match=r"a group of weights has a scale of 1e\+06, more than fp16 holds"):
        grid_of(torch.full((1, 16), 8e6), 4, 16, symmetric=True, half=True)


# GPTQ


def lost(weight: Tensor, values: Tensor, moment: Tensor) -> float:
    """tr(dW H dW^T)"""
    off = (values - weight).double()
    return float(((off @ moment.double()) * off).sum())


def moment_of(features: int, tokens: int, seed: int) -> Tensor:
    """Of tokens whose features go together, some of them far larger than others."""
    x = seeded(tokens, features, seed=seed) @ seeded(features, features, seed=seed + 1)
    x = x * torch.logspace(-1, 1, features)[torch.randperm(features, generator=torch.Generator().manual_seed(seed))]
    return x.T @ x / tokens


@kinds
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("features", "tokens"), [(24, 200), (24, 5), (40, 40), (150, 300)])
def test_gptq_loses_less_than_rounding_to_nearest(
    bits: int, symmetric: bool, features: int, tokens: int, seed: int
) -> None:
    """On the same grid; fewer tokens than features too, and more columns than are corrected at once."""
    weight, moment = seeded(32, features, seed=seed), moment_of(features, tokens, seed)
    grid = grid_of(weight, bits, 16, symmetric=symmetric)
    before = moment.clone()
    numbers = gptq(weight, moment, grid)
    assert torch.equal(moment, before)
    assert bool(((numbers >= 0) & (numbers < 2**bits) & (numbers == numbers.round())).all())
    nearest = lost(weight, grid.values(grid.numbers(weight)), moment)
    assert lost(weight, grid.values(numbers), moment) < 0.9 * nearest


@kinds
@small
@given(seed=st.integers(0, 10**6), features=st.integers(1, 16), tokens=st.integers(1, 40))
def test_gptq_is_never_worse_by_more_than_a_hair(
    bits: int, symmetric: bool, seed: int, features: int, tokens: int
) -> None:
    """Of many rows: one of them may be lucky when rounded to nearest, where features hardly go together."""
    weight, x = seeded(256, features, seed=seed), seeded(tokens, features, seed=seed + 1)
    moment = x.T @ x / tokens
    grid = grid_of(weight, bits, 16, symmetric=symmetric)
    nearest = lost(weight, grid.values(grid.numbers(weight)), moment)
    assert lost(weight, grid.values(gptq(weight, moment, grid)), moment) <= 1.05 * nearest + 1e-6


@kinds
@pytest.mark.parametrize("features", [1, 20, 130])
def test_features_that_do_not_go_together_are_rounded_to_nearest(bits: int, symmetric: bool, features: int) -> None:
    weight = seeded(5, features)
    grid = grid_of(weight, bits, 16, symmetric=symmetric)
    moment = torch.diag(seeded(features, seed=1).abs() + 0.1)
    assert torch.equal(gptq(weight, moment, grid), grid.numbers(weight))


def test_gptq_by_hand() -> None:
    """Numbers 0 to 15 around 8 in steps of 1. Feature 1 counts more and comes first: 0.4 becomes 0. Feature 0 has to make up
    for it by (H01 / H00) * 0.4 = 0.2 and goes up to 1, where the nearest is 0 (0.4)."""
    grid = Grid(4, 2, torch.ones(1, 1), torch.full((1, 1), 8.0))
    moment = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    weight = torch.tensor([[0.4, 0.4]])
    assert grid.numbers(weight).tolist() == [[8, 8]]
    assert gptq(weight, moment, grid, damping=0.0).tolist() == [[9, 8]]
    assert gptq(weight, moment * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), grid, damping=0.0).tolist() == [[8, 8]]


def test_gptq_by_hand_of_three() -> None:
    """The same by normal equations: after each feature the others take what is best of what is left to them."""
    weight, moment = seeded(1, 3) * 2, moment_of(3, 50, 7)
    grid = grid_of(weight, 4, 16, symmetric=False)
    order = moment.diagonal().argsort(descending=True).tolist()
    rest, expected = weight.double().clone(), torch.zeros(1, 3)
    for place, feature in enumerate(order):
        expected[0, feature] = grid.numbers(rest.float())[0, feature]
        off = rest[0, feature] - grid.values(expected)[0, feature]
        left = order[place + 1 :]
        if left:
            own = moment.double()[left][:, left]
            rest[0, left] += off * torch.linalg.solve(own, moment.double()[left, feature])
    assert torch.equal(gptq(weight, moment, grid, damping=0.0), expected)


@kinds
def test_features_that_the_data_never_reached(bits: int, symmetric: bool) -> None:
    """They are rounded to nearest, and the others as if they were not there; all of them may be so."""
    weight, moment = seeded(4, 20), moment_of(20, 100, 3)
    dead = torch.tensor([0, 7, 19])
    moment[dead], moment[:, dead] = 0, 0
    grid = grid_of(weight, bits, 32, symmetric=symmetric)
    numbers = gptq(weight, moment, grid)
    assert torch.equal(numbers[:, dead], grid.numbers(weight)[:, dead])
    assert lost(weight, grid.values(numbers), moment) <= lost(weight, grid.values(grid.numbers(weight)), moment)
    assert torch.equal(gptq(weight, torch.zeros(20, 20), grid), grid.numbers(weight))


def test_gptq_of_one_feature() -> None:
    weight = torch.tensor([[0.3], [-2.0], [0.0]])
    grid = grid_of(weight, 4, 16, symmetric=True)
    assert torch.equal(gptq(weight, torch.tensor([[5.0]]), grid), grid.numbers(weight))


def test_gptq_in_halves_keeps_their_dtype() -> None:
    weight = seeded(4, 20).half()
    grid = grid_of(weight.float(), 4, 16, symmetric=True)
    assert gptq(weight, moment_of(20, 50, 0), grid).dtype == torch.float16


# Packing


@small
@given(rows=st.integers(1, 3), count=st.integers(1, 20), bits=st.sampled_from([4, 8]), seed=st.integers(0, 1000))
def test_pack_is_two_numbers_a_byte(rows: int, count: int, bits: int, seed: int) -> None:
    """The first one low, behind an odd one a 0."""
    numbers = np.random.default_rng(seed).integers(0, 2**bits, (rows, count))
    packed = pack(torch.from_numpy(numbers).float(), bits)
    assert packed.dtype == torch.uint8
    each = 8 // bits
    assert packed.shape == (rows, math.ceil(count / each))
    for row, place in np.ndindex(*packed.shape):
        own = [int(number) for number in numbers[row, place * each : (place + 1) * each]]
        assert int(packed[row, place]) == sum(number << (bits * index) for index, number in enumerate(own))


def unpacked_by_hand(packed: Tensor, count: int, bits: int) -> NDArray[np.int64]:
    numbers = packed.numpy().astype(np.int64)
    if bits == 4:
        numbers = np.stack([numbers % 16, numbers // 16], -1).reshape(*numbers.shape[:-1], -1)
    return numbers[..., :count]


@pytest.mark.parametrize("features", [16, 40, 33])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("importance", [False, True])
def test_groups_with_zeros_are_a_grid_s(bits: int, features: int, importance: bool) -> None:
    """An odd number of groups fills its last byte of zeros by half."""
    weight, counts = seeded(5, features), seeded(features, seed=1).square() if importance else None
    parts = nearest_groups(Weight.of(weight), Packing(bits, 16, symmetric=False), counts)
    groups = math.ceil(features / 16)
    tensors = {name: part.load() for name, (_, part) in parts.weights.items()}
    assert {name: part.type.shape for name, (_, part) in parts.weights.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    assert tensors["zeros"].shape == (5, math.ceil(groups * bits / 8))
    grid = grid_of(weight, bits, 16, symmetric=False, importance=counts)
    np.testing.assert_array_equal(unpacked_by_hand(tensors["zeros"], groups, bits), grid.zeros.numpy())
    np.testing.assert_array_equal(tensors["scales"], grid.scales)
    numbers = unpacked_by_hand(tensors["packed"], 16, bits).reshape(5, -1)[:, :features]
    np.testing.assert_array_equal(numbers, grid.numbers(weight).numpy())


@pytest.mark.parametrize("features", [16, 40, 33, 600])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("half", [False, True])
def test_groups_of_rests_stand_behind_the_others(bits: int, features: int, half: bool) -> None:
    """A product with the inputs and the means of their groups is one with the grid's values."""
    weight, x = seeded(5, features), seeded(7, features, seed=1)
    of = Packing(bits, 16, symmetric=False, fractions=True, half=half)
    tensors = {name: part.load() for name, (_, part) in nearest_groups(Weight.of(weight), of).weights.items()}
    assert tensors["scales"].dtype == (torch.float16 if half else torch.float32)
    packed, scales, zeros = (tensors[name] for name in ("packed", "scales", "zeros"))
    with_means = torch.cat([x, x @ of.means(features)], 1)
    got = unpacked(packed, scales.float(), zeros, None, bits)[:, : with_means.shape[1]]
    grid = of.grid(weight)
    torch.testing.assert_close(with_means @ got.T, x @ grid.values(grid.numbers(weight)).T, rtol=1e-4, atol=1e-4)


# NormalFloat


@pytest.mark.parametrize("features", [16, 40, 1])
@pytest.mark.parametrize("group", [16, 32])
def test_nf4_is_the_nearest_of_its_codebook(group: int, features: int) -> None:
    weight = seeded(6, features)
    weight[1] = 0
    parts: dict[str, Any] = {
        name: part.load() for name, (_, part) in nf4_groups(Weight.of(weight), group).weights.items()
    }
    assert parts["codebook"].tolist() == pytest.approx(NF4)
    numbers = unpacked_by_hand(parts["packed"], group, 4)
    for row, feature in np.ndindex(6, features):
        own = weight[row, feature // group * group : (feature // group + 1) * group]
        largest = float(own.abs().max()) or 1.0
        assert float(parts["scales"][row, feature // group]) == largest
        distances = [abs(float(weight[row, feature]) - number * largest) for number in NF4]
        chosen = int(numbers[row, feature // group, feature % group])
        assert distances[chosen] <= min(distances) + 1e-6 * largest
    assert bool((numbers[1] == NF4.index(0.0)).all())


def test_nf4_keeps_the_largest_of_a_group_with_its_sign() -> None:
    weight = torch.tensor([[0.1] * 15 + [-3.0] + [2.5] + [0.0] * 15])
    packed = nf4_groups(Weight.of(weight), 16).weights["packed"][1].load()
    numbers = unpacked_by_hand(packed, 16, 4)
    assert (numbers[0, 0, 15], numbers[0, 1, 0]) == (0, 15)


def test_nf4_is_quantiles_of_a_normal_distribution() -> None:
    """Dettmers et al. 2023: 8 of them below 0 and 9 above with 0 in both, each side up to the same largest one."""
    from scipy.stats import norm

    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9))[:-1]
    below = -norm.ppf(np.linspace(offset, 0.5, 8))[:-1]
    quantiles = np.sort(np.concatenate([below, [0.0], above]))
    np.testing.assert_allclose(quantiles / quantiles.max(), NF4, atol=1e-4)


# What rounding does to products


class Nothing:
    """A writer that leaves every linear as it is."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def replace(self, *args: Any) -> None: ...

    def has(self, *args: Any) -> bool:
        return True

    def look_up(self, *args: Any, **options: Any) -> None: ...


@pytest.mark.parametrize(
    ("body", "name"), [(BEFORE, "int8_smooth"), (BEFORE, "awq"), (TIED, "int8_smooth"), (TIED, "awq")]
)
def test_nothing_but_rounding_changes_the_function(body: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_module, "Writer", Nothing)
    graph = read(body.replace("output y", "output e = %e\noutput y"))
    inputs = {"x": tokens()[0]} if body == BEFORE else {"ids": torch.tensor([[0, 7, TABLE - 1]])}
    expected = run(graph, inputs)
    applied(graph, **OPTIONS[name] | (DATA if body == BEFORE else IDS))
    assert "aten.mul.Tensor" in str(graph)
    for output, tensor in run(graph, inputs).items():
        torch.testing.assert_close(tensor, expected[output], rtol=1e-4, atol=1e-4)


def test_awq_and_gptq_lose_less_of_the_data() -> None:
    reference, off = load(program(BEFORE)), {}
    for name, options in {"rtn": {"scheme": "weight_only"}, "gptq": OPTIONS["gptq"], "awq": OPTIONS["awq"]}.items():
        graph = read(BEFORE)
        applied(graph, **options)
        x = {"x": tokens().flatten(0, 1)}
        off[name] = float((run(graph, x)["gate"] - run(reference, x)["gate"]).square().mean())
    assert max(off["gptq"], off["awq"]) < 0.7 * off["rtn"], off


@pytest.mark.parametrize("scheme", ["int8_static", "int8_smooth", "int8_dynamic", "int8_token", "llm_int8"])
def test_a_reduced_range_is_7_bits(scheme: str) -> None:
    graph = read(BEFORE)
    data = {} if scheme in ("int8_dynamic", "int8_token") else DATA
    applied(graph, scheme, reduce_range=True, **data)
    for layer, channels in (("up", 6), ("gate", 5)):
        assert graph.weights[f"mlp.{layer}.int8"].load().int().abs().amax(1).tolist() == [63] * channels
    if scheme == "int8_token":
        numbers, scale = (graph.weights[f"mlp.up.{part}"].load() for part in ("int8", "scale"))
        assert bool(((numbers * scale[:, None] - of_layers()[0]).abs() <= 0.501 * scale[:, None]).all())


def weight_of(graph: Graph, layer: str) -> Tensor:
    """Of packed parts."""
    parts = (graph.weights[f"{layer}.{part}"].load() for part in ("packed", "scales"))
    packed, scales = parts
    features = {"a": 40, "b": 16, "c": 16}[layer]
    made: Tensor = torch.ops.graphopt.unpack_rows(packed, scales, bits=4, features=features)
    return made


def test_gptq_takes_layers_in_order() -> None:
    """Each on what those before have made of the data; outputs lose less than rounded to nearest."""
    reference = load(program(DEEP))
    graph, nearest = read(DEEP), read(DEEP)
    applied(graph, **OPTIONS["gptq"])
    applied(nearest, "weight_only")
    x = tokens().reshape(-1, 40)
    for layer in "abc":
        expected = by_moment(reference.weights[f"{layer}.weight"].load(), x.T @ x / len(x))
        torch.testing.assert_close(weight_of(graph, layer), expected)
        x = x @ expected.T
        x = x.relu() if layer == "a" else x
    data = {"x": tokens().flatten(0, 1)}
    wanted = run(reference, data)["y"]
    errors = [float((run(each, data)["y"] - wanted).square().mean()) for each in (graph, nearest)]
    assert errors[0] < 0.7 * errors[1], errors


def mean_errors(scheme: str, **options: Any) -> dict[str, Tensor]:
    """Of each channel, on the calibration data."""
    graph = read(BEFORE)
    applied(graph, scheme, **options)
    x, reference = {"x": tokens().flatten(0, 1)}, load(program(BEFORE))
    expected = run(reference, x)
    return {name: (tensor - expected[name]).mean((0, 1)).abs() for name, tensor in run(graph, x).items()}


@pytest.mark.parametrize("options", [{}, {"algorithm": "awq"}, {"algorithm": "gptq"}], ids=str)
def test_corrected_biases_leave_no_mean_error(options: dict[str, Any]) -> None:
    """Of weights; the linear without a bias gets one."""
    got = mean_errors("weight_only", bias_correction=True, **options, **DATA)
    without = mean_errors("weight_only", **options, **(DATA if options else {}))
    for name, error in got.items():
        assert float(error.max()) < 1e-4 < 1e-2 < float(without[name].max())


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_corrected_biases_lessen_mean_errors(scheme: str) -> None:
    got = mean_errors(scheme, bias_correction=True, **DATA)
    plain = mean_errors(scheme, **({} if scheme == "nf4" else DATA))
    assert all(float(got[name].mean()) < 0.6 * float(plain[name].mean()) for name in got), (got, plain)


@pytest.mark.parametrize(
    "outliers",
    [100, 6],
)
def test_only_what_integers_lose_is_corrected(outliers: float) -> None:
    """Features in floats lose nothing."""
    graph = read(BEFORE)
    applied(graph, "llm_int8", outliers=outliers, bias_correction=True, **DATA)
    up, _, bias = of_layers()
    lost = up - by_row(up)
    if outliers < 10:
        lost[:, OUTLIERS] = 0
    expected = bias + lost @ tokens().reshape(-1, 40).mean(0)
    torch.testing.assert_close(graph.weights["mlp.up.corrected_bias"].load(), expected, rtol=1e-4, atol=1e-5)
