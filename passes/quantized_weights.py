"""Weights as integers: by channel, or packed in groups. They are computed when they are read, so nothing is held twice."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.dims import Size
from graphopt.errors import PassError, nearest
from graphopt.ir import Graph, Node, TensorType, Value, Weight
from graphopt.pipeline import Context

LEVELS = 127
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """The operands of a linear that hold its weight, by argument name, each with the suffix of its name."""

    weights: dict[str, tuple[str, Weight]]

    def added_to(self, graph: Graph, name: str) -> dict[str, Value]:
        stem = name.removesuffix(".weight")
        return {
            argument: graph.add_weight(graph.unique(f"{stem}.{suffix}"), weight)
            for argument, (suffix, weight) in self.weights.items()
        }


def is_linear(graph: Graph, node: Node) -> bool:
    """A linear whose weight is a matrix of the model."""
    if node.op != "aten.linear.default" or graph.weight_of(node.args["weight"]) is None:
        return False
    return len(node.args["weight"].type.shape) == 2


def matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def module_of(node: Node) -> str:
    """The path of the module that a node's weight belongs to."""
    name: str = node.args["weight"].name
    return name.removesuffix(".weight").replace(".weight_and_", "+")


def refuse_unknown(kind: str, patterns: Sequence[str], paths: Sequence[str], context: Context) -> None:
    """PassError for a pattern that no linear's module matches, here or in the graph that runs before (which comes after)."""
    context.modules.update(paths)
    if context.is_last:
        for pattern in patterns:
            if pattern != "*" and not fnmatch.filter(context.modules, pattern):
                raise PassError(
                    f"no linear's module matches {pattern!r}", where=kind, hint=nearest(pattern, context.modules)
                )


def quantized_rows(weight: Weight) -> Parts:
    """int8 ``[N, K]`` by ``scale`` ``[N]``, each row's largest magnitude at 127."""
    channels, features = weight.type.shape
    scale = _once(lambda: row_scale(weight.load()))
    numbers = Weight(
        TensorType(torch.int8, (channels, features)),
        lambda: (weight.load() / scale()[:, None]).round().clamp(-LEVELS, LEVELS).to(torch.int8),
    )
    return Parts(
        {"weight": ("int8", numbers), "scale": ("scale", Weight(TensorType(weight.type.dtype, (channels,)), scale))}
    )


def row_scale(weight: Tensor) -> Tensor:
    """A row of zeros may have any scale."""
    largest = weight.abs().amax(1)
    return torch.where(largest > 0, largest, 1.0) / LEVELS


def packed_groups(weight: Weight, bits: int, group: int) -> Parts:
    """Groups of ``group`` input features with a scale each, the largest magnitude of a group, with its sign, at the lowest
    integer: round to nearest."""
    channels, features = weight.type.shape
    groups = -(-_number(features) // group)
    made = _once(lambda: rounded_groups(weight.load(), bits, group))
    packed = Weight(TensorType(torch.uint8, (channels, groups, group * bits // 8)), lambda: made()[0])
    scales = Weight(TensorType(weight.type.dtype, (channels, groups)), lambda: made()[1])
    return Parts({"packed": ("packed", packed), "scales": ("scales", scales)})


def rounded_groups(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """uint8 ``[N, G, group * bits / 8]`` and scales ``[N, G]``."""
    lowest = -(2 ** (bits - 1))
    padded = functional.pad(weight, (0, -weight.shape[1] % group)).reshape(len(weight), -1, group)
    extreme = padded.gather(2, padded.abs().argmax(2, keepdim=True))
    scale = torch.where(extreme == 0, 1.0, extreme) / lowest
    numbers = (padded / scale).round().clamp(lowest, -lowest - 1) - lowest
    return pack(numbers.to(torch.uint8), bits), scale.squeeze(2)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Two numbers of 4 bits in a byte, the first one in the low half."""
    return numbers if bits == 8 else numbers[..., ::2] | (numbers[..., 1::2] << 4)


def _number(size: Size) -> int:
    assert isinstance(size, int)
    return size


def _once(make: Callable[[], T]) -> Callable[[], T]:
    return functools.lru_cache(maxsize=1)(make)
