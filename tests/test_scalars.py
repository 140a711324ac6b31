"""size_of: what an integer without dimensions is as a function of the sizes; and models that cut by such numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.dims import Dim, Size, evaluate, floordiv, maximum, minimum
from graphopt.errors import TracingError
from graphopt.execution import run
from graphopt.ir import Graph, Value
from graphopt.scalars import size_of
from graphopt.tensors import DimRange, TensorType, Weight
from graphopt.tracing import trace
from tests.onnx_helpers import check_everywhere

s, b = Dim.named("s"), Dim.named("b")
I64 = torch.int64


class Numbers:
    """A graph to compute numbers in; ``x: f32[b, s]`` and ``i: i64[]`` are data."""

    def __init__(self) -> None:
        self.graph = Graph(dims={"b": DimRange(), "s": DimRange()})
        self.x = self.graph.add_input("x", TensorType(torch.float32, (b, s)))
        self.i = self.graph.add_input("i", TensorType(I64, ()))

    def of(self, size: Any, dtype: torch.dtype = I64, op: str = "aten.scalar_tensor.default") -> Value:
        args = {"s": size} if "scalar" in op else {"size": (), "fill_value": size}
        return self.graph.insert(op, args | {"dtype": dtype}).output

    def call(self, op: str, *args: Any, **options: Any) -> Value:
        names = ("self", "other")[: len(args)]
        return self.graph.insert(f"aten.{op}", dict(zip(names, args, strict=True)) | options).output

    def size(self, arg: Any) -> Size | None:
        return size_of(self.graph, arg)


@pytest.fixture
def numbers() -> Numbers:
    return Numbers()


@pytest.mark.parametrize("op", ["aten.scalar_tensor.default", "aten.full.default"])
@pytest.mark.parametrize("dtype", [I64, torch.int32])
def test_a_tensor_made_of_a_size_is_the_size(numbers: Numbers, dtype: torch.dtype, op: str) -> None:
    assert numbers.size(numbers.of(2 * s + 1, dtype, op)) == 2 * s + 1
    assert numbers.size(numbers.of(7, dtype, op)) == 7


def test_numbers_and_sizes_are_themselves(numbers: Numbers) -> None:
    assert numbers.size(5) == 5
    assert numbers.size(s - b) == s - b
    assert numbers.size(True) is None
    assert numbers.size(2.0) is None
    assert numbers.size(None) is None


def test_a_weight_is_its_number(numbers: Numbers) -> None:
    for dtype in (I64, torch.int32, torch.uint8):
        weight = numbers.graph.add_weight(f"w.{dtype}", Weight.of(torch.tensor(11, dtype=dtype)))
        assert numbers.size(weight) == 11


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add.Tensor", s + b),
        ("sub.Tensor", s - b),
        ("rsub.Tensor", b - s),
        ("mul.Tensor", s * b),
        ("floor_divide.default", floordiv(s, b)),
        ("minimum.default", minimum(s, b)),
        ("maximum.default", maximum(s, b)),
    ],
)
def test_arithmetic(numbers: Numbers, op: str, expected: Size) -> None:
    assert numbers.size(numbers.call(op, numbers.of(s), numbers.of(b))) == expected


@pytest.mark.parametrize(
    ("op", "expected"), [("add.Tensor", s + 3), ("sub.Tensor", s - 3), ("rsub.Scalar", 3 - s), ("mul.Tensor", 3 * s)]
)
def test_arithmetic_with_a_number(numbers: Numbers, op: str, expected: Size) -> None:
    assert numbers.size(numbers.call(op, numbers.of(s), 3)) == expected


def test_a_longer_computation_is_evaluated_like_torch(numbers: Numbers) -> None:
    """``min((s + 3) // 4 * b, max(s, 8) - 1)``"""
    rows = numbers.call("floor_divide.default", numbers.call("add.Tensor", numbers.of(s), 3), numbers.of(4))
    product = numbers.call("mul.Tensor", rows, numbers.of(b, torch.int32))
    most = numbers.call("sub.Tensor", numbers.call("maximum.default", numbers.of(s), numbers.of(8)), 1)
    size = numbers.size(numbers.call("minimum.default", product, most))
    for env in ({"s": 1, "b": 1}, {"s": 5, "b": 9}, {"s": 17, "b": 2}, {"s": 40, "b": 3}):
        assert evaluate(size, env) == min((env["s"] + 3) // 4 * env["b"], max(env["s"], 8) - 1)


def test_casts_between_integers(numbers: Numbers) -> None:
    assert numbers.size(numbers.call("to.dtype", numbers.of(s), dtype=torch.int32)) == s


# What depends on data


def test_data_has_no_size(numbers: Numbers) -> None:
    assert numbers.size(numbers.i) is None
    assert numbers.size(numbers.x) is None
    assert numbers.size(numbers.call("add.Tensor", numbers.i, numbers.of(s))) is None
    assert numbers.size(numbers.call("mul.Tensor", numbers.of(s), numbers.i)) is None
    assert numbers.size(numbers.call("to.dtype", numbers.call("sum.default", numbers.x), dtype=I64)) is None
    assert numbers.size(numbers.call("argmax.default", numbers.x)) is None


def test_floats_have_no_size(numbers: Numbers) -> None:
    half = numbers.of(0.5, torch.float32)
    assert numbers.size(half) is None
    assert numbers.size(numbers.call("mul.Tensor", numbers.of(s), half)) is None
    assert numbers.size(numbers.call("to.dtype", numbers.of(s), dtype=torch.float32)) is None
    assert numbers.size(numbers.call("to.dtype", half, dtype=I64)) is None


def test_tensors_with_dimensions_have_no_size(numbers: Numbers) -> None:
    row = numbers.graph.insert("aten.full.default", {"size": (1,), "fill_value": 3, "dtype": I64}).output
    assert numbers.size(row) is None
    assert numbers.size(numbers.graph.add_weight("w", Weight.of(torch.tensor([3])))) is None


def test_sums_with_alpha_have_no_size(numbers: Numbers) -> None:
    assert numbers.size(numbers.call("add.Tensor", numbers.of(s), numbers.of(b), alpha=2)) is None


def test_ops_that_are_not_known_have_no_size(numbers: Numbers) -> None:
    assert numbers.size(numbers.call("bitwise_xor.Tensor", numbers.of(s), numbers.of(b))) is None


@pytest.mark.xfail(strict=True, reason="not known yet, although functions of sizes")
@pytest.mark.parametrize("op", ["neg", "remainder", "clamp", "div"])
def test_more_that_sizes_are_made_with(numbers: Numbers, op: str) -> None:
    size = numbers.of(s)
    made = {
        "neg": lambda: numbers.call("neg.default", size),
        "remainder": lambda: numbers.call("remainder.Scalar", size, 4),
        "clamp": lambda: numbers.call("clamp.default", size, max=5),
        "div": lambda: numbers.call("div.Tensor_mode", size, 2, rounding_mode="floor"),
    }[op]()
    assert numbers.size(made) == {"neg": -s, "remainder": s % 4, "clamp": minimum(s, 5), "div": s // 2}[op]


@pytest.mark.xfail(strict=True, raises=ZeroDivisionError, reason="the number is computed, and the computation fails")
def test_a_division_by_zero_has_no_size(numbers: Numbers) -> None:
    assert numbers.size(numbers.call("floor_divide.default", numbers.of(7), numbers.of(0))) is None


# Models


class Cuts(nn.Module):
    """A function of ``x``."""

    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def first_eight(x: Tensor) -> Tensor:
    return x[:, : torch.tensor(min(x.shape[1], 8)).item()]


def all_but_two(x: Tensor) -> Tensor:
    return x[:, : (torch.tensor(x.shape[1]) - 2).item()]


def at_most_four(x: Tensor) -> Tensor:
    size: Any = torch.minimum(torch.tensor(x.shape[1]), torch.tensor(4)).item()
    return x.new_ones(size, 2)


def half_and_more(x: Tensor) -> Tensor:
    size: Any = torch.maximum(torch.tensor(x.shape[1]) // 2, torch.tensor(2)).to(torch.int32).item()
    return torch.cat([x, x.new_zeros(x.shape[0], size)], 1)


def counted(x: Tensor) -> Tensor:
    size: Any = torch.tensor(x.shape[1]).item()
    return torch.arange(size) * x + x.new_zeros(size, size + 1).reshape(-1).sum()


def from_the_other_side(x: Tensor) -> Tensor:
    size: Any = (20 - torch.tensor(x.shape[1])).item()
    return x[:, :1].expand(-1, size)


CUTS = (first_eight, all_but_two, at_most_four, half_and_more, counted, from_the_other_side)


@pytest.mark.parametrize("fn", CUTS, ids=lambda fn: fn.__name__)
def test_sizes_that_go_through_tensors(fn: Callable[[Tensor], Tensor]) -> None:
    """``item`` of a function of the shapes: at sizes on both sides of every bound."""
    graph = trace(Cuts(fn).eval(), {"x": torch.randn(3, 6)}, {"x": ("b", "s")})
    given = [{"x": torch.randn(batch, sequence)} for batch, sequence in ((3, 6), (2, 3), (3, 8), (1, 9), (4, 13))]
    for inputs in given:
        torch.testing.assert_close(run(graph, inputs)["output"], fn(inputs["x"]))
    check_everywhere(graph, given)


class ByData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        size: Any = torch.minimum(x.abs().sum().long(), torch.tensor(x.shape[0])).item()
        return x.new_zeros(size)


class ByDataAndSize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        size: Any = (torch.tensor(x.shape[0]) + x.argmax()).item()
        return x.new_zeros(size, 2)


@pytest.mark.parametrize("module", [ByData, ByDataAndSize])
def test_sizes_of_data_are_refused_with_their_line(module: type[nn.Module]) -> None:
    with pytest.raises(TracingError) as error:
        trace(module().eval(), {"x": torch.randn(4, 3)}, {"x": ("b", None)})
    assert error.value.what == "the size u0 depends on data, not on the inputs' shapes"
    assert error.value.where == f"%item | tests/test_scalars.py:{inspect.getsourcelines(module.forward)[1] + 1}"
    assert error.value.hint == "make the size a function of the inputs' shapes"


def test_a_size_that_is_rounded_up() -> None:
    """``-(-s // 4)``, as blocks are counted."""

    def blocks(x: Tensor) -> Tensor:
        return x.sum() + x.new_zeros(-(-x.shape[1] // 4))

    graph = trace(Cuts(blocks).eval(), {"x": torch.randn(3, 6)}, {"x": ("b", "s")})
    check_everywhere(graph, [{"x": torch.randn(3, size)} for size in (6, 8, 9)])
