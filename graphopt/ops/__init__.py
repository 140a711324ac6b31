"""The ``graphopt::`` torch ops. Each body is plain torch: the definition that passes, backends and tests are held to."""

from graphopt.ops.attention import visible_keys
from graphopt.ops.library import SHAPES
from graphopt.ops.quantization import dequantize, dynamic_linear, packed_linear, quantize, static_linear, unpack_rows

__all__ = [
    "SHAPES",
    "dequantize",
    "dynamic_linear",
    "packed_linear",
    "quantize",
    "static_linear",
    "unpack_rows",
    "visible_keys",
]
