"""Running graphs in torch, and the ``graphopt::`` ops against plain PyTorch formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

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


# Ops: attention


def heads(
    batch: int = 2, count: int = 4, length: int = 5, width: int = 8, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(batch, count, length, width, dtype=dtype)


def qkv(queries: int = 5, keys: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    return heads(length=queries), heads(length=keys), heads(length=keys)


def by_loops(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Attention one query at a time over its visible keys; ``visible`` ``[B, H, S, T]``."""
    result = torch.zeros(*q.shape[:3], v.shape[3])
    for batch, head, query in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        seen = visible[batch, head, query].nonzero().flatten()
        if len(seen):
            scores = k[batch, head, seen] @ q[batch, head, query] * scale
            result[batch, head, query] = (scores.exp() / scores.exp().sum()) @ v[batch, head, seen]
    return result


def all_visible(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[0], q.shape[1], q.shape[2], k.shape[2], dtype=torch.bool)


@pytest.mark.parametrize("scale", [0.125, 1.0])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3)])
def test_attention_is_sdpa(scale: float, queries: int, keys: int) -> None:
    q, k, v = qkv(queries, keys)
    expected = functional.scaled_dot_product_attention(q, k, v, scale=scale)
    torch.testing.assert_close(ops.attention(q, k, v, scale=scale), expected)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (7, 3)])
def test_upper_left_causal_is_sdpas(queries: int, keys: int) -> None:
    q, k, v = qkv(queries, keys)
    expected = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5)
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.5, causal="upper_left"), expected)


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 7), (1, 7)])
def test_lower_right_causal(queries: int, keys: int) -> None:
    q, k, v = qkv(queries, keys)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    expected = functional.scaled_dot_product_attention(q, k, v, mask, scale=0.5)
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.5, causal="lower_right"), expected)


