"""Ops of transformers: attention, caches, rotary embeddings, norms, activations, packed tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.ops.library import own_op
from graphopt.ops.quantization import dequantize, quantize, scaled


@own_op(
    "(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? key_mask=None, Tensor? kv_lengths=None, "
    "Tensor? sinks=None, Tensor? segments=None, Tensor? prefix=None, Tensor? starts=None, *, float scale, str causal='none', "
    "int window_left=-1, int window_right=-1, int chunk=0, float softcap=0.0, bool heads_last=False) -> Tensor",
    shapes=lambda args: (_attention_shape(**{name: args[name] for name in ("q", "k", "v", "causal", "heads_last")}),),
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    sinks: Tensor | None = None,
    segments: Tensor | None = None,
    prefix: Tensor | None = None,
    starts: Tensor | None = None,
    *,
    scale: float,
    causal: str = "none",
    window_left: int = -1,
    window_right: int = -1,
    chunk: int = 0,
    softcap: float = 0.0,
    heads_last: bool = False,
) -> Tensor:
    """``softmax(softcap(q @ k.T * scale) + bias, over visible keys) @ v``; grouped heads native.

    q ``[B, Hq, S, D]``, k ``[B, Hkv, T, D]``, v ``[B, Hkv, T, Dv]``, Hq a multiple of Hkv; result ``[B, Hq, S, Dv]``.

    - ``bias`` broadcasts to ``[B, Hq, S, T]``: float is added to the scores, bool says which keys are visible.
    - ``key_mask`` bool ``[B, T]``: which keys any query may see (padding on either side).
    - ``kv_lengths`` int ``[B]``: only the first that many keys are visible.
    - ``sinks`` ``[Hq]``: a score that joins the softmax but has no value (gpt-oss).
    - ``causal``: ``none``; ``upper_left``: query i stands at position i; ``lower_right``: at ``i + T - S``. Keys after
      the query's position are invisible in the two latter.
    - ``window_left``, ``window_right``: visible keys before and after the query's position, itself not counted; -1: all.
    - ``chunk`` c > 0: only keys of the query's own chunk of c positions are visible (Llama 4).
    - ``prefix`` bool ``[B, T]``: keys that ``causal`` and the windows do not hide (prefix language models).
    - ``segments`` ``[B, T]`` of any dtype: a query sees keys of its own number only (packed sequences); the queries are the
      last S positions.
    - ``starts`` int ``[B]``: query i of row b stands at position ``starts[b] + i`` (k and v are buffers that are filled so
      far); ``causal`` is ``upper_left`` then.
    - ``softcap`` c > 0: ``c * tanh(score / c)`` (Gemma 2).
    - ``heads_last``: q, k, v and the result have the sequence before the heads, ``[B, S, H, D]``.

    A query that sees no key gives zeros.
    """
    if heads_last:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    batch, heads, queries, _ = q.shape
    groups = heads // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.matmul(q, k.transpose(-2, -1)) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    visible = visible_keys(
        k.shape[2], queries, q.device, key_mask, kv_lengths, segments, prefix, causal, window_left, window_right, chunk,
        starts,
    )  # fmt: skip
    if bias is not None and bias.dtype == torch.bool:
        visible = bias if visible is None else visible & bias
    elif bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink = sinks.reshape(1, heads, 1, 1).expand(batch, heads, queries, 1).to(scores.dtype)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1)
    if visible is not None:
        weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)  # a row without any visible key is NaN
    if sinks is not None:
        weights = weights[..., :-1]
    result = torch.matmul(weights, v)
    return result.transpose(1, 2) if heads_last else result


CAUSAL = ("none", "upper_left", "lower_right")


def _check_causal(causal: str) -> None:
    if causal not in CAUSAL:
        raise ValueError(f"causal is {causal!r}, not one of {', '.join(CAUSAL)}")


def _attention_shape(q: Tensor, k: Tensor, v: Tensor, causal: str, heads_last: bool) -> Tensor:
    """The empty result. ValueError if q, k and v do not fit together."""
    heads = 2 if heads_last else 1
    _check_causal(causal)
    if not (q.ndim == k.ndim == v.ndim == 4 and q.dtype == k.dtype == v.dtype):
        raise ValueError("q, k and v are of one dtype and four dimensions")
    if q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0]:
        raise ValueError(f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not fit together")
    if q.shape[heads] % k.shape[heads]:
        raise ValueError(f"{q.shape[heads]} query heads cannot share {k.shape[heads]} key heads")
    return q.new_empty((*q.shape[:3], v.shape[3]))


def _like(first: str, second: str | None = None, results: int = 1) -> Callable[[Mapping[str, Any]], tuple[Tensor, ...]]:
    """Results of the type of the first argument, which the second one must have too."""

    def shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
        x, y = args[first], args[first if second is None else second]
        if x.shape != y.shape or x.dtype != y.dtype:
            raise ValueError(f"{first} {list(x.shape)} and {second} {list(y.shape)} differ in type")
        return tuple(x.new_empty(x.shape) for _ in range(results))

    return shapes


def _rotary_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, cos, sin = args["x"], args["cos"], args["sin"]
    rows = 1 if args["heads_last"] else 2
    fits = x.ndim == 4 and cos.ndim == 3 and cos.shape == sin.shape and x.dtype == cos.dtype == sin.dtype
    if (
        not fits
        or cos.shape[0] not in (1, x.shape[0])
        or cos.shape[1] != x.shape[rows]
        or 2 * cos.shape[2] > x.shape[3]
    ):
        raise ValueError(f"x {list(x.shape)}, cos {list(cos.shape)} and sin {list(sin.shape)} do not fit together")
    return (x.new_empty(x.shape),)


def visible_keys(
    keys: int,
    queries: int,
    device: torch.device,
    key_mask: Tensor | None = None,
    kv_lengths: Tensor | None = None,
    segments: Tensor | None = None,
    prefix: Tensor | None = None,
    causal: str = "none",
    window_left: int = -1,
    window_right: int = -1,
    chunk: int = 0,
    starts: Tensor | None = None,
) -> Tensor | None:
    """Which keys each query may see, bool, broadcasting to ``[B, H, S, T]``; None for all."""
    _check_causal(causal)
    key = torch.arange(keys, device=device)
    query = torch.arange(queries, device=device).unsqueeze(1)
    if causal == "lower_right":
        query = query + (keys - queries)
    if starts is not None:
        query = query + starts[:, None, None, None]
    conditions = []
    if causal != "none":
        conditions.append(key <= query)
    if window_left >= 0:
        conditions.append(query - key <= window_left)
    if window_right >= 0:
        conditions.append(key - query <= window_right)
    if prefix is not None and conditions:
        conditions = [_all(conditions) | prefix[:, None, None, :]]
    if chunk > 0:
        conditions.append(key // chunk == query // chunk)
    if segments is not None:
        conditions.append(segments[:, None, keys - queries :, None] == segments[:, None, None, :])
    if key_mask is not None:
        conditions.append(key_mask[:, None, None, :])
    if kv_lengths is not None:
        conditions.append(key < kv_lengths[:, None, None, None])
    return _all(conditions) if conditions else None


def _all(conditions: list[Tensor]) -> Tensor:
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def _update_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    cache, new = args["cache"], args["new"]
    fits = cache.ndim == new.ndim == 4 and cache.dtype == new.dtype
    if not fits or cache.shape[:2] != new.shape[:2] or cache.shape[3] != new.shape[3]:
        raise ValueError(f"cache {list(cache.shape)} and new {list(new.shape)} do not fit together")
    return (cache.new_empty(cache.shape),)


@own_op("(Tensor cache, Tensor new, Tensor starts) -> Tensor", _update_shapes)
def kv_cache_update(cache: Tensor, new: Tensor, starts: Tensor) -> Tensor:
    """The buffer with new keys or values in it: ``cache[b, :, starts[b] + i] = new[b, :, i]``.

    cache ``[B, H, M, D]``, new ``[B, H, S, D]``, starts int ``[B]``; what falls behind the buffer's end is left out. A value
    like any other here; backends write in place where past and present are one buffer."""
    places = starts[:, None] + torch.arange(new.shape[2], device=new.device)
    index = places.clamp(max=cache.shape[2])[:, None, :, None].expand_as(new)
    return functional.pad(cache, (0, 0, 0, 1)).scatter(2, index, new)[:, :, :-1]


def _cached_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    parts = [args[name].transpose(1, 2) if args["heads_last"] else args[name] for name in ("q", "k", "v")]
    caches = args["k_cache"], args["v_cache"]
    cos, sin = args["cos"], args["sin"]
    if (cos is None) != (sin is None) or (
        cos is not None and (cos.ndim != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > parts[0].shape[3])
    ):
        raise ValueError("cos and sin are two tables [positions, R/2] of one shape, R the rotated features at most")
    for new, cache, scale in zip(parts[1:], caches, (args["k_scale"], args["v_scale"]), strict=True):
        if (scale is not None) != (cache.dtype == torch.int8):
            raise ValueError(f"a cache of {cache.dtype} {'with' if scale is not None else 'without'} a scale")
        if scale is not None:
            scaled({"x": cache, "scale": scale})
            if scale.ndim and scale.shape[::2] != (1, 1):
                raise ValueError(f"scale {list(scale.shape)} is not of heads and features alone")
        _update_shapes({"cache": cache, "new": new.to(cache.dtype)})
    result = _attention_shape(parts[0], parts[1], parts[2], "none", heads_last=False)
    return (
        result.transpose(1, 2) if args["heads_last"] else result,
        *(cache.new_empty(cache.shape) for cache in caches),
    )


@own_op(
    "(Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor? bias=None, Tensor? sinks=None, "
    "Tensor? cos=None, Tensor? sin=None, Tensor? k_scale=None, Tensor? v_scale=None, *, float scale, "
    "bool interleaved=False, int window_left=-1, int chunk=0, float softcap=0.0, bool heads_last=False) "
    "-> (Tensor, Tensor, Tensor)",
    _cached_shapes,
)
def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    starts: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    *,
    scale: float,
    interleaved: bool = False,
    window_left: int = -1,
    chunk: int = 0,
    softcap: float = 0.0,
    heads_last: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotary embedding, cache update and causal attention over the buffers in one: ``(attention, k_cache, v_cache)``.

    q ``[B, Hq, S, D]``, k, v ``[B, Hkv, S, D]`` (sequence before heads with ``heads_last``), caches ``[B, Hkv, M, D]``, starts
    int ``[B]``; cos and sin, if given, ``[P, R/2]`` for positions from 0 on: q and k are rotated by their positions. Caches of
    another dtype hold rounded keys and values, int8 ones by their scales ``[1, Hkv or 1, 1, D or 1]``."""
    if heads_last:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if cos is not None and sin is not None:
        places = starts[:, None] + torch.arange(q.shape[2], device=q.device)
        places = places.clamp(max=cos.shape[0] - 1)  # behind the end there is padding only
        q, k = (rotary_embedding(x, cos[places], sin[places], interleaved=interleaved) for x in (q, k))
    k_cache = kv_cache_update(k_cache, _stored(k, k_cache.dtype, k_scale), starts)
    v_cache = kv_cache_update(v_cache, _stored(v, v_cache.dtype, v_scale), starts)
    keys, values = _read(k_cache, k_scale, q.dtype), _read(v_cache, v_scale, q.dtype)
    result = attention(
        q, keys, values, bias, sinks=sinks, starts=starts, scale=scale, causal="upper_left",
        window_left=window_left, chunk=chunk, softcap=softcap,
    )  # fmt: skip
    return result.transpose(1, 2) if heads_last else result, k_cache, v_cache


