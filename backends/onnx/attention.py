"""``graphopt.attention`` in ONNX: the standard op, and the plain products that any reader takes.

Masks: the key mask, lengths, windows and what causal cannot say are put together as one boolean ``[B or 1, 1, S, T]``,
once for all layers that share them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering, Reshaped, Unsupported
from graphopt.dims import Size
from graphopt.ir import Node, Value
from graphopt.tensors import TensorType


class Attention:
    """A ``graphopt.attention`` node, read."""

    MASKS = ("key_mask", "kv_lengths", "segments", "prefix", "starts")

    def __init__(self, node: Node) -> None:
        self.node = node
        args = node.args
        self.q, self.k, self.v = args["q"], args["k"], args["v"]
        self.last = args["heads_last"]
        sequence, head = (1, 2) if self.last else (2, 1)
        self.batch: Size = self.q.type.shape[0]
        self.queries, self.keys = self.q.type.shape[sequence], self.k.type.shape[sequence]
        self.heads, self.kv_heads = self.q.type.shape[head], self.k.type.shape[head]
        self.size, self.value_size = self.q.type.shape[3], self.v.type.shape[3]
        self.dtype = self.q.type.dtype
        self.scale, self.softcap, self.causal = args["scale"], args["softcap"], args["causal"]
        self.bias, self.sinks = args["bias"], args["sinks"]

    @property
    def causal_is_upper_left(self) -> bool:
        """Whether a kernel's own causal mask says all that ``causal`` does."""
        return (
            self.node.args["prefix"] is None
            and self.node.args["starts"] is None
            and bool(self.causal == "upper_left" or (self.causal == "lower_right" and self.queries == self.keys))
        )

    @property
    def has_other_masks(self) -> bool:
        """Whether something but the key mask says which keys are seen: a bias, lengths, segments or a prefix."""
        return self.bias is not None or any(
            self.node.args[name] is not None for name in self.MASKS if name != "key_mask"
        )

    @property
    def has_limits(self) -> bool:
        """Whether keys far away are not seen: a window or chunks."""
        args = self.node.args
        return max(args["window_left"], args["window_right"]) >= 0 or bool(args["chunk"])

    def heads_last(self, e: Emitter, value: Value, heads: Any, size: Any) -> ir.Value:
        """q, k or v as ``[B, S, H*D]``."""
        rows = self.queries if value is self.q else self.keys
        source = e.elements(value) if self.last else e.op("Transpose", e.value(value), perm=[0, 2, 1, 3])
        return e.reshape(source, (self.batch, rows, heads * size))

    def heads_first(self, e: Emitter, value: Value) -> ir.Value:
        """q, k or v as ``[B, H, S, D]``."""
        return e.op("Transpose", e.value(value), perm=[0, 2, 1, 3]) if self.last else e.value(value)

    def from_heads_last(self, e: Emitter, result: ir.Value) -> Lowered:
        """A result ``[B, S, H*D]`` in the node's own layout."""
        if self.last:
            return Reshaped(result)
        shaped = e.reshape(result, (self.batch, self.queries, self.heads, self.value_size))
        return e.op("Transpose", shaped, perm=[0, 2, 1, 3])

    def from_heads_first(self, e: Emitter, result: ir.Value) -> ir.Value:
        return e.op("Transpose", result, perm=[0, 2, 1, 3]) if self.last else result

    def visible(self, e: Emitter, with_causal: bool) -> ir.Value | None:
        """Which keys each query may see, boolean, broadcasting to ``[B, 1, S, T]``; None for all. Without the bias."""
        args = self.node.args
        key = (
            "visible", self.queries, self.keys, args["causal"] if with_causal else "none", args["window_left"],
            args["window_right"], args["chunk"], *(args[name] and args[name].name for name in self.MASKS),
        )  # fmt: skip
        return e.once(key, lambda: self._visible(e, with_causal))

    def _visible(self, e: Emitter, with_causal: bool) -> ir.Value | None:
        args = self.node.args
        parts: list[ir.Value] = []
        key = functools.partial(e.numbers, self.keys)
        query = functools.partial(self._query_positions, e)
        if with_causal and self.causal != "none":
            parts.append(e.op("LessOrEqual", key(), query()))
        if args["window_left"] >= 0:
            reach = e.constant(args["window_left"], torch.int64)
            parts.append(e.op("LessOrEqual", e.op("Sub", query(), key()), reach))
        if args["window_right"] >= 0:
            reach = e.constant(args["window_right"], torch.int64)
            parts.append(e.op("LessOrEqual", e.op("Sub", key(), query()), reach))
        if args["prefix"] is not None and parts:
            ahead = e.op("Unsqueeze", e.value(args["prefix"]), e.constant(np.array([1, 2], np.int64)))
            parts = [e.op("Or", functools.reduce(lambda a, b: e.op("And", a, b), parts), ahead)]
        if args["chunk"] > 0:
            length = e.constant(args["chunk"], torch.int64)
            parts.append(e.op("Equal", e.op("Div", key(), length), e.op("Div", query(), length)))
        if args["segments"] is not None:
            numbers = e.cast(e.value(args["segments"]), args["segments"].type.dtype, torch.int64)
            own = numbers
            if self.queries != self.keys:
                ends = (e.size(self.keys - self.queries), e.size(self.keys), e.constant(np.array([1], np.int64)))
                own = e.op("Slice", numbers, *ends)
            columns = e.op("Unsqueeze", numbers, e.constant(np.array([1, 2], np.int64)))
            rows = e.op("Unsqueeze", own, e.constant(np.array([1, 3], np.int64)))
            parts.append(e.op("Equal", columns, rows))
        if args["key_mask"] is not None:
            parts.append(e.op("Unsqueeze", e.value(args["key_mask"]), e.constant(np.array([1, 2], np.int64))))
        if args["kv_lengths"] is not None:
            lengths = e.cast(e.value(args["kv_lengths"]), args["kv_lengths"].type.dtype, torch.int64)
            parts.append(e.op("Less", key(), e.op("Unsqueeze", lengths, e.constant(np.array([1, 2, 3], np.int64)))))
        return functools.reduce(lambda a, b: e.op("And", a, b), parts) if parts else None

    def _query_positions(self, e: Emitter) -> ir.Value:
        """``[S, 1]``, or ``[B, 1, S, 1]`` where rows differ: where each query stands among the keys."""

        def make() -> ir.Value:
            column = e.op("Unsqueeze", e.numbers(self.queries), e.constant(np.array([1], np.int64)))
            if starts is not None:
                own = e.cast(e.value(starts), starts.type.dtype, torch.int64)
                return e.op("Add", e.op("Unsqueeze", own, e.constant(np.array([1, 2, 3], np.int64))), column)
            if self.causal == "lower_right" and self.keys != self.queries:
                return e.op("Add", column, e.scalar(self.keys - self.queries))
            return column

        starts = self.node.args["starts"]
        return e.once(("query positions", self.queries, self.keys, self.causal, starts and starts.name), make)

    def additive(self, e: Emitter, with_causal: bool) -> ir.Value | None:
        """Everything that masks, bias included, as numbers to add to the scores; None if nothing masks."""
        visible = self.visible(e, with_causal)
        if visible is None and (self.bias is None or self.bias.type.dtype != torch.bool):
            return None if self.bias is None else e.value(self.bias)

        def make() -> ir.Value:
            both = visible
            if self.bias is not None and self.bias.type.dtype == torch.bool:
                both = e.value(self.bias) if visible is None else e.op("And", visible, e.value(self.bias))
            zero, low = e.constant(0.0, self.dtype), e.constant(torch.finfo(self.dtype).min, self.dtype)
            hidden = e.op("Where", both, zero, low)
            if self.bias is not None and self.bias.type.dtype != torch.bool:
                return e.op("Where", both, e.value(self.bias), low)
            return hidden

        return e.once(("additive", visible and visible.name, self.bias and self.bias.name, self.dtype), make)

    def whole(self, e: Emitter, mask: ir.Value) -> ir.Value:
        """A mask expanded to every query and key: onnxruntime refuses masks that broadcast over queries."""
        one = e.size(1)
        shape = e.op("Concat", one, one, e.size(self.queries), e.size(self.keys), axis=0)
        return e.once(("whole", mask.name, self.queries, self.keys), lambda: e.op("Expand", mask, shape))

    def require(self, condition: object, reason: str) -> None:
        if not condition:
            raise Unsupported(reason)


