"""Ops of quantized numbers: shapes and refusals, and quantize and dequantize in ONNX."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from graphopt.dims import Dim, Size, names_of
from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.ops import SHAPES
from graphopt.ops.quantization import FP8
from graphopt.tensors import DimRange, TensorType, Weight
from tests.onnx_helpers import ONNXRUNTIME, check_everywhere, emit, run_onnxruntime, run_reference
from tests.test_quantized_ops import BYTE, EDGES, HALVES, INT8, OPS, SCALED, D, H, N, Packed, scale_of

# Shapes


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


LINEAR: dict[str, Any] = {"weight": empty(N, 6, dtype=INT8), "scale": empty(N), "bias": empty(N)}
GROUPS: dict[str, Any] = {
    "x": empty(2, 3, 20), "packed": empty(N, 2, 8, dtype=BYTE), "scales": empty(N, 2), "zeros": None, "codebook": None,
    "bias": None, "bits": 4, "block": 16,
}  # fmt: skip
ROWS: dict[str, Any] = {
    "packed": empty(2, 3, 5, 8, dtype=BYTE), "scales": empty(2, 3, 5), "zeros": empty(2, 3, 3, dtype=BYTE),
    "codebook": None, "bits": 4, "features": 77,
}  # fmt: skip
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"quantize by {name}": ("quantize", {"x": empty(*x), "scale": empty(*s) + 1, "dtype": None})
        for name, (x, s) in SCALED.items()
    },
    **{
        f"dequantize by {name}": ("dequantize", {"x": empty(*x, dtype=INT8), "scale": empty(*s)})
        for name, (x, s) in SCALED.items()
    },
    "quantize to float8": ("quantize", {"x": empty(3), "scale": empty() + 1, "dtype": FP8}),
    "dequantize float8": ("dequantize", {"x": empty(3, dtype=FP8), "scale": empty()}),
    **{
        f"static_linear of {dtype}": (
            "static_linear",
            {"x": empty(2, 6, dtype=dtype), "x_scale": empty(), **LINEAR, "weight": empty(N, 6, dtype=dtype)},
        )
        for dtype in (INT8, FP8)
    },
    "unpack_rows": ("unpack_rows", ROWS),
    "unpack_rows by a codebook": ("unpack_rows", ROWS | {"codebook": empty(16), "zeros": None}),
    "packed_linear by a codebook": ("packed_linear", GROUPS | {"codebook": empty(16)}),
    "dequantize to halves": ("dequantize", {"x": empty(3, dtype=INT8), "scale": empty(dtype=torch.float16)}),
    "dynamic_linear": ("dynamic_linear", {"x": empty(2, 3, 6), **LINEAR}),
    "dynamic_linear of a vector": ("dynamic_linear", {"x": empty(6), **LINEAR, "bias": None}),
    "dynamic_linear by one scale": ("dynamic_linear", {"x": empty(2, 6), **LINEAR, "scale": empty()}),
    "packed_linear": ("packed_linear", GROUPS),
    "packed_linear of bytes": ("packed_linear", GROUPS | {"packed": empty(N, 2, 16, dtype=BYTE), "bits": 8}),
    "packed_linear of everything": ("packed_linear", GROUPS | {"zeros": empty(N, 1, dtype=BYTE), "bias": empty(N)}),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
def test_shapes_are_those_of_the_body(call: str) -> None:
    op, args = CALLS[call]
    (shape,) = SHAPES[f"graphopt.{op}.default"](args)
    result = getattr(OPS, op)(**args)
    assert (shape.shape, shape.dtype) == (result.shape, result.dtype)


def refused(op: str, args: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        SHAPES[f"graphopt.{op}.default"](args)


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
@pytest.mark.parametrize(
    ("scale", "reason"),
    [
        (empty(4), "a scale is one number or has an axis for each of x"),
        (empty(1, 2, 3, 1), "a scale is one number or has an axis for each of x"),
        (empty(1, 3, 1, dtype=INT8), "a scale is one number or has an axis for each of x"),
        (empty(1, 4, 1), r"scale \[1, 4, 1\] does not fit x \[2, 3, 4\]"),
        (empty(2, 3, 3), r"scale \[2, 3, 3\] does not fit x"),
        (empty(0, 1, 1), r"scale \[0, 1, 1\] does not fit x"),
    ],
)
def test_scales_that_do_not_fit_are_refused(op: str, scale: Tensor, reason: str) -> None:
    refused(op, {"x": empty(2, 3, 4, dtype=INT8 if op == "dequantize" else torch.float32), "scale": scale}, reason)


def test_numbers_of_another_dtype_are_refused() -> None:
    scale = empty(dtype=torch.float16)
    refused("quantize", {"x": empty(3), "scale": scale}, "x is torch.float32, its scale torch.float16")
    for dtype in (torch.float16, BYTE, torch.float8_e5m2):
        refused(
            "quantize", {"x": empty(3), "scale": empty(), "dtype": dtype}, f"{dtype} is neither int8 nor float8_e4m3"
        )
    for dtype in (torch.float32, BYTE, torch.int32):
        refused(
            "dequantize", {"x": empty(3, dtype=dtype), "scale": scale}, f"x is {dtype}, neither int8 nor float8_e4m3fn"
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"weight": empty(N, 6)}, r"weight \[5, 6\] \(torch.float32\) is no int8 \[N, 6\]"),
        ({"weight": empty(N, 6, dtype=BYTE)}, "is no int8"),
        ({"weight": empty(N, 7, dtype=INT8)}, r"weight \[5, 7\] \(torch.int8\) is no int8 \[N, 6\]"),
        ({"weight": empty(1, N, 6, dtype=INT8)}, "is no int8"),
        ({"scale": empty(6)}, "scale and bias are of 5 channels"),
        ({"scale": empty(N, 1)}, "scale and bias are of 5 channels"),
        ({"bias": empty(6)}, "scale and bias are of 5 channels"),
        ({"bias": empty(1, N)}, "scale and bias are of 5 channels"),
    ],
)
def test_linears_that_do_not_fit_are_refused(change: dict[str, Tensor], reason: str) -> None:
    refused("dynamic_linear", {"x": empty(2, 6), **LINEAR} | change, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 2}, "packed .* is no uint8"),
        ({"packed": empty(N, 2, 8, dtype=INT8)}, r"packed \[5, 2, 8\] \(torch.int8\) .* do not fit together"),
        ({"packed": empty(N, 2, 16, dtype=BYTE)}, r"packed \[5, 2, 16\] is no uint8 \[N, groups, 8\]"),
        ({"packed": empty(N, 16, dtype=BYTE)}, "is no uint8"),
        ({"x": empty(2, 33)}, "2 groups of 16 do not fit 33 features"),
        ({"x": empty(2, 16)}, "2 groups of 16 do not fit 16 features"),
        ({"scales": empty(N, 3)}, r"packed \[5, 2, 8\] .* and scales \[5, 3\] do not fit"),
        ({"scales": empty(N)}, r"packed \[5, 2, 8\] .* and scales \[5\] do not fit"),
        ({"zeros": empty(N, 2, dtype=BYTE)}, r"zeros \[5, 2\] .* are no uint8 \[5, 1\]"),
        ({"zeros": empty(N, 1)}, "zeros .* are no uint8"),
        ({"codebook": empty(15)}, r"codebook \[15\] does not hold 16 numbers"),
        ({"codebook": empty(16), "zeros": empty(N, 1, dtype=BYTE)}, "or there are zeros beside it"),
        ({"bias": empty(N + 1)}, "bias .* is not of 5 channels"),
    ],
)
def test_packed_linears_that_do_not_fit_are_refused(change: dict[str, Any], reason: str) -> None:
    refused("packed_linear", GROUPS | change, reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": empty(2, 6)}, "x is torch.float32, not int8 or float8_e4m3fn with one scale"),
        ({"x_scale": empty(1)}, "not int8 or float8_e4m3fn with one scale"),
        ({"x": empty(2, 6, dtype=FP8)}, r"weight \[5, 6\] \(torch.int8\) is no float8_e4m3fn \[N, 6\]"),
        ({"weight": empty(N, 6, dtype=FP8)}, r"weight \[5, 6\] \(torch.float8_e4m3fn\) is no int8"),
    ],
)
def test_products_of_what_does_not_fit_are_refused(change: dict[str, Tensor], reason: str) -> None:
    refused("static_linear", {"x": empty(2, 6, dtype=INT8), "x_scale": empty(), **LINEAR} | change, reason)


@pytest.mark.parametrize("features", [0, 81])
def test_rows_of_more_features_than_there_are_are_refused(features: int) -> None:
    refused("unpack_rows", ROWS | {"features": features}, f"does not hold {features} features")


def test_an_odd_block_of_nibbles_is_refused() -> None:
    refused(
        "packed_linear", GROUPS | {"x": empty(2, 6), "packed": empty(N, 2, 1, dtype=BYTE), "block": 3}, "is no uint8"
    )


def test_a_graph_infers_their_types() -> None:
    graph = Graph(dims={"batch": DimRange()})
    batch = Dim.named("batch")
    x = graph.add_input("x", TensorType(torch.float32, (batch, H, 6, D)))
    scale = graph.add_weight("scale", Weight.of(scale_of((1, H, 1, 1))))
    numbers = graph.insert("graphopt.quantize.default", {"x": x, "scale": scale}).output
    back = graph.insert("graphopt.dequantize.default", {"x": numbers, "scale": scale}).output
    assert str(numbers.type) == "i8[batch, 3, 6, 4]"
    assert str(back.type) == "f32[batch, 3, 6, 4]"


# In ONNX


class Made:
    """A graph of one op; x has a dynamic first axis where its scale is not of each row's own."""

    def __init__(self, op: str, x: tuple[torch.dtype, Sequence[Size]], scale: Tensor | TensorType) -> None:
        self.graph = Graph(dims={name: DimRange() for size in x[1] for name in names_of(size)})
        given = self.graph.add_input("x", TensorType(x[0], tuple(x[1])))
        own = (
            self.graph.add_weight("scale", Weight.of(scale))
            if isinstance(scale, Tensor)
            else self.graph.add_input("scale", scale)
        )
        self.graph.outputs["y"] = self.graph.insert(f"graphopt.{op}.default", {"x": given, "scale": own}).output
        self.graph.verify()

    def check(self, *examples: Mapping[str, Tensor], reference: bool = True) -> None:
        """What the op's body says, number for number: by onnxruntime in both dialects, and by the reference evaluator."""
        models = [emit(self.graph), emit(self.graph, ONNXRUNTIME)]
        onnx.checker.check_model(models[0], full_check=True)
        for inputs in examples:
            expected = run(self.graph, inputs)["y"].numpy()
            results = [run_onnxruntime(model, inputs)[0] for model in models]
            results += [run_reference(models[0], inputs)[0]] if reference else []
            for got in results:
                assert got.dtype == expected.dtype
                if got.dtype == np.int8:
                    np.testing.assert_array_equal(got, expected)
                else:
                    np.testing.assert_allclose(got, expected, rtol=1e-6)


