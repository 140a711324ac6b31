"""quantize: smoothed inputs, outliers in floats, float8, NormalFloat, zero points, GPTQ, AWQ, and what is kept by a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.passes.quantize import Quantize
from graphopt.passes.quantized_weights import NF4
from graphopt.passes.rounding import gptq, grid_of
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.report import PassReport
from graphopt.sources import Source
from graphopt.tensors import Weight
from tests.onnx_helpers import ONNXRUNTIME, emit, run_onnxruntime, run_reference
from tests.rules import difference, inputs_of, load, program, read
from tests.test_quantize import BEFORE, GATE, HEAD, OUTPUTS, TABLE, TIED, UP, by_groups, by_rows
from tests.test_quantize_engines import SIZES, assert_relative

OUTLIERS = [7, 30]


def tokens(batches: int = 2) -> Tensor:
    """``[batches, 2, 6, 40]``: around a half, two features of them ten times as large."""
    x = torch.randn(batches, 2, 6, 40, generator=torch.Generator().manual_seed(5)).clamp(-3, 3) + 0.5
    x[..., OUTLIERS] *= 10
    return x


DATA: dict[str, Any] = {"calibration": {"data": [{"x": batch} for batch in tokens()]}}
IDS: dict[str, Any] = {"calibration": {"data": [{"ids": torch.arange(60).reshape(2, 30)}]}}
OPTIONS: dict[str, dict[str, Any]] = {
    "int8_smooth": {"scheme": "int8_smooth", "strength": 0.5, **DATA},
    "llm_int8": {"scheme": "llm_int8", **DATA},
    "fp8": {"scheme": "fp8", **DATA},
    "nf4": {"scheme": "nf4"},
    "zeros": {"scheme": "weight_only", "symmetric": False},
    "fractions": {"scheme": "weight_only", "symmetric": False, "fractions": True, "scales": "fp16"},
    "gptq": {"scheme": "weight_only", "algorithm": "gptq", **DATA},
    "awq": {"scheme": "weight_only", "algorithm": "awq", **DATA},
}
schemes = pytest.mark.parametrize("name", OPTIONS)


def step_of(scheme: str, **options: Any) -> Quantize:
    (step,) = load_passes([{"kind": "canonicalize"}, {"kind": "quantize", "scheme": scheme, **options}])[1:]
    assert isinstance(step, Quantize)
    return step


def source_of(name: str) -> Source:
    x = torch.zeros(2, 6, 40) if name == "x" else torch.zeros(2, 6, dtype=torch.int64)
    return Source(nn.Identity(), {name: x}, {name: ("batch", "sequence", None)[: x.ndim]})


def applied(graph: Graph, scheme: str, **options: Any) -> PassReport:
    context = Context(source=source_of(next(iter(graph.inputs))))
    (report,) = run_passes(graph, [step_of(scheme, **options)], context=context)
    return report


def quantized(name: str, **options: Any) -> Graph:
    graph = read(BEFORE)
    applied(graph, **OPTIONS[name], **options)
    return graph


# What the pass writes


def rows_of(layer: str, channels: int, kind: str = "int8: i8") -> str:
    name, type = kind.split(": ")
    return f"weight %mlp.{layer}.{name}: {type}[{channels}, 40]\nweight %mlp.{layer}.scale: f32[{channels}]\n"


def static_of(x: str, scale: str, weight: str) -> str:
    call = f"graphopt.static_linear.default(x={x}, x_scale={scale}"
    return f"""
    {UP} {call}, weight=%mlp.up.{weight}, scale=%mlp.up.scale, bias=%mlp.up.bias)
    {GATE} {call}, weight=%mlp.gate.{weight}, scale=%mlp.gate.scale)
    {OUTPUTS}"""


def packed_of(*more: str, x: str = "x", head: str = "", mul: str = "") -> str:
    """``more``: other parts than packed and scales, each with its type, N for the channels."""
    weights, calls = [f"{HEAD}\nweight %mlp.up.bias: f32[6]\n{head}"], [mul]
    for layer, channels, line, bias in (("up", 6, UP, ", bias=%mlp.up.bias"), ("gate", 5, GATE, "")):
        parts = [f"packed: u8[{channels}, 2, 16]", f"scales: f32[{channels}, 2]", *more]
        weights += [f"weight %mlp.{layer}.{part.replace('N', str(channels))}" for part in parts]
        own = "".join(f", {part.split(':')[0]}=%mlp.{layer}.{part.split(':')[0]}" for part in parts)
        calls.append(f"{line} graphopt.packed_linear.default(x=%{x}{own}{bias}, bits=4, block=32)")
    return "\n".join([*weights, *calls, OUTPUTS])


BIAS = "weight %mlp.up.bias: f32[6]\n"
SMOOTH = "%mul: f32[batch, sequence, 40] = aten.mul.Tensor(self=%x, other=%x.smooth)\n"
WITH_ZEROS = "graphopt.packed_linear.default(x=%cat, packed=%mlp.{0}.packed, scales=%to{1}, zeros=%mlp.{0}.zeros"
BY_TOKEN = "graphopt.dynamic_linear.default(x=%mul, weight=%mlp"
AFTER = {
    "int8_smooth": f"""{HEAD}{BIAS}weight %x.smooth: f32[40]
    {rows_of("up", 6)}weight %mul.scale: f32[]
    {rows_of("gate", 5)}{SMOOTH}
    %quantize: i8[batch, sequence, 40] = graphopt.quantize.default(x=%mul, scale=%mul.scale)
    {static_of("%quantize", "%mul.scale", "int8")}""",
    "fp8": f"""{HEAD}{BIAS}{rows_of("up", 6, "fp8: f8e4m3")}weight %x.scale: f32[]
    {rows_of("gate", 5, "fp8: f8e4m3")}
    %quantize: f8e4m3[batch, sequence, 40] = graphopt.quantize.default(x=%x, scale=%x.scale, dtype=f8e4m3)
    {static_of("%quantize", "%x.scale", "fp8")}""",
    "llm_int8": f"""{HEAD}{BIAS}{rows_of("up", 6)}
    weight %x.kept: f32[40]
    weight %x.outliers: i64[2]
    weight %mlp.up.outliers: f32[6, 2]
    {rows_of("gate", 5)}weight %mlp.gate.outliers: f32[5, 2]
    %mul: f32[batch, sequence, 40] = aten.mul.Tensor(self=%x, other=%x.kept)
    %index_select: f32[batch, sequence, 2] = aten.index_select.default(self=%x, dim=2, index=%x.outliers)
    %dynamic_linear: f32[batch, sequence, 6] = {BY_TOKEN}.up.int8, scale=%mlp.up.scale, per_token=True)
    %linear: f32[batch, sequence, 6] = aten.linear.default(input=%index_select, weight=%mlp.up.outliers, bias=%mlp.up.bias)
    {UP} aten.add.Tensor(self=%dynamic_linear, other=%linear)
    %dynamic_linear_1: f32[batch, sequence, 5] = {BY_TOKEN}.gate.int8, scale=%mlp.gate.scale, per_token=True)
    %linear_1: f32[batch, sequence, 5] = aten.linear.default(input=%index_select, weight=%mlp.gate.outliers)
    {GATE} aten.add.Tensor(self=%dynamic_linear_1, other=%linear_1)
    {OUTPUTS}""",
    "nf4": packed_of("codebook: f32[16]"),
    "zeros": packed_of("zeros: u8[N, 1]"),
    "fractions": f"""{HEAD}{BIAS}
    weight %mlp.up.packed: u8[6, 3, 16]
    weight %mlp.up.scales: f16[6, 3]
    weight %mlp.up.zeros: u8[6, 2]
    weight %means_of_32_in_40: f32[40, 26]
    weight %mlp.gate.packed: u8[5, 3, 16]
    weight %mlp.gate.scales: f16[5, 3]
    weight %mlp.gate.zeros: u8[5, 2]
    %matmul: f32[batch, sequence, 26] = aten.matmul.default(self=%x, other=%means_of_32_in_40)
    %cat: f32[batch, sequence, 66] = aten.cat.default(tensors=[%x, %matmul], dim=2)
    %to: f32[6, 3] = aten.to.dtype(self=%mlp.up.scales, dtype=f32)
    {UP} {WITH_ZEROS.format("up", "")}, bias=%mlp.up.bias, bits=4, block=32)
    %to_1: f32[5, 3] = aten.to.dtype(self=%mlp.gate.scales, dtype=f32)
    {GATE} {WITH_ZEROS.format("gate", "_1")}, bits=4, block=32)
    {OUTPUTS}""",
    "gptq": packed_of(),
    "awq": packed_of(x="mul", head="weight %x.smooth: f32[40]", mul=SMOOTH),
}


@schemes
def test_fires(name: str) -> None:
    graph = read(BEFORE)
    report = applied(graph, **OPTIONS[name])
    assert str(graph) == program(AFTER[name]), difference(program(AFTER[name]), str(graph))
    assert report.matches == {OPTIONS[name]["scheme"]: 2}


def test_without_outliers_all_are_integers() -> None:
    graph = read(BEFORE)
    applied(graph, "int8_token")
    assert str(quantized("llm_int8", outliers=100)) == str(graph)


# What is computed


def weights() -> tuple[Tensor, Tensor, Tensor]:
    graph = load(program(BEFORE))
    up, gate, bias = (graph.weights[f"mlp.{name}"].load() for name in ("up.weight", "gate.weight", "up.bias"))
    return up, gate, bias


def by_row(weight: Tensor) -> Tensor:
    numbers, scale = by_rows(weight.numpy())
    return torch.from_numpy(numbers * scale[:, None])


def in_float8(x: Tensor, scale: Tensor) -> Tensor:
    rounded = np.clip((x / scale).numpy(), -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return torch.from_numpy(rounded) * scale


def by_group(weight: Tensor, form: str) -> Tensor:
    """Groups of 32 one after another: the nearest of NormalFloat, or of 16 numbers from the smallest to the largest."""
    parts = []
    for part in torch.split(weight, 32, 1):
        if form == "nf4":
            largest, codes = part.abs().amax(1, keepdim=True), torch.tensor(NF4)
            parts.append(codes[(part[..., None] / largest[..., None] - codes).abs().argmin(2)] * largest)
        else:
            low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
            step = (high - low) / 15
            if form == "fractions":
                step = step.half().float()
            zero = -low / step if form == "fractions" else (-low / step).round()
            parts.append(((part / step + zero).round().clamp(0, 15) - zero) * step)
    return torch.cat(parts, 1)


def by_moment(weight: Tensor, moment: Tensor) -> Tensor:
    grid = grid_of(weight, 4, 32, symmetric=True, importance=moment.diagonal())
    return grid.values(gptq(weight, moment, grid))


def protected(up: Tensor, gate: Tensor, moment: Tensor) -> list[Tensor]:
    """The best of the powers, by brute force, then ranges by what each feature counts."""
    magnitude, both = moment.diagonal().sqrt(), torch.cat([up, gate]).numpy()
    tried = {}
    for power in (step / 20 for step in range(20)):
        factors = magnitude**power / (magnitude**power).max().mul((magnitude**power).min()).sqrt()
        numbers, scales = by_groups(both * factors.numpy(), 4, 32)
        off = torch.from_numpy((numbers * scales[..., None]).reshape(11, -1)[:, :40] / factors.numpy() - both)
        tried[float(torch.einsum("nk,kl,nl->", off, moment.double(), off))] = factors
    factors = tried[min(tried)]
    grids = [grid_of(w * factors, 4, 32, symmetric=True, importance=(magnitude / factors) ** 2) for w in (up, gate)]
    return [grid.values(grid.numbers(w * factors)) / factors for grid, w in zip(grids, (up, gate), strict=True)]


def operands(name: str, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
    """An input and both weights as a scheme has them."""
    up, gate, _ = weights()
    own = tokens().reshape(-1, 40)
    moment = own.T @ own / len(own)
    if name == "int8_smooth":
        factors = (own.abs().amax(0) / torch.cat([up, gate]).abs().amax(0)).sqrt()
        step = (own.abs().amax(0) / factors).max() / 127
        made = (x / factors / step).round().clamp(-128, 127) * step
        return made, [by_row(weight * factors) for weight in (up, gate)]
    if name == "fp8":
        halves = [in_float8(weight, weight.abs().amax(1, keepdim=True) / 448) for weight in (up, gate)]
        return in_float8(x, own.abs().max() / 448), halves
    if name == "gptq":
        return x, [by_moment(weight, moment) for weight in (up, gate)]
    if name == "awq":
        return x, protected(up, gate, moment)
    return x, [by_group(weight, name) for weight in (up, gate)]


def with_outliers(x: Tensor, weight: Tensor) -> Tensor:
    rest = x.clone()
    rest[..., OUTLIERS] = 0
    step = rest.abs().amax(-1, keepdim=True) / 127
    return (rest / step).round() * step @ by_row(weight).T + x[..., OUTLIERS] @ weight[:, OUTLIERS].T


@schemes
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_are_of_rounded_numbers(name: str, sizes: dict[str, int]) -> None:
    graph = quantized(name)
    x = inputs_of(graph, sizes)["x"]
    x[0, 0, 7], x[0, 0, 0] = 80.0, 20.0  # more than in the data
    got, (up, gate, bias) = run(graph, {"x": x}), weights()
    if name == "llm_int8":
        expected = {"up": with_outliers(x, up) + bias, "gate": with_outliers(x, gate)}
    else:
        own, (up, gate) = operands(name, x)
        expected = {"up": own @ up.T + bias, "gate": own @ gate.T}
    for output, tensor in expected.items():
        if name == "fractions":  # up to what 4 bits say of them
            assert_relative(got[output].numpy(), tensor.float(), 4e-3)
        else:
            torch.testing.assert_close(got[output], tensor.float(), rtol=1e-4, atol=1e-3)


@schemes
def test_engines_compute_what_the_interpreter_does(name: str) -> None:
    """Both linears of one input, and one of them alone. Own products of packed integers round their inputs as well."""
    integers = name in ("zeros", "fractions", "gptq", "awq")
    for options in ({}, {"skip": ("*.gate",)}):
        graph = quantized(name, **options)
        standard, own = emit(graph), emit(graph, ONNXRUNTIME)
        onnx.checker.check_model(standard, full_check=True)
        assert {node.op_type for node in own.graph.node} & (
            {"MatMulNBits"} if integers else {"MatMulIntegerToFloat", "DynamicQuantizeLinear", "MatMul"}
        )
        for inputs in ({"x": tokens()[0]}, inputs_of(graph, SIZES[1])):
            for index, expected in enumerate(run(graph, inputs).values()):
                assert_relative(run_reference(standard, inputs)[index], expected)
                assert_relative(run_onnxruntime(standard, inputs)[index], expected)
                assert_relative(run_onnxruntime(own, inputs)[index], expected, 2e-2 if integers else 1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "awq", **IDS},
        {"algorithm": "gptq", **IDS},
        {"symmetric": False},
        {"scheme": "nf4"},
        {"symmetric": False, "fractions": True},
        {"scales": "fp16"},
        {"symmetric": False, "fractions": True, "scales": "fp16", "algorithm": "gptq", **IDS},
    ],
    ids=["awq", "gptq", "zeros", "nf4", "fractions", "fp16", "fractions, fp16, gptq"],
)
def test_a_tied_table_is_one_and_looked_up_right(options: dict[str, Any]) -> None:
    """Rows that were scaled for the linear are divided again: they are the table's, up to a step of 4 bits."""
    graph = read(TIED.replace("output y", "output e = %e\noutput y"))
    ids = torch.tensor([[0, 7, TABLE - 1]])
    before = run(graph, {"ids": ids})
    report = applied(graph, **{"scheme": "weight_only", **options})
    assert [layer.precision for layer in report.layers][1:] == ["as its linear"]
    assert [name for name in graph.weights if name.startswith("embed.packed")] == ["embed.packed"]
    assert "embed.weight" not in graph.weights
    got = run(graph, {"ids": ids})
    steps = before["e"].abs().amax(-1, keepdim=True) * (0.5 if "algorithm" in options else 0.2)
    assert bool(((got["e"] - before["e"]).abs() <= steps).all())
    for output in ("e", "y"):
        assert float(torch.cosine_similarity(got[output].flatten(), before[output].flatten(), 0)) > 0.98
    for index, expected in enumerate(got.values()):
        assert_relative(run_onnxruntime(emit(graph, ONNXRUNTIME), {"ids": ids})[index], expected, 2e-2)
        assert_relative(run_onnxruntime(emit(graph), {"ids": ids})[index], expected)


