"""smooth_activations: the same function with other magnitudes: where factors go, what they are, what they are good for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CalibrationError, NoMatchError, PipelineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.quantize import Quantize
from graphopt.passes.rescaling import smoothing
from graphopt.passes.smooth_activations import SmoothActivations
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.calibration import Calibration
from graphopt.schemas.report import PassReport
from graphopt.sources import Source
from graphopt.tensors import Weight
from tests.rules import difference, inputs_of, load, program, read
from tests.tiny import tiny_bert, tiny_llama

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small for several

FEATURES, OUTLIER = 8, 3
WHOLE = f"f32[batch, sequence, {FEATURES}]"
SIZES: tuple[dict[str, int], ...] = ({"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 1})
HEAD = f"""
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: {WHOLE}
"""
IDS = HEAD.replace(f"%x: {WHOLE}", "%ids: i64[batch, sequence]")
WEIGHTS = """
    weight %n.weight: f32[8]
    weight %n.bias: f32[8]
    weight %up.weight: f32[8, 8]
    weight %up.bias: f32[8]
    weight %gate.weight: f32[8, 8]
    weight %a.weight: f32[6, 8]
    weight %b.weight: f32[5, 8]
"""


def graph_of(*lines: str, head: str = HEAD) -> str:
    """A graph of these lines, with the weights that they read."""
    text = "\n".join(lines)
    names = {line.split()[1].rstrip(":"): line for line in WEIGHTS.splitlines() if line}
    used = [line for name, line in names.items() if re.search(f"={re.escape(name)}[,)]", text)]
    return "\n".join([head, *used, text])


def reads(x: str) -> tuple[str, ...]:
    """Two linears of a value."""
    return (
        f"%a: f32[batch, sequence, 6] = aten.linear.default(input=%{x}, weight=%a.weight)",
        f"%b: f32[batch, sequence, 5] = aten.linear.default(input=%{x}, weight=%b.weight)",
    )


BOTH = ("output a = %a", "output b = %b")
NORM = "normalized_shape=[8], weight=%n.weight"
RMS = f"%n: {WHOLE} = aten.rms_norm.default(input=%x, {NORM})"
LAYER = f"%n: {WHOLE} = aten.layer_norm.default(input=%x, {NORM}, bias=%n.bias)"
ADD_RMS = f"%n: {WHOLE}, %s: {WHOLE} = graphopt.add_rms_norm.default(x=%x, residual=%x, {NORM})"
UP = f"%up: {WHOLE} = aten.linear.default(input=%x, weight=%up.weight, bias=%up.bias)"
GATE = f"%gate: {WHOLE} = aten.linear.default(input=%x, weight=%gate.weight)"
GATED = f'%n: {WHOLE} = graphopt.gated_activation.default(gate=%gate, up=%up, activation="silu")'
SILU = f"%s: {WHOLE} = aten.silu.default(self=%gate)"
MUL = f"%n: {WHOLE} = aten.mul.Tensor(self=%s, other=%up)"
GELU = f"%n: {WHOLE} = aten.gelu.default(self=%up)"
RELU = f"%r: {WHOLE} = aten.relu.default(self=%n)"

#: Where all factors go into what makes the channels; the up and gate linears read a graph's input, which takes a product.
FOLDED = {
    "rms_norm": (graph_of(RMS, *reads("n"), *BOTH), {"folded": 1}),
    "layer_norm with a bias": (graph_of(LAYER, *reads("n"), *BOTH), {"folded": 1}),
    "add_rms_norm": (graph_of(ADD_RMS, *reads("n"), *BOTH, "output s = %s"), {"folded": 1}),
    "gated activation": (graph_of(UP, GATE, GATED, *reads("n"), *BOTH), {"inserted": 1, "folded": 1}),
    "product": (graph_of(UP, GATE, SILU, MUL, *reads("n"), *BOTH), {"inserted": 1, "folded": 1}),
    "product turned": (
        graph_of(UP, GATE, SILU, MUL.replace("self=%s, other=%up", "self=%up, other=%s"), *reads("n"), *BOTH),
        {"inserted": 1, "folded": 1},
    ),
}
INSERTED = {
    "graph input": (graph_of(*reads("x"), *BOTH), {"inserted": 1}),
    "gelu": (graph_of(UP, GELU, *reads("n"), *BOTH), {"inserted": 2}),
    "norm read elsewhere": (graph_of(RMS, RELU, *reads("n"), *BOTH, "output r = %r"), {"inserted": 1}),
    "norm that is an output": (graph_of(RMS, *reads("n"), *BOTH, "output n = %n"), {"inserted": 1}),
    "norm without a weight": (
        graph_of(RMS.replace(", weight=%n.weight", ""), *reads("n"), *BOTH), {"inserted": 1},
    ),
    "norm whose weight is an input": (
        graph_of(RMS, *reads("n"), *BOTH).replace("weight %n.weight", "input %n.weight"), {"inserted": 1},
    ),
    "norms of one weight": (
        graph_of(RMS, RMS.replace("%n:", "%m:"), reads("n")[0], reads("m")[1], *BOTH), {"inserted": 2},
    ),
    "sum of a norm": (graph_of(ADD_RMS, *reads("s"), *BOTH, "output n = %n"), {"inserted": 1}),
    "up that is an output": (
        graph_of(UP, GATE, GATED, *reads("n"), *BOTH, "output up = %up"), {"inserted": 2},
    ),
    "up read elsewhere": (
        graph_of(UP, SILU.replace("gate", "up"), MUL, *reads("n"), *BOTH), {"inserted": 2},
    ),
    "gate alone": (graph_of(GATE, SILU, *reads("s"), *BOTH), {"inserted": 2}),
}  # fmt: skip
TABLE = """
    weight %embed.weight: f32[9, 8]
    weight %n.weight: f32[8]
    %e: f32[batch, sequence, 8] = aten.embedding.default(weight=%embed.weight, indices=%ids)
    %n: f32[batch, sequence, 8] = aten.rms_norm.default(input=%e, normalized_shape=[8], weight=%n.weight)
    %y: f32[batch, sequence, 9] = aten.linear.default(input=%n, weight=%embed.weight)
    output y = %y
