"""Types of results: symbolic for new nodes, concrete to check them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings

from graphopt import operators
from graphopt.dims import Dim, evaluate, maximum
from graphopt.errors import GraphError
from graphopt.execution import run
from graphopt.inference import from_sympy, infer, rederive
from graphopt.ir import Value
from graphopt.tensors import TensorType
from graphopt.text import parse_type
from tests.graphs import Case, cases

a, b, s = Dim.named("a"), Dim.named("b"), Dim.named("s")


def value(text: str) -> Value:
    return Value("v", parse_type(text), None)


def args_of(op: str, *given_: Any) -> dict[str, Any]:
    """Bound arguments; strings with a shape are operands of that type."""

    def operand(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return tuple(map(operand, arg))
        return value(arg) if isinstance(arg, str) and arg.endswith("]") else arg

    return operators.bind(op, [operand(arg) for arg in given_], {})


CASES: list[tuple[str, tuple[Any, ...], tuple[str, ...]]] = [
    ("aten.add.Tensor", ("f32[b, s, 4]", "f32[4]"), ("f32[b, s, 4]",)),
    ("aten.add.Tensor", ("f32[b, 1, 4]", "f32[s, 1]"), ("f32[b, s, 4]",)),
    ("aten.add.Tensor", ("i64[s]", "f32[]"), ("f32[s]",)),
    ("aten.mul.Tensor", ("f16[s]", 2.0), ("f16[s]",)),
    ("aten.eq.Tensor", ("f32[s]", "f32[s]"), ("bool[s]",)),
    ("aten.matmul.default", ("f32[b, s, 4]", "f32[4, 8]"), ("f32[b, s, 8]",)),
    ("aten.matmul.default", ("f32[b, 3, s, 4]", "f32[b, 3, 4, a]"), ("f32[b, 3, s, a]",)),
    ("aten.linear.default", ("f32[b, s, 4]", "f32[8, 4]", "f32[8]"), ("f32[b, s, 8]",)),
    ("aten.reshape.default", ("f32[b, s, 4]", (b * s, 4)), ("f32[b*s, 4]",)),
    ("aten.reshape.default", ("f32[b*s, 4]", (b, s, 2, 2)), ("f32[b, s, 2, 2]",)),
    ("aten.reshape.default", ("f32[b, 4*s]", (b, -1, 4)), ("f32[b, s, 4]",)),
    ("aten.transpose.int", ("f32[b, s, 4]", 1, 2), ("f32[b, 4, s]",)),
    ("aten.permute.default", ("f32[b, s, 4]", (2, 0, 1)), ("f32[4, b, s]",)),
    ("aten.unsqueeze.default", ("f32[s]", 0), ("f32[1, s]",)),
    ("aten.expand.default", ("f32[1, s]", (b, s)), ("f32[b, s]",)),
    ("aten.cat.default", (("f32[a, 4]", "f32[b, 4]"), 0), ("f32[a + b, 4]",)),
    ("aten.softmax.int", ("f32[s]", 0), ("f32[s]",)),
    ("aten.to.dtype", ("f32[s]", torch.bfloat16), ("bf16[s]",)),
    ("aten.slice.Tensor", ("f32[s]", 0, 0, None, 2), ("f32[(s + 1) // 2]",)),
    ("aten.slice.Tensor", ("f32[s, 8]", 1, 2, 6), ("f32[s, 4]",)),
    ("aten.slice.Tensor", ("f32[64, 8]", 0, 0, s), ("f32[s, 8]",)),  # of a table, which holds as many
    ("aten.slice.Tensor", ("f32[64, 8]", 0, 0, a + s), ("f32[a + s, 8]",)),
    ("aten.slice.Tensor", ("f32[2*s]", 0, s, 2 * s), ("f32[s]",)),
    ("aten.embedding.default", ("f32[9, 4]", "i64[b, s]"), ("f32[b, s, 4]",)),
    ("aten.arange.start_step", (0, s + 1), ("i64[s + 1]",)),
    ("aten.full.default", ((b, s), 0.5), ("f32[b, s]",)),
    ("aten.topk.default", ("f32[s, 4]", 2), ("f32[s, 2]", "i64[s, 2]")),
    ("aten.split.Tensor", ("f32[s, 4]", 2, 1), ("f32[s, 2]", "f32[s, 2]")),
    ("aten.sum.dim_IntList", ("f32[b, s]", (1,)), ("f32[b]",)),
    ("aten.layer_norm.default", ("f32[b, s, 4]", (4,), "f32[4]", "f32[4]"), ("f32[b, s, 4]",)),
    ("graphopt.attention.default", ("f32[b, 4, s, 8]", "f32[b, 2, a, 8]", "f32[b, 2, a, 6]"), ("f32[b, 4, s, 6]",)),
]


@pytest.mark.parametrize(("op", "given_", "expected"), CASES, ids=[f"{op}-{i}" for i, (op, *_) in enumerate(CASES)])
def test_infers(op: str, given_: tuple[Any, ...], expected: tuple[str, ...]) -> None:
    args = args_of(op, *given_) if not op.startswith("graphopt") else _attention(given_)
    found = infer(op, args)
    assert tuple(map(str, found)) == expected
    for env in ({"a": 3, "b": 2, "s": 5}, {"a": 2, "b": 7, "s": 4}):
        assert rederive(op, args, env) == tuple(type_.concrete(env) for type_ in found)


def _attention(operands: tuple[str, ...]) -> dict[str, Any]:
    return operators.bind("graphopt.attention.default", list(map(value, operands)), {"scale": 1.0})


@pytest.mark.parametrize(
    ("op", "given_", "message"),
    [
        ("aten.add.Tensor", ("f32[a]", "f32[b]"), "aten.add.Tensor(self=f32[a], other=f32[b], alpha=1) has no type"),
        ("aten.add.Tensor", ("f32[3]", "f32[4]"), "aten.add.Tensor(self=f32[3], other=f32[4], alpha=1) has no type"),
        ("aten.matmul.default", ("f32[2, a]", "f32[b, 2]"), "aten.matmul.default(self=f32[2, a], other=f32[b, 2])"),
        ("aten.reshape.default", ("f32[s]", (2, s // 2)), "aten.reshape.default(self=f32[s], shape=(2, s // 2))"),
        ("aten.reshape.default", ("f32[a, 4]", (b, 4)), "aten.reshape.default(self=f32[a, 4], shape=(b, 4))"),
        (
            "aten.expand.default",
            ("f32[a]", (b,)),
            "aten.expand.default(self=f32[a], size=(b,), implicit=False) has no type",
        ),
        ("aten.cat.default", (("f32[a, 4]", "f32[b, 3]"), 0), "aten.cat.default"),
        ("aten.linear.default", ("f32[s]", "f32[8, 4]"), "aten.linear.default"),
    ],
)
def test_refuses_sizes_that_fit_only_in_special_cases(op: str, given_: tuple[Any, ...], message: str) -> None:
    with pytest.raises(GraphError) as error:
        infer(op, args_of(op, *given_))
    assert error.value.what.startswith(message)


@pytest.mark.parametrize(
    ("op", "operand", "message"),
    [
        ("aten.nonzero.default", "f32[s]", "the size u0 depends on data, not on the inputs' shapes"),
        ("aten.item.default", "f32[]", r"aten.item.default\(self=f32\[\]\) has no type"),
    ],
)
def test_results_that_depend_on_data_have_no_type(op: str, operand: str, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        infer(op, args_of(op, operand))


def test_torch_does_not_log_what_the_error_says(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(GraphError):
        infer("aten.matmul.default", args_of("aten.matmul.default", "f32[7, a]", "f32[b, 7]"))
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr() == ("", "")


def test_more_names_than_hints() -> None:
    shape = tuple(Dim.named(f"n{index}") for index in range(9))
    args = {"self": Value("v", TensorType(torch.float32, shape), None)}
    assert infer("aten.relu.default", args) == (TensorType(torch.float32, shape),)


def test_rederive_raises_what_torch_raises() -> None:
    args = args_of("aten.add.Tensor", "f32[a]", "f32[b]")
    assert rederive("aten.add.Tensor", args, {"a": 3, "b": 3}) == (TensorType(torch.float32, (3,)),)
    with pytest.raises(RuntimeError, match="broadcast"):
        rederive("aten.add.Tensor", args, {"a": 3, "b": 4})


def test_numbers_and_dtypes_of_arguments_are_told_apart() -> None:
    """1, 1.0 and True are equal as keys of a dict, not as arguments."""
    op = "aten.mul.Tensor"
    found = [infer(op, args_of(op, "i64[s]", other))[0].dtype for other in (1, 1.0, True)]
    assert found == [torch.int64, torch.float32, torch.int64]
    concrete = [rederive(op, args_of(op, "i64[s]", other), {"s": 2})[0].dtype for other in (1.0, 1, True)]
    assert concrete == [torch.float32, torch.int64, torch.int64]


@settings(deadline=None, max_examples=20)
@given(cases())
def test_inferred_types_hold_at_every_size(case: Case) -> None:
    for sizes in (dict.fromkeys(case.graph.dims, 1), case.sizes(2), case.sizes(4)):
        expected = {name: evaluated.type.concrete(sizes).shape for name, evaluated in case.graph.outputs.items()}
        found = run(case.graph, case.inputs(sizes))
        assert {name: tuple(tensor.shape) for name, tensor in found.items()} == expected


def test_from_sympy() -> None:
    import sympy

    x, y = sympy.Symbol("s0", integer=True, positive=True), sympy.Symbol("s1", integer=True, positive=True)
    meaning = {"s0": a, "s1": b}
    assert from_sympy(sympy.Integer(5), meaning) == 5
    assert from_sympy(2 * x * y + 1, meaning) == 2 * a * b + 1
    assert from_sympy(x**3, meaning) == a * a * a
    assert from_sympy(x / 2, meaning) == a // 2
    assert from_sympy(x % 3, meaning) == a % 3
    assert from_sympy(sympy.Max(x, y), meaning) in (maximum(a, b), maximum(b, a))
    assert evaluate(from_sympy(sympy.Min(x, 4), meaning), {"a": 9}) == 4
    with pytest.raises(GraphError, match="the size u0 depends on data, not on the inputs' shapes"):
        from_sympy(sympy.Symbol("u0"), meaning)
    with pytest.raises(GraphError, match="has no form in a graph"):
        from_sympy(sympy.sqrt(x), meaning)
