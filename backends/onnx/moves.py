"""Ops that move, repeat or make elements without computing with them, in ONNX."""

from __future__ import annotations

import numpy as np
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Reshaped, Table, Unsupported
from graphopt.dims import Dim
from graphopt.ir import Node

MOVES = Table()
lowers = MOVES.lowers


def _dtype(node: Node) -> torch.dtype:
    return node.outputs[0].type.dtype


@lowers("aten.reshape")
def _reshape(e: Emitter, node: Node) -> Lowered:
    source = node.args["self"]
    if source.type == node.output.type:
        return e.value(source)
    return Reshaped(e.elements(source))


@lowers("aten.unsqueeze", "aten.squeeze")
def _unsqueeze(e: Emitter, node: Node) -> Lowered:
    if node.op != "aten.unsqueeze.default":
        return Reshaped(e.elements(node.args["self"]))
    return e.op("Unsqueeze", e.value(node.args["self"]), e.constant(np.array([node.args["dim"]], np.int64)))


@lowers("aten.expand")
def _expand(e: Emitter, node: Node) -> Lowered:
    return e.op("Expand", e.value(node.args["self"]), e.vector(node.output.type.shape))


@lowers("aten.view_as_real", "aten.view_as_complex")
def _pairs(e: Emitter, node: Node) -> Lowered:
    """Complex numbers are pairs of reals already."""
    return e.value(node.args["self"])


@lowers("aten.transpose")
def _transpose(e: Emitter, node: Node) -> Lowered:
    order = list(range(len(node.output.type.shape)))
    a, b = node.args["dim0"], node.args["dim1"]
    order[a], order[b] = order[b], order[a]
    return e.op("Transpose", e.value(node.args["self"]), perm=order)


@lowers("aten.permute")
def _permute(e: Emitter, node: Node) -> Lowered:
    return e.op("Transpose", e.value(node.args["self"]), perm=list(node.args["dims"]))


@lowers("aten.slice")
def _slice(e: Emitter, node: Node) -> Lowered:
    args = node.args
    bounds = [e.size(args[key]) for key in ("start", "end")]
    axis, step = (e.constant(np.array([args[key]], np.int64)) for key in ("dim", "step"))
    return e.op("Slice", e.value(args["self"]), *bounds, axis, step)


@lowers("aten.select")
def _select(e: Emitter, node: Node) -> Lowered:
    return e.op("Gather", e.value(node.args["self"]), e.scalar(node.args["index"]), axis=node.args["dim"])


@lowers("aten.cat")
def _cat(e: Emitter, node: Node) -> Lowered:
    parts = [e.arg(tensor, _dtype(node)) for tensor in node.args["tensors"]]
    return e.op("Concat", *parts, axis=node.args["dim"])


@lowers("aten.stack")
def _stack(e: Emitter, node: Node) -> Lowered:
    axis = node.args["dim"]
    new = e.constant(np.array([axis], np.int64))
    parts = [e.op("Unsqueeze", e.arg(tensor, _dtype(node)), new) for tensor in node.args["tensors"]]
    return e.op("Concat", *parts, axis=axis)


@lowers("aten.repeat", "aten.tile")
def _repeat(e: Emitter, node: Node) -> Lowered:
    source = node.args["self"]
    times = node.args["repeats" if "repeats" in node.args else "dims"]
    rank = len(node.output.type.shape)
    shape = (1,) * (rank - len(source.type.shape)) + tuple(source.type.shape)
    x = e.value(source) if shape == source.type.shape else e.reshape(e.elements(source), shape)
    return e.op("Tile", x, e.vector((1,) * (rank - len(times)) + tuple(times)))


