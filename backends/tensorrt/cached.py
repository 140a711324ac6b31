"""A static cache for importers without TensorScatter: the engine reads the buffers and gives the new rows, which the runtime
writes behind each row's text."""

from __future__ import annotations

import functools

import onnx_ir as ir
import torch

from graphopt.backends.onnx.attention import Attention, Keys, softmax_of_products
from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering, Unsupported
from graphopt.ir import Node, Value


def new_rows(e: Emitter, node: Node) -> Lowered:
    """``graphopt.kv_cache_update`` as what it writes: ``[B, H, S, D]``. Attention reads the buffer and these rows."""
    readers = [user.op for user in node.outputs[0].users if user.op != "graphopt.attention.default"]
    if readers:
        raise Unsupported(f"{readers[0]} reads a cache, of which there are only the new rows")
    if not e.graph.is_output(node.outputs[0]):
        raise Unsupported("a cache that is no output")
    return e.value(node.args["new"])


def appended(e: Emitter, node: Node) -> Lowered:
    """Attention to a buffer's filled positions and to new rows, in one softmax."""
    a = Attention(node)
    keys, values = updated(a.k), updated(a.v)
    if keys is None or values is None:
        raise Unsupported("keys and values that are in no buffer")
    starts = keys.args["starts"]
    same = starts is values.args["starts"] and starts is node.args["starts"] and a.causal == "upper_left"
    a.require(same and not a.last, "queries that stand elsewhere than the new keys")
    a.require(a.bias is None, "a bias over the positions of a buffer")
    others = [name for name in a.MASKS if name != "starts" and node.args[name] is not None]
    a.require(not others and node.args["window_right"] < 0, f"{', '.join(others) or 'a window ahead'} over a buffer")
    past, new = _masks(e, a, starts)
    return softmax_of_products(
        e,
        a,
        [
            Keys(e.value(keys.args["cache"]), e.value(values.args["cache"]), a.keys, past),
            Keys(e.value(keys.args["new"]), e.value(values.args["new"]), a.queries, new),
        ],
    )


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


def _masks(e: Emitter, a: Attention, starts: Value) -> tuple[ir.Value, ir.Value]:
    """What is added to the scores of the buffer's positions, ``[B, 1, 1 or S, M]``, and of the new ones, ``[S, S]``
    (``[B, 1, S, S]`` with chunks)."""
    args = a.node.args
    window, chunk = args["window_left"], args["chunk"]

    def make() -> tuple[ir.Value, ir.Value]:
        filled = e.op("Unsqueeze", e.cast(e.value(starts), starts.type.dtype, torch.int64), e.vector([1, 2, 3]))
        place, column = (e.op("Range", e.scalar(0), e.scalar(count), e.scalar(1)) for count in (a.keys, a.queries))
        row = e.op("Unsqueeze", column, e.vector([1]))
        query = e.op("Add", filled, row)  # [B, 1, S, 1]
        past, new = [e.op("Less", place, filled)], [e.op("LessOrEqual", column, row)]
        if window >= 0:
            past.append(e.op("LessOrEqual", e.op("Sub", query, place), e.scalar(window)))
            new.append(e.op("LessOrEqual", e.op("Sub", row, column), e.scalar(window)))
        if chunk > 0:
            own = e.op("Div", query, e.scalar(chunk))
            past.append(e.op("Equal", e.op("Div", place, e.scalar(chunk)), own))
            new.append(e.op("Equal", e.op("Div", e.op("Add", filled, column), e.scalar(chunk)), own))
        zero, low = e.constant(0.0, a.dtype), e.constant(torch.finfo(a.dtype).min, a.dtype)
        both = [functools.reduce(lambda one, other: e.op("And", one, other), parts) for parts in (past, new)]
        return e.op("Where", both[0], zero, low), e.op("Where", both[1], zero, low)

    return e.once(("past and new", starts.name, a.keys, a.queries, window, chunk, a.dtype), make)
