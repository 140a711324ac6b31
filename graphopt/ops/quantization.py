"""Ops of quantized numbers: symmetric int8 and fp8 with a scale, linears on them, weights packed in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.ops.library import own_op

FP8 = torch.float8_e4m3fn
QUANTIZED = (torch.int8, FP8)


def scaled(args: Mapping[str, Any]) -> tuple[torch.Size, torch.dtype]:
    """The shape of x and the dtype of its scale. ValueError if they do not fit together."""
    x, scale = args["x"], args["scale"]
    if scale.ndim not in (0, x.ndim) or not scale.is_floating_point():
        raise ValueError(f"a scale is one number or has an axis for each of x {list(x.shape)}, not {list(scale.shape)}")
    if any(size not in (1, whole) for size, whole in zip(scale.shape, x.shape[-scale.ndim :], strict=False)):
        raise ValueError(f"scale {list(scale.shape)} does not fit x {list(x.shape)}")
    return x.shape, scale.dtype


def _quantize_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    shape, dtype = scaled(args)
    if args["x"].dtype != dtype:
        raise ValueError(f"x is {args['x'].dtype}, its scale {dtype}")
    dtype = args["dtype"] or torch.int8
    if dtype not in QUANTIZED:
        raise ValueError(f"{dtype} is neither int8 nor float8_e4m3fn")
    return (args["x"].new_empty(shape, dtype=dtype),)


def _dequantize_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    shape, dtype = scaled(args)
    if args["x"].dtype not in QUANTIZED:
        raise ValueError(f"x is {args['x'].dtype}, neither int8 nor float8_e4m3fn")
    return (args["x"].new_empty(shape, dtype=dtype),)


@own_op("(Tensor x, Tensor scale, *, ScalarType? dtype=None) -> Tensor", _quantize_shapes)
def quantize(x: Tensor, scale: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """``round(x / scale)`` as int8 (the default) or float8_e4m3fn, saturated; halves go to the even number (ONNX
    QuantizeLinear, zero point 0).

    scale: one number, or an axis for each of x, of size 1 or x's own (``[N, 1]`` for a weight's channels)."""
    if dtype == FP8:
        return (x / scale).clamp(-torch.finfo(FP8).max, torch.finfo(FP8).max).to(FP8)
    return (x / scale).round().clamp(-128, 127).to(torch.int8)


@own_op("(Tensor x, Tensor scale) -> Tensor", _dequantize_shapes)
def dequantize(x: Tensor, scale: Tensor) -> Tensor:
    """``x * scale`` in the scale's dtype; x int8 or float8_e4m3fn."""
    return x.to(scale.dtype) * scale


def _linear_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, weight, scale, bias = (args[name] for name in ("x", "weight", "scale", "bias"))
    wanted = x.dtype if x.dtype in QUANTIZED else torch.int8
    if weight.dtype != wanted or weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight {list(weight.shape)} ({weight.dtype}) is no {str(wanted).removeprefix('torch.')} [N, {x.shape[-1]}]"
        )
    if scale.shape not in ((), (weight.shape[0],)) or (bias is not None and bias.shape != weight.shape[:1]):
        raise ValueError(f"scale and bias are of {weight.shape[0]} channels")
    return (x.new_empty((*x.shape[:-1], weight.shape[0])),)


@own_op("(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None, *, bool per_token=False) -> Tensor", _linear_shapes)
def dynamic_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None, *, per_token: bool = False
) -> Tensor:
    """A linear whose input is quantized to 8 bits by its own range when it runs.

    x ``[..., K]``, weight int8 ``[N, K]``, scale ``[N]`` or one number, bias ``[N]``; result ``[..., N]``. The products are of
    integers; what is rounded is the input alone: all of it asymmetrically by its smallest and largest element (ONNX
    DynamicQuantizeLinear), or ``per_token``, each row by its largest magnitude."""
    rounded = _by_token(x) if per_token else _by_range(x)
    product = functional.linear(rounded, weight.to(x.dtype) * (scale if scale.ndim == 0 else scale[:, None]))
    return product if bias is None else product + bias


def _by_range(x: Tensor) -> Tensor:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = ((high - low) / 255).clamp(min=torch.finfo(x.dtype).tiny)
    zero = (-low / step).round().clamp(0, 255)
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


def _by_token(x: Tensor) -> Tensor:
    step = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / 127
    return (x / step).round().clamp(-127, 127) * step


def _static_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    if args["x"].dtype not in QUANTIZED or args["x_scale"].ndim:
        raise ValueError(f"x is {args['x'].dtype}, not int8 or float8_e4m3fn with one scale")
    (result,) = _linear_shapes(args)
    return (result.to(args["x_scale"].dtype),)


