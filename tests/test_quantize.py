"""quantize: linears on integers: what the pass writes, what it refuses, what it reports, and what engines make of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from graphopt.errors import CalibrationError, PassError, PipelineError
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.ops.quantization import unpacked
from graphopt.passes.quantize import LARGE, Quantize
from graphopt.passes.quantized_weights import Packing, Parts, nearest_groups, quantized_rows
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.report import LayerPrecision
from graphopt.sources import Source
from graphopt.tensors import TensorType, Weight
from tests.rules import Applied, apply_pass, difference, load, pass_on, program, read

pytestmark = pytest.mark.usefixtures("one_thread")  # the models are too small for several

SCHEMES = ("int8_static", "int8_dynamic", "int8_token", "weight_only")
FEATURES = 40  # no multiple of a group
HEAD = f"""
    dim batch in [1, ...]
    dim sequence in [1, ...]
    input %x: f32[batch, sequence, {FEATURES}]
"""
UP = "%up: f32[batch, sequence, 6] ="
GATE = "%gate: f32[batch, sequence, 5] ="
STATIC = "x=%quantize, x_scale=%x.scale"
OUTPUTS = "output up = %up\noutput gate = %gate"
BEFORE = f"""{HEAD}
    weight %mlp.up.weight: f32[6, 40]
    weight %mlp.up.bias: f32[6]
    weight %mlp.gate.weight: f32[5, 40]
    {UP} aten.linear.default(input=%x, weight=%mlp.up.weight, bias=%mlp.up.bias)
    {GATE} aten.linear.default(input=%x, weight=%mlp.gate.weight)
    {OUTPUTS}
"""
UP_ROWS = "weight %mlp.up.bias: f32[6]\nweight %mlp.up.int8: i8[6, 40]\nweight %mlp.up.scale: f32[6]"
GATE_ROWS = "weight %mlp.gate.int8: i8[5, 40]\nweight %mlp.gate.scale: f32[5]"
AFTER = {
    "int8_static": f"""{HEAD}{UP_ROWS}
    weight %x.scale: f32[]
    {GATE_ROWS}
    %quantize: i8[batch, sequence, 40] = graphopt.quantize.default(x=%x, scale=%x.scale)
    {UP} graphopt.static_linear.default({STATIC}, weight=%mlp.up.int8, scale=%mlp.up.scale, bias=%mlp.up.bias)
    {GATE} graphopt.static_linear.default({STATIC}, weight=%mlp.gate.int8, scale=%mlp.gate.scale)
    {OUTPUTS}""",
    "int8_dynamic": f"""{HEAD}{UP_ROWS}
    {GATE_ROWS}
    {UP} graphopt.dynamic_linear.default(x=%x, weight=%mlp.up.int8, scale=%mlp.up.scale, bias=%mlp.up.bias)
    {GATE} graphopt.dynamic_linear.default(x=%x, weight=%mlp.gate.int8, scale=%mlp.gate.scale)
    {OUTPUTS}""",
    "int8_token": f"""{HEAD}{UP_ROWS}
    {GATE_ROWS}
    {UP} graphopt.dynamic_linear.default(x=%x, weight=%mlp.up.int8, scale=%mlp.up.scale, bias=%mlp.up.bias, per_token=True)
    {GATE} graphopt.dynamic_linear.default(x=%x, weight=%mlp.gate.int8, scale=%mlp.gate.scale, per_token=True)
    {OUTPUTS}""",
    "weight_only": f"""{HEAD}
    weight %mlp.up.bias: f32[6]
    weight %mlp.up.packed: u8[6, 2, 16]
    weight %mlp.up.scales: f32[6, 2]
    weight %mlp.gate.packed: u8[5, 2, 16]
    weight %mlp.gate.scales: f32[5, 2]
    {UP} graphopt.packed_linear.default(x=%x, packed=%mlp.up.packed, scales=%mlp.up.scales, bias=%mlp.up.bias, bits=4, block=32)
    {GATE} graphopt.packed_linear.default(x=%x, packed=%mlp.gate.packed, scales=%mlp.gate.scales, bits=4, block=32)
    {OUTPUTS}""",
}  # fmt: skip
ROWS = HEAD.replace(f"%x: f32[batch, sequence, {FEATURES}]", "%ids: i64[batch, sequence]")
TABLE = 12_500  # rows of 8
LOOKED_UP = "%e: f32[batch, sequence, 8] ="
LOGITS = f"%y: f32[batch, sequence, {TABLE}] ="
TIED = f"""{ROWS}
    weight %embed.weight: f32[{TABLE}, 8]
    {LOOKED_UP} aten.embedding.default(weight=%embed.weight, indices=%ids)
    {LOGITS} aten.linear.default(input=%e, weight=%embed.weight)
    output y = %y
