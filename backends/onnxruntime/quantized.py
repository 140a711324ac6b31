"""Integer products as ONNX Runtime's own ops, which scale and add the bias on the way out."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Unsupported
from graphopt.backends.onnx.quantized import QUANTIZED, by_token, dynamic, turned, with_bias
from graphopt.backends.onnxruntime.cached import CONTRIB
from graphopt.ir import Node, Value


def static_linear(e: Emitter, node: Node) -> Lowered:
    """The input as uint8 with its zero point in the middle: the same numbers, and what the kernels of most CPUs multiply int8
    weights with (int8 by int8 took six times as long with AVX512-VNNI)."""
    x, x_scale, weight, scale, bias = (node.args[name] for name in ("x", "x_scale", "weight", "scale", "bias"))
    if x.type.dtype != torch.int8:  # float8: products of floats
        return QUANTIZED["graphopt.static_linear"](e, node)
    middle = e.constant(np.array(128, np.uint8))
    return e.op(
        "MatMulIntegerToFloat", _unsigned(e, x, x_scale, middle), turned(e, e.value(weight)), e.value(x_scale), e.value(scale),
        middle, None, e.value(bias) if bias is not None else None, domain=CONTRIB,
    )  # fmt: skip


def _unsigned(e: Emitter, x: Value, scale: Value, middle: ir.Value) -> ir.Value:
    """What was quantized to int8 as uint8."""
    node = x.producer
    if node is None or node.op != "graphopt.quantize.default" or node.args["scale"] is not scale:
        raise Unsupported("integers that come from elsewhere than quantize")
    source: Value = node.args["x"]
    return e.once(("unsigned", x.name), lambda: e.op("QuantizeLinear", e.value(source), e.value(scale), middle))


def dynamic_linear(e: Emitter, node: Node) -> Lowered:
    """One op, or where several products read the same input its quantization once for all."""
    x, weight, scale, bias = (node.args[name] for name in ("x", "weight", "scale", "bias"))
    own = turned(e, e.value(weight)), e.value(scale), e.value(bias) if bias is not None else None
    if x.type.dtype != torch.float32:
        raise Unsupported(
            f"integer products of {x.type.dtype}",
            "leave cast out, or take a scheme that goes with it: int8_static, int8_smooth, weight_only, nf4",
        )
    if node.args["per_token"]:
        numbers, largest = by_token(e, x)
        step, middle = e.constant(1 / 127, x.type.dtype), e.constant(np.array(128, np.uint8))
        even = e.op("MatMulIntegerToFloat", numbers, own[0], step, own[1], middle, domain=CONTRIB)
        return with_bias(e, e.op("Mul", even, largest), bias)
    if sum(user.op == node.op for user in x.users) == 1:
        return e.op("DynamicQuantizeMatMul", e.value(x), own[0], own[1], None, own[2], domain=CONTRIB)
    numbers, step, zero = dynamic(e, x)
    return e.op("MatMulIntegerToFloat", numbers, own[0], step, own[1], zero, None, own[2], domain=CONTRIB)


def packed_linear(e: Emitter, node: Node) -> Lowered:
    """MatMulNBits, computed in integers (accuracy_level 4) where the weights are of 4 bits or 8."""
    args = node.args
    if args["codebook"] is not None:  # products of floats
        return QUANTIZED["graphopt.packed_linear"](e, node)
    channels, features = args["packed"].type.shape[0], args["x"].type.shape[-1]
    zeros, bias = (e.value(args[name]) if args[name] is not None else None for name in ("zeros", "bias"))
    return e.op(
        "MatMulNBits", e.value(args["x"]), e.value(args["packed"]), e.value(args["scales"]), zeros, None, bias,
        domain=CONTRIB, K=features, N=channels, bits=args["bits"], block_size=args["block"], accuracy_level=4,
    )  # fmt: skip
