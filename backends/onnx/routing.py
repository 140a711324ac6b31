"""Sorting, indexing and grouped products in ONNX: what a mixture of experts routes its tokens with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Table, Unsupported
from graphopt.ir import Node, Value

ROUTING = Table()
lowers = ROUTING.lowers


@lowers("aten.sort")
def _sort(e: Emitter, node: Node) -> Lowered:
    source, axis = node.args["self"], node.args["dim"]
    count = e.size(source.type.shape[axis])
    return e.op_several("TopK", e.value(source), count, outputs=2, axis=axis, largest=int(node.args["descending"]))


@lowers("aten.topk")
def _topk(e: Emitter, node: Node) -> Lowered:
    args = node.args
    return e.op_several(
        "TopK", e.value(args["self"]), e.size(args["k"]), outputs=2, axis=args["dim"], largest=int(args["largest"]),
        sorted=int(args["sorted"]),
    )  # fmt: skip


@lowers("aten.bucketize")
def _bucketize(e: Emitter, node: Node) -> Lowered:
    args = node.args
    return _places(e, node, args["self"], args["boundaries"], args["right"])


@lowers("aten.searchsorted")
def _searchsorted(e: Emitter, node: Node) -> Lowered:
    args = node.args
    if args["sorter"] is not None:
        raise Unsupported("an order of the sorted sequence")
    return _places(e, node, args["self"], args["sorted_sequence"], args["right"] or args["side"] == "right")


def _places(e: Emitter, node: Node, x: Value, ordered: Value, right: bool) -> ir.Value:
    """How many of ``ordered`` ``[..., N]`` are not at or behind each of ``x`` ``[..., M]``; NaN is behind all."""
    if not isinstance(x, Value) or x.type.dtype != ordered.type.dtype:
        raise Unsupported("numbers of another dtype than the boundaries")
    column = e.op("Unsqueeze", e.value(x), e.vector([-1]))
    row = e.value(ordered)
    row = e.op("Unsqueeze", row, e.vector([-2])) if len(ordered.type.shape) > 1 else row
    before = e.op("Not", e.op("Greater" if right else "GreaterOrEqual", row, column))
    counts = e.op("ReduceSum", e.op("Cast", before, to=ir.DataType.INT64), e.vector([-1]), keepdims=0)
    return e.cast(counts, torch.int64, node.output.type.dtype)


@lowers("aten.histc")
def _histc(e: Emitter, node: Node) -> Lowered:
    """Counts of elements in equal bins; the last bin has both its ends."""
    source, bins, low, high = (node.args[key] for key in ("self", "bins", "min", "max"))
    if low >= high:
        raise Unsupported("bins between the smallest and the largest element")
    dtype = source.type.dtype
    x = e.reshape(e.elements(source), (-1,))
    place = e.op("Floor", e.op("Mul", e.op("Sub", x, e.constant(low, dtype)), e.constant(bins / (high - low), dtype)))
    at_end = e.op("Equal", x, e.constant(high, dtype))
    place = e.op("Where", at_end, e.constant(bins - 1, dtype), place)
    inside = e.op("LessOrEqual", x, e.constant(high, dtype))
    place = e.op("Where", inside, place, e.constant(-1, dtype))
    column = e.op("Unsqueeze", place, e.constant(np.array([1], np.int64)))
    hits = e.op("Cast", e.op("Equal", column, e.constant(np.arange(bins), dtype)), to=ir.DataType.FLOAT)
    counts = e.op("ReduceSum", hits, e.constant(np.array([0], np.int64)), keepdims=0)
    return e.cast(counts, torch.float32, node.output.type.dtype)


@lowers("transformers.grouped_mm_fallback", "aten._grouped_mm")
def _grouped_product(e: Emitter, node: Node) -> Lowered:
    """Rows sorted by group, each group's rows times its own matrix: a product for each, of its rows and no others."""
    names = list(node.args)
    x, weight, ends = (node.args[name] for name in names[:3])
    if not (isinstance(ends, Value) and len(weight.type.shape) == 3 and len(x.type.shape) == 2):
        raise Unsupported("groups that are not rows")
    if any(node.args[name] is not None for name in names[3:]):
        raise Unsupported("a bias or another dtype")
    bounds = e.op(
        "Concat", e.constant(np.array([0], np.int64)), e.cast(e.value(ends), ends.type.dtype, torch.int64), axis=0
    )
    axis = e.constant(np.array([0], np.int64))
    parts = []
    for group in range(weight.type.shape[0]):
        start, end = (
            e.op("Gather", bounds, e.constant(np.array([index], np.int64)), axis=0) for index in (group, group + 1)
        )
        rows = e.op("Slice", e.value(x), start, end, axis)
        matrix = e.op("Gather", e.value(weight), e.constant(np.array(group, np.int64)), axis=0)
        parts.append(e.op("MatMul", rows, matrix))
    return e.op("Concat", *parts, axis=0)


@lowers("aten.index")
def _index(e: Emitter, node: Node) -> Lowered:
    """``x[i]``, ``x[:, i]``, ``x[i, j]``: one index anywhere, or several on the first axes."""
    source, indices = node.args["self"], node.args["indices"]
    places = [axis for axis, index in enumerate(indices) if index is not None]
    if any(indices[axis].type.dtype in (torch.bool, torch.uint8) for axis in places):
        raise Unsupported("an index by truth")
    if len(places) == 1:
        return e.op("Gather", e.value(source), e.value(indices[places[0]]), axis=places[0])
    if places != list(range(len(places))):
        raise Unsupported("several indices that do not begin at the first axis")
    return e.op("GatherND", e.value(source), _together(e, node, indices[: len(places)]))


def _together(e: Emitter, node: Node, indices: tuple[Value, ...]) -> ir.Value:
    """Several indices as one tensor of coordinates; negative ones count from the end in ONNX as well."""
    source = node.args["self"]
    shape = node.output.type.shape[: len(node.output.type.shape) - len(source.type.shape) + len(indices)]
    whole = e.vector(shape)
    last = e.constant(np.array([-1], np.int64))
    columns = []
    for index in indices:
        wide = e.cast(e.value(index), index.type.dtype, torch.int64)
        columns.append(e.op("Unsqueeze", e.op("Expand", wide, whole) if index.type.shape != shape else wide, last))
    return e.op("Concat", *columns, axis=-1)


@lowers("aten.index_put")
def _index_put(e: Emitter, node: Node) -> Lowered:
    """``x[i] = values`` or ``x[i] += values`` with one index of rows."""
    source, indices, values = (node.args[key] for key in ("self", "indices", "values"))
    if len(indices) != 1 or indices[0] is None or indices[0].type.dtype in (torch.bool, torch.uint8):
        raise Unsupported("an assignment to anything but rows")
    shape = (*indices[0].type.shape, *source.type.shape[1:])
    new = e.value(values) if values.type.shape == shape else e.op("Expand", e.value(values), e.vector(shape))
    rows = e.op("Unsqueeze", e.value(indices[0]), e.constant(np.array([-1], np.int64)))
    return e.op("ScatterND", e.value(source), rows, new, reduction="add" if node.args["accumulate"] else "none")