def standard(mask_as: str, flat: bool) -> Lowering:
    """ONNX Attention (opset 23) with a ``bool`` or ``float`` mask; ``flat``: on ``[B, S, H*D]``."""

    def lower(e: Emitter, node: Node) -> Lowered:
        op = _Standard(e, Attention(node), flat)
        causal = op.a.causal_is_upper_left
        if mask_as == "bool":
            op.a.require(op.a.bias is None, "a bias is no boolean mask")
            mask = op.a.visible(e, with_causal=not causal)
        else:
            mask = op.a.additive(e, with_causal=not causal)
        return op.result(op.call(op.a.whole(e, mask) if mask is not None else None))

    return lower


def without_padding(e: Emitter, node: Node) -> Lowered:
    """ONNX Attention without a mask where the key mask keeps all keys, which shows when the model runs, and with it otherwise:
    kernels are faster without, and a single text has no padding."""
    op = _Standard(e, Attention(node), flat=True)
    a, keys = op.a, node.args["key_mask"]
    a.require(keys is not None and not a.has_other_masks, "no key mask, or not that alone")
    a.require(not a.has_limits, "a window or chunks")
    a.require(a.causal == "none" or a.causal_is_upper_left, "causal of unequal lengths")
    visible = a.visible(e, with_causal=False)
    assert visible is not None
    mask = a.whole(e, visible)
    is_full = e.once(("full", keys.name), lambda: _all_of(e, e.value(keys)))
    return op.result(e.either(is_full, lambda: op.call(None), lambda: op.call(mask)))


def _all_of(e: Emitter, mask: ir.Value) -> ir.Value:
    least = e.op("ReduceMin", e.cast(mask, torch.bool, torch.int32), keepdims=0)
    return e.cast(least, torch.int32, torch.bool)


