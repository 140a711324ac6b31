"""The graphopt:: ops against plain PyTorch formulas: attention, rotary embedding, norms, activations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import GraphError
from graphopt.text import parse
from tests.test_execution import ops

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
