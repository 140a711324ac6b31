"""Encoders' attention by the plugin that TensorRT brings, ``CustomQKVToContextPluginDynamic`` with variable lengths.

It reads all tokens of a batch in one row, each with the query, key and value of a head side by side, and where each text
begins and ends. Padding at an end of a row is a text of its own here, so nothing has to be packed::

    graphopt.attention(q, k, v, key_mask)     ->     qkv = x W + b        [B*S, H*3*D, 1, 1]
                                                     ends = 0, 3, 5, ...  where real tokens and padding end
                                                     y = plugin(qkv, ends, longest)  [B*S, H*D, 1, 1]

Source: NVIDIA/TensorRT, plugin/bertQKVToContextPlugin, version 2 of the plugin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.attention import Attention
from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering
from graphopt.backends.onnx.quantized import turned, zeros
from graphopt.backends.tensorrt.linears import is_summed_wide, product
from graphopt.backends.tensorrt.options import Accumulate
from graphopt.dims import Size, evaluate
from graphopt.ir import Graph, Node, TensorType, Value, Weight

PLUGIN = "plugin"
#: The plugin's name and version in the library's registry.
CREATOR = "CustomQKVToContextPluginDynamic", "2"
_LINEARS = {
    "aten.linear.default": ("weight", "bias"),
    "graphopt.static_linear.default": ("weight", "bias", "scale"),
}
_HEAD, _LONGEST = 64, 512  # the kernels that it has for every GPU it knows


def plugin_attention(accumulate: Accumulate) -> Lowering:
    """Attention as the plugin reads it. ``accumulate``: what the product that makes queries, keys and values is summed in."""

    def lower(e: Emitter, node: Node) -> Lowered:
        a = Attention(node)
        reason = why_not(e.graph, node)
        a.require(reason is None, reason or "")
        ends, fine = _runs(e, a)
        positions = e.once(("positions in int32", a.keys), lambda: e.cast(_positions(e, a), torch.int64, torch.int32))
        name, version = CREATOR
        together = _of_one_product(e, a, accumulate) or _put_together(e, a)
        rows = e.op("Reshape", together, e.vector((-1, 3 * a.heads * a.size, 1, 1)))
        made = e.op(
            name, rows, positions, ends, positions, plugin_version=version, plugin_namespace="", type_id=1,
            hidden_size=a.heads * a.size, num_heads=a.heads, has_mask=1, var_seqlen=1,
        )  # fmt: skip
        result = e.reshape(made, (a.batch, a.queries, a.heads * a.size))
        if fine is not None and not _follows_another(node):
            result = e.op("Mul", result, fine)
        return a.from_heads_last(e, result)

    return lower


def why_not(graph: Graph, node: Node) -> str | None:
    """Why the plugin does not compute an attention; None if it does."""
    a = Attention(node)
    alike = a.heads == a.kv_heads and a.size == a.value_size and a.queries == a.keys
    longest = _largest(a.keys, graph)
    reasons = {
        "not in fp16": a.dtype != torch.float16,
        f"heads of {a.size}, not {_HEAD}": a.size != _HEAD or not isinstance(a.heads, int),
        "queries and keys of other numbers of heads or positions": not alike,
        "causal": a.causal != "none",
        "a mask that is not of padding": a.has_other_masks or a.has_limits,
        "sinks or a soft cap": a.sinks is not None or bool(a.softcap),
        f"a scale of {a.scale}": not math.isclose(a.scale, _HEAD**-0.5, rel_tol=1e-6),
        f"up to {longest or 'any number of'} tokens, not {_LONGEST}": longest is None or longest > _LONGEST,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _largest(size: Size, graph: Graph) -> int | None:
    try:
        most: int = evaluate(size, {name: dim.max for name, dim in graph.dims.items() if dim.max is not None})
    except KeyError:
        return None
    return most


# Queries, keys and values


def _of_one_product(e: Emitter, a: Attention, accumulate: Accumulate) -> ir.Value | None:
    """``[B, S, H*3*D]`` where all three are linears of one value: one product, of their weights head by head."""
    linears = [node for value in (a.q, a.k, a.v) if (node := _linear_behind(e, a, value)) is not None]
    if len(linears) < 3 or len({node.op for node in linears}) > 1:
        return None
    name = "input" if linears[0].op == "aten.linear.default" else "x"
    read, biased = ({node.args[part] for node in linears} for part in (name, "bias"))
    if len(read) > 1 or (None in biased and len(biased) > 1):
        return None
    x, weight = e.value(linears[0].args[name]), _head_by_head(e, a, linears, "weight")
    if name == "input":
        type = linears[0].args["weight"].type
        made = product(e, x, turned(e, weight), type.dtype, is_summed_wide(type.shape[1], type.dtype, accumulate))
    elif len({node.args["x_scale"] for node in linears}) > 1:
        return None
    else:
        step, scale = linears[0].args["x_scale"], _head_by_head(e, a, linears, "scale")
        zero = e.constant(torch.zeros(3 * a.heads * a.size), torch.int8)
        own = e.op("DequantizeLinear", x, e.value(step), zeros(e, step, torch.int8))
        made = e.op("MatMul", own, turned(e, e.op("DequantizeLinear", weight, scale, zero, axis=0)))
    return made if None in biased else e.op("Add", made, _head_by_head(e, a, linears, "bias"))


def _head_by_head(e: Emitter, a: Attention, linears: Sequence[Node], part: str) -> ir.Value:
    """Weights, biases or scales ``[H*D, ...]`` of queries, keys and values as one ``[H*3*D, ...]``; a scale may be one number."""
    names = [node.args[part].name for node in linears]
    weights = [e.graph.weights[name] for name in names]
    channels = a.heads * a.size
    rest = linears[0].args[part].type.shape[1:] if part == "weight" else ()

    def load() -> torch.Tensor:
        each = [weight.load().reshape(-1, *rest).expand(channels, *rest) for weight in weights]
        return torch.stack([one.reshape(a.heads, a.size, *rest) for one in each], 1).flatten(0, 2)

    type = TensorType(weights[0].type.dtype, (3 * channels, *rest))
    return e.once(("head by head", *names), lambda: e.external(f"{names[0]}.by_heads", Weight(type, load)))


def _linear_behind(e: Emitter, a: Attention, value: Value) -> Node | None:
    """The linear of weights, in floats or int8, whose result, split into heads, is ``value``; None if there is more between."""
    node = value.producer
    if not a.last:
        if node is None or node.op != "aten.transpose.int" or {node.args["dim0"], node.args["dim1"]} != {1, 2}:
            return None
        node = node.args["self"].producer
    if node is None or node.op != "aten.reshape.default":
        return None
    made = node.args["self"].producer
    if made is None or made.op not in _LINEARS or made.output.type.shape[:-1] != (a.batch, a.keys):
        return None
    weights = (made.args[part] for part in _LINEARS[made.op])
    return made if all(weight is None or e.is_weight(weight) for weight in weights) else None


def _put_together(e: Emitter, a: Attention) -> ir.Value:
    """The same of any queries, keys and values, as a copy."""
    shape = (a.batch, a.keys, a.heads, 1, a.size)
    parts = (e.reshape(a.heads_last(e, value, a.heads, a.size), shape) for value in (a.q, a.k, a.v))
    return e.op("Concat", *parts, axis=3)


# Padding


def _positions(e: Emitter, a: Attention) -> ir.Value:
    return e.once(("positions", "key", a.keys), lambda: e.op("Range", e.scalar(0), e.scalar(a.keys), e.scalar(1)))


def _runs(e: Emitter, a: Attention) -> tuple[ir.Value, ir.Value | None]:
    """Where runs of real tokens and of padding end, i32 ``[2B + 1]`` from 0 on, and for each row 1, or NaN if padding lies
    elsewhere than at one end, ``[B, 1, 1]``. Without a mask every row is one run."""
    mask: Value | None = a.node.args["key_mask"]
    return e.once(("runs", a.batch, a.keys, mask and mask.name), lambda: _found_runs(e, a, mask))


def _found_runs(e: Emitter, a: Attention, mask: Value | None) -> tuple[ir.Value, ir.Value | None]:
    size = e.scalar(a.keys)
    rows = e.op("Range", e.scalar(0), e.scalar(a.batch), e.scalar(1))
    starts = e.op("Mul", rows, size)
    borders, fine = [e.op("Add", starts, size)], None
    if mask is not None:
        real = e.op("ReduceSum", e.cast(e.value(mask), torch.bool, torch.int64), e.vector([1]), keepdims=0)
        padding = e.op("Sub", size, real)
        at_end = _is(e, mask, e.op("Less", _positions(e, a), e.op("Unsqueeze", real, e.vector([1]))))
        at_start = _is(e, mask, e.op("GreaterOrEqual", _positions(e, a), e.op("Unsqueeze", padding, e.vector([1]))))
        borders.insert(0, e.op("Add", starts, e.op("Where", at_end, real, padding)))
        fine = e.op("Where", e.op("Or", at_end, at_start), e.constant(1.0, a.dtype), e.constant(np.nan, a.dtype))
        fine = e.op("Unsqueeze", fine, e.vector([1, 2]))
    each = e.op("Concat", *(e.op("Unsqueeze", border, e.vector([1])) for border in borders), axis=1)
    ends = e.op("Concat", e.vector([0]), e.op("Reshape", each, e.vector([-1])), axis=0)
    return e.cast(ends, torch.int64, torch.int32), fine


def _is(e: Emitter, mask: Value, other: ir.Value) -> ir.Value:
    """Whether each row of a mask ``[B, S]`` is the same as another's."""
    differ = e.cast(e.op("Xor", e.value(mask), other), torch.bool, torch.int64)
    return e.op("Equal", e.op("ReduceSum", differ, e.vector([1]), keepdims=0), e.scalar(0))


def _follows_another(node: Node) -> bool:
    """Whether an attention reads what another one with its mask gives: NaN comes to it from there."""
    seen: set[Node] = set()
    unread = [node.args["q"]]
    while unread:
        made = unread.pop().producer
        if made is None or made in seen:
            continue
        seen.add(made)
        if made.op == node.op and made.args["key_mask"] is node.args["key_mask"]:
            return True
        unread += made.operands
    return False
