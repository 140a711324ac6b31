"""The lowering table of plain ONNX for ATen ops. What is not here goes through the single-op fallback."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering, Reshaped, Table, Unsupported
from graphopt.dims import Dim
from graphopt.ir import Node, Value

LOWERINGS = Table()
lowers = LOWERINGS.lowers


def _dtype(node: Node) -> torch.dtype:
    return node.outputs[0].type.dtype


def _unary(op_type: str) -> Lowering:
    def lower(e: Emitter, node: Node) -> Lowered:
        operand = node.args["self"]
        return e.op(op_type, e.arg(operand, _dtype(node)))

    return lower


def _binary(op_type: str) -> Lowering:
    """An arithmetic op whose operands are promoted to the result's dtype."""

    def lower(e: Emitter, node: Node) -> Lowered:
        dtype = _dtype(node)
        if dtype == torch.bool:
            raise Unsupported("arithmetic on booleans")
        other = e.arg(node.args["other"], dtype)
        alpha = node.args.get("alpha", 1)
        if alpha != 1:
            other = e.op("Mul", other, e.constant(alpha, dtype))
        return e.op(op_type, e.arg(node.args["self"], dtype), other)

    return lower


@lowers("aten.rsub")
def _rsub(e: Emitter, node: Node) -> Lowered:
    own, other, alpha = (node.args[key] for key in ("self", "other", "alpha"))
    if alpha != 1:
        raise Unsupported("alpha")
    return e.op("Sub", e.arg(other, _dtype(node)), e.arg(own, _dtype(node)))


def _comparison(op_type: str, negate: bool = False) -> Lowering:
    def lower(e: Emitter, node: Node) -> Lowered:
        a, b = node.args["self"], node.args["other"]
        dtype = _common_dtype(a, b)
        result = e.op(op_type, e.arg(a, dtype), e.arg(b, dtype))
        return e.op("Not", result) if negate else result

    return lower


def _common_dtype(a: Any, b: Any) -> torch.dtype:
    tensors = [arg.type.dtype for arg in (a, b) if isinstance(arg, Value)]
    if len(tensors) == 2:
        return torch.promote_types(*tensors)
    number = b if isinstance(a, Value) else a
    if isinstance(number, float) and not tensors[0].is_floating_point:
        return torch.float32
    return torch.int64 if tensors[0] == torch.bool and not isinstance(number, bool) else tensors[0]


def _logical(op_type: str) -> Lowering:
    def lower(e: Emitter, node: Node) -> Lowered:
        operands = [arg for arg in node.args.values() if isinstance(arg, Value)]
        if any(operand.type.dtype != torch.bool for operand in operands):
            raise Unsupported("a bitwise op on integers")
        return e.op(op_type, *map(e.value, operands))

    return lower


for _name, _op_type in {
    "neg": "Neg", "abs": "Abs", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "cos": "Cos", "sin": "Sin", "tanh": "Tanh",
    "sigmoid": "Sigmoid", "relu": "Relu", "erf": "Erf", "reciprocal": "Reciprocal", "floor": "Floor",
    "ceil": "Ceil", "sign": "Sign",
}.items():  # fmt: skip
    LOWERINGS[f"aten.{_name}"] = _unary(_op_type)
for _name, _op_type in {"add": "Add", "sub": "Sub", "mul": "Mul", "maximum": "Max", "minimum": "Min"}.items():
    LOWERINGS[f"aten.{_name}"] = _binary(_op_type)
for _name, _op_type in {
    "le": "LessOrEqual",
    "lt": "Less",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "eq": "Equal",
}.items():
    LOWERINGS[f"aten.{_name}"] = _comparison(_op_type)
LOWERINGS["aten.ne"] = _comparison("Equal", negate=True)
for _name, _op_type in {"and": "And", "or": "Or", "xor": "Xor", "not": "Not"}.items():
    LOWERINGS[f"aten.bitwise_{_name}"] = LOWERINGS[f"aten.logical_{_name}"] = _logical(_op_type)


@lowers("aten.rsqrt")
def _rsqrt(e: Emitter, node: Node) -> Lowered:
    return e.op("Reciprocal", e.op("Sqrt", e.value(node.args["self"])))


@lowers("aten.log_sigmoid")
def _log_sigmoid(e: Emitter, node: Node) -> Lowered:
    """``-softplus(-x)``: the logarithm of a sigmoid is minus infinity where that rounds to 0."""
    return e.op("Neg", e.op("Softplus", e.op("Neg", e.value(node.args["self"]))))


