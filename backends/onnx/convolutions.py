"""Convolutions and the normalizations that go with them in ONNX."""

from __future__ import annotations

import numpy as np

from graphopt.backends.onnx.emitter import Emitter, Lowered, Table, Unsupported
from graphopt.dims import Dim
from graphopt.ir import Node

CONVOLUTIONS = Table()
lowers = CONVOLUTIONS.lowers


@lowers("aten.conv1d", "aten.conv2d", "aten.conv3d")
def _conv(e: Emitter, node: Node) -> Lowered:
    args = node.args
    axes = len(args["input"].type.shape) - 2
    if isinstance(args["padding"], str):
        raise Unsupported("padding by a word")

    def spread(sizes: tuple[int, ...]) -> list[int]:
        return list(sizes) * axes if len(sizes) == 1 else list(sizes)

    operands = [args[key] for key in ("input", "weight", "bias") if args[key] is not None]
    return e.op(
        "Conv", *map(e.value, operands), strides=spread(args["stride"]), dilations=spread(args["dilation"]),
        pads=spread(args["padding"]) * 2, group=args["groups"],
    )  # fmt: skip


@lowers("aten.group_norm")
def _group_norm(e: Emitter, node: Node) -> Lowered:
    args = node.args
    channels = args["input"].type.shape[1]
    if isinstance(channels, Dim):
        raise Unsupported("a dynamic number of channels")
    dtype = args["input"].type.dtype
    scale, shift = (
        e.value(args[key]) if args[key] is not None else e.constant(np.full(channels, number), dtype)
        for key, number in (("weight", 1.0), ("bias", 0.0))
    )
    return e.op(
        "GroupNormalization", e.value(args["input"]), scale, shift, num_groups=args["num_groups"], epsilon=args["eps"]
    )


@lowers("aten.batch_norm")
def _batch_norm(e: Emitter, node: Node) -> Lowered:
    args = node.args
    needed = [args[key] for key in ("weight", "bias", "running_mean", "running_var")]
    if args["training"] or any(value is None for value in needed):
        raise Unsupported("statistics of the batch itself")
    return e.op("BatchNormalization", e.value(args["input"]), *map(e.value, needed), epsilon=args["eps"])
