"""``graphopt.cached_attention`` as com.microsoft.GroupQueryAttention: rotary inside, past and present one buffer."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Reshaped, Unsupported
from graphopt.dims import Size
from graphopt.ir import Node, Value

CONTRIB = "com.microsoft"


def group_query(e: Emitter, node: Node) -> Lowered:
    """Queries, keys and values packed where they are pieces of one product. The kernel's own mask is causal with a window;
    all else is a bias ``[B or 1, H or 1, S, total]``."""
    args = node.args
    sequence, head = (1, 2) if args["heads_last"] else (2, 1)
    batch, queries, heads, size = (args["q"].type.shape[axis] for axis in (0, sequence, head, 3))
    kv_heads = args["k"].type.shape[head]
    if size % 8 or args["v"].type.shape[3] != size:
        raise Unsupported("heads whose size is no multiple of 8, or is another one for values")

    def flat(value: Value, count: int) -> ir.Value:
        source = e.elements(value) if args["heads_last"] else e.op("Transpose", e.value(value), perm=[0, 2, 1, 3])
        return e.reshape(source, (batch, queries, count * size))

    packed = _packed(e, node) if args["heads_last"] else None
    parts: list[ir.Value | None]
    if packed is None:
        parts = [flat(args["q"], heads), flat(args["k"], kv_heads), flat(args["v"], kv_heads)]
    else:
        parts = [e.reshape(packed, (batch, queries, (heads + 2 * kv_heads) * size)), None, None]
    # total_sequence_length is the buffers' length, a constant: a number computed on the GPU is read before it is there (seen in
    # 1.31.1), and the kernels take each row's own length from seqlens_k anyway.
    total = args["k_cache"].type.shape[2]
    rotary = [e.value(args[name]) if args[name] is not None else None for name in ("cos", "sin")]
    result, keys, values = e.op_several(
        "GroupQueryAttention",
        *parts, e.value(args["k_cache"]), e.value(args["v_cache"]),
        _last_keys(e, args["starts"], queries), e.constant(total, torch.int32), *rotary,
        None, _bias(e, node, queries, total), e.value(args["sinks"]) if args["sinks"] is not None else None,
        *_scales(e, node, kv_heads, size), outputs=3, domain=CONTRIB, num_heads=heads, kv_num_heads=kv_heads, scale=args["scale"],
        softcap=args["softcap"] or None, local_window_size=args["window_left"] + 1 if args["window_left"] >= 0 else None,
        **({"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8} if args["k_scale"] else {}),
        do_rotary=int(args["cos"] is not None) or None, rotary_interleaved=int(args["interleaved"]) or None,
    )  # fmt: skip
    if args["heads_last"]:
        return Reshaped(result), keys, values
    shaped = e.reshape(result, (batch, queries, heads, size))
    return e.op("Transpose", shaped, perm=[0, 2, 1, 3]), keys, values


def _scales(e: Emitter, node: Node, heads: int, size: int) -> list[ir.Value]:
    """Of int8 caches: f32, one for each feature of each head."""
    found = []
    for name in ("k_scale", "v_scale"):
        if node.args[name] is None:
            continue
        weight = node.graph.weight_of(node.args[name]) if node.graph is not None else None
        if weight is None:
            raise Unsupported("scales that are computed")
        found.append(e.constant(weight.load().float().expand(1, heads, 1, size).flatten().numpy()))
    return found


def _packed(e: Emitter, node: Node) -> ir.Value | None:
    """What queries, keys and values were split from, if they are all of it in this order."""
    views = [node.args[part].producer for part in ("q", "k", "v")]
    if any(view is None or view.op != "aten.reshape.default" for view in views):
        return None
    pieces = [view.args["self"] for view in views]
    split = pieces[0].producer
    if split is None or split.op != "aten.split_with_sizes.default" or list(split.outputs) != pieces:
        return None
    return e.elements(split.args["self"])


def _last_keys(e: Emitter, starts: Value, queries: Size) -> ir.Value:
    """The position of each row's last new token, int32 ``[B]``."""

    def make() -> ir.Value:
        last = e.op("Add", _counted(e, starts), e.size(queries - 1))
        return e.cast(last, torch.int64, torch.int32)

    return e.once(("last keys", starts.name, queries), make)


def _bias(e: Emitter, node: Node, queries: Size, total: int) -> ir.Value | None:
    """The bias and what chunks hide, ``[B or 1, H or 1, S, total]``."""
    args = node.args
    dtype = args["q"].type.dtype
    parts = []
    if args["bias"] is not None:
        parts.append(_whole(e, args["bias"], queries, total, dtype))
    if args["chunk"]:
        parts.append(_hidden(e, _same_chunk(e, args["starts"], queries, args["chunk"], total), dtype))
    return functools.reduce(lambda a, b: e.op("Add", a, b), parts) if parts else None


def _whole(e: Emitter, bias: Value, queries: Size, total: int, dtype: torch.dtype) -> ir.Value:
    """A bias as numbers, with a row for every query and a column for every key."""
    shape = bias.type.shape
    numbers = _hidden(e, e.value(bias), dtype) if bias.type.dtype == torch.bool else e.value(bias)
    if len(shape) == 4 and shape[2:] == (queries, total):
        return numbers
    lead = (*[1] * (4 - len(shape)), *shape)[:2]
    return e.once(("whole", numbers.name), lambda: e.op("Expand", numbers, e.vector((*lead, queries, total))))


def _hidden(e: Emitter, visible: ir.Value, dtype: torch.dtype) -> ir.Value:
    key = "hidden", visible.name
    return e.once(
        key, lambda: e.op("Where", visible, e.constant(0.0, dtype), e.constant(torch.finfo(dtype).min, dtype))
    )


def _same_chunk(e: Emitter, starts: Value, queries: Size, chunk: int, total: int) -> ir.Value:
    """``[B, 1, S, total]``: whether query and key are of one chunk."""

    def make() -> ir.Value:
        own = e.op("Unsqueeze", _counted(e, starts), e.constant(np.array([1, 2, 3], np.int64)))
        column = e.op("Unsqueeze", e.numbers(queries), e.constant(np.array([1], np.int64)))
        query = e.op("Div", e.op("Add", own, column), e.scalar(chunk))
        return e.op("Equal", query, e.constant(np.arange(total) // chunk))

    return e.once(("chunk", starts.name, queries, chunk), make)


def _counted(e: Emitter, starts: Value) -> ir.Value:
    return e.cast(e.value(starts), starts.type.dtype, torch.int64)
