"""A static cache for importers without TensorScatter: the engine reads the buffers and gives the new rows, which the runtime
writes behind each row's text.

::

    %k: f16[B, H, M, D] = graphopt.kv_cache_update(                     keys = Where(a new row's place, its row, cache)
        cache=%past, new=%new, starts=%n)                         ->    scores = MatMul(q, keys^T) ...
    %y = graphopt.attention(q=%q, k=%k, v=%v, starts=%n)                output present = new
    output present = %k
"""

from __future__ import annotations

import functools

import onnx_ir as ir
import torch

from graphopt.backends.onnx.attention import Attention, softmax_of_products
from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering, Unsupported
from graphopt.backends.tensorrt.options import CACHE_LENGTH
from graphopt.dims import Dim
from graphopt.ir import Graph, Node, Value
from graphopt.runtime.cache import CacheLayout
from graphopt.tensors import DimRange, TensorType

#: What of an attention has a last axis of positions.
_OF_POSITIONS = ("bias", "key_mask", "segments", "prefix")
#: What to do about ops between a cache and its attention.
_REMEDIES = {
    "aten.to.dtype": "insert_kv_cache: dtype: fp16, where cast comes later",
    "graphopt.dequantize.default": "a static cache in int8 needs TensorRT 10.15; leave the cache's dtype out",
}


def of_any_length(graph: Graph, layout: CacheLayout) -> Graph:
    """The graph with buffers that may be shorter than ``max_length``. Of a bias attention takes as many positions as they have.

    ::

        input %past: f16[B, H, 2304, D]                     dim cache.length in [1, 2304]
        %y = graphopt.attention(k=..., bias=%all)    ->     input %past: f16[B, H, cache.length, D]
                                                            %near = aten.slice(self=%all, dim=-1, start=0, end=cache.length)
                                                            %y = graphopt.attention(k=..., bias=%near)
    """
    assert layout.max_length is not None
    made = graph.clone()
    made.dims[CACHE_LENGTH] = DimRange(1, layout.max_length)
    whole = {made.inputs[name] for name in layout.whole}
    near: dict[Value, Value] = {}
    for node in made.nodes:
        if node.op == "graphopt.kv_cache_update.default" and node.args["cache"] in whole:
            node.output.type = open_type(node.output.type)
            whole.add(node.output)
        elif node.op == "graphopt.attention.default" and node.args["k"] in whole:
            _take_near(made, node, layout.max_length, near)
    for name in layout.whole:
        made.inputs[name].type = open_type(made.inputs[name].type)
    return made


def open_type(buffer: TensorType) -> TensorType:
    """Of a buffer whose length is open."""
    batch, heads, _, size = buffer.shape
    return TensorType(buffer.dtype, (batch, heads, Dim.named(CACHE_LENGTH), size))


def _take_near(graph: Graph, node: Node, length: int, near: dict[Value, Value]) -> None:
    """Let an attention read as many of ``length`` positions as its buffers have; ``near``: what was cut before."""
    args = dict(node.args)
    for name in _OF_POSITIONS:
        value = args[name]
        if value is not None and value.type.shape[-1:] == (length,):
            if value not in near:
                part = {"self": value, "dim": len(value.type.shape) - 1, "start": 0, "end": Dim.named(CACHE_LENGTH)}
                near[value] = graph.insert("aten.slice.Tensor", part, before=node, origin=node.origin).output
            args[name] = near[value]
    graph.set_args(node, args)


def new_rows(e: Emitter, node: Node) -> Lowered:
    """``graphopt.kv_cache_update`` as what it writes: ``[B, H, S, D]``. Attention reads the buffer and these rows."""
    readers = [user.op for user in node.outputs[0].users if user.op != "graphopt.attention.default"]
    if readers:
        raise Unsupported(
            f"{readers[0]} reads a cache, of which there are only the new rows", _REMEDIES.get(readers[0])
        )
    if not e.graph.is_output(node.outputs[0]):
        raise Unsupported("a cache that is no output")
    return e.value(node.args["new"])


def over_buffers(e: Emitter, node: Node) -> Lowered:
    """Attention to buffers with the new rows in their places. (To scores of both side by side, which needs no copy of the
    buffers, a step of a Llama of 1B takes 6 % longer on an H200: more and narrower kernels.)"""
    a = Attention(node)
    keys, values = updated(a.k), updated(a.v)
    if keys is None or values is None:
        raise Unsupported("keys and values that are in no buffer")
    a.require(not a.last, "a buffer with its heads last")
    return softmax_of_products(e, a, _written(e, keys), _written(e, values))


def _written(e: Emitter, update: Node) -> ir.Value:
    """What ``graphopt.kv_cache_update`` gives, ``[B, H, M, D]``: each position takes its row of the new ones, if it has one."""
    cache, new, starts = (update.args[name] for name in ("cache", "new", "starts"))
    batch, heads, length, size = cache.type.shape
    count = new.type.shape[2]

    def places() -> tuple[ir.Value, ir.Value]:
        own = e.op("Unsqueeze", e.cast(e.value(starts), starts.type.dtype, torch.int64), e.vector([1, 2, 3]))
        position = e.op("Unsqueeze", e.numbers(length), e.vector([0, 1, 3]))
        row = e.op("Sub", position, own)  # [B, 1, M, 1]
        is_new = e.op("And", e.op("GreaterOrEqual", row, e.scalar(0)), e.op("Less", row, e.scalar(count)))
        last = e.op("Sub", e.scalar(count), e.scalar(1))
        near = e.op("Max", e.op("Min", row, last), e.scalar(0))
        return is_new, e.op("Expand", near, e.vector((batch, heads, length, size)))

    is_new, row = e.once(("places of new rows", starts.name, count, cache.type.shape), places)
    return e.op("Where", is_new, e.op("GatherElements", e.value(new), row, axis=2), e.value(cache))


def without_buffers(lowering: Lowering) -> Lowering:
    """A form of attention that would take new rows for all keys."""

    @functools.wraps(lowering)
    def lower(e: Emitter, node: Node) -> Lowered:
        if any(updated(node.args[name]) for name in ("k", "v")):
            raise Unsupported("keys in a buffer, of which there are only the new rows")
        return lowering(e, node)

    return lower


def updated(value: Value) -> Node | None:
    """The update of a cache that a value is."""
    node = value.producer
    return node if node is not None and node.op == "graphopt.kv_cache_update.default" else None