def dynamic(shape: Sequence[int], scale: Sequence[int]) -> Sequence[Size]:
    """The first axis as a named size, unless the scale has it."""
    return shape if len(scale) and scale[0] != 1 else (Dim.named("batch"), *shape[1:])


def example(op: str, shape: Sequence[int], batch: int = 0) -> Tensor:
    """Of int8 all its numbers from end to end, of others some that saturate."""
    whole = [batch or shape[0], *shape[1:]]
    return torch.randint(-128, 128, whole).to(INT8) if op == "dequantize" else torch.randn(whole) * 5


@pytest.mark.parametrize("as_input", [False, True], ids=["weight", "input"])
@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_lowerings(op: str, name: str, as_input: bool) -> None:
    """At two sizes of the batch where that is dynamic; the scale a weight, or given when it runs."""
    shape, own = SCALED[name]
    scale = scale_of(own)
    dtype = INT8 if op == "dequantize" else torch.float32
    size = dynamic(shape, own)
    made = Made(op, (dtype, size), TensorType(torch.float32, own) if as_input else scale)
    given = {"scale": scale} if as_input else {}
    batches = (0,) if size is shape else (1, 4)
    made.check(*({"x": example(op, shape, batch)} | given for batch in batches))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_halves_and_edges_in_onnx(shape: tuple[int, ...]) -> None:
    x = torch.tensor(EDGES)
    made = Made("quantize", (torch.float32, (len(EDGES),)), torch.full(shape, 0.5))
    made.check({"x": x.clamp(-1e8, 1e8)})  # the reference evaluator has numbers of 32 bits between
    made.check({"x": x}, reference=False)
    assert run_onnxruntime(emit(made.graph), {"x": x})[0].tolist() == HALVES