"""
TIED = {
    "tied": (f"{IDS}{TABLE}", {"folded": 1}),
    "tied, and an output": (f"{IDS}{TABLE}output e = %e", {"folded": 1}),
    "tied, read by itself": (f"{IDS}{TABLE}".replace("input=%n, weight=%embed", "input=%e, weight=%embed"), {"inserted": 1}),
    "tied, read by others": (
        f"{IDS}{TABLE}".replace("output y", f"%z: {WHOLE} = aten.add.Tensor(self=%e, other=%e)\noutput z = %z\noutput y"),
        {"folded": 1},
    ),
}  # fmt: skip
ALL = FOLDED | INSERTED | TIED


def texts(graph: Graph, seed: int = 0) -> dict[str, Tensor]:
    """A batch of the graph's inputs, with one channel that is far larger than the others."""
    made = inputs_of(graph, SIZES[0])
    torch.manual_seed(seed)
    for name, tensor in made.items():
        if tensor.is_floating_point():
            made[name] = torch.randn_like(tensor)
            made[name][..., OUTLIER] *= 50
    return made


def source_of(graph: Graph) -> Source:
    axes = {
        name: tuple(size if size in ("batch", "sequence") else None for size in map(str, value.type.shape))
        for name, value in graph.inputs.items()
    }
    return Source(nn.Identity(), dict(inputs_of(graph, SIZES[0])), axes)


def data(graph: Graph) -> list[dict[str, Tensor]]:
    """What the graphs are calibrated on: ``n.weight`` as an input has no batch, and is not among it."""
    return [texts(graph, seed) for seed in range(24)]  # few rows, and the search finds nothing that holds for others


def smoothed(body: str, **options: Any) -> tuple[Graph, PassReport]:
    graph = read(body)
    step = SmoothActivations(calibration=Calibration(data=data(graph)), **options)
    (report,) = run_passes(graph, [step], context=Context(source=source_of(graph)))
    return graph, report