@lowers("aten.pad", "aten.constant_pad_nd")
def _pad(e: Emitter, node: Node) -> Lowered:
    """torch names the last axis first, and each axis's two ends together."""
    if node.args.get("mode", "constant") != "constant":
        raise Unsupported("padding with anything but a constant")
    source, ends = node.args["self"], node.args["pad"]
    rank = len(source.type.shape)
    before, after = ([0] * rank for _ in range(2))
    for place in range(len(ends) // 2):
        before[rank - 1 - place], after[rank - 1 - place] = ends[2 * place], ends[2 * place + 1]
    return e.op("Pad", e.value(source), e.vector([*before, *after]), e.constant(node.args["value"] or 0, _dtype(node)))


@lowers("aten.roll")
def _roll(e: Emitter, node: Node) -> Lowered:
    """Each axis cut where it wraps, its two parts exchanged."""
    source, shifts, axes = (node.args[key] for key in ("self", "shifts", "dims"))
    if not axes or any(isinstance(size, Dim) for size in (*shifts, *(source.type.shape[axis] for axis in axes))):
        raise Unsupported("a roll of everything, or of a dynamic size")
    x = e.value(source)
    for shift, axis in zip(shifts, axes, strict=True):
        size = source.type.shape[axis]
        cut, along = e.size(-shift % size), e.constant(np.array([axis], np.int64))
        x = e.op(
            "Concat", e.op("Slice", x, cut, e.size(size), along), e.op("Slice", x, e.size(0), cut, along), axis=axis
        )
    return x


@lowers("aten.split_with_sizes", "aten.split", "aten.chunk")
def _split(e: Emitter, node: Node) -> Lowered:
    axis = node.args["dim"]
    sizes = e.vector([value.type.shape[axis] for value in node.outputs])
    return e.op_several("Split", e.value(node.args["self"]), sizes, outputs=len(node.outputs), axis=axis)


@lowers("aten.unbind")
def _unbind(e: Emitter, node: Node) -> Lowered:
    source, axis = e.value(node.args["self"]), node.args["dim"]
    return [e.op("Gather", source, e.scalar(index), axis=axis) for index in range(len(node.outputs))]


@lowers("aten.full")
def _full(e: Emitter, node: Node) -> Lowered:
    number = e.arg(node.args["fill_value"], _dtype(node))
    return number if not node.output.type.shape else e.op("Expand", number, e.vector(node.output.type.shape))


@lowers("aten.arange")
def _arange(e: Emitter, node: Node) -> Lowered:
    parts = [node.args[key] for key in ("start", "end", "step")]
    if any(isinstance(part, float) for part in parts):
        return e.op("Range", *(e.arg(part, _dtype(node)) for part in parts))
    start, end, step = parts
    numbers = e.numbers(end) if (start, step) == (0, 1) else e.op("Range", *map(e.scalar, parts))
    return e.cast(numbers, torch.int64, _dtype(node))


@lowers("aten.embedding")
def _embedding(e: Emitter, node: Node) -> Lowered:
    return e.op("Gather", e.value(node.args["weight"]), e.value(node.args["indices"]), axis=0)


@lowers("aten.gather")
def _gather(e: Emitter, node: Node) -> Lowered:
    source, index = node.args["self"], node.args["index"]
    axis = node.args["dim"]
    if all(size == 1 for other, size in enumerate(source.type.shape) if other != axis):
        return e.op("Gather", e.reshape(e.elements(source), (source.type.shape[axis],)), e.value(index), axis=0)
    for other, (size, indexed) in enumerate(zip(source.type.shape, index.type.shape, strict=True)):
        if other != axis and size != indexed:
            raise Unsupported("a gather of a part of the other axes")  # ONNX wants them equal
    return e.op("GatherElements", e.value(source), e.value(index), axis=axis)


@lowers("aten.copy")
def _copy(e: Emitter, node: Node) -> Lowered:
    source = node.args["src"]
    cast = e.cast(e.value(source), source.type.dtype, _dtype(node))
    return (
        cast if source.type.shape == node.output.type.shape else e.op("Expand", cast, e.vector(node.output.type.shape))
    )


@lowers("aten.slice_scatter")
def _slice_scatter(e: Emitter, node: Node) -> Lowered:
    """What lies before the slice, the new elements, what lies behind."""
    args = node.args
    source, axis = args["self"], args["dim"]
    size, start = source.type.shape[axis], args["start"] or 0
    if args["step"] != 1 or (isinstance(start, int) and start < 0):
        raise Unsupported("a slice with a step, or from the end")
    x, along = e.value(source), e.constant(np.array([axis], np.int64))
    end = start + args["src"].type.shape[axis]
    before = e.op("Slice", x, e.size(0), e.size(start), along)
    behind = e.op("Slice", x, e.size(end), e.size(size), along)
    return e.op("Concat", before, e.arg(args["src"], _dtype(node)), behind, axis=axis)
