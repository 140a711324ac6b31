"""Quantized numbers and products in plain ONNX: QuantizeLinear and DequantizeLinear with zero point 0."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Table
from graphopt.ir import Node, Value

QUANTIZED = Table()
lowers = QUANTIZED.lowers


@lowers("graphopt.quantize")
def _quantize(e: Emitter, node: Node) -> Lowered:
    x, scale = node.args["x"], node.args["scale"]
    axis = scaled_axis(scale)
    zero = e.constant(np.array(0, np.int8))
    if axis is None:
        return e.op("QuantizeLinear", e.op("Div", e.value(x), e.value(scale)), e.constant(1.0, scale.type.dtype), zero)
    return e.op("QuantizeLinear", e.value(x), flat_scale(e, scale), zeros(e, scale), axis=axis)


@lowers("graphopt.dequantize")
def _dequantize(e: Emitter, node: Node) -> Lowered:
    x, scale = node.args["x"], node.args["scale"]
    axis = scaled_axis(scale)
    if axis is None:
        return e.op("Mul", e.cast(e.value(x), torch.int8, scale.type.dtype), e.value(scale))
    return e.op("DequantizeLinear", e.value(x), flat_scale(e, scale), zeros(e, scale), axis=axis)


def scaled_axis(scale: Value) -> int | None:
    """The axis along which a scale has several numbers, 0 for one number; None if there are several such axes."""
    axes = [axis for axis, size in enumerate(scale.type.shape) if size != 1]
    return None if len(axes) > 1 else axes[0] if axes else 0


def flat_scale(e: Emitter, scale: Value) -> ir.Value:
    """A scale of one axis as ONNX has it: one number, or one axis."""
    several = [size for size in scale.type.shape if size != 1]
    if len(several) == len(scale.type.shape):
        return e.value(scale)
    return e.once(("flat scale", scale.name), lambda: e.reshape(e.value(scale), tuple(several)))


def zeros(e: Emitter, scale: Value) -> ir.Value:
    """Zero points for a scale of one axis."""
    return e.constant(np.zeros([int(size) for size in scale.type.shape if size != 1], np.int8))  # type: ignore[arg-type]  # constant