def assert_same_function(before: Graph, after: Graph) -> None:
    """At two sizes, up to 1e-5 of the largest number; and weights are what their types say."""
    for name, weight in after.weights.items():
        assert tuple(weight.load().shape) == weight.type.shape, name
    for sizes in SIZES:
        inputs = inputs_of(before, sizes)
        expected, got = run(before, inputs), run(after, inputs)
        assert expected.keys() == got.keys()
        for name, tensor in expected.items():
            assert got[name].shape == tensor.shape
            off = float((got[name] - tensor).abs().max())
            assert off <= 1e-5 * float(tensor.abs().max()), f"{name} is off by {off}"


# The same function

GIVEN = "norm whose weight is an input"


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, "search"])
@pytest.mark.parametrize("name", [name for name in ALL if name != GIVEN])
def test_the_function_is_the_same(name: str, strength: Any) -> None:
    body, matches = ALL[name]
    graph, report = smoothed(body, strength=strength, allow_no_match=strength == "search")
    if strength != "search" or report.matches:  # it may find that nothing gains
        assert report.matches == matches
    assert report.refusals == []
    assert_same_function(load(program(body)), graph)


@pytest.mark.parametrize("name", FOLDED)
def test_what_is_folded_is_no_node(name: str) -> None:
    """Only the first linears of a graph's input have a product before them."""
    body, matches = FOLDED[name]
    graph, _ = smoothed(body)
    assert len(graph) == len(read(body)) + matches.get("inserted", 0)


# What is written

SMOOTH = f"%mul: {WHOLE} = aten.mul.Tensor(self=%n, other=%n.smooth)"
GELU_OF_X = GELU.replace("%up", "%x")


def test_a_product_is_inserted_once_for_all_that_read_it() -> None:
    graph, _ = smoothed(graph_of(GELU_OF_X, *reads("n"), *BOTH))
    after = graph_of(GELU_OF_X, SMOOTH, *reads("mul"), *BOTH)
    after = after.replace(
        "    weight %b.weight: f32[5, 8]\n", "    weight %b.weight: f32[5, 8]\nweight %n.smooth: f32[8]\n"
    )
    assert str(graph) == program(after), difference(program(after), str(graph))


def test_others_read_what_is_not_divided() -> None:
    graph, _ = smoothed(graph_of(RMS, RELU, *reads("n"), *BOTH, "output r = %r", "output n = %n"))
    text = str(graph)
    assert "aten.relu.default(self=%n)" in text
    assert "output n = %n\n" in text
    assert text.count("input=%mul, weight=") == 2


def test_rows_of_a_tied_table_are_divided_again() -> None:
    graph, _ = smoothed(f"{IDS}{TABLE}output e = %e")
    text = str(graph)
    assert f"%mul: {WHOLE} = aten.mul.Tensor(self=%e, other=%e.smooth)" in text
    assert "aten.rms_norm.default(input=%mul" in text
    assert "output e = %mul" in text


# Factors


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.7, 1.0])
def test_factors_are_the_formula_s(strength: float) -> None:
    body = graph_of(*reads("x"), *BOTH)
    graph, _ = smoothed(body, strength=strength)
    before = load(program(body))
    weights = [before.weights[f"{name}.weight"].load() for name in "ab"]
    largest = torch.cat([batch["x"].reshape(-1, FEATURES) for batch in data(before)]).abs().amax(0)
    factors = largest**strength / torch.cat(weights).abs().amax(0) ** (1 - strength)
    torch.testing.assert_close(graph.weights["x.smooth"].load(), 1 / factors)
    for name, weight in zip("ab", weights, strict=True):
        torch.testing.assert_close(graph.weights[f"{name}.weight"].load(), weight * factors)


def test_a_norm_s_weight_and_bias_are_divided() -> None:
    body = graph_of(LAYER, *reads("n"), *BOTH)
    graph, _ = smoothed(body)
    before = load(program(body))
    factors = graph.weights["a.weight"].load()[0] / before.weights["a.weight"].load()[0]
    for name in ("n.weight", "n.bias"):
        torch.testing.assert_close(graph.weights[name].load(), before.weights[name].load() / factors)