@own_op(
    "(Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor",
    _static_shapes,
)
def static_linear(x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear on integers, or on numbers of 8 bits: ``(x @ weight.T) * x_scale * scale + bias``.

    x int8 or float8_e4m3fn ``[..., K]`` with one scale, weight ``[N, K]`` of the same dtype with a scale for each channel,
    ``[N]``, or one; result in the scales' dtype, ``[..., N]``."""
    wide = torch.promote_types(x_scale.dtype, torch.float32)  # whole sums do not fit into halves
    product = functional.linear(x.to(wide), weight.to(wide)) * (x_scale.to(wide) * scale)
    return (product if bias is None else product + bias).to(x_scale.dtype)


def _check_groups(args: Mapping[str, Any]) -> None:
    """ValueError unless packed ``[..., G, bytes]``, scales, zeros and codebook fit together."""
    packed, scales, zeros, codebook, bits = (args[name] for name in ("packed", "scales", "zeros", "codebook", "bits"))
    if bits not in (4, 8) or packed.dtype != torch.uint8 or packed.ndim < 2 or packed.shape[:-1] != scales.shape:
        raise ValueError(
            f"packed {list(packed.shape)} ({packed.dtype}) and scales {list(scales.shape)} do not fit together"
        )
    bytes_of_zeros = -(-scales.shape[-1] * bits // 8)
    if zeros is not None and (zeros.shape != (*scales.shape[:-1], bytes_of_zeros) or zeros.dtype != torch.uint8):
        wanted = [*scales.shape[:-1], bytes_of_zeros]
        raise ValueError(f"zeros {list(zeros.shape)} ({zeros.dtype}) are no uint8 {wanted}")
    if codebook is not None and (codebook.shape != (2**bits,) or zeros is not None):
        raise ValueError(
            f"codebook {list(codebook.shape)} does not hold {2**bits} numbers, or there are zeros beside it"
        )


def _packed_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    x, packed, bias = (args[name] for name in ("x", "packed", "bias"))
    bits, block = args["bits"], args["block"]
    channels, groups = packed.shape[:2]
    if block * bits % 8 or packed.shape != (channels, groups, block * bits // 8):
        raise ValueError(f"packed {list(packed.shape)} is no uint8 [N, groups, {block * bits // 8}]")
    _check_groups(args)
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias {list(bias.shape)} is not of {channels} channels")
    if not (groups - 1) * block < x.shape[-1] <= groups * block:
        raise ValueError(f"{groups} groups of {block} do not fit {x.shape[-1]} features")
    return (x.new_empty((*x.shape[:-1], channels)),)


@own_op(
    "(Tensor x, Tensor packed, Tensor scales, Tensor? zeros=None, Tensor? codebook=None, Tensor? bias=None, *, int bits, "
    "int block) -> Tensor",
    _packed_shapes,
)
def packed_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    bits: int,
    block: int,
) -> Tensor:
    """A linear whose weight is packed in groups along its input features (com.microsoft.MatMulNBits).

    x ``[..., K]``; packed uint8 ``[N, G, block * bits / 8]``, low nibble first; scales ``[N, G]``; zeros uint8 ``[N, bytes]``,
    packed like the numbers, by default the middle of the range, ``2 ** (bits - 1)``; a weight is ``(number - zero) * scale``,
    or with a codebook ``[2 ** bits]`` ``codebook[number] * scale``. Result ``[..., N]``."""
    weight = unpacked(packed, scales, zeros, codebook, bits)[:, : x.shape[-1]]
    return functional.linear(x, weight.to(x.dtype), bias)


def unpacked(packed: Tensor, scales: Tensor, zeros: Tensor | None, codebook: Tensor | None, bits: int) -> Tensor:
    """The weight ``[..., G * block]`` that groups ``[..., G, bytes]`` hold."""
    numbers = nibbles(packed) if bits == 4 else packed
    if codebook is not None:
        own = codebook.to(scales.dtype)[numbers.int()]
    elif zeros is None:
        own = numbers.to(scales.dtype) - 2 ** (bits - 1)
    else:
        each = (nibbles(zeros) if bits == 4 else zeros)[..., : scales.shape[-1]]
        own = numbers.to(scales.dtype) - each.to(scales.dtype)[..., None]
    return (own * scales[..., None]).flatten(-2)


def nibbles(packed: Tensor) -> Tensor:
    """Both halves of each byte, the low one first, along the last axis."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def _unpack_shapes(args: Mapping[str, Any]) -> tuple[Tensor, ...]:
    _check_groups(args)
    packed, scales, bits, features = (args[name] for name in ("packed", "scales", "bits", "features"))
    if not 0 < features <= packed.shape[-2] * packed.shape[-1] * 8 // bits:
        raise ValueError(f"packed {list(packed.shape)} does not hold {features} features")
    return (scales.new_empty((*packed.shape[:-2], features)),)


@own_op(
    "(Tensor packed, Tensor scales, Tensor? zeros=None, Tensor? codebook=None, *, int bits, int features) -> Tensor",
    _unpack_shapes,
)
def unpack_rows(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    codebook: Tensor | None = None,
    *,
    bits: int,
    features: int,
) -> Tensor:
    """Rows of a weight that is packed in groups, as :func:`packed_linear` takes it: packed uint8 ``[..., G, bytes]``, scales
    ``[..., G]``; result ``[..., features]`` in the scales' dtype."""
    return unpacked(packed, scales, zeros, codebook, bits)[..., :features]