def test_edges_of_two_axes_in_onnx() -> None:
    x = torch.tensor(EDGES).reshape(1, 4, 4)
    made = Made("quantize", (torch.float32, (1, 4, 4)), torch.full((1, 4, 4), 0.5))
    made.check({"x": x.clamp(-1e8, 1e8)})
    made.check({"x": x}, reference=False)
    assert run_onnxruntime(emit(made.graph), {"x": x})[0].flatten().tolist() == HALVES


@pytest.mark.parametrize("name", ["one number", "heads", "features of each head"])
@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_halves_of_sixteen_bits_in_onnx(op: str, name: str) -> None:
    """onnxruntime and the standard compute the quotient in another precision each: a step apart at most."""
    shape, own = SCALED[name]
    scale = scale_of(own).half()
    x = example(op, shape) if op == "dequantize" else example(op, shape).half()
    made = Made(op, (x.dtype, shape), scale)
    expected = run(made.graph, {"x": x})["y"]
    for dialect in (None, ONNXRUNTIME):
        model = emit(made.graph) if dialect is None else emit(made.graph, dialect)
        got = torch.from_numpy(run_onnxruntime(model, {"x": x})[0])
        assert got.dtype == expected.dtype
        if op == "quantize":
            assert int((got.int() - expected.int()).abs().max()) <= 1
            assert float((got != expected).double().mean()) < 0.1
        else:
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_one_number_and_one_axis_are_quantize_linear() -> None:
    """Scales of several axes are a division before it, and a product behind a cast."""

    def made_of(op: str, name: str) -> list[str]:
        shape, own = SCALED[name]
        model = emit(Made(op, (INT8 if op == "dequantize" else torch.float32, shape), scale_of(own)).graph)
        return [node.op_type for node in model.graph.node if node.op_type not in ("Constant", "Reshape")]

    for name in ("one number", "heads", "channels of a weight"):
        assert made_of("quantize", name) == ["QuantizeLinear"]
        assert made_of("dequantize", name) == ["DequantizeLinear"]
    assert made_of("quantize", "features of each head") == ["Div", "QuantizeLinear"]
    assert made_of("dequantize", "features of each head") == ["Cast", "Mul"]