def test_rows_and_bias_of_the_linear_before_are_divided() -> None:
    """The gate's are as they were, but for what their own input needs."""
    body = graph_of(UP, GATE, GATED, *reads("n"), *BOTH)
    graph, _ = smoothed(body)
    before = load(program(body))
    ratio = {name: graph.weights[name].load() / before.weights[name].load() for name in before.weights}
    factors = ratio["a.weight"][0]
    torch.testing.assert_close(ratio["up.bias"], 1 / factors)
    torch.testing.assert_close(ratio["up.weight"], ratio["gate.weight"][:1] / factors[:, None])


def test_channels_of_zeros_have_factors() -> None:
    """Of the magnitudes' smallest share, so nothing is divided by 0."""
    factors = smoothing(torch.tensor([0.0, 2.0]), torch.tensor([[1.0, 0.0]]), 0.5)
    torch.testing.assert_close(factors, torch.tensor([(2e-5) ** 0.5, (2 / 1e-5) ** 0.5]))


def test_full_strength_makes_all_channels_alike() -> None:
    body = graph_of(*reads("x"), *BOTH)
    graph, _ = smoothed(body, strength=1.0)
    largest = torch.cat([batch["x"].reshape(-1, FEATURES) for batch in data(read(body))]).abs().amax(0)
    torch.testing.assert_close(largest * graph.weights["x.smooth"].load(), torch.ones(FEATURES))


def test_no_strength_makes_all_columns_alike() -> None:
    graph, _ = smoothed(graph_of(*reads("x"), *BOTH), strength=0.0)
    weight = torch.cat([graph.weights[f"{name}.weight"].load() for name in "ab"])
    torch.testing.assert_close(weight.abs().amax(0), torch.ones(FEATURES))


# Modules, refusals, options


@pytest.mark.parametrize(
    ("modules", "inputs"),
    [(("*",), ["x", "mul"]), (("a", "b"), ["mul"]), (("up",), ["x"]), (("[ab]", "u?"), ["x", "mul"])],
)
def test_only_inputs_of_the_modules_are_smoothed(modules: tuple[str, ...], inputs: list[str]) -> None:
    graph, report = smoothed(graph_of(UP, GELU, *reads("n"), *BOTH), modules=modules)
    assert report.matches == {"inserted": len(inputs)}
    assert ("x.smooth" in graph.weights) == ("x" in inputs)
    assert ("n.smooth" in graph.weights) == ("mul" in inputs)


def test_an_input_that_others_read_as_well_stays() -> None:
    """Their weights would have to change too."""
    with pytest.raises(NoMatchError, match="smooth_activations changed nothing"):
        smoothed(graph_of(*reads("x"), *BOTH), modules=("a",))


ELSEWHERE = "%w: f32[6, 8] = aten.relu.default(self=%a.weight)"


def test_weights_that_are_read_elsewhere_are_refused() -> None:
    body = graph_of(RMS, *reads("n"), ELSEWHERE, *BOTH, "output w = %w")
    graph, report = smoothed(body, allow_no_match=True)
    assert [refused.reason for refused in report.refusals] == ["%a.weight is read elsewhere as well"]
    assert (report.matches, str(graph)) == ({}, program(body))
    assert_same_function(load(program(body)), graph)