@lowers("aten.softplus")
def _softplus(e: Emitter, node: Node) -> Lowered:
    """``log(1 + exp(beta x)) / beta``; torch is linear above its threshold, where the two are one in floating point."""
    beta, dtype = node.args["beta"], _dtype(node)
    x = e.value(node.args["self"])
    if beta == 1:
        return e.op("Softplus", x)
    return e.op("Div", e.op("Softplus", e.op("Mul", x, e.constant(beta, dtype))), e.constant(beta, dtype))


@lowers("aten.div")
def _div(e: Emitter, node: Node) -> Lowered:
    mode = node.args.get("rounding_mode")
    if mode == "floor" and not _dtype(node).is_floating_point:
        return _floor_divide(e, node)
    if mode is not None or not _dtype(node).is_floating_point:
        raise Unsupported("a division that rounds")
    return e.op("Div", e.arg(node.args["self"], _dtype(node)), e.arg(node.args["other"], _dtype(node)))


@lowers("aten.floor_divide")
def _floor_divide(e: Emitter, node: Node) -> Lowered:
    """ONNX divides integers towards zero, and its remainder has the divisor's sign: what is left divides evenly."""
    dtype = _dtype(node)
    a, b = (e.arg(node.args[key], dtype) for key in ("self", "other"))
    if dtype.is_floating_point:
        return e.op("Floor", e.op("Div", a, b))
    return e.op("Div", e.op("Sub", a, e.op("Mod", a, b)), b)


@lowers("aten.pow")
def _pow(e: Emitter, node: Node) -> Lowered:
    base, exponent = node.args["self"], node.args["exponent"]
    if exponent == 2 and isinstance(base, Value) and base.type.dtype == _dtype(node):
        value = e.value(base)
        return e.op("Mul", value, value)
    return e.op("Pow", e.arg(base, _dtype(node)), e.arg(exponent, _dtype(node)))


@lowers("aten.to")
def _to(e: Emitter, node: Node) -> Lowered:
    return e.cast(e.value(node.args["self"]), node.args["self"].type.dtype, _dtype(node))


@lowers("aten.clamp")
def _clamp(e: Emitter, node: Node) -> Lowered:
    x, dtype = e.arg(node.args["self"], _dtype(node)), _dtype(node)
    for op_type, end in (("Max", node.args["min"]), ("Min", node.args["max"])):
        if end is not None:
            x = e.op(op_type, x, e.arg(end, dtype))
    return x


@lowers("aten.where")
def _where(e: Emitter, node: Node) -> Lowered:
    chosen = [e.arg(node.args[key], _dtype(node)) for key in ("self", "other")]
    return e.op("Where", e.value(node.args["condition"]), *chosen)


@lowers("aten.masked_fill")
def _masked_fill(e: Emitter, node: Node) -> Lowered:
    fill = e.arg(node.args["value"], _dtype(node))
    return e.op("Where", e.value(node.args["mask"]), fill, e.value(node.args["self"]))


@lowers("aten.matmul", "aten.bmm")
def _matmul(e: Emitter, node: Node) -> Lowered:
    second = node.args["other"] if "other" in node.args else node.args["mat2"]
    return e.op("MatMul", e.value(node.args["self"]), e.value(second))


@lowers("aten.einsum")
def _einsum(e: Emitter, node: Node) -> Lowered:
    return e.op("Einsum", *map(e.value, node.args["tensors"]), equation=node.args["equation"])


@lowers("aten.linear")
def _linear(e: Emitter, node: Node) -> Lowered:
    """A flat linear is one Gemm on the weight as it lies; others multiply the transposed weight."""
    x, weight, bias = (node.args[key] for key in ("input", "weight", "bias"))
    if len(x.type.shape) == 2:
        operands = [e.value(x), e.value(weight)] + ([e.value(bias)] if bias is not None else [])
        return e.op("Gemm", *operands, transB=1)
    turned = e.once(("transposed", weight.name), lambda: e.op("Transpose", e.value(weight), perm=[1, 0]))
    product = e.op("MatMul", e.value(x), turned)
    return product if bias is None else e.op("Add", product, e.value(bias))