"""
IN_INTEGERS = f"""
    %unsqueeze: f32[{TABLE}, 1] = aten.unsqueeze.default(self=%embed.scale, dim=1)
    %embedding: i8[batch, sequence, 8] = aten.embedding.default(weight=%embed.int8, indices=%ids)
    %embedding_1: f32[batch, sequence, 1] = aten.embedding.default(weight=%unsqueeze, indices=%ids)
    {LOOKED_UP} graphopt.dequantize.default(x=%embedding, scale=%embedding_1)
"""
TABLE_ROWS = f"weight %embed.int8: i8[{TABLE}, 8]\nweight %embed.scale: f32[{TABLE}]"
TIED_AFTER = f"""{ROWS}{TABLE_ROWS}
    {IN_INTEGERS}
    {LOGITS} graphopt.dynamic_linear.default(x=%e, weight=%embed.int8, scale=%embed.scale)
    output y = %y
"""
TIED_PACKED = f"""{ROWS}
    weight %embed.packed: u8[{TABLE}, 1, 16]
    weight %embed.scales: f32[{TABLE}, 1]
    %index: u8[batch, sequence, 1, 16] = aten.index.Tensor(self=%embed.packed, indices=[%ids])
    %index_1: f32[batch, sequence, 1] = aten.index.Tensor(self=%embed.scales, indices=[%ids])
    {LOOKED_UP} graphopt.unpack_rows.default(packed=%index, scales=%index_1, bits=4, features=8)
    {LOGITS} graphopt.packed_linear.default(x=%e, packed=%embed.packed, scales=%embed.scales, bits=4, block=32)
    output y = %y
"""


def examples(batches: int = 2) -> list[dict[str, Tensor]]:
    """Batches of x, the largest number of all of them 3."""
    generator = torch.Generator().manual_seed(1)
    made = [{"x": torch.randn(2, 6, FEATURES, generator=generator).clamp(-2.5, 2.5)} for _ in range(batches)]
    made[0]["x"][1, 2, 3] = -3
    return made


SOURCE = Source(nn.Identity(), {"x": torch.zeros(2, 6, FEATURES)}, {"x": ("batch", "sequence", None)})
DATA: dict[str, Any] = {"calibration": {"data": examples()}}


def quantize(scheme: str, **options: Any) -> Quantize:
    """The pass, with data if the scheme is static."""
    (step,) = load_passes([{"kind": "canonicalize"}, {"kind": "quantize", "scheme": scheme, **options}])[1:]
    assert isinstance(step, Quantize)
    return step


def static(**options: Any) -> Quantize:
    return quantize("int8_static", **DATA, **options)


def step_of(scheme: str, **options: Any) -> Quantize:
    return static(**options) if scheme == "int8_static" else quantize(scheme, **options)


def applied(body: str, step: Quantize) -> tuple[Applied, list[LayerPrecision]]:
    context = Context(source=SOURCE)
    return apply_pass(body, step, context), list(context.layers)


def quantized(body: str, step: Quantize) -> Graph:
    graph = read(body)
    run_passes(graph, [step], context=Context(source=SOURCE))
    return graph


# What the pass writes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_fires(scheme: str) -> None:
    made, _ = applied(BEFORE, step_of(scheme))
    assert made.text == program(AFTER[scheme]), difference(program(AFTER[scheme]), made.text)
    assert (made.matches, made.reasons) == ({scheme: 2}, [])


@pytest.mark.parametrize(("scheme", "after"), [("int8_dynamic", TIED_AFTER), ("weight_only", TIED_PACKED)])
def test_a_tied_table_is_looked_up_in_integers(scheme: str, after: str) -> None:
    """It is the linear's weight as well: one table stays."""
    made, layers = applied(TIED, step_of(scheme))
    assert made.text == program(after), difference(program(after), made.text)
    assert made.matches == {scheme: 1, "embedding": 1}
    assert [(layer.module, layer.precision) for layer in layers][-1] == ("embed", "as its linear")


