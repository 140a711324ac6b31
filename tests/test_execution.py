"""Running graphs in torch: the interpreter, gradients, shape functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import operators
from graphopt.errors import GraphError, InputError
from graphopt.execution import run
from graphopt.ir import Graph, Value
from graphopt.text import parse
from tests.graphs import Case, cases, graph_of

ops = torch.ops.graphopt

TWO_INPUTS = """graph {
  dim b in [1, 8]
  dim s in [2, 16]
  input %ids: i64[b, s]
  input %mask: f32[b, 2*s]
  input %bias: f32[b, 4]
  %m: f32[b, 2*s] = aten.mul.Tensor(self=%mask, other=2.0)
  output m = %m
  output ids = %ids
}
"""


def two_inputs(**changed: Tensor | None) -> dict[str, Tensor]:
    given_ = {"ids": torch.zeros(3, 5, dtype=torch.int64), "mask": torch.ones(3, 10), "bias": torch.zeros(3, 4)}
    return {name: tensor for name, tensor in (given_ | changed).items() if tensor is not None}


# The interpreter


@settings(deadline=None, max_examples=30)
@given(cases())
def test_random_graphs_compute_what_torch_computes(case: Case) -> None:
    case.graph.verify()
    for sizes in (case.sizes(3), case.sizes(1)):
        inputs = case.inputs(sizes)
        torch.testing.assert_close(run(case.graph, inputs), case.reference(inputs))


@settings(deadline=None, max_examples=30)
@given(cases())
def test_declared_types_are_those_of_the_run(case: Case) -> None:
    sizes = case.sizes(2)

    def tap(value: Value, tensor: Tensor) -> None:
        declared = value.type.concrete(sizes)
        assert (declared.dtype, declared.shape) == (tensor.dtype, tuple(tensor.shape))

    run(case.graph, case.inputs(sizes), tap=tap)


def test_taps_see_every_computed_value_in_order() -> None:
    graph = graph_of(
        """
        weight %w: f32[4]
        %a: f32[s, 4] = aten.add.Tensor(self=%x, other=%w)
        %v: f32[s, 2], %i: i64[s, 2] = aten.topk.default(self=%a, k=2)
        %n: f32[s, 2] = aten.neg.default(self=%v)
        output y = %n
        """,
        {"w": torch.arange(4.0)},
    )
    seen: list[tuple[str, Tensor]] = []
    run(graph, {"x": torch.zeros(1, 4)}, tap=lambda value, tensor: seen.append((value.name, tensor)))
    assert [name for name, _ in seen] == ["a", "v", "i", "n"]
    assert seen[1][1].tolist() == [[3.0, 2.0]]
    assert seen[2][1].tolist() == [[3, 2]]


def test_outputs_may_be_inputs_weights_and_repeated() -> None:
    graph = graph_of(
        """
        weight %w: f32[4]
        %a: f32[s, 4] = aten.add.Tensor(self=%x, other=%w)
        output one = %a
        output two = %a
        output input = %x
        output weight = %w
        """,
        {"w": torch.ones(4)},
    )
    x = torch.zeros(2, 4)
    found = run(graph, {"x": x})
    assert list(found) == ["one", "two", "input", "weight"]
    assert found["one"] is found["two"]
    assert found["input"] is x
    torch.testing.assert_close(found["weight"], torch.ones(4))


def test_weights_can_be_replaced() -> None:
    body = "weight %w: f32[4]\n%a: f32[s, 4] = aten.add.Tensor(self=%x, other=%w)\noutput y = %a"
    graph = graph_of(body, {"w": torch.ones(4)})
    found = run(graph, {"x": torch.zeros(2, 4)}, weights={"w": torch.full((4,), 5.0)})
    torch.testing.assert_close(found["y"], torch.full((2, 4), 5.0))


def test_sizes_in_arguments_follow_the_inputs() -> None:
    graph = graph_of(
        """
        %f: f32[s + 1, 2] = aten.full.default(size=[s + 1, 2], fill_value=1.0, dtype=f32)
        %r: f32[4*s] = aten.reshape.default(self=%x, shape=[4*s])
        %d: f32[4*s] = aten.div.Tensor(self=%r, other=s)
        output f = %f
        output d = %d
        """
    )
    for size in (2, 5):
        x = torch.randn(size, 4)
        found = run(graph, {"x": x})
        torch.testing.assert_close(found, {"f": torch.ones(size + 1, 2), "d": x.flatten() / size})


# Binding inputs


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"mask": None}, "missing input: mask"),
        ({"mask": None, "ids": None}, "missing input: ids, mask"),
        ({"maks": torch.ones(1)}, "unknown input: maks"),
        ({"ids": torch.zeros(3, 5, dtype=torch.int32)}, "input 'ids' has dtype i32, needs i64"),
        ({"ids": torch.zeros(3, 5, dtype=torch.uint16)}, "input 'ids' has dtype"),
        ({"bias": torch.zeros(3)}, "input 'bias' has shape [3], needs 2 dimensions: f32[b, 4]"),
        ({"bias": torch.zeros(3, 5)}, "input 'bias' has size 5 at axis 1, needs 4"),
        ({"bias": torch.zeros(2, 4)}, "input 'bias' has size 2 at axis 0, needs 3 (b, from ids)"),
        ({"mask": torch.ones(3, 5)}, "input 'mask' has size 5 at axis 1, needs 10 (2*s, from ids)"),
    ],
)
def test_inputs_that_do_not_fit(changed: dict[str, Tensor | None], what: str) -> None:
    with pytest.raises(InputError) as error:
        run(parse(TWO_INPUTS), two_inputs(**changed))
    assert error.value.what.startswith(what)
    assert len(error.value.what) == len(what) or "uint16" in str(changed)


def test_missing_inputs_are_told_their_types() -> None:
    with pytest.raises(InputError) as error:
        run(parse(TWO_INPUTS), {})
    assert error.value.hint == "inputs: ids: i64[b, s], mask: f32[b, 2*s], bias: f32[b, 4]"


def test_unknown_inputs_are_told_the_nearest_name() -> None:
    with pytest.raises(InputError) as error:
        run(parse(TWO_INPUTS), two_inputs(maks=torch.ones(1)))
    assert error.value.hint == "did you mean 'mask'? known: bias, ids, mask"


@pytest.mark.parametrize(
    ("batch", "length", "what"), [(9, 5, "b is 9, outside [1, 8]"), (3, 1, "s is 1, outside [2, 16]")]
)
def test_sizes_outside_their_range(batch: int, length: int, what: str) -> None:
    inputs = {
        "ids": torch.zeros(batch, length, dtype=torch.int64),
        "mask": torch.ones(batch, 2 * length),
        "bias": torch.zeros(batch, 4),
    }
    with pytest.raises(InputError) as error:
        run(parse(TWO_INPUTS), inputs)
    assert error.value.what == what
    assert error.value.where == "input 'ids'"
    assert error.value.hint == "compile with a wider range in dims, or split the input"


# Gradients


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": "lower_right", "window_left": 1},
        {"key_mask": torch.tensor([[False, True, True], [False, False, False]])},
        {"softcap": 1.5, "kv_lengths": torch.tensor([2, 3])},
    ],
    ids=["plain", "causal", "hidden", "softcap"],
)
def test_gradients_of_attention(options: dict[str, Any]) -> None:
    q, k, v, bias, sinks = doubles(2, 2, 2, 2), doubles(2, 1, 3, 2), doubles(2, 1, 3, 2), doubles(2, 3), doubles(2)

    def fn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        found: Tensor = ops.attention(q, k, v, bias, scale=0.7, **options)
        return found

    assert torch.autograd.gradcheck(fn, (q, k, v, bias), fast_mode=True)

    def with_sinks(q: Tensor, sinks: Tensor) -> Tensor:
        found: Tensor = ops.attention(q, k, v, sinks=sinks, scale=0.7, **options)
        return found

    assert torch.autograd.gradcheck(with_sinks, (q, sinks), fast_mode=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradients_of_rotary_embedding(interleaved: bool) -> None:
    def fn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        found: Tensor = ops.rotary_embedding(x, cos, sin, interleaved=interleaved)
        return found

    assert torch.autograd.gradcheck(fn, (doubles(1, 2, 2, 5), doubles(1, 2, 2), doubles(1, 2, 2)))


def test_gradients_of_the_rest() -> None:
    x, y, weight, bias = doubles(2, 3), doubles(2, 3), doubles(3), doubles(3)
    assert torch.autograd.gradcheck(lambda *a: ops.add_layer_norm(a[0], a[1], [3], a[2], a[3]), (x, y, weight, bias))
    assert torch.autograd.gradcheck(lambda *a: ops.add_rms_norm(a[0], a[1], [3], a[2]), (x, y, weight))
    assert torch.autograd.gradcheck(lambda *a: ops.gated_activation(a[0], a[1], activation="silu"), (x, y))
    assert torch.autograd.gradcheck(ops.quick_gelu, (x,))


# Shape functions agree with the bodies


def assert_shapes_agree(op: str, args: dict[str, Any]) -> None:
    bound = operators.bind(op, (), args)
    said, found = operators.shapes_of(op, bound, "cpu"), operators.call(op, bound)
    assert [(t.dtype, t.shape) for t in said] == [(t.dtype, t.shape) for t in found]


SMALL = st.integers(1, 4)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


@settings(deadline=None, max_examples=30)
@given(SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, SMALL, st.booleans(), DTYPES)
def test_shape_of_attention(
    b: int, kv: int, groups: int, s: int, t: int, d: int, e: int, last: bool, dtype: torch.dtype
) -> None:
    shapes = {"q": (b, kv * groups, s, d), "k": (b, kv, t, d), "v": (b, kv, t, e)}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    if last:
        tensors = {name: tensor.transpose(1, 2) for name, tensor in tensors.items()}
    assert_shapes_agree("graphopt.attention.default", {**tensors, "scale": 0.5, "heads_last": last})


@settings(deadline=None, max_examples=30)
@given(SMALL, SMALL, SMALL, SMALL, st.integers(0, 3), st.booleans(), DTYPES)
def test_shape_of_rotary_embedding(
    b: int, h: int, s: int, half: int, rest: int, interleaved: bool, dtype: torch.dtype
) -> None:
    x, angle = torch.randn(b, h, s, 2 * half + rest).to(dtype), torch.randn(1, s, half).to(dtype)
    args = {"x": x, "cos": angle, "sin": angle, "interleaved": interleaved}
    assert_shapes_agree("graphopt.rotary_embedding.default", args)


@settings(deadline=None, max_examples=20)
@given(st.lists(SMALL, min_size=1, max_size=3), DTYPES)
def test_shapes_of_the_rest(shape: list[int], dtype: torch.dtype) -> None:
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    sums = {"x": x, "residual": y, "normalized_shape": shape[-1:]}
    assert_shapes_agree("graphopt.add_layer_norm.default", sums)
    assert_shapes_agree("graphopt.add_rms_norm.default", sums)
    assert_shapes_agree("graphopt.gated_activation.default", {"gate": x, "up": y, "activation": "gelu"})
    assert_shapes_agree("graphopt.quick_gelu.default", {"x": x})


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("gated_activation", {"gate": "f32[1, 4]", "up": "f32[3, 4]", "activation": "silu"}),
        ("gated_activation", {"gate": "bf16[3, 4]", "up": "f32[3, 4]", "activation": "silu"}),
        ("add_rms_norm", {"x": "f32[1, 4]", "residual": "f32[3, 4]", "normalized_shape": (4,)}),
        ("add_layer_norm", {"x": "bf16[3, 4]", "residual": "f32[3, 4]", "normalized_shape": (4,)}),
        ("rotary_embedding", {"x": "f32[1, 2, 3, 4]", "cos": "f32[5, 3, 2]", "sin": "f32[5, 3, 2]"}),
        ("rotary_embedding", {"x": "f32[1, 2, 3, 4]", "cos": "f32[1, 3, 4]", "sin": "f32[1, 3, 4]"}),
    ],
)
def test_operands_whose_shapes_the_op_does_not_take_have_no_type(op: str, args: dict[str, Any]) -> None:
    """The body would broadcast or fail, so a type that ignores it would be a wrong type."""
    tensors = {name: arg for name, arg in args.items() if isinstance(arg, str) and "[" in arg}
    declared = "\n".join(f"input %{name}: {text}" for name, text in tensors.items())
    graph: Graph = parse(f"graph {{\n{declared}\n}}")
    with pytest.raises(GraphError, match="has no type"):
        graph.insert(f"graphopt.{op}.default", args | {name: graph.value(name) for name in tensors})