@lowers("aten.softmax", "aten._softmax")
def _softmax(e: Emitter, node: Node) -> Lowered:
    return e.op("Softmax", e.arg(node.args["self"], _dtype(node)), axis=node.args["dim"])


def _reduction(op_type: str) -> Lowering:
    def lower(e: Emitter, node: Node) -> Lowered:
        axes = node.args.get("dim")
        if isinstance(axes, int):
            axes = (axes,)
        vector = e.constant(np.array(axes, np.int64)) if axes else None
        operand = e.arg(node.args["self"], _dtype(node))
        return e.op(
            op_type, operand, *([vector] if vector is not None else []), keepdims=int(node.args.get("keepdim", False))
        )

    return lower


for _name, _op_type in {"mean": "ReduceMean", "sum": "ReduceSum", "amax": "ReduceMax", "amin": "ReduceMin"}.items():
    LOWERINGS[f"aten.{_name}"] = _reduction(_op_type)


@lowers("aten.cumsum")
def _cumsum(e: Emitter, node: Node) -> Lowered:
    return e.op("CumSum", e.arg(node.args["self"], _dtype(node)), e.constant(np.array(node.args["dim"], np.int64)))


@lowers("aten.argmax")
def _argmax(e: Emitter, node: Node) -> Lowered:
    if node.args["dim"] is None:
        raise Unsupported("an argmax over everything")
    return e.op("ArgMax", e.value(node.args["self"]), axis=node.args["dim"], keepdims=int(node.args["keepdim"]))


@lowers("aten.gelu")
def _gelu(e: Emitter, node: Node) -> Lowered:
    return e.op("Gelu", e.value(node.args["self"]), approximate=node.args["approximate"])


def silu(e: Emitter, x: ir.Value) -> ir.Value:
    return e.op("Mul", x, e.op("Sigmoid", x))


@lowers("aten.silu")
def _silu(e: Emitter, node: Node) -> Lowered:
    return silu(e, e.value(node.args["self"]))


@lowers("graphopt.quick_gelu")
def _quick_gelu(e: Emitter, node: Node) -> Lowered:
    x = e.value(node.args["x"])
    return e.op("Mul", x, e.op("Sigmoid", e.op("Mul", x, e.constant(node.args["alpha"], _dtype(node)))))


