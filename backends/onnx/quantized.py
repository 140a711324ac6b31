"""Quantized numbers and products in plain ONNX: QuantizeLinear and DequantizeLinear with zero point 0."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Table, Unsupported
from graphopt.dims import Dim
from graphopt.ir import Node, Value

QUANTIZED = Table()
lowers = QUANTIZED.lowers


@lowers("graphopt.quantize")
def _quantize(e: Emitter, node: Node) -> Lowered:
    x, scale = node.args["x"], node.args["scale"]
    axis = scaled_axis(scale)
    dtype = node.args["dtype"] or torch.int8
    zero = e.constant(0, dtype)
    if axis is None:
        return e.op("QuantizeLinear", e.op("Div", e.value(x), e.value(scale)), e.constant(1.0, scale.type.dtype), zero)
    return e.op("QuantizeLinear", e.value(x), flat_scale(e, scale), zeros(e, scale, dtype), axis=axis)


@lowers("graphopt.dequantize")
def _dequantize(e: Emitter, node: Node) -> Lowered:
    x, scale = node.args["x"], node.args["scale"]
    axis = scaled_axis(scale)
    if axis is None:
        return e.op("Mul", e.cast(e.value(x), x.type.dtype, scale.type.dtype), e.value(scale))
    return e.op("DequantizeLinear", e.value(x), flat_scale(e, scale), zeros(e, scale, x.type.dtype), axis=axis)


def scaled_axis(scale: Value) -> int | None:
    """The axis along which a scale has several numbers, as many as are known, 0 for one number; None if it is otherwise."""
    if any(isinstance(size, Dim) for size in scale.type.shape):
        return None
    axes = [axis for axis, size in enumerate(scale.type.shape) if size != 1]
    return None if len(axes) > 1 else axes[0] if axes else 0


def flat_scale(e: Emitter, scale: Value) -> ir.Value:
    """A scale of one axis as ONNX has it: one number, or one axis."""
    several = [size for size in scale.type.shape if size != 1]
    if len(several) == len(scale.type.shape):
        return e.value(scale)
    return e.once(("flat scale", scale.name), lambda: e.reshape(e.value(scale), tuple(several)))


def zeros(e: Emitter, scale: Value, dtype: torch.dtype) -> ir.Value:
    """Zero points for a scale of one axis."""
    return e.constant(torch.zeros([int(size) for size in scale.type.shape if size != 1]), dtype)  # type: ignore[arg-type]  # constant


@lowers("graphopt.static_linear")
def static_linear(e: Emitter, node: Node) -> Lowered:
    """Both operands dequantized before a product in float: what readers of Q/DQ make integers of."""
    x, x_scale, weight, scale, bias = (node.args[name] for name in ("x", "x_scale", "weight", "scale", "bias"))
    zero = zeros(e, scale, weight.type.dtype)
    return with_bias(e, integer_product(e, x, x_scale, e.value(weight), e.value(scale), zero), bias)


def integer_product(
    e: Emitter, x: Value, x_scale: Value, weight: ir.Value, scale: ir.Value, zero: ir.Value
) -> ir.Value:
    """Quantized ``x`` by a weight ``[N, K]`` with ``scale`` and ``zero`` ``[N]``."""
    own = e.op("DequantizeLinear", e.value(x), e.value(x_scale), zeros(e, x_scale, x.type.dtype))
    return e.op("MatMul", own, turned(e, e.op("DequantizeLinear", weight, scale, zero, axis=0)))


@lowers("graphopt.dynamic_linear")
def _dynamic_linear(e: Emitter, node: Node) -> Lowered:
    x, weight, scale, bias = (node.args[name] for name in ("x", "weight", "scale", "bias"))
    if node.args["per_token"]:
        own, largest = by_token(e, x)
        zero, step = e.constant(np.array(128, np.uint8)), e.op("Mul", largest, e.constant(1 / 127, x.type.dtype))
    else:
        own, step, zero = dynamic(e, x)
    product = e.cast(e.op("MatMulInteger", own, turned(e, e.value(weight)), zero), torch.int32, x.type.dtype)
    if node.args["per_token"]:  # in two products, because onnxruntime takes one by both for a single scale
        scaled = e.op("Mul", e.op("Mul", product, e.value(scale)), step)
    else:
        scaled = e.op("Mul", product, e.op("Mul", step, e.value(scale)))
    return with_bias(e, scaled, bias)


def by_token(e: Emitter, x: Value) -> tuple[ir.Value, ir.Value]:
    """Each row by its largest magnitude, as uint8 around 128 in steps of its 127th; and that magnitude ``[..., 1]``."""

    def make() -> tuple[ir.Value, ir.Value]:
        own, dtype = e.value(x), x.type.dtype
        last = e.constant(np.array([-1], np.int64))
        largest = e.op("ReduceMax", e.op("Abs", own), last, keepdims=1)
        largest = e.op("Max", largest, e.constant(torch.finfo(dtype).tiny, dtype))
        even = e.op("Mul", own, e.op("Reciprocal", largest))  # a product for each number, a division for each row
        step = e.constant(1 / 127, dtype)
        return e.op("QuantizeLinear", even, step, e.constant(np.array(128, np.uint8))), largest

    return e.once(("by token", x.name), make)


def dynamic(e: Emitter, x: Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """x as uint8 by its own range, once for all that read it: numbers, scale, zero point."""
    if x.type.dtype != torch.float32:
        raise Unsupported(f"DynamicQuantizeLinear of {x.type.dtype}")
    made = e.once(("dynamic", x.name), lambda: e.op_several("DynamicQuantizeLinear", e.value(x), outputs=3))
    return made[0], made[1], made[2]


def turned(e: Emitter, weight: ir.Value) -> ir.Value:
    """A weight ``[N, K]`` as the second operand of a product."""
    return e.once(("transposed", weight.name), lambda: e.op("Transpose", weight, perm=[1, 0]))


def with_bias(e: Emitter, product: ir.Value, bias: Value | None) -> ir.Value:
    return product if bias is None else e.op("Add", product, e.value(bias))


@lowers("graphopt.packed_linear")
def _packed_linear(e: Emitter, node: Node) -> Lowered:
    """The weight dequantized before a product in float; what readers of DequantizeLinear in blocks know to leave packed."""
    x, packed, bias = (node.args[name] for name in ("x", "packed", "bias"))
    features = x.type.shape[-1]
    weight = e.once(("unpacked", packed.name), lambda: unpacked(e, node, features))
    return with_bias(e, e.op("MatMul", e.value(x), turned(e, weight)), bias)


@lowers("graphopt.unpack_rows")
def _unpack_rows(e: Emitter, node: Node) -> Lowered:
    return unpacked(e, node, node.args["features"])


def unpacked(e: Emitter, node: Node, features: int) -> ir.Value:
    """The rows ``[..., features]`` that packed groups hold."""
    packed, scales, zeros, codebook = (node.args[name] for name in ("packed", "scales", "zeros", "codebook"))
    bits, dtype, lead = node.args["bits"], scales.type.dtype, scales.type.shape
    group = packed.type.shape[-1] * 8 // bits
    last = e.constant(np.array([-1], np.int64))
    if codebook is not None:
        own = e.op("Gather", e.value(codebook), e.cast(_numbers(e, packed, bits), torch.uint8, torch.int32))
    elif len(lead) == 2 and zeros is None and all(e.is_weight(each) for each in (packed, scales)):
        signed = e.signed(packed, (*lead[:-1], lead[-1] * group), bits)
        return _cut(
            e, e.op("DequantizeLinear", signed, e.value(scales), axis=1, block_size=group), features, lead[-1] * group
        )
    else:
        middle = e.constant(float(2 ** (bits - 1)), dtype)
        if zeros is not None:
            each = _cut(e, _numbers(e, zeros, bits), lead[-1], zeros.type.shape[-1] * 8 // bits)
            middle = e.op("Unsqueeze", e.cast(each, torch.uint8, dtype), last)
        own = e.op("Sub", e.cast(_numbers(e, packed, bits), torch.uint8, dtype), middle)
    rows = e.op("Mul", own, e.op("Unsqueeze", e.value(scales), last))
    return _cut(e, e.reshape(rows, (*lead[:-1], lead[-1] * group)), features, lead[-1] * group)


def _numbers(e: Emitter, packed: Value, bits: int) -> ir.Value:
    """Packed numbers one by one along the last axis, as uint8."""
    numbers = e.value(packed)
    if bits == 8:
        return numbers
    last = e.constant(np.array([-1], np.int64))
    low = e.op("BitwiseAnd", numbers, e.constant(np.array(15, np.uint8)))
    high = e.op("BitShift", numbers, e.constant(np.array(4, np.uint8)), direction="RIGHT")
    pairs = e.op("Concat", e.op("Unsqueeze", low, last), e.op("Unsqueeze", high, last), axis=-1)
    return e.reshape(pairs, (*packed.type.shape[:-1], packed.type.shape[-1] * 2))


def _cut(e: Emitter, rows: ir.Value, features: int, width: int) -> ir.Value:
    """The first ``features`` of the last axis."""
    if features == width:
        return rows
    return e.op("Slice", rows, *(e.constant(np.array([number], np.int64)) for number in (0, features, -1)))