def test_lower_right_with_fewer_keys_gives_zeros_above() -> None:
    q, k, v = qkv(5, 3)
    found = ops.attention(q, k, v, scale=0.5, causal="lower_right")
    assert torch.equal(found[:, :, :2], torch.zeros(2, 4, 2, 8))
    mask = torch.ones(5, 3, dtype=torch.bool).tril(-2)
    torch.testing.assert_close(found, by_loops(q, k, v, mask.expand(2, 4, 5, 3), 0.5))


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 1, 5, 6), (2, 1, 1, 6), (5, 6)])
def test_a_float_bias_is_added(shape: tuple[int, ...]) -> None:
    (q, k, v), bias = qkv(5, 6), torch.randn(shape)
    expected = functional.scaled_dot_product_attention(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(ops.attention(q, k, v, bias, scale=0.3), expected)


@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (2, 1, 1, 6), (5, 6)])
def test_a_bool_bias_says_what_is_visible(shape: tuple[int, ...]) -> None:
    (q, k, v), bias = qkv(5, 6), torch.rand(shape) < 0.6
    bias[..., 0] = True
    expected = functional.scaled_dot_product_attention(q, k, v, bias, scale=0.3)
    torch.testing.assert_close(ops.attention(q, k, v, bias, scale=0.3), expected)
    causal = bias & torch.ones(5, 6, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(q, k, v, causal, scale=0.3)
    torch.testing.assert_close(ops.attention(q, k, v, bias, scale=0.3, causal="upper_left"), expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads(kv_heads: int) -> None:
    q, k, v = heads(), heads(count=kv_heads), heads(count=kv_heads)
    expected = functional.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), expected)
    each = [
        functional.scaled_dot_product_attention(q[:, h], k[:, h * kv_heads // 4], v[:, h * kv_heads // 4], scale=0.3)
        for h in range(4)
    ]
    torch.testing.assert_close(ops.attention(q, k, v, scale=0.3), torch.stack(each, 1))


def test_values_of_another_width() -> None:
    q, k, v = heads(), heads(), heads(width=3)
    found = ops.attention(q, k, v, scale=0.3)
    assert found.shape == (2, 4, 5, 3)
    torch.testing.assert_close(found, by_loops(q, k, v, all_visible(q, k), 0.3))


@pytest.mark.parametrize("causal", ["none", "upper_left", "lower_right"])
@pytest.mark.parametrize(("left", "right"), [(0, 0), (1, -1), (-1, 2), (2, 1)])
def test_windows(causal: str, left: int, right: int) -> None:
    q, k, v = qkv(4, 6)
    shift = 2 if causal == "lower_right" else 0
    visible = torch.tensor([
        [
            (causal == "none" or key <= query + shift)
            and (left < 0 or query + shift - key <= left)
            and (right < 0 or key - query - shift <= right)
            for key in range(6)
        ]
        for query in range(4)
    ])  # fmt: skip
    found = ops.attention(q, k, v, scale=0.3, causal=causal, window_left=left, window_right=right)
    torch.testing.assert_close(found, by_loops(q, k, v, visible.expand(2, 4, 4, 6), 0.3))


def test_softcap_comes_after_the_scale_and_before_the_bias() -> None:
    (q, k, v), bias = qkv(), torch.randn(5, 5)
    scores = 2.0 * torch.tanh(torch.einsum("bhsd,bhtd->bhst", q, k) * 0.3 / 2.0) + bias
    expected = torch.einsum("bhst,bhtd->bhsd", scores.softmax(-1), v)
    torch.testing.assert_close(ops.attention(q, k, v, bias, scale=0.3, softcap=2.0), expected)


def test_sinks_join_the_softmax_without_a_value() -> None:
    (q, k, v), sinks = qkv(), torch.randn(4)
    scores = (torch.einsum("bhsd,bhtd->bhst", q, k) * 0.3).exp()
    expected = torch.einsum("bhst,bhtd->bhsd", scores, v) / (scores.sum(-1) + sinks.exp()[:, None])[..., None]
    torch.testing.assert_close(ops.attention(q, k, v, sinks=sinks, scale=0.3), expected)


def test_sinks_take_all_where_no_key_is_visible() -> None:
    (q, k, v), mask = qkv(), torch.zeros(2, 5, dtype=torch.bool)
    found = ops.attention(q, k, v, key_mask=mask, sinks=torch.zeros(4), scale=0.3)
    assert torch.equal(found, torch.zeros_like(q))


def test_key_mask_pads_on_either_side() -> None:
    q, k, v = qkv(5, 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    found = ops.attention(q, k, v, key_mask=mask, scale=0.3)
    first = functional.scaled_dot_product_attention(q[0], k[0, :, :3], v[0, :, :3], scale=0.3)
    second = functional.scaled_dot_product_attention(q[1], k[1, :, 2:], v[1, :, 2:], scale=0.3)
    torch.testing.assert_close(found, torch.stack([first, second]))


def test_kv_lengths() -> None:
    q, k, v = qkv(5, 6)
    found = ops.attention(q, k, v, kv_lengths=torch.tensor([4, 1]), scale=0.3)
    first = functional.scaled_dot_product_attention(q[0], k[0, :, :4], v[0, :, :4], scale=0.3)
    torch.testing.assert_close(found, torch.stack([first, v[1, :, :1].expand(4, 5, 8)]))


def test_all_masks_together() -> None:
    q, k, v = qkv(4, 6)
    key_mask, bias, lengths = torch.rand(2, 6) < 0.7, torch.rand(4, 6) < 0.8, torch.tensor([6, 4])
    visible = bias & key_mask[:, None, None] & (torch.arange(6) < lengths[:, None, None, None])
    visible = (visible & torch.ones(4, 6, dtype=torch.bool).tril(2)).expand(2, 4, 4, 6)
    found = ops.attention(q, k, v, bias, key_mask, lengths, scale=0.3, causal="lower_right")
    torch.testing.assert_close(found, by_loops(q, k, v, visible, 0.3))


@pytest.mark.parametrize("how", ["key_mask", "kv_lengths", "bias", "window"])
def test_a_query_that_sees_no_key_gives_zeros(how: str) -> None:
    q, k, v = qkv()
    nothing: dict[str, dict[str, Any]] = {
        "key_mask": {"key_mask": torch.tensor([[True] * 5, [False] * 5])},
        "kv_lengths": {"kv_lengths": torch.tensor([5, 0])},
        "bias": {"bias": torch.tensor([True, False]).reshape(2, 1, 1, 1)},
        "window": {"key_mask": torch.tensor([[True] * 5, [True] + [False] * 4]), "window_left": 0, "window_right": 0},
    }
    found = ops.attention(q, k, v, scale=0.3, **nothing[how])
    rows = slice(1, None) if how == "window" else slice(None)
    assert torch.equal(found[1, :, rows], torch.zeros_like(q[1, :, rows]))
    assert bool((found[0] != 0).all())


def test_heads_last() -> None:
    q, k, v = heads(), heads(count=2), heads(count=2)
    mask = torch.rand(2, 5) < 0.7
    options = {"key_mask": mask, "scale": 0.3, "causal": "upper_left"}
    expected = ops.attention(q, k, v, **options).transpose(1, 2)
    found = ops.attention(*(tensor.transpose(1, 2) for tensor in (q, k, v)), heads_last=True, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_unknown_kind_of_causal_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError), match="banana"):
        ops.attention(*qkv(), scale=0.3, causal="banana")


@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ("2, 4, 5, 8", "2, 3, 5, 8", "2, 3, 5, 8", "4 query heads cannot share 3 key heads"),
        ("2, 4, 5, 8", "2, 4, 5, 7", "2, 4, 5, 8", "do not fit together"),
        ("2, 4, 5, 8", "2, 4, 6, 8", "2, 4, 5, 8", "do not fit together"),
        ("2, 4, 5, 8", "1, 4, 5, 8", "1, 4, 5, 8", "do not fit together"),
        ("4, 5, 8", "4, 5, 8", "4, 5, 8", "q, k and v are of one dtype and four dimensions"),
    ],
)
def test_attention_of_shapes_that_do_not_fit_has_no_type(q: str, k: str, v: str, message: str) -> None:
    graph = parse(f"graph {{\ninput %q: f32[{q}]\ninput %k: f32[{k}]\ninput %v: f32[{v}]\n}}")
    with pytest.raises(GraphError, match=message):
        graph.insert("graphopt.attention.default", {n: graph.value(n) for n in "qkv"} | {"scale": 1.0})