def activation(e: Emitter, name: str, x: ir.Value) -> ir.Value:
    """One of the activations of ``graphopt.gated_activation``."""
    if name == "silu":
        return silu(e, x)
    if name in ("gelu", "gelu_tanh"):
        return e.op("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
    return e.op({"relu": "Relu", "sigmoid": "Sigmoid"}[name], x)


@lowers("graphopt.gated_activation")
def _gated(e: Emitter, node: Node) -> Lowered:
    return e.op("Mul", activation(e, node.args["activation"], e.value(node.args["gate"])), e.value(node.args["up"]))


# Normalizations


def _norm_operands(e: Emitter, node: Node) -> tuple[int, ir.Value]:
    """(axis, weight): ONNX wants a weight, so there is one of ones where torch has none."""
    shape = node.args["normalized_shape"]
    if any(isinstance(size, Dim) for size in shape):
        raise Unsupported("a normalized size that is dynamic")
    weight = node.args["weight"]
    scale = e.value(weight) if weight is not None else e.constant(np.ones(shape), _dtype(node))
    return -len(shape), scale


def layer_norm(e: Emitter, node: Node, x: ir.Value) -> ir.Value:
    axis, scale = _norm_operands(e, node)
    bias = node.args["bias"]
    operands = [x, scale] + ([e.value(bias)] if bias is not None else [])
    return e.op("LayerNormalization", *operands, axis=axis, epsilon=node.args["eps"])


def rms_norm(e: Emitter, node: Node, x: ir.Value) -> ir.Value:
    axis, scale = _norm_operands(e, node)
    eps = node.args["eps"]
    eps = torch.finfo(_dtype(node)).eps if eps is None else eps
    return e.op("RMSNormalization", x, scale, axis=axis, epsilon=eps)


@lowers("aten.layer_norm")
def _layer_norm(e: Emitter, node: Node) -> Lowered:
    return layer_norm(e, node, e.value(node.args["input"]))


@lowers("aten.rms_norm")
def _rms_norm(e: Emitter, node: Node) -> Lowered:
    return rms_norm(e, node, e.value(node.args["input"]))


@lowers("graphopt.add_layer_norm", "graphopt.add_rms_norm")
def _add_norm(e: Emitter, node: Node) -> Lowered:
    """A sum and a norm: onnxruntime's fused SkipLayerNormalization takes 3 to 7 times as long on CPU (measured, 1.32)."""
    total = e.op("Add", e.value(node.args["x"]), e.value(node.args["residual"]))
    norm = layer_norm if node.op.startswith("graphopt.add_layer_norm") else rms_norm
    return norm(e, node, total), total


# Packed tokens


def kept_tokens(e: Emitter, mask: Value) -> ir.Value:
    """``[B, S]``: the tokens that are packed, which are those of the mask and the first of every row."""

    def make() -> ir.Value:
        first = e.op("Equal", e.numbers(mask.type.shape[1]), e.scalar(0))
        return e.op("Or", e.value(mask), first)

    return e.once(("kept tokens", mask.name), make)


def kept_rows(e: Emitter, mask: Value) -> ir.Value:
    """The same, ``[B * S]``."""
    row = e.constant(np.array([-1], np.int64))
    return e.once(("kept rows", mask.name), lambda: e.op("Reshape", kept_tokens(e, mask), row))


def rows_of_tokens(e: Emitter, node: Node, places: ir.Value) -> ir.Value:
    """What a pack reads, ``[B * S, K]``, in the order of ``places``."""
    x, mask = node.args["x"], node.args["mask"]
    rows = e.reshape(e.elements(x), (mask.type.shape[0] * mask.type.shape[1], x.type.shape[2]))
    return e.op("Gather", rows, places, axis=0)


@lowers("graphopt.pack_tokens")
def _pack(e: Emitter, node: Node) -> Lowered:
    """The rows of the real tokens, and no others."""
    mask = node.args["mask"]
    places = e.once(
        ("packed places", mask.name),
        lambda: e.op("Reshape", e.op("NonZero", kept_rows(e, mask)), e.constant(np.array([-1], np.int64))),
    )
    return rows_of_tokens(e, node, places)


@lowers("graphopt.unpack_tokens")
def _unpack(e: Emitter, node: Node) -> Lowered:
    """Every position's row; padding takes the row of the last real token before it."""
    mask = node.args["mask"]

    def make() -> ir.Value:
        counted = e.op(
            "CumSum", e.op("Cast", kept_rows(e, mask), to=ir.DataType.INT64), e.constant(np.array(0, np.int64))
        )
        return e.op("Sub", counted, e.constant(np.array(1, np.int64)))

    return Reshaped(e.op("Gather", e.value(node.args["x"]), e.once(("unpacked places", mask.name), make), axis=0))


@lowers("graphopt.packed_attention")
def _packed_attention(e: Emitter, node: Node) -> Lowered:
    raise Unsupported(
        "kernels for packed texts are those of backend: tensorrt; others need remove_padding without attention: packed"
    )


# Rotary embedding


@lowers("graphopt.rotary_embedding")
def _rotary(e: Emitter, node: Node) -> Lowered:
    """ONNX RotaryEmbedding with a row of angles for each position: ``[batch, sequence, R/2]``, no position ids."""
    x, cos, sin = (node.args[key] for key in ("x", "cos", "sin"))
    last = node.args["heads_last"]
    batch, sequence = x.type.shape[0], x.type.shape[1 if last else 2]
    heads, size = x.type.shape[2 if last else 1], x.type.shape[3]
    width = cos.type.shape[-1]
    if not (isinstance(heads, int) and isinstance(size, int) and isinstance(width, int)):
        raise Unsupported("a dynamic number or size of heads")
    angles = [_for_batch(e, angle, batch) for angle in (cos, sin)]
    attributes: dict[str, Any] = {
        "interleaved": int(node.args["interleaved"]),
        "rotary_embedding_dim": 0 if 2 * width == size else 2 * width,
    }
    if not last:
        return e.op("RotaryEmbedding", e.value(x), *angles, **attributes)
    flat = e.reshape(e.elements(x), (batch, sequence, heads * size))
    return Reshaped(e.op("RotaryEmbedding", flat, *angles, num_heads=heads, **attributes))


def _for_batch(e: Emitter, angle: Value, batch: Any) -> ir.Value:
    if angle.type.shape[0] == batch:
        return e.value(angle)
    shape = e.vector((batch, *angle.type.shape[1:]))
    return e.once(("rotary", angle.name), lambda: e.op("Expand", e.value(angle), shape))
