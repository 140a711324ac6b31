"""What linears of half precision are summed in, and how many processors sum.

A product ``[M, K] x [K, N]`` runs on as many processors as its result has tiles, each of which adds up all of K. Where that
leaves most of them idle, parts of K are products of their own (split-K), in one batch::

    y = MatMul(x, W) + b     ->     y = ReduceSum(MatMul([P, M, K/P], [P, K/P, N]), axis 0) + b
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from graphopt.backends.onnx.emitter import Emitter, Lowered, Lowering, Unsupported
from graphopt.backends.onnx.lowerings import LOWERINGS
from graphopt.backends.onnx.quantized import turned, with_bias
from graphopt.backends.tensorrt.options import Accumulate, Profile
from graphopt.dims import evaluate
from graphopt.ir import Node

_TILE = 64  # rows and columns of the smallest tiles that kernels take for such products
_PARTS = 2  # as fast as four on an H200
_HALVES = (torch.float16, torch.bfloat16)
_LONG = 2048  # features, from which on a sum is long


@dataclass(frozen=True)
class Device:
    """What products are to fill: ``processors`` of the GPU, at the expected sizes of these ``profiles``."""

    processors: int
    profiles: Sequence[Profile]

    @classmethod
    def here(cls, profiles: Sequence[Profile]) -> Device:
        """The GPU of this machine."""
        return cls(torch.cuda.get_device_properties(0).multi_processor_count, profiles)

    def is_idle(self, node: Node) -> bool:
        """Whether a linear leaves half of the processors idle, at all of the sizes."""
        channels = node.args["weight"].type.shape[0]
        lead = node.args["input"].type.shape[:-1]
        for profile in self.profiles:
            env = {name: best for name, (_, best, _) in profile.items()}
            rows = math.prod(evaluate(size, env) for size in lead)
            if -(-rows // _TILE) * -(-int(channels) // _TILE) * 2 > self.processors:
                return False
        return True


def in_parts(device: Device) -> Lowering:
    """Linears in half precision whose sums are long and whose tiles are few. The parts' sums are in half precision: of parts in
    fp32 between casts 10.6 keeps the weights in fp32 and takes slow kernels, which take twice the time of the whole."""

    def lower(e: Emitter, node: Node) -> Lowered:
        x, weight, bias = (node.args[key] for key in ("input", "weight", "bias"))
        features, dtype = weight.type.shape[-1], weight.type.dtype
        wanted = dtype in _HALVES and e.is_weight(weight) and len(x.type.shape) > 1
        if not (wanted and isinstance(features, int) and features >= _LONG and features % _PARTS == 0):
            raise Unsupported("a short sum, or fp32")
        if not device.is_idle(node):
            raise Unsupported("enough tiles")
        channels = weight.type.shape[0]
        each = features // _PARTS
        rows = e.op("Transpose", e.op("Reshape", e.value(x), e.vector((-1, _PARTS, each))), perm=[1, 0, 2])
        columns = e.once(
            ("in parts", weight.name),
            lambda: e.op("Transpose", e.reshape(e.value(weight), (channels, _PARTS, each)), perm=[1, 2, 0]),
        )
        total = e.op("ReduceSum", e.op("MatMul", rows, columns), e.vector([0]), keepdims=0)
        return with_bias(e, e.reshape(total, (*x.type.shape[:-1], channels)), bias)

    return lower


def product(e: Emitter, x: ir.Value, columns: ir.Value, dtype: torch.dtype, wide: bool) -> ir.Value:
    """``[..., K] x [K, N]``. ``wide``: half precision summed in fp32, by a product of fp32 between casts, which the compiler
    makes one half-precision kernel of."""
    if not wide:
        return e.op("MatMul", x, columns)
    weight = e.once(("wide", columns.name), lambda: e.cast(columns, dtype, torch.float32))
    return e.cast(e.op("MatMul", e.cast(x, dtype, torch.float32), weight), torch.float32, dtype)


def is_summed_wide(features: object, dtype: torch.dtype, accumulate: Accumulate) -> bool:
    """Whether sums of so many features are to be in fp32."""
    if accumulate == "fastest" or dtype not in _HALVES:
        return False
    return accumulate == "fp32" or not isinstance(features, int) or features >= _LONG


def summed_wide(accumulate: Accumulate) -> Lowering:
    def lower(e: Emitter, node: Node) -> Lowered:
        x, weight, bias = (node.args[key] for key in ("input", "weight", "bias"))
        dtype = weight.type.dtype
        if not is_summed_wide(weight.type.shape[-1], dtype, accumulate):
            raise Unsupported("no half precision, or a short sum")
        return with_bias(e, product(e, e.value(x), turned(e, e.value(weight)), dtype, True), bias)

    return lower


def linears(device: Device | None, accumulate: Accumulate) -> dict[str, Lowering]:
    """The forms of a linear, by name. ``device``: one whose processors long sums are split for."""
    forms: dict[str, Lowering] = {} if device is None else {"parts": in_parts(device)}
    return {**forms, "summed wide": summed_wide(accumulate), "whole": LOWERINGS["aten.linear"]}
