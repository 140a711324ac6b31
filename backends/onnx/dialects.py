"""The dialects. ``standard``: any reader of opset 23; ``onnxruntime`` adds its contrib ops (see its backend)."""

from __future__ import annotations

from graphopt.backends.onnx.attention import STANDARD_FORMS, update_cache
from graphopt.backends.onnx.convolutions import CONVOLUTIONS
from graphopt.backends.onnx.emitter import Dialect
from graphopt.backends.onnx.lowerings import LOWERINGS
from graphopt.backends.onnx.moves import MOVES
from graphopt.backends.onnx.quantized import QUANTIZED
from graphopt.backends.onnx.routing import ROUTING

OPSET = 23

STANDARD = Dialect(
    "standard",
    {"": OPSET},
    {**LOWERINGS, **MOVES, **CONVOLUTIONS, **ROUTING, **QUANTIZED, "graphopt.kv_cache_update": update_cache},
    {"graphopt.attention": STANDARD_FORMS},
)