@pytest.mark.parametrize("op", ["quantize", "dequantize"])
def test_a_scale_for_each_row_of_any_batch(op: str) -> None:
    batch = Dim.named("batch")
    dtype = INT8 if op == "dequantize" else torch.float32
    made = Made(op, (dtype, (batch, 3)), TensorType(torch.float32, (batch, 1)))
    made.check(*({"x": example(op, (rows, 3)), "scale": scale_of((rows, 1))} for rows in (1, 2, 5)))


@pytest.mark.parametrize("name", SCALED)
def test_float8_in_onnx(name: str) -> None:
    shape, own = SCALED[name]
    graph = Graph()
    x, scale = graph.add_input("x", TensorType(torch.float32, shape)), graph.add_weight("s", Weight.of(scale_of(own)))
    numbers = graph.insert("graphopt.quantize.default", {"x": x, "scale": scale, "dtype": FP8}).output
    graph.outputs["y"] = graph.insert("graphopt.dequantize.default", {"x": numbers, "scale": scale}).output
    check_everywhere(graph, [{"x": torch.randn(shape) * 20}], 1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [None, FP8], ids=str)
def test_static_linear_in_onnx(dtype: torch.dtype | None, with_bias: bool) -> None:
    """Of any number of rows."""
    graph = Graph(dims={"batch": DimRange()})
    x = graph.add_input("x", TensorType(torch.float32, (Dim.named("batch"), 6)))
    args: dict[str, Any] = {"x_scale": graph.add_weight("step", Weight.of(torch.tensor(0.02)))}
    numbers = graph.insert("graphopt.quantize.default", {"x": x, "scale": args["x_scale"], "dtype": dtype}).output
    weight = torch.randint(-100, 101, (N, 6)).to(dtype or INT8)
    parts = {"weight": weight, "scale": scale_of((N,)), **({"bias": torch.randn(N)} if with_bias else {})}
    args |= {name: graph.add_weight(name, Weight.of(part)) for name, part in parts.items()}
    graph.outputs["y"] = graph.insert("graphopt.static_linear.default", {"x": numbers, **args}).output
    check_everywhere(graph, [{"x": torch.randn(rows, 6)} for rows in (1, 4)], 1e-4)


