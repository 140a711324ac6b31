"""The ``onnxruntime`` dialect: the standard one, with contrib ops where they are right and may be faster."""

from __future__ import annotations

import torch

from graphopt.backends.onnx.attention import STANDARD_FORMS, Attention, without_padding
from graphopt.backends.onnx.dialects import OPSET, STANDARD
from graphopt.backends.onnx.emitter import Dialect, Emitter, Lowered
from graphopt.backends.onnxruntime.cached import CONTRIB, group_query
from graphopt.backends.onnxruntime.quantized import dynamic_linear, packed_linear, static_linear
from graphopt.backends.quirks import quirks_in_force
from graphopt.ir import Node


def _multi_head(e: Emitter, node: Node, mask_as: str) -> Lowered:
    """com.microsoft.MultiHeadAttention: one head count; key padding as int32 ``[B, T]`` or everything as a bias."""
    a = Attention(node)
    args = node.args
    a.require(a.sinks is None and not a.softcap, "sinks or softcap")
    a.require(isinstance(a.heads, int) and a.heads == a.kv_heads, "grouped heads")
    a.require(isinstance(a.size, int) and isinstance(a.value_size, int), "a dynamic head size")
    key_mask = bias = None
    unidirectional = 0
    if mask_as == "keys":
        a.require(not a.has_other_masks, "a bias, lengths, segments or a prefix")
        a.require(not a.has_limits, "a window or chunks")
        a.require(a.causal == "none" or (a.causal_is_upper_left and a.queries == a.keys), "causal of unequal lengths")
        unidirectional = int(a.causal != "none")
        if args["key_mask"] is not None:
            mask = e.value(args["key_mask"])
            key_mask = e.once(("int mask", mask.name), lambda: e.cast(mask, torch.bool, torch.int32))
    else:
        bias = a.additive(e, with_causal=True)
        bias = a.whole(e, bias) if bias is not None else None
    sizes = ((a.q, a.heads, a.size), (a.k, a.heads, a.size), (a.v, a.heads, a.value_size))
    parts = [a.heads_last(e, *each) for each in sizes]
    result = e.op(
        "MultiHeadAttention", *parts, None, key_mask, bias, domain=CONTRIB,
        num_heads=a.heads, scale=a.scale, unidirectional=unidirectional,
    )  # fmt: skip
    return a.from_heads_last(e, result)


def _multi_head_keys(e: Emitter, node: Node) -> Lowered:
    return _multi_head(e, node, "keys")


def _multi_head_bias(e: Emitter, node: Node) -> Lowered:
    return _multi_head(e, node, "bias")


def _sigmoid_gate(e: Emitter, node: Node) -> Lowered:
    """``x * sigmoid(alpha * x)`` as one op: SiLU is alpha 1."""
    x = node.args["x"] if "x" in node.args else node.args["self"]
    return e.op("QuickGelu", e.value(x), domain=CONTRIB, alpha=float(node.args.get("alpha", 1.0)))


def _gated(e: Emitter, node: Node) -> Lowered:
    if node.args["activation"] != "silu":
        return STANDARD.lowerings["graphopt.gated_activation"](e, node)
    gate = e.op("QuickGelu", e.value(node.args["gate"]), domain=CONTRIB, alpha=1.0)
    return e.op("Mul", gate, e.value(node.args["up"]))


def onnxruntime_dialect(version: str) -> Dialect:
    """The dialect of an installed version, its faults included."""
    forms = {
        **STANDARD_FORMS,
        "attention_without_padding": without_padding,
        "multi_head_key_mask": _multi_head_keys,
        "multi_head_bias": _multi_head_bias,
    }
    lowerings = {
        **STANDARD.lowerings,
        "aten.silu": _sigmoid_gate,
        "graphopt.quick_gelu": _sigmoid_gate,
        "graphopt.gated_activation": _gated,
        "graphopt.cached_attention": group_query,
        "graphopt.static_linear": static_linear,
        "graphopt.dynamic_linear": dynamic_linear,
        "graphopt.packed_linear": packed_linear,
    }
    return Dialect(
        "onnxruntime", {"": OPSET, CONTRIB: 1}, lowerings, {"graphopt.attention": forms},
        quirks_in_force("onnxruntime", version),
    )  # fmt: skip