def test_tables_stay_if_that_is_said() -> None:
    made, _ = applied(TIED, quantize("int8_dynamic", embeddings=False))
    assert "aten.embedding.default(weight=%embed.weight, indices=%ids)" in made.text
    assert "weight=%embed.int8" in made.text


def test_tables_alone() -> None:
    made, layers = applied(TIED, quantize("int8_dynamic", ops=("embedding",)))
    assert made.matches == {"embedding": 1}
    assert "weight=%embed.weight" in made.text  # of the linear, which stays
    assert "aten.embedding.default(weight=%embed.int8, indices=%ids)" in made.text
    found = {(layer.precision, layer.reason) for layer in layers}
    assert found == {("fp32", "not among ops"), ("int8 rows", None)}


def test_linears_alone() -> None:
    made, _ = applied(TIED, quantize("int8_dynamic", ops=("linear",)))
    assert made.matches == {"int8_dynamic": 1}
    assert "aten.embedding.default(weight=%embed.weight, indices=%ids)" in made.text


@pytest.mark.parametrize("ops", [("linear",), ("embedding",)])
@pytest.mark.parametrize("sizes", [{"batch": 2, "sequence": 6}, {"batch": 3, "sequence": 5}], ids=str)
def test_either_op_alone_stays_near(ops: tuple[str, ...], sizes: dict[str, int]) -> None:
    before, after = load(program(TIED)), quantized(TIED, quantize("int8_dynamic", ops=ops))
    shape = [int(size) for size in before.inputs["ids"].type.concrete(sizes).shape]  # type: ignore[arg-type]  # numbers
    ids = torch.randint(0, TABLE, shape, generator=torch.Generator().manual_seed(0))
    expected, got = (run(graph, {"ids": ids})["y"] for graph in (before, after))
    assert float((got - expected).abs().max() / expected.abs().max()) < 0.03


def test_small_tables_stay() -> None:
    assert 12_499 * 8 < LARGE == TABLE * 8
    made, _ = applied(TIED.replace(str(TABLE), "12499"), quantize("int8_dynamic"))
    assert made.matches == {"int8_dynamic": 1}


def test_rows_that_are_looked_up_are_the_table_s() -> None:
    graph = quantized(TIED.replace("output y = %y", "output e = %e\noutput y = %y"), quantize("int8_dynamic"))
    ids = torch.tensor([[0, 7, TABLE - 1]])
    table = load(program(TIED)).weights["embed.weight"].load()
    numbers, scale = by_rows(table.numpy())
    got = run(graph, {"ids": ids})["e"]
    assert torch.equal(got[0], torch.from_numpy(numbers.astype(np.float32) * scale[:, None])[ids[0]])


def test_weights_and_inputs_that_several_linears_read_are_quantized_once() -> None:
    more = """
        %h: f32[batch, sequence, 40] = aten.relu.default(self=%x)
        %a: f32[batch, sequence, 5] = aten.linear.default(input=%h, weight=%mlp.gate.weight)
        %b: f32[batch, sequence, 5] = aten.linear.default(input=%x, weight=%mlp.gate.weight)
        output a = %a
        output b = %b
        output up"""
    text = str(quantized(BEFORE.replace("output up", more, 1), static()))
    assert text.count("= graphopt.quantize.default") == 2
    assert text.count("= graphopt.static_linear.default") == 4
    assert text.count("weight %mlp.gate") == 2