def of_rows(parts: Mapping[str, Tensor], **options: int) -> Graph:
    """A graph of unpack_rows, of as many rows as there are; a codebook is a weight."""
    graph, rows = Graph(dims={"rows": DimRange()}), Dim.named("rows")
    args: dict[str, Any] = {
        name: graph.add_weight(name, Weight.of(part))
        if name == "codebook"
        else graph.add_input(name, TensorType(part.dtype, (rows, *part.shape[1:])))
        for name, part in parts.items()
    }
    graph.outputs["y"] = graph.insert("graphopt.unpack_rows.default", {**args, **options}).output
    return graph


def of_linear(parts: Mapping[str, Tensor], **options: int) -> Graph:
    graph = Graph(dims={"rows": DimRange()})
    args: dict[str, Any] = {name: graph.add_weight(name, Weight.of(part)) for name, part in parts.items()}
    args["x"] = graph.add_input("x", TensorType(torch.float32, (Dim.named("rows"), options.pop("features"))))
    graph.outputs["y"] = graph.insert("graphopt.packed_linear.default", {**args, **options}).output
    return graph


BY = list(itertools.product((4, 8), (20, 40), ("middle", "zeros", "codebook")))


@pytest.mark.parametrize(("bits", "features", "by"), BY)
def test_packed_weights_in_onnx(bits: int, features: int, by: str) -> None:
    """Two groups and three: zeros fill their bytes, or not. onnxruntime's own products round their inputs as well."""
    packed, scales, zeros = Packed(features, bits, 16, by == "zeros").tensors()
    parts = {"packed": packed, "scales": scales}
    parts |= {"zeros": zeros} if zeros is not None else {"codebook": torch.randn(2**bits)} if by == "codebook" else {}
    few = {name: part if name == "codebook" else part[:2] for name, part in parts.items()}
    rows = of_rows(parts, bits=bits, features=features)
    check_everywhere(rows, [{n: p for n, p in each.items() if n != "codebook"} for each in (parts, few)], 1e-6)
    graph = of_linear(parts, bits=bits, block=16, features=features)
    for inputs in ({"x": torch.randn(count, features)} for count in (1, 4)):
        expected = run(graph, inputs)["y"].numpy()
        for got in (run_reference(emit(graph), inputs)[0], run_onnxruntime(emit(graph), inputs)[0]):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        own = run_onnxruntime(emit(graph, ONNXRUNTIME), inputs)[0]
        assert np.abs(own - expected).max() <= (1e-4 if by == "codebook" else 2e-2) * np.abs(expected).max()
