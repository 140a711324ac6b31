"""Attention of packed tokens by the plugin that TensorRT brings, ``CustomQKVToContextPluginDynamic`` with variable lengths.

It reads all tokens of a batch in one column, each with the query, key and value of a head side by side, and where each text
begins and ends::

    graphopt.packed_attention(q, k, v, mask)     ->     qkv = x W + b        [T, H*3*D, 1, 1]
                                                        ends = 0, 7, 12, ...
                                                        y = plugin(qkv, ends, longest)  [T, H*D, 1, 1]

Source: NVIDIA/TensorRT, plugin/bertQKVToContextPlugin, version 2 of the plugin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering, Unsupported
from graphopt.backends.onnx.quantized import integer_product, turned
from graphopt.backends.tensorrt.linears import is_summed_wide, product
from graphopt.backends.tensorrt.options import Accumulate
from graphopt.backends.tensorrt.packed import tokens_before
from graphopt.dims import Dim, Size
from graphopt.ir import Graph, Node, Value
from graphopt.tensors import DTYPE_NAMES, TensorType, Weight

#: The plugin's name and version in the library's registry.
CREATOR = "CustomQKVToContextPluginDynamic", "2"
_LINEARS = {
    "aten.linear.default": ("weight", "bias"),
    "graphopt.static_linear.default": ("weight", "bias", "scale"),
}
_HEAD, _LONGEST = 64, 512  # the kernels that it has for every GPU it knows
#: The plugin's defaults for int8. It reads them for int8 only; the parser warns where they are missing.
_FOR_INT8: dict[str, Any] = {"dq_probs": 1 / 127, "use_int8_scale_max": 1}


def plugin_attention(accumulate: Accumulate) -> Lowering:
    """Packed attention as the plugin reads it. ``accumulate``: of the product that makes queries, keys and values."""

    def lower(e: Emitter, node: Node) -> Lowered:
        q, mask = node.args["q"], node.args["mask"]
        reason = why_not(e.graph, node)
        if reason is not None:
            raise Unsupported(f"TensorRT's plugin computes no attention with {reason}")
        values, heads = [node.args[name] for name in "qkv"], q.type.shape[1]
        together = _of_one_product(e, [_linear_behind(value) for value in values], heads, accumulate)
        if together is None:
            together = _side_by_side(e, (e.value(value) for value in values), (q.type.shape[0], heads, 1, _HEAD))
        rows = e.op("Reshape", together, e.vector((-1, 3 * heads * _HEAD, 1, 1)))
        ends, longest = e.once(("texts", mask.name), lambda: (_ends(e, mask), _longest(e, mask)))
        name, version = CREATOR
        made = e.op(
            name, rows, longest, ends, longest, plugin_version=version, plugin_namespace="", type_id=1,
            hidden_size=heads * _HEAD, num_heads=heads, has_mask=1, var_seqlen=1, **_FOR_INT8,
        )  # fmt: skip
        return e.reshape(made, q.type.shape)

    return lower


def why_not(graph: Graph, node: Node) -> str | None:
    """What of a packed attention the plugin does not compute; None if it computes it."""
    q, v, scale = node.args["q"].type, node.args["v"].type, node.args["scale"]
    longest = _largest(node.args["mask"].type.shape[1], graph)
    reasons = {
        f"{DTYPE_NAMES[q.dtype]}, only with f16": q.dtype != torch.float16,
        f"heads of {q.shape[2]}, only with heads of {_HEAD}": q.shape[2] != _HEAD or not isinstance(q.shape[1], int),
        "fewer heads of keys, or values of another size": not q == node.args["k"].type == v,
        f"a scale of {scale}": not math.isclose(scale, _HEAD**-0.5, rel_tol=1e-6),
        f"texts of {longest or 'any number of'} tokens, only with up to {_LONGEST} (which dims may say)": (
            longest is None or longest > _LONGEST
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _largest(size: Size, graph: Graph) -> int | None:
    if isinstance(size, Dim):
        return graph.dims[size.name].max if size.name is not None else None
    return size


# Queries, keys and values


def _of_one_product(e: Emitter, linears: Sequence[Node | None], heads: int, accumulate: Accumulate) -> ir.Value | None:
    """``[T, H*3*D]`` where all three are linears of one value: one product, of their weights head by head."""
    found = [node for node in linears if node is not None and all(map(e.is_weight, _weights_of(node)))]
    if len(found) < 3 or len({node.op for node in found}) > 1:
        return None
    name = "input" if found[0].op == "aten.linear.default" else "x"
    read, biased = ({node.args[part] for node in found} for part in (name, "bias"))
    if len(read) > 1 or (None in biased and len(biased) > 1):
        return None
    type = found[0].args["weight"].type
    if name == "input":
        wide = is_summed_wide(type.shape[1], type.dtype, accumulate)
        made = product(
            e, e.value(found[0].args[name]), turned(e, _head_by_head(e, found, "weight", heads)), type.dtype, wide
        )
    elif len({node.args["x_scale"] for node in found}) > 1:
        return None
    else:
        weight, scale = (_head_by_head(e, found, part, heads) for part in ("weight", "scale"))
        zero = e.constant(torch.zeros(3 * heads * _HEAD), type.dtype)
        made = integer_product(e, found[0].args["x"], found[0].args["x_scale"], weight, scale, zero)
    return made if None in biased else e.op("Add", made, _head_by_head(e, found, "bias", heads))


def _head_by_head(e: Emitter, linears: Sequence[Node], part: str, heads: int) -> ir.Value:
    """Weights, biases or scales ``[H*D, ...]`` of queries, keys and values as one ``[H*3*D, ...]``; a scale may be one number."""
    names = [node.args[part].name for node in linears]
    weights = [e.graph.weights[name] for name in names]
    rest = linears[0].args[part].type.shape[1:] if part == "weight" else ()

    def load() -> torch.Tensor:
        each = [weight.load().reshape(-1, *rest).expand(heads * _HEAD, *rest) for weight in weights]
        return torch.stack([one.reshape(heads, _HEAD, *rest) for one in each], 1).flatten(0, 2)

    type = TensorType(weights[0].type.dtype, (3 * heads * _HEAD, *rest))
    name = f"{'+'.join(names)} by {heads} heads"
    return e.once(("head by head", name), lambda: e.external(name, Weight(type, load)))


def _weights_of(linear: Node) -> list[Value]:
    values = (linear.args[part] for part in _LINEARS[linear.op])
    return [value for value in values if value is not None]


def _linear_behind(value: Value) -> Node | None:
    """The linear, in floats or few bits, whose result, split into heads, is ``value``; None if there is more between."""
    node = value.producer
    made = node.args["self"].producer if node is not None and node.op == "aten.reshape.default" else None
    return made if made is not None and made.op in _LINEARS else None


def _side_by_side(e: Emitter, parts: Iterable[ir.Value], shape: Sequence[Size]) -> ir.Value:
    """Any queries, keys and values, each ``[T, H, D]``, as ``[T, H, 3, D]``: a copy. ``shape`` ``[T, H, 1, D]``."""
    return e.op("Concat", *(e.reshape(part, shape) for part in parts), axis=2)


# Texts


def _ends(e: Emitter, mask: Value) -> ir.Value:
    """Where texts end, i32 ``[2B + 1]`` from 0 on. A row's first token, if it is padding, is packed, and a text of its own."""
    is_real = e.op("Squeeze", e.op("Slice", e.value(mask), *(e.vector([n]) for n in (0, 1, 1))), e.vector([1]))
    first = e.cast(e.op("Not", is_real), torch.bool, torch.int64)
    real = e.op("ReduceSum", e.cast(e.value(mask), torch.bool, torch.int64), e.vector([1]), keepdims=0)
    alone = e.op("Add", tokens_before(e, mask), first)
    each = e.op("Concat", *(e.op("Unsqueeze", end, e.vector([1])) for end in (alone, e.op("Add", alone, real))), axis=1)
    ends = e.op("Concat", e.vector([0]), e.op("Reshape", each, e.vector([-1])), axis=0)
    return e.cast(ends, torch.int64, torch.int32)


def _longest(e: Emitter, mask: Value) -> ir.Value:
    """Some i32 tensor whose size says how long the longest text may be."""
    return e.cast(e.numbers(mask.type.shape[1]), torch.int64, torch.int32)
