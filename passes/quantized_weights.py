"""Weights in few bits: by channel, or packed in groups. They are computed when they are read, so nothing is held twice."""

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
from graphopt.ir import Graph, Node, Value
from graphopt.ops.quantization import FP8
from graphopt.passes.rounding import Grid, grid_of, pack
from graphopt.pipeline import Context
from graphopt.schemas.quantization import Treatment
from graphopt.tensors import TensorType, Weight

LEVELS = 127
REDUCED_LEVELS = 63
FP8_LARGEST = torch.finfo(FP8).max
T = TypeVar("T")


@dataclass(frozen=True)
class Parts:
    """The operands of a linear that hold its weight, by argument name, each with the suffix of its name; ``bits`` of a number."""

    weights: dict[str, tuple[str, Weight]]
    bits: int = 8

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


def quantized_rows(weight: Weight, levels: int = LEVELS) -> Parts:
    """int8 ``[N, K]`` by ``scale`` ``[N]``, each row's largest magnitude at ``levels``: 127, or 63 for processors whose products
    of uint8 by int8 saturate in 16 bits."""
    channels, _ = weight.type.shape
    scale = _once(lambda: row_scale(weight.load(), levels))
    numbers = Weight(
        TensorType(torch.int8, weight.type.shape),
        lambda: (weight.load() / scale()[:, None]).round().clamp(-levels, levels).to(torch.int8),
    )
    return Parts(
        {"weight": ("int8", numbers), "scale": ("scale", Weight(TensorType(weight.type.dtype, (channels,)), scale))}
    )


def fp8_rows(weight: Weight) -> Parts:
    """float8_e4m3fn ``[N, K]`` by ``scale`` ``[N]``, each row's largest magnitude at the format's largest number."""
    channels, _ = weight.type.shape
    scale = _once(lambda: row_scale(weight.load(), FP8_LARGEST))
    numbers = Weight(
        TensorType(FP8, weight.type.shape),
        lambda: (weight.load() / scale()[:, None]).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8),
    )
    return Parts(
        {"weight": ("fp8", numbers), "scale": ("scale", Weight(TensorType(weight.type.dtype, (channels,)), scale))}
    )


def row_scale(weight: Tensor, levels: float = LEVELS) -> Tensor:
    """A row of zeros may have any scale."""
    largest = weight.abs().amax(1)
    return torch.where(largest > 0, largest, 1.0) / levels


def packed_groups(weight: Weight, grid: Callable[[], Grid], numbers: Callable[[], Tensor], of: Packing) -> Parts:
    """Groups of input features with a scale each, zeros where the grid is not symmetric: ``numbers`` ``[N, K]`` of a grid.

    With ``fractions`` more groups stand behind them, which hold the weights of the groups' means (:attr:`Grid.rests`)."""
    channels, features = weight.type.shape
    groups = -(-_number(features) // of.group)
    behind = -(-groups // of.group) if of.fractions else 0
    dtype, middle = torch.float16 if of.half else weight.type.dtype, 2.0 ** (of.bits - 1)
    rests = _once(lambda: grid().of_rests())

    def grouped(own: Tensor, count: int) -> Tensor:
        padded = functional.pad(own, (0, count * of.group - own.shape[1]), value=middle)
        return pack(padded.reshape(_number(channels), count, of.group), of.bits)

    def packed() -> Tensor:
        own = grouped(numbers(), groups)
        return torch.cat([own, grouped(rests().numbers(grid().rests), behind)], 1) if behind else own

    def scales() -> Tensor:
        return torch.cat([grid().scales, rests().scales], 1) if behind else grid().scales

    def zeros() -> Tensor:
        whole = grid().whole
        return pack(functional.pad(grid().zeros if whole is None else whole, (0, behind), value=middle), of.bits)

    count = groups + behind
    parts = {
        "packed": ("packed", Weight(TensorType(torch.uint8, (channels, count, of.group * of.bits // 8)), packed)),
        "scales": ("scales", Weight(TensorType(dtype, (channels, count)), lambda: scales().to(dtype))),
    }
    if not of.symmetric:
        parts["zeros"] = "zeros", Weight(TensorType(torch.uint8, (channels, -(-count * of.bits // 8))), zeros)
    return Parts(parts, of.bits)


@dataclass(frozen=True)
class Packing:
    """Bits of a number, input features of a group, whether zero is in the middle of the numbers, or even between them; whether
    scales are stored in fp16."""

    bits: int
    group: int
    symmetric: bool
    fractions: bool = False
    half: bool = False

    @classmethod
    def of(cls, treatment: Treatment) -> Packing:
        half = treatment.scales == "fp16"
        return cls(treatment.bits, treatment.group, treatment.symmetric, treatment.fractions, half)

    def grid(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        return grid_of(
            weight.float(),
            self.bits,
            self.group,
            symmetric=self.symmetric,
            fractions=self.fractions,
            half=self.half,
            importance=importance,
        )

    def means(self, features: int) -> Tensor:
        """``[K, P + G]``: a product with it fills inputs up to whole groups (P zeros) and gives the mean of each group."""
        groups = -(-features // self.group)
        own = torch.eye(groups).repeat_interleave(self.group, 0)[:features] / self.group
        return functional.pad(own, (groups * self.group - features, 0))


def nearest_groups(weight: Weight, of: Packing, importance: Tensor | None = None) -> Parts:
    """Round to nearest; by ``importance`` ``[K]``, with ranges that lose least."""
    grid = _once(lambda: of.grid(weight.load(), importance))
    return packed_groups(weight, grid, lambda: grid().numbers(weight.load().float()), of)


#: The numbers of 4-bit NormalFloat: quantiles of a normal distribution, one of them 0 (Dettmers et al. 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4_groups(weight: Weight, group: int) -> Parts:
    """Each group by its largest magnitude, as the nearest numbers of NormalFloat."""
    channels, features = weight.type.shape
    groups = -(-_number(features) // group)
    codebook = torch.tensor(NF4)

    def grouped() -> Tensor:
        padded = functional.pad(weight.load().float(), (0, groups * group - _number(features)))
        return padded.reshape(-1, groups, group)

    def scales() -> Tensor:
        largest = grouped().abs().amax(2)
        return torch.where(largest > 0, largest, 1.0)

    def packed() -> Tensor:
        middles = (codebook[1:] + codebook[:-1]) / 2
        return pack(torch.bucketize(grouped() / scales()[..., None], middles), 4)

    dtype = weight.type.dtype
    return Parts({
        "packed": ("packed", Weight(TensorType(torch.uint8, (channels, groups, group // 2)), packed)),
        "scales": ("scales", Weight(TensorType(dtype, (channels, groups)), lambda: scales().to(dtype))),
        "codebook": ("codebook", Weight.of(codebook.to(dtype))),
    }, bits=4)  # fmt: skip


def _number(size: Size) -> int:
    assert isinstance(size, int)
    return size


def _once(make: Callable[[], T]) -> Callable[[], T]:
    return functools.lru_cache(maxsize=1)(make)
