"""Packed tokens for TensorRT, whose importer makes a loop of CumSum: running sums are products with triangles of ones.

``packed_padding: dropped`` gives as many rows as there are tokens, so that sizes depend on the data and calls cannot be CUDA
graphs; ``behind`` keeps all rows, padding behind the tokens of all texts: no size changes, and only attention takes less time.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Reshaped
from graphopt.backends.onnx.lowerings import kept_rows, kept_tokens, rows_of_tokens
from graphopt.dims import Size
from graphopt.ir import Node, Value


def packed_before_padding(e: Emitter, node: Node) -> Lowered:
    """The rows of the tokens, one text behind the other, then those of padding."""
    mask: Value = node.args["mask"]
    return rows_of_tokens(e, node, e.once(("tokens first", mask.name), lambda: _tokens_first(e, mask)))


def _tokens_first(e: Emitter, mask: Value) -> ir.Value:
    """Every row's number at the place where the row goes; padding goes behind all tokens, as many as there are before it."""
    count = mask.type.shape[0] * mask.type.shape[1]
    places = e.op("Reshape", _places(e, mask), e.vector((count,)))
    numbers = e.numbers(count)
    # tokens up to and with this one are places + 1, so padding before this one is numbers - places - 1
    padding = e.op("Sub", e.op("Add", _tokens(e, mask), e.op("Sub", numbers, places)), e.scalar(1))
    return e.op("ScatterElements", numbers, e.op("Where", kept_rows(e, mask), places, padding), numbers, axis=0)


def unpacked(e: Emitter, node: Node) -> Lowered:
    """Every position's row; padding takes the row of the last token before it."""
    mask: Value = node.args["mask"]
    places = e.once(("unpacked rows", mask.name), lambda: e.op("Reshape", _places(e, mask), e.vector([-1])))
    return Reshaped(e.op("Gather", e.value(node.args["x"]), places, axis=0))


def tokens_before(e: Emitter, mask: Value) -> ir.Value:
    """How many tokens the rows before each one have, i64 ``[B]``."""

    def make() -> ir.Value:
        counts = e.op("ReduceSum", e.cast(kept_tokens(e, mask), torch.bool, torch.int64), e.vector([1]), keepdims=0)
        return e.op(
            "ReduceSum",
            e.op("Where", _triangle(e, mask.type.shape[0], "Less"), counts, e.scalar(0)),
            e.vector([1]),
            keepdims=0,
        )

    return e.once(("tokens before", mask.name), make)


def _places(e: Emitter, mask: Value) -> ir.Value:
    """The packed row of each token, of padding that of the last token before it; i64 ``[B, S]``."""

    def make() -> ir.Value:
        # of zeros and ones: exact in TF32 too, whose sums are in fp32
        kept = e.cast(kept_tokens(e, mask), torch.bool, torch.float32)
        until = e.cast(_triangle(e, mask.type.shape[1], "LessOrEqual"), torch.bool, torch.float32)
        inside = e.cast(e.op("MatMul", kept, e.op("Transpose", until, perm=[1, 0])), torch.float32, torch.int64)
        row = e.op("Add", inside, e.op("Unsqueeze", tokens_before(e, mask), e.vector([1])))
        return e.op("Sub", row, e.scalar(1))

    return e.once(("places of tokens", mask.name), make)


def _tokens(e: Emitter, mask: Value) -> ir.Value:
    """How many tokens there are."""
    kept = e.cast(kept_tokens(e, mask), torch.bool, torch.int64)
    return e.once(("tokens", mask.name), lambda: e.op("ReduceSum", kept, e.vector([0, 1]), keepdims=0))


def _triangle(e: Emitter, size: Size, compare: str) -> ir.Value:
    """``[size, size]``, boolean: whether a column's number compares so with its row's."""

    def make() -> ir.Value:
        numbers = e.numbers(size)
        return e.op(compare, numbers, e.op("Unsqueeze", numbers, e.vector([1])))

    return e.once(("triangle", size, compare), make)