# Ops: rotary embedding, norms, activations


def rotate(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """x ``[B, H, S, D]``, angle ``[B or 1, S, R/2]``: pair by pair."""
    half = angle.shape[-1]
    result = x.clone()
    for pair in range(half):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + half)
        turn = torch.polar(torch.ones(()), angle[:, None, :, pair]) * torch.complex(x[..., i], x[..., j])
        result[..., i], result[..., j] = turn.real, turn.imag
    return result


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [2, 6, 8])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_embedding(interleaved: bool, rotated: int, batch: int) -> None:
    x, angle = heads(), torch.randn(batch, 5, rotated // 2) * 3
    expected = rotate(x, angle, interleaved)
    found = ops.rotary_embedding(x, angle.cos(), angle.sin(), interleaved=interleaved)
    torch.testing.assert_close(found, expected)
    last = ops.rotary_embedding(x.transpose(1, 2), angle.cos(), angle.sin(), interleaved=interleaved, heads_last=True)
    torch.testing.assert_close(last, expected.transpose(1, 2))


def test_rotary_embedding_is_rotate_half() -> None:
    x, angle = heads(), torch.randn(1, 5, 4)
    cos, sin = (torch.cat([f(angle), f(angle)], -1).unsqueeze(1) for f in (torch.cos, torch.sin))
    turned = torch.cat([-x[..., 4:], x[..., :4]], -1)
    torch.testing.assert_close(ops.rotary_embedding(x, angle.cos(), angle.sin()), x * cos + turned * sin)


@pytest.mark.parametrize("affine", [False, True])
def test_add_layer_norm(affine: bool) -> None:
    x, residual = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    weight, bias = (torch.randn(6), torch.randn(6)) if affine else (None, None)
    normed, total = ops.add_layer_norm(x, residual, [6], weight, bias, 0.1)
    summed = x + residual
    centered = summed - summed.mean(-1, keepdim=True)
    expected = centered / (centered.square().mean(-1, keepdim=True) + 0.1).sqrt()
    torch.testing.assert_close(total, summed)
    torch.testing.assert_close(normed, expected if weight is None or bias is None else expected * weight + bias)


def test_add_rms_norm() -> None:
    x, residual, weight = torch.randn(2, 3, 6), torch.randn(2, 3, 6), torch.randn(6)
    normed, total = ops.add_rms_norm(x, residual, [6], weight, 0.1)
    summed = x + residual
    torch.testing.assert_close(total, summed)
    torch.testing.assert_close(normed, summed / (summed.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("silu", lambda x: x / (1 + (-x).exp())),
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
        ("relu", lambda x: x.clamp(min=0)),
        ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
    ],
)
def test_gated_activation(activation: str, formula: Any) -> None:
    gate, up = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(ops.gated_activation(gate, up, activation=activation), formula(gate) * up)


@pytest.mark.parametrize("alpha", [1.702, 1.0])
def test_quick_gelu(alpha: float) -> None:
    x = torch.randn(3, 4)
    torch.testing.assert_close(ops.quick_gelu(x, alpha=alpha), x / (1 + (-alpha * x).exp()))


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