class _Standard:
    """The standard op for an attention, its operands in place."""

    def __init__(self, e: Emitter, a: Attention, flat: bool) -> None:
        self.e, self.a, self.flat = e, a, flat
        a.require(a.sinks is None, "attention sinks")
        a.require(isinstance(a.heads, int) and isinstance(a.kv_heads, int), "a dynamic number of heads")
        self.attributes: dict[str, Any] = {
            "scale": a.scale, "softcap": a.softcap or None, "is_causal": int(a.causal_is_upper_left) or None
        }  # fmt: skip
        if not flat:
            self.parts = [a.heads_first(e, value) for value in (a.q, a.k, a.v)]
            return
        a.require(isinstance(a.size, int) and isinstance(a.value_size, int), "a dynamic head size")
        sizes = ((a.q, a.heads, a.size), (a.k, a.kv_heads, a.size), (a.v, a.kv_heads, a.value_size))
        self.parts = [
            self._flat(a.heads_last(e, *each), a.queries if each[0] is a.q else a.keys, *each[1:]) for each in sizes
        ]
        self.attributes |= {"q_num_heads": a.heads, "kv_num_heads": a.kv_heads}

    def call(self, mask: ir.Value | None) -> ir.Value:
        made = self.e.op("Attention", *self.parts, mask, **self.attributes)
        return self._flat(made, self.a.queries, self.a.heads, self.a.value_size) if self.flat else made

    def _flat(self, value: ir.Value, rows: Size, heads: Any, size: Any) -> ir.Value:
        """Declared as ``[B, S, H*D]``: inside a branch onnxruntime infers another shape from what it does not know."""
        return self.e.typed(value, TensorType(self.a.dtype, (self.a.batch, rows, heads * size)))

    def result(self, called: ir.Value) -> Lowered:
        """In the node's own layout."""
        return self.a.from_heads_last(self.e, called) if self.flat else self.a.from_heads_first(self.e, called)


def products(e: Emitter, node: Node) -> Lowered:
    """Matmul, softmax, matmul: any attention, for any reader."""
    a = Attention(node)
    return softmax_of_products(e, a, a.heads_first(e, a.k), a.heads_first(e, a.v))


def softmax_of_products(e: Emitter, a: Attention, k: ir.Value, v: ir.Value) -> Lowered:
    """The same of keys and values ``[B, Hkv, T, D]`` that are made otherwise."""
    a.require(isinstance(a.heads, int) and isinstance(a.kv_heads, int), "a dynamic number of heads")
    groups = a.heads // a.kv_heads
    q = e.op("Mul", a.heads_first(e, a.q), e.constant(a.scale, a.dtype))
    q = e.reshape(q, (a.batch, a.kv_heads, groups * a.queries, a.size)) if groups > 1 else q
    scores = _scores(e, a, q, k)
    if a.sinks is None:
        weights = e.op("Softmax", scores, axis=-1)
    else:
        whole = e.op("Softmax", e.op("Concat", scores, _sinks(e, a), axis=-1), axis=-1)
        weights = e.op("Slice", whole, e.size(0), e.size(a.keys), e.vector([-1]))
    if groups > 1:
        weights = e.reshape(weights, (a.batch, a.kv_heads, groups * a.queries, a.keys))
    result = e.op("MatMul", weights, v)
    if groups > 1:
        result = e.reshape(result, (a.batch, a.heads, a.queries, a.value_size))
    return a.from_heads_first(e, result)


def _scores(e: Emitter, a: Attention, q: ir.Value, k: ir.Value) -> ir.Value:
    """``[B, H, S, T]``, masked."""
    scores = e.op("MatMul", q, e.op("Transpose", k, perm=[0, 1, 3, 2]))
    if a.heads != a.kv_heads:
        scores = e.reshape(scores, (a.batch, a.heads, a.queries, a.keys))
    if a.softcap:
        cap = e.constant(a.softcap, a.dtype)
        scores = e.op("Mul", e.op("Tanh", e.op("Div", scores, cap)), cap)
    mask = a.additive(e, with_causal=True)
    return scores if mask is None else e.op("Add", scores, mask)


def update_cache(e: Emitter, node: Node) -> Lowered:
    """TensorScatter (opset 24): linear, from each row's own place on."""
    args = node.args
    starts = e.cast(e.value(args["starts"]), args["starts"].type.dtype, torch.int64)
    return e.op("TensorScatter", e.value(args["cache"]), e.value(args["new"]), starts, axis=2)


def _sinks(e: Emitter, a: Attention) -> ir.Value:
    """The sinks' scores, ``[B, H, S, 1]``."""
    column = e.reshape(e.arg(a.sinks, a.dtype), (1, a.heads, 1, 1))
    return e.op("Expand", column, e.vector((a.batch, a.heads, a.queries, 1)))


STANDARD_FORMS = {
    "attention_float_mask": standard("float", flat=True),
    "attention_bool_mask": standard("bool", flat=True),
    "attention_4d_float_mask": standard("float", flat=False),
    "products": products,
}