def test_a_tied_table_may_be_int8_beside_its_linear() -> None:
    graph = read(TIED.replace("output y", "output e = %e\noutput y"))
    ids = torch.tensor([[0, 7, TABLE - 1]])
    before = run(graph, {"ids": ids})["e"]
    report = applied(graph, "weight_only", embeddings="int8")
    assert [layer.precision for layer in report.layers][1:] == ["int8 rows"]
    off = (run(graph, {"ids": ids})["e"] - before).abs()
    assert bool((off <= before.abs().amax(-1, keepdim=True) / 127 * 0.51).all())


# What is kept

DEEP = f"""{HEAD}
    weight %a.weight: f32[16, 40]
    weight %b.weight: f32[16, 16]
    weight %c.weight: f32[4, 16]
    %a: f32[batch, sequence, 16] = aten.linear.default(input=%x, weight=%a.weight)
    %relu: f32[batch, sequence, 16] = aten.relu.default(self=%a)
    %b: f32[batch, sequence, 16] = aten.linear.default(input=%relu, weight=%b.weight)
    %y: f32[batch, sequence, 4] = aten.linear.default(input=%b, weight=%c.weight)
    output y = %y
"""


def with_a_terrible_layer() -> Graph:
    """``b`` reads a channel of huge numbers, and hardly uses it: by one scale for its input the others are lost."""
    graph = read(DEEP)
    a, b = (graph.weights[f"{name}.weight"].load().clone() for name in "ab")
    a[3] *= 1e4
    b[:, 3] *= 1e-6
    graph.set_weight("a.weight", Weight.of(a))
    graph.set_weight("b.weight", Weight.of(b))
    return graph


def off(graph: Graph) -> float:
    """The worst ``relative`` of both batches."""
    pairs = [[run(each, {"x": x})["y"] for each in (graph, with_a_terrible_layer())] for x in tokens()]
    return max(float((got - expected).abs().max() / expected.abs().max()) for got, expected in pairs)