def test_idempotent() -> None:
    graph = quantized(BEFORE, static())
    again = pass_on(graph, quantize("int8_dynamic", allow_no_match=True), Context(source=SOURCE))
    assert (again.text, again.matches) == (program(AFTER["int8_static"]), {})


def test_a_linear_whose_weight_is_given_stays() -> None:
    body = BEFORE.replace("weight %mlp.gate.weight: f32[5, 40]", "")
    body = body.replace("weight %mlp.up.weight", "input %mlp.gate.weight: f32[5, 40]\nweight %mlp.up.weight", 1)
    made, layers = applied(body, quantize("int8_dynamic"))
    assert made.matches == {"int8_dynamic": 1}
    assert [layer.module for layer in layers] == ["mlp.up"]


# Options


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"scheme": "int8_static"}, "scheme: int8_static needs calibration: {data: ...}"),
        ({"scheme": "int8_token", "overrides": {"a": "int8_static"}}, "scheme: int8_static needs calibration"),
        ({"scheme": "int8_dynamic", **DATA}, "nothing needs calibration in scheme: int8_dynamic"),
        ({"scheme": "weight_only", **DATA}, "nothing needs calibration in scheme: weight_only"),
        ({}, "scheme is missing"),
        ({"scheme": "int4"}, "'int8_static', 'int8_smooth', 'int8_dynamic'"),
        ({"scheme": "weight_only", "bits": 3}, "bits: Input should be 4 or 8"),
        ({"scheme": "weight_only", "group": 24}, "group: Input should be 16, 32, 64, 128 or 256"),
        ({"scheme": "int8_token", "ops": []}, "ops: Tuple should have at least 1 item"),
        ({"scheme": "int8_token", "ops": ["conv"]}, "ops.0: Input should be 'linear' or 'embedding'"),
        ({"scheme": "int8_token", "min_weights": 0}, "min_weights: Input should be greater than 0"),
        ({"scheme": "int8_token", "skipp": ["a"]}, "there is no option 'skipp'; did you mean 'skip'"),
        ({"scheme": "int8_token", "overrides": {"a": "int9"}}, r"overrides.a.*: Input should be 'int8_static'"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(PipelineError, match=reason):
        load_passes([{"kind": "canonicalize"}, {"kind": "quantize", **options}])


def test_data_may_be_for_an_override_alone() -> None:
    made, _ = applied(BEFORE, quantize("int8_token", overrides={"*.up": "int8_static"}, **DATA))
    assert made.matches == {"int8_static": 1, "int8_token": 1}


@pytest.mark.parametrize(
    "options", [{"modules": ("mpl.up",)}, {"skip": ("mpl.up",)}, {"overrides": {"mpl.up": "int8_token"}}]
)
def test_a_pattern_that_nothing_matches_is_refused_with_the_nearest(options: dict[str, Any]) -> None:
    with pytest.raises(PassError, match=r"no linear's module matches 'mpl.up'(.|\n)*did you mean 'mlp.up'"):
        applied(BEFORE, quantize("int8_dynamic", **options))


def test_static_needs_a_model() -> None:
    with pytest.raises(CalibrationError, match="there is no model whose inputs the data could be"):
        apply_pass(BEFORE, static())


def test_an_input_that_is_always_0_is_refused() -> None:
    with pytest.raises(CalibrationError, match="%x is 0 for all of the data"):
        applied(BEFORE, quantize("int8_static", calibration={"data": [{"x": torch.zeros(2, 6, FEATURES)}]}))


@pytest.mark.parametrize(
    ("options", "gate"),
    [
        ({"modules": ("*.up",)}, ("fp32", "not among modules")),
        ({"modules": ("*.up", "other*", "*")}, None),
        ({"skip": ("*.gate",)}, ("fp32", "skipped")),
        ({"skip": ("*.gat?",)}, ("fp32", "skipped")),
        ({"min_weights": 201}, ("fp32", "200 weights, fewer than 201")),
        ({"min_weights": 200}, ("int8_dynamic", None)),
        ({"overrides": {"*.gate": "weight_only"}}, ("int4 in groups of 32", None)),
        ({"overrides": {"*.gate": "weight_only"}, "bits": 8, "group": 16}, ("int8 in groups of 16", None)),
        ({"overrides": {"*.gate": "weight_only", "*gate": "int8_token"}}, ("int8_token", None)),
        ({"overrides": {"mlp.gate": "int8_token", "*e": "weight_only"}}, ("int4 in groups of 32", None)),
    ],
)  # fmt: skip
def test_every_linear_is_reported(options: dict[str, Any], gate: tuple[str, str | None] | None) -> None:
    """With its precision, and why it stays as it is. A pattern that nothing matches is refused elsewhere."""
    if gate is None:
        with pytest.raises(PassError, match=r"matches 'other\*'"):
            applied(BEFORE, quantize("int8_dynamic", **options))
        return
    made, layers = applied(BEFORE, quantize("int8_dynamic", **options))
    precision, reason = gate
    assert layers == [
        LayerPrecision(module="mlp.up", precision="int8_dynamic"),
        LayerPrecision(module="mlp.gate", precision=precision, reason=reason),
    ]
    assert made.reasons == [] if reason is None else [reason]
    assert ("aten.linear.default(input=%x, weight=%mlp.gate.weight)" in made.text) == (reason is not None)


def test_the_report_holds_the_layers() -> None:
    graph = read(BEFORE)
    (report,) = run_passes(graph, [quantize("int8_dynamic", skip=["*.gate"])])
    assert report.layers_by_precision == {("int8_dynamic", ""): ["mlp.up"], ("fp32", "skipped"): ["mlp.gate"]}


# A graph that runs once before


def with_prologue() -> Graph:
    graph = read(BEFORE)
    graph.prologue = load(program(BEFORE.replace("mlp.", "encoder.")))
    return graph


def test_what_runs_once_before_is_quantized_as_well() -> None:
    graph = with_prologue()
    (report,) = run_passes(graph, [static()], context=Context(source=SOURCE))
    assert report.matches == {"int8_static": 4}
    assert [layer.module for layer in report.layers] == ["mlp.up", "mlp.gate", "encoder.up", "encoder.gate"]


@pytest.mark.parametrize("skipped", ["encoder.*", "mlp.*"])
def test_a_pattern_may_match_in_one_of_both_graphs(skipped: str) -> None:
    (report,) = run_passes(with_prologue(), [quantize("int8_dynamic", skip=[skipped])])
    assert report.matches == {"int8_dynamic": 2}


# Weights


def by_rows(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers and scales of rows, by numpy."""
    largest = np.abs(weight).max(1)
    scale = (np.where(largest > 0, largest, 1) / np.float32(127)).astype(np.float32)
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8), scale


def by_groups(weight: NDArray[np.float32], bits: int, group: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Integers around 0 and scales of groups, one number after another."""
    lowest = -(1 << (bits - 1))
    groups = -(-weight.shape[1] // group)
    numbers = np.zeros((len(weight), groups, group), np.int64)
    scales = np.zeros((len(weight), groups), np.float32)
    for row, place in np.ndindex(len(weight), groups):
        part = weight[row, place * group : (place + 1) * group]
        extreme = part[np.argmax(np.abs(part))]
        scales[row, place] = (extreme if extreme else np.float32(1)) / np.float32(lowest)
        numbers[row, place, : len(part)] = np.clip(np.rint(part / scales[row, place]), lowest, -lowest - 1)
    return numbers, scales


def loaded(parts: Parts) -> dict[str, Tensor]:
    """Each part, which is what its type says."""
    tensors = {name: weight.load() for name, (_, weight) in parts.weights.items()}
    for name, (_, weight) in parts.weights.items():
        assert TensorType(tensors[name].dtype, tuple(tensors[name].shape)) == weight.type
    return tensors


def numbers_with_zeros(rows: int, features: int) -> Tensor:
    weight = torch.randn(rows, features) * torch.logspace(-3, 2, rows)[:, None]
    weight[1] = 0
    weight[2, :16] = 0
    return weight


@pytest.mark.parametrize("shape", [(5, 40), (3, 1), (4, 16)])
def test_rows_are_rounded_by_their_127th(shape: tuple[int, int]) -> None:
    weight = numbers_with_zeros(*shape)
    got = loaded(quantized_rows(Weight.of(weight)))
    numbers, scale = by_rows(weight.numpy())
    np.testing.assert_array_equal(got["weight"], numbers)
    np.testing.assert_array_equal(got["scale"], scale)
    assert int(got["weight"][0].abs().max()) == 127
    assert bool((got["weight"][1] == 0).all())


@pytest.mark.parametrize("features", [40, 16, 256, 33])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_are_rounded_by_what_is_largest_in_them(bits: int, group: int, features: int) -> None:
    weight = numbers_with_zeros(5, features)
    got = loaded(nearest_groups(Weight.of(weight), Packing(bits, group, symmetric=True)))
    numbers, scales = by_groups(weight.numpy(), bits, group)
    np.testing.assert_array_equal(got["scales"], scales)
    expected = (numbers * scales[..., None]).reshape(5, -1).astype(np.float32)
    back = unpacked(got["packed"], got["scales"], None, None, bits)
    np.testing.assert_array_equal(back, expected)
    assert bool((back[1] == 0).all())
    steps = torch.from_numpy(np.abs(scales)).repeat_interleave(group, 1)[:, :features]
    assert bool(((back[:, :features] - weight).abs() <= steps * (1 + 1e-6)).all())


def test_what_is_largest_in_a_group_is_exact() -> None:
    """Whatever its sign: it is at the lowest integer."""
    weight = torch.tensor([[0.1] * 15 + [8.0] + [-8.0] + [0.5] * 15])
    got = loaded(nearest_groups(Weight.of(weight), Packing(4, 16, symmetric=True)))
    assert got["scales"].tolist() == [[-1.0, 1.0]]
    assert unpacked(got["packed"], got["scales"], None, None, 4)[0, [15, 16]].tolist() == [8.0, -8.0]


def test_two_numbers_are_in_a_byte_the_first_one_low() -> None:
    weight = torch.tensor([[-8.0, 7.0, 1.0, 0.0] + [0.0] * 12])
    packed = loaded(nearest_groups(Weight.of(weight), Packing(4, 16, symmetric=True)))["packed"]
    assert packed[0, 0, :3].tolist() == [0 | 15 << 4, 9 | 8 << 4, 8 | 8 << 4]


def test_weights_are_read_when_they_are_needed() -> None:
    graph, loads = read(BEFORE), []

    def load(weight: Weight = graph.weights["mlp.up.weight"]) -> Tensor:
        loads.append("up")
        return weight.load()

    graph.weights["mlp.up.weight"] = Weight(graph.weights["mlp.up.weight"].type, load)
    run_passes(graph, [quantize("int8_dynamic")])
    assert loads == []
    graph.weights["mlp.up.int8"].load()
    assert loads


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_of_weights_are_reported(scheme: str) -> None:
    graph = read(BEFORE)
    (report,) = run_passes(graph, [step_of(scheme)], context=Context(source=SOURCE))
    own = {"int8_static": 11 * 40 + 11 * 4 + 4, "weight_only": 11 * 32 + 11 * 2 * 4}
    assert report.bytes_after == own.get(scheme, 11 * 40 + 11 * 4) + 6 * 4
