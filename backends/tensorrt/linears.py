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
from graphopt.backends.onnx.quantized import static_linear, turned, with_bias, zeros
from graphopt.backends.tensorrt.options import Accumulate, Profile
from graphopt.dims import Size, evaluate
from graphopt.ir import Node, Value
from graphopt.tensors import TensorType, Weight

_TILE = 64  # rows and columns of the smallest tiles that kernels take for such products
_PARTS = 4  # at most
_HALVES = (torch.float16, torch.bfloat16)
#: Features, from which on a sum is long. Of a single row's shorter parts the compiler makes multiplications and sums instead of
#: products: eight times 2048 x 2048 in parts of 512 takes 285 us on an H200, and 75 as a whole.
_LONG = 2048


@dataclass(frozen=True)
class Device:
    """What products are to fill: ``processors`` of the GPU, at the expected sizes of these ``profiles``."""

    processors: int
    profiles: Sequence[Profile]

    @classmethod
    def here(cls, profiles: Sequence[Profile]) -> Device:
        """The GPU of this machine."""
        return cls(torch.cuda.get_device_properties(0).multi_processor_count, profiles)

    def parts(self, lead: Sequence[Size], channels: int, features: int) -> int:
        """How many parts, long ones, of the sums of a product ``[*lead, features] x [features, channels]`` the processors have
        room for at all of the sizes: a power of two that divides the features, 1 for the whole."""
        tiles = max(self._tiles(profile, lead, channels) for profile in self.profiles)
        parts = _PARTS
        while parts > 1 and (parts * tiles > self.processors or features % parts or features // parts < _LONG):
            parts //= 2
        return parts

    def _tiles(self, profile: Profile, lead: Sequence[Size], channels: int) -> int:
        env = {name: best for name, (_, best, _) in profile.items()}
        rows: int = math.prod(evaluate(size, env) for size in lead)
        return -(-rows // _TILE) * -(-channels // _TILE)


def in_parts(device: Device) -> Lowering:
    """Linears in half precision whose sums are long and whose tiles are few. The parts' sums are in half precision: of parts in
    fp32 between casts 10.6 keeps the weights in fp32 and takes slow kernels, which take twice the time of the whole."""

    def lower(e: Emitter, node: Node) -> Lowered:
        x, weight, bias = (node.args[key] for key in ("input", "weight", "bias"))
        if weight.type.dtype not in _HALVES:
            raise Unsupported("fp32")
        parts = _parts(e, device, x, weight)
        total = _summed(e, e.op("MatMul", _rows_in_parts(e, x, parts), _columns_in_parts(e, weight, parts)), node)
        return with_bias(e, total, bias)

    return lower


def integers_in_parts(device: Device) -> Lowering:
    """The same of int8, whose parts are added up in the precision of the result."""

    def lower(e: Emitter, node: Node) -> Lowered:
        x, x_scale, weight, scale, bias = (node.args[key] for key in ("x", "x_scale", "weight", "scale", "bias"))
        if weight.type.dtype != torch.int8:
            raise Unsupported("fp8")
        parts = _parts(e, device, x, weight)
        rows = e.op("DequantizeLinear", _rows_in_parts(e, x, parts), e.value(x_scale), zeros(e, x_scale, x.type.dtype))
        columns = e.op(
            "DequantizeLinear", _columns_in_parts(e, weight, parts), e.value(scale), zeros(e, scale, torch.int8), axis=2
        )
        return with_bias(e, _summed(e, e.op("MatMul", rows, columns), node), bias)

    return lower


def _parts(e: Emitter, device: Device, x: Value, weight: Value) -> int:
    """How many; ``Unsupported`` unless sums are long, and tiles few."""
    channels, features = weight.type.shape
    if not (isinstance(channels, int) and isinstance(features, int) and e.is_weight(weight) and len(x.type.shape) > 1):
        raise Unsupported("no constant weight, or a single row")
    if features < 2 * _LONG:
        raise Unsupported("a short sum")
    parts = device.parts(x.type.shape[:-1], channels, features)
    if parts == 1:
        raise Unsupported("enough tiles, or features that no parts divide")
    return parts


def _rows_in_parts(e: Emitter, x: Value, parts: int) -> ir.Value:
    """``[..., K]`` as ``[P, M, K/P]``."""
    each = x.type.shape[-1] // parts
    return e.op("Transpose", e.op("Reshape", e.value(x), e.vector((-1, parts, each))), perm=[1, 0, 2])


def _columns_in_parts(e: Emitter, weight: Value, parts: int) -> ir.Value:
    """``[N, K]`` as ``[P, K/P, N]``, written so: the builder dequantizes no int8 that is computed."""
    channels, features = weight.type.shape
    own, name = e.graph.weights[weight.name], f"{weight.name}.{parts}_parts"

    def load() -> torch.Tensor:
        rows = own.load()
        return rows.reshape(len(rows), parts, -1).permute(1, 2, 0).contiguous()

    type = TensorType(own.type.dtype, (parts, features // parts, channels))
    return e.once(("in parts", parts, weight.name), lambda: e.external(name, Weight(type, load)))


def _summed(e: Emitter, parts: ir.Value, node: Node) -> ir.Value:
    return e.reshape(e.op("ReduceSum", parts, e.vector([0]), keepdims=0), node.output.type.shape)


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


def of_floats(accumulate: Accumulate) -> Lowering:
    """The product of what was quantized, by the dequantized weight: where this one must not be of few bits."""

    def lower(e: Emitter, node: Node) -> Lowered:
        made, weight, scale = node.args["x"].producer, node.args["weight"], node.args["scale"]
        if made is None or made.op != "graphopt.quantize.default" or not (e.is_weight(weight) and e.is_weight(scale)):
            raise Unsupported("an operand that is not quantized here")
        dtype = node.output.type.dtype
        numbers, steps = e.graph.weights[weight.name], e.graph.weights[scale.name]

        def floats() -> torch.Tensor:
            return (numbers.load().float() * steps.load().float().reshape(-1, 1)).to(dtype).T.contiguous()

        own = TensorType(dtype, weight.type.shape[::-1])
        name = f"{weight.name}.floats"
        columns = e.once(("floats", weight.name), lambda: e.external(name, Weight(own, floats)))
        wide = is_summed_wide(own.shape[0], dtype, accumulate)
        return with_bias(e, product(e, e.value(made.args["x"]), columns, dtype, wide), node.args["bias"])

    return lower


def static_linears(device: Device | None, accumulate: Accumulate) -> dict[str, Lowering]:
    """The forms of a linear in few bits, by name."""
    forms: dict[str, Lowering] = {} if device is None else {"integers in parts": integers_in_parts(device)}
    return {**forms, "integers": static_linear, "floats": of_floats(accumulate)}


def packed_weights(lowering: Lowering) -> Lowering:
    """What is made of packed weights, of which the importer dequantizes int4 by one number a group, and int8 by none that is
    negative, as those of groups are."""

    def lower(e: Emitter, node: Node) -> Lowered:
        if node.args["bits"] == 8:
            raise Unsupported("TensorRT dequantizes no int8 in groups whose scales may be negative", "bits: 4")
        if node.args["zeros"] is not None or node.args["codebook"] is not None:
            raise Unsupported(
                "TensorRT dequantizes no weights with zero points or a codebook",
                "quantize with scheme: weight_only, bits: 4 and symmetric: true",
            )
        if not e.is_weight(node.args["scales"]):
            raise Unsupported("scales that are computed", "cast before quantize, or leave scales: fp16 out")
        return lowering(e, node)

    return lower