def _stored(new: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    return new.to(dtype) if scale is None else quantize(new, scale)


def _read(cache: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return cache.to(dtype) if scale is None else dequantize(cache, scale)


@own_op(
    "(Tensor x, Tensor cos, Tensor sin, *, bool interleaved=False, bool heads_last=False) -> Tensor", _rotary_shapes
)
def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, heads_last: bool = False
) -> Tensor:
    """Rotate pairs of features by position (RoFormer, arXiv:2104.09864).

    x ``[B, H, S, D]`` (``[B, S, H, D]`` with ``heads_last``); cos and sin ``[B or 1, S, R/2]`` with even
    R <= D: the first R features are rotated, the others
    pass. Pairs are ``(i, i + R/2)``, or ``(2i, 2i + 1)`` if ``interleaved``.
    """
    width = 2 * cos.shape[-1]
    rotated, passed = x[..., :width], x[..., width:]
    heads = 2 if heads_last else 1
    cos, sin = cos.unsqueeze(heads), sin.unsqueeze(heads)
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., : width // 2], rotated[..., width // 2 :]
    turned = first * cos - second * sin, second * cos + first * sin
    result = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat([result, passed], -1)


@own_op(
    "(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, Tensor? bias=None, "
    "float eps=1e-05) -> (Tensor, Tensor)",
    shapes=_like("x", "residual", results=2),
)
def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; ``(layer_norm(s), s)``, all of one shape."""
    total = x + residual
    return functional.layer_norm(total, normalized_shape, weight, bias, eps), total


@own_op(
    "(Tensor x, Tensor residual, SymInt[] normalized_shape, Tensor? weight=None, float? eps=None) -> (Tensor, Tensor)",
    shapes=_like("x", "residual", results=2),
)
def add_rms_norm(
    x: Tensor, residual: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> tuple[Tensor, Tensor]:
    """``s = x + residual``; ``(rms_norm(s), s)``, all of one shape (RMSNorm: arXiv:1910.07467)."""
    total = x + residual
    return functional.rms_norm(total, normalized_shape, weight, eps), total


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "sigmoid": torch.sigmoid,
}


@own_op("(Tensor gate, Tensor up, *, str activation) -> Tensor", _like("gate", "up"))
def gated_activation(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """``activation(gate) * up``: SwiGLU with ``silu``, GeGLU with ``gelu`` or ``gelu_tanh`` (arXiv:2002.05202)."""
    return ACTIVATIONS[activation](gate) * up


@own_op("(Tensor x, *, float alpha=1.702) -> Tensor", _like("x"))
def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """``x * sigmoid(alpha * x)`` (GELU's sigmoid approximation, arXiv:1606.08415)."""
    return x * torch.sigmoid(alpha * x)


def _packing_order(mask: Tensor) -> Tensor:
    """Positions of ``mask`` flattened, kept ones first: those the mask keeps, and the first of every row."""
    kept = mask | (torch.arange(mask.shape[1], device=mask.device) == 0)
    return torch.argsort((~kept).flatten().to(torch.uint8), stable=True)


@own_op("(Tensor x, Tensor mask) -> Tensor", lambda args: (args["x"].flatten(0, 1),))
def pack_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """x ``[B, S, K]``, mask bool ``[B, S]``: the tokens as ``[B * S, K]``, real ones first, in order.

    Real are those the mask keeps, and the first of every row. The rows after them mean nothing: a backend may leave them
    out, and all that works token by token between a pack and its unpack with them."""
    return x.flatten(0, 1)[_packing_order(mask)]


@own_op(
    "(Tensor x, Tensor mask) -> Tensor",
    lambda args: (args["x"].new_empty((*args["mask"].shape, args["x"].shape[1])),),
)
def unpack_tokens(x: Tensor, mask: Tensor) -> Tensor:
    """The inverse of ``pack_tokens``: x ``[B * S, K]`` as ``[B, S, K]``. At padding the result is finite, and means nothing."""
    places = torch.argsort(_packing_order(mask))
    return x[places].reshape(*mask.shape, x.shape[1])


@own_op(
    "(Tensor q, Tensor k, Tensor v, Tensor mask, *, float scale) -> Tensor",
    lambda args: (args["q"].new_empty((*args["q"].shape[:2], args["v"].shape[2])),),
)
def packed_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float) -> Tensor:
    """Attention of packed tokens: the real tokens of a row to each other, and its first one to itself if it is padding.

    q ``[B * S, Hq, D]``, k ``[B * S, Hkv, D]``, v ``[B * S, Hkv, Dv]`` as ``pack_tokens`` orders them by ``mask``, bool
    ``[B, S]``; result ``[B * S, Hq, Dv]``, in that order."""
    order = _packing_order(mask)
    places = torch.argsort(order)
    apart = (part[places].reshape(*mask.shape, *part.shape[1:]) for part in (q, k, v))
    result: Tensor = attention(*apart, segments=mask, scale=scale, heads_last=True)
    return torch.where(_is_alone(mask), _repeated(v[places], q.shape[1]), result.flatten(0, 1))[order]


def _is_alone(mask: Tensor) -> Tensor:
    """``[B * S, 1, 1]``: which tokens are padding at the first place of a row."""
    alone = ~mask & (torch.arange(mask.shape[1], device=mask.device) == 0)
    return alone.flatten()[:, None, None]


def _repeated(v: Tensor, heads: int) -> Tensor:
    """Values ``[T, Hkv, Dv]`` for each of the query heads."""
    return v.repeat_interleave(heads // v.shape[1], 1)