def test_other_inputs_are_smoothed_though_one_is_refused() -> None:
    body = graph_of(RMS, *reads("n"), ELSEWHERE, UP, *BOTH, "output w = %w", "output up = %up")
    _, report = smoothed(body)
    assert (report.matches, len(report.refusals)) == ({"inserted": 1}, 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "calibration is missing"),
        ({"calibration": {"data": "a.txt"}, "strength": 1.5}, "strength"),
        ({"calibration": {"data": "a.txt"}, "strength": "much"}, "strength"),
        ({"calibration": {"data": "a.txt"}, "rounds": "row"}, "rounds: Input should be 'tensor' or 'token'"),
        ({"calibration": {"data": "a.txt"}, "rows": 2}, "rows: Input should be greater than or equal to 16"),
        ({"calibration": {"data": "a.txt"}, "module": ["a"]}, "there is no option 'module'; did you mean 'modules'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        load_passes([{"kind": "canonicalize"}, {"kind": "smooth_activations", **options}])


def test_it_needs_a_model() -> None:
    graph = read(graph_of(*reads("x"), *BOTH))
    with pytest.raises(CalibrationError, match="there is no model whose inputs the data could be"):
        run_passes(graph, [SmoothActivations(calibration=Calibration(data=data(graph)))])


# What it is good for


def error(before: Graph, after: Graph, calibration: Calibration, scheme: str) -> float:
    """How far outputs are off with linears on integers, as a share of their own magnitude."""
    options: Mapping[str, Any] = {"calibration": calibration} if scheme == "int8_static" else {}
    graph = after.clone()
    run_passes(graph, [Quantize(scheme=scheme, **options)], context=Context(source=source_of(before)))
    inputs = calibration.data[0]
    expected, got = run(before, inputs), run(graph, inputs)
    return max(float((got[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int8_token"])
@pytest.mark.parametrize("strength", [0.5, 0.7, "search"])
@pytest.mark.parametrize("name", ["graph input", "rms_norm"])
def test_products_of_inputs_with_an_outlier_are_nearer(name: str, strength: Any, scheme: str) -> None:
    body = ALL[name][0]
    plain = quiet(body)
    smooth = plain.clone()
    rounds = "token" if scheme == "int8_token" else "tensor"
    calibration = Calibration(data=quiet_data(plain))
    step = SmoothActivations(calibration=calibration, strength=strength, rounds=rounds)
    run_passes(smooth, [step], context=Context(source=source_of(plain)))
    assert error(plain, smooth, calibration, scheme) < 0.7 * error(plain, plain, calibration, scheme)


def quiet(body: str) -> Graph:
    """The graph with weights that hardly read the outlier, so the other channels count. Of a norm it is one by its weight."""
    graph = load(program(body))
    for name in ("a.weight", "b.weight"):
        weight = graph.weights[name].load().clone()
        weight[:, OUTLIER] /= 50
        graph.set_weight(name, Weight.of(weight))
    if "n.weight" in graph.weights:
        graph.set_weight("n.weight", Weight.of(torch.where(torch.arange(FEATURES) == OUTLIER, 50.0, 1.0)))
    return graph


def quiet_data(graph: Graph) -> list[dict[str, Tensor]]:
    """The outlier is made by the norm, if there is one."""
    made = data(graph)
    if "n.weight" in graph.weights:
        for batch in made:
            batch["x"][..., OUTLIER] /= 50
    return made


def test_the_search_says_what_it_found() -> None:
    graph = quiet(ALL["graph input"][0])
    step = SmoothActivations(calibration=Calibration(data=data(graph)), strength="search")
    (report,) = run_passes(graph, [step], context=Context(source=source_of(graph)))
    (note,) = report.notes
    assert note.startswith("a, b: strength 0.")
    assert note.endswith("of that without")
    assert float(note.split("error ")[1].split()[0]) < 0.7


def test_what_the_search_leaves_as_it_is_is_not_touched() -> None:
    """Signs alone are rounded without an error: no factors are better."""
    body = graph_of(*reads("x"), *BOTH)
    graph = load(program(body))
    for name, weight in list(graph.weights.items()):
        graph.set_weight(name, Weight.of(weight.load().sign()))
    calibration = Calibration(data=[{"x": inputs_of(graph, SIZES[0])["x"].sign()}])
    step = SmoothActivations(calibration=calibration, strength="search", allow_no_match=True)
    context = Context(source=source_of(graph))
    run_passes(graph, [step], context=context)
    assert context.notes == ["a, b: as they are"]
    assert str(graph) == program(body)


# Models

TARGET = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
KINDS = ("canonicalize", "fuse_attention", "fuse_norm", "fuse_activation")


@pytest.mark.parametrize(
    ("make", "matches"), [(tiny_bert, {"inserted": 9}), (tiny_llama, {"folded": 7, "inserted": 2})]
)
def test_a_model_is_smoothed_and_quantized(make: Callable[[], Source], matches: dict[str, int], tmp_path: Path) -> None:
    """As exact as every pass before it. Norms and up linears take the factors; norms that are added to what follows,
    attentions and a gelu cannot."""
    source = make()
    ids = torch.randint(0, 99, (16, 40))
    inputs = {name: (torch.arange(40) > 20).long().expand_as(ids) for name in source.tensors} | {"input_ids": ids}
    calibration = {"data": [inputs | {"attention_mask": torch.ones_like(ids)}]}
    passes: list[dict[str, Any]] = [{"kind": kind, "allow_no_match": True} for kind in KINDS]
    passes += [{"kind": "smooth_activations", "calibration": calibration}]
    passes += [{"kind": "quantize", "scheme": "int8_static", "calibration": calibration}]
    made = graphopt.compile(source, tmp_path / "e", passes=passes, target=TARGET)
    smooth, quantized = made.manifest.report.passes[-2:]
    assert smooth.matches == matches
    assert smooth.parity is not None
    assert smooth.parity.holds
    assert "cosine" not in smooth.parity.contract
    assert quantized.parity is not None
    assert quantized.parity.holds
    assert made.manifest.report.engine is not None
    assert made.manifest.report.engine.holds


# Graphs that were once made other functions


def case(reason: str, body: str) -> Any:
    return pytest.param(body, id=reason)


SQUARE = MUL.replace("self=%s, other=%up", "self=%up, other=%up")
SAME = reads("x")[0].replace("%a:", "%c:")
SQUARES = f"""{HEAD.replace("sequence, 8", "sequence, 8, 8")}
    weight %n.weight: f32[8, 8]
    weight %a.weight: f32[6, 8]
    %n: f32[batch, sequence, 8, 8] = aten.layer_norm.default(input=%x, normalized_shape=[8, 8], weight=%n.weight)
    %a: f32[batch, sequence, 8, 6] = aten.linear.default(input=%n, weight=%a.weight)
    output a = %a"""
VECTOR = f"""{HEAD}
    weight %v: f32[8]
    weight %a.weight: f32[6, 8]
    %v.y: f32[batch, sequence] = aten.linear.default(input=%x, weight=%v)
    %a: f32[batch, sequence, 6] = aten.linear.default(input=%x, weight=%a.weight)
    output v = %v.y
    output a = %a"""
LATER = f"""{HEAD}
    input %ids: i64[batch, sequence]
    weight %embed.weight: f32[9, 8]
    weight %a.weight: f32[6, 8]
    %e: {WHOLE} = aten.embedding.default(weight=%embed.weight, indices=%ids)
    %y: f32[batch, sequence, 9] = aten.linear.default(input=%x, weight=%embed.weight)
    %a: f32[batch, sequence, 6] = aten.linear.default(input=%e, weight=%a.weight)
    output y = %y
    output a = %a"""
NARROW = graph_of(SILU.replace("gate", "x"), UP, MUL, *reads("n"), *BOTH)
for _before, _after in (
    ("up.weight: f32[8, 8]", "up.weight: f32[1, 8]"),
    ("up.bias: f32[8]", "up.bias: f32[1]"),
    (f"%up: {WHOLE}", "%up: f32[batch, sequence, 1]"),
):
    NARROW = NARROW.replace(_before, _after)
FAULTS = [
    case("one weight of two linears of an input is multiplied twice", graph_of(reads("x")[0], SAME, BOTH[0], "output c = %c")),
    case("a product of a value with itself is divided twice", graph_of(UP, SQUARE, *reads("n"), *BOTH)),
    case("gate and up are one value", graph_of(UP, GATED.replace("%gate", "%up"), *reads("n"), *BOTH)),
    case("the linear behind has one channel, which is broadcast", NARROW),
    case("a norm of several axes is divided along the wrong one", SQUARES),
    case("the input is the rows of a table that an earlier linear is tied to", LATER),
    case("a weight of one axis among others", VECTOR),
    case("a weight is an output as well", graph_of(*reads("x"), *BOTH, "output w = %a.weight")),
    case("a norm's weight is an output as well", graph_of(RMS, *reads("n"), *BOTH, "output w = %n.weight")),
]  # fmt: skip


@pytest.mark.parametrize("body", FAULTS)
def test_still_the_same_function(body: str) -> None:
    graph, _ = smoothed(body, allow_no_match=True)
    assert_same_function(load(program(body)), graph)
