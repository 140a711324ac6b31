"""The ``tensorrt`` dialect: what the importer takes, and the forms that its compiler makes fast kernels of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
import torch

from graphopt.backends.onnx.attention import Attention, products
from graphopt.backends.onnx.dialects import OPSET, STANDARD
from graphopt.backends.onnx.emitter import Dialect, Emitter, Lowered, Lowering, Unsupported
from graphopt.backends.quirks import Quirk
from graphopt.backends.tensorrt.cached import new_rows, over_buffers, without_buffers
from graphopt.backends.tensorrt.linears import Device, linears, packed_weights, static_linears
from graphopt.backends.tensorrt.options import Accumulate, PackedPadding
from graphopt.backends.tensorrt.packed import packed_before_padding, unpacked
from graphopt.backends.tensorrt.plugin_attention import plugin_attention
from graphopt.dims import Size
from graphopt.ir import Node, Value

#: The opset of importers that have none of the later ops.
OLD_OPSET = 21


def tensorrt_dialect(
    parses: Callable[[str], bool],
    name: str = "tensorrt",
    quirks: Sequence[Quirk] = (),
    device: Device | None = None,
    accumulate: Accumulate = "fastest",
    padding: PackedPadding | None = None,
) -> Dialect:
    """The dialect of an importer. ``parses``: whether it knows an op; ``device``: what linears are to fill, if that is known;
    ``accumulate``: what they are summed in; ``padding``: what becomes of it where tokens are packed, if the importer has a plugin
    for their attention."""
    lowerings: dict[str, Lowering] = {**STANDARD.lowerings, **_REFUSED}
    for op in ("graphopt.packed_linear", "graphopt.unpack_rows"):
        lowerings[op] = packed_weights(STANDARD.lowerings[op])
    if not parses("NonZero"):
        lowerings |= dict.fromkeys(("graphopt.pack_tokens", "graphopt.unpack_tokens"), _NO_PACKING)
    forms: dict[str, Lowering] = {"products": products}
    if parses("Attention"):
        forms = {"attention": _attention, **forms}
    if not parses("TensorScatter"):
        forms = {"over_buffers": over_buffers, **{form: without_buffers(lowering) for form, lowering in forms.items()}}
        lowerings["graphopt.kv_cache_update"] = new_rows
    if padding is not None:
        lowerings |= {"graphopt.unpack_tokens": unpacked, "graphopt.packed_attention": plugin_attention(accumulate)}
    if padding == "behind":
        lowerings["graphopt.pack_tokens"] = packed_before_padding
    if not parses("RMSNormalization"):
        lowerings |= {"aten.rms_norm": _rms_norm, "graphopt.add_rms_norm": _add_rms_norm}
    if not parses("RotaryEmbedding"):
        lowerings["graphopt.rotary_embedding"] = _rotary
    opset = OPSET if parses("RMSNormalization") else OLD_OPSET
    forms_of = {
        "graphopt.attention": forms,
        "graphopt.static_linear": static_linears(device, accumulate),
        "aten.linear": linears(device, accumulate),
    }
    return Dialect(name, {"": opset}, lowerings, forms_of, quirks)


def _attention(e: Emitter, node: Node) -> Lowered:
    """ONNX Attention on ``[B, H, S, D]``. The importer takes a causal flag or a mask, not both, and no soft cap.

    Of buffers a mask says what is filled, not ``nonpad_kv_seqlen``: fused kernels of 11.1 and 11.2 refuse that or read past it
    (NVIDIA/TensorRT-Model-Connect#1048)."""
    a = Attention(node)
    a.require(a.sinks is None and not a.softcap, "sinks or a soft cap")
    a.require(isinstance(a.heads, int) and isinstance(a.kv_heads, int), "a dynamic number of heads")
    a.require(a.size == a.value_size, "another head size for values")
    others = a.visible(e, with_causal=False) is not None or a.bias is not None
    causal = a.causal_is_upper_left and not others
    mask = a.additive(e, with_causal=not causal)
    mask = a.whole(e, mask) if mask is not None else None
    parts = (a.heads_first(e, value) for value in (a.q, a.k, a.v))
    attributes = {"scale": a.scale, "is_causal": int(causal) or None}
    return a.from_heads_first(e, e.op("Attention", *parts, mask, **attributes))


def _refused(reason: str, hint: str | None = None) -> Lowering:
    def lower(e: Emitter, node: Node) -> Lowered:
        raise Unsupported(reason, hint)

    return lower


_REFUSED: dict[str, Lowering] = {
    "graphopt.dynamic_linear": _refused(
        "TensorRT has no integer products of inputs that are scaled when they run", "quantize with scheme: int8_static"
    ),
    "graphopt.cached_attention": _refused(
        "an op of ONNX Runtime's, which TensorRT has not", "leave fuse_cached_attention out"
    ),
}
_NO_PACKING = _refused(
    "TensorRT-RTX has nothing to leave padding out with", "remove_padding is for backend: tensorrt or onnxruntime"
)


def _rms_norm(e: Emitter, node: Node) -> Lowered:
    return _normed(e, node, e.value(node.args["input"]))


def _add_rms_norm(e: Emitter, node: Node) -> Lowered:
    total = e.op("Add", e.value(node.args["x"]), e.value(node.args["residual"]))
    return _normed(e, node, total), total


def _normed(e: Emitter, node: Node, x: ir.Value) -> ir.Value:
    """``x / sqrt(mean(x²) + eps) * weight``, the mean in fp32."""
    dtype, shape, eps = node.outputs[0].type.dtype, node.args["normalized_shape"], node.args["eps"]
    wide = e.cast(x, dtype, torch.float32)
    axes = e.vector([axis - len(shape) for axis in range(len(shape))])
    mean = e.op("ReduceMean", e.op("Mul", wide, wide), axes, keepdims=1)
    root = e.op("Sqrt", e.op("Add", mean, e.constant(torch.finfo(dtype).eps if eps is None else eps, torch.float32)))
    even = e.cast(e.op("Div", wide, root), torch.float32, dtype)
    weight: Value | None = node.args["weight"]
    return even if weight is None else e.op("Mul", even, e.value(weight))


def _rotary(e: Emitter, node: Node) -> Lowered:
    """``x * [cos, cos] + flipped(x) * [-sin, sin]``, on halves or on neighbours. (Sums and differences of halves would be
    several kernels, and one more that puts them together.)"""
    x, cos, sin = (node.args[key] for key in ("x", "cos", "sin"))
    last, width, size, near = node.args["heads_last"], cos.type.shape[-1], x.type.shape[3], node.args["interleaved"]
    if not (isinstance(size, int) and isinstance(width, int)):
        raise Unsupported("a dynamic size of heads")
    heads = 2 if last else 1
    same = _for_pairs(e, cos, heads, near, turned=False)
    other = _for_pairs(e, sin, heads, near, turned=True)
    whole = e.value(x)
    own = whole if 2 * width == size else _slice(e, whole, 0, 2 * width, 1)
    turned = e.op("Add", e.op("Mul", own, same), e.op("Mul", _flipped(e, own, x.type.shape[:3], width, near), other))
    return turned if 2 * width == size else e.op("Concat", turned, _slice(e, whole, 2 * width, size, 1), axis=-1)


def _for_pairs(e: Emitter, angle: Value, heads: int, near: bool, turned: bool) -> ir.Value:
    """Angles ``[B, S, R]`` for both numbers of each pair, ``[B, S, 2R]`` with an axis for the heads; ``turned``: the first
    number's with the other sign."""

    def make() -> ir.Value:
        own = e.op("Unsqueeze", e.value(angle), e.vector([heads, *([4] if near else [])]))
        both = e.op("Concat", e.op("Neg", own) if turned else own, own, axis=-1)
        if not near:
            return both
        batch, sequence, width = angle.type.shape
        lead = (batch, 1, sequence) if heads == 1 else (batch, sequence, 1)
        return e.reshape(both, (*lead, 2 * width))

    return e.once(("for pairs", angle.name, heads, near, turned), make)


def _flipped(e: Emitter, x: ir.Value, lead: Sequence[Size], width: int, near: bool) -> ir.Value:
    """``[..., 2R]`` with the two numbers of each pair in each other's place."""
    if not near:
        return e.op("Concat", _slice(e, x, width, 2 * width, 1), _slice(e, x, 0, width, 1), axis=-1)
    pairs = e.reshape(x, (*lead, width, 2))
    flipped = e.op("Concat", _slice(e, pairs, 1, 2, 1), _slice(e, pairs, 0, 1, 1), axis=-1)
    return e.reshape(flipped, (*lead, 2 * width))


def _slice(e: Emitter, x: ir.Value, start: int, end: int, step: int) -> ir.Value:
    return e.op("Slice", x, *(e.vector([number]) for number in (start, end, -1, step)))
