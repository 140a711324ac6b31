"""Which number of few bits each weight becomes: grids with a scale and a zero for each group of input features, round to
nearest on them, and GPTQ (Frantar et al. 2022), which lets later weights make up for what earlier ones lost."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import PassError

_SHRINKS = tuple(1 - step / 40 for step in range(17))  # of a group's range, that a search tries: 1 to 0.6
_BLOCK = 128  # columns between which GPTQ corrects all later ones at once


@dataclass(frozen=True)
class Grid:
    """Numbers from 0 to ``2 ** bits - 1`` for a weight ``[N, K]``: ``(number - zero) * scale``, scale and zero ``[N, G]`` for
    each ``size`` input features. Where zeros lie between whole numbers, ``whole`` are the whole ones near them. ``half``: scales
    are numbers of fp16."""

    bits: int
    size: int
    scales: Tensor
    zeros: Tensor
    whole: Tensor | None = None
    half: bool = False

    def numbers(self, weight: Tensor) -> Tensor:
        """The nearest of the grid's numbers, ``[N, K]``, in the weight's dtype."""
        scales, zeros = (
            each.repeat_interleave(self.size, 1)[:, : weight.shape[1]] for each in (self.scales, self.zeros)
        )
        return self.nearest(weight, scales, zeros)

    def nearest(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
        return (weight / scales + zeros).round().clamp(0, 2**self.bits - 1)

    @property
    def rests(self) -> Tensor:
        """What whole zeros take from a group's weights, times its size: the weight of the group's mean, ``[N, G]``."""
        assert self.whole is not None
        return (self.whole - self.zeros) * self.scales * self.size

    def of_rests(self) -> Grid:
        """The grid of the rests: symmetric, of the same bits and group size. Rests that are on it stay as they are."""
        return grid_of(self.rests, self.bits, self.size, symmetric=True, half=self.half)

    def values(self, numbers: Tensor) -> Tensor:
        """What the numbers ``[N, K]`` stand for."""
        scales, zeros = (
            each.repeat_interleave(self.size, 1)[:, : numbers.shape[1]] for each in (self.scales, self.zeros)
        )
        return (numbers - zeros) * scales


def grid_of(
    weight: Tensor,
    bits: int,
    size: int,
    *,
    symmetric: bool,
    fractions: bool = False,
    half: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """The grid whose ends are each group's smallest and largest weight, its zero the nearest whole number; with ``fractions``
    where it falls, to what numbers of the same ``bits`` can say of :attr:`Grid.rests`; ``symmetric``, its largest magnitude,
    with its sign, at the lowest number and zero in the middle. ``half`` rounds scales to fp16.

    ``importance`` ``[K]``: how much an input feature's error counts; then each group's range is the one among smaller
    ones that has the least squared error."""
    groups = _grouped(weight, size)

    def make(shrink: float) -> tuple[Tensor, Tensor]:
        scale, zero = _symmetric(groups, bits, shrink) if symmetric else _asymmetric(groups, bits, shrink)
        return _halved(scale) if half else scale, zero if fractions else zero.round()

    if importance is None:
        return _with_rests(Grid(bits, size, *make(1.0), half=half), fractions)
    counts = _grouped(importance[None], size)
    least = torch.full(groups.shape[:2], torch.inf)
    scales, zeros = make(1.0)
    for shrink in _SHRINKS:
        scale, zero = make(shrink)
        numbers = (groups / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
        error = ((((numbers - zero[..., None]) * scale[..., None]) - groups).square() * counts).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return _with_rests(Grid(bits, size, scales, zeros, half=half), fractions)


def _with_rests(grid: Grid, fractions: bool) -> Grid:
    """With ``fractions`` the grid whose zeros are those that rests of few bits can say."""
    if not fractions:
        return grid
    wanted = replace(grid, whole=grid.zeros.round())
    of_rests = wanted.of_rests()
    rests = of_rests.values(of_rests.numbers(wanted.rests))
    return replace(wanted, zeros=wanted.zeros.round() - rests / (grid.scales * grid.size))


def _grouped(weight: Tensor, size: int) -> Tensor:
    """``[N, K]`` as ``[N, G, size]``, zeros behind the end."""
    return functional.pad(weight, (0, -weight.shape[1] % size)).reshape(len(weight), -1, size)


def _symmetric(groups: Tensor, bits: int, shrink: float) -> tuple[Tensor, Tensor]:
    middle = 2.0 ** (bits - 1)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    return torch.where(extreme == 0, 1.0, extreme * shrink) / -middle, torch.full_like(extreme, middle)


def _halved(scales: Tensor) -> Tensor:
    """Numbers of fp16 other than 0."""
    own, limits = scales.half(), torch.finfo(torch.float16)
    if not own.isfinite().all():
        raise PassError(
            f"a group of weights has a scale of {float(scales.abs().max()):.3g}, more than fp16 holds",
            hint="scales: fp32",
        )
    return torch.where(own == 0, limits.smallest_normal * limits.eps, own.to(scales.dtype))


def _asymmetric(groups: Tensor, bits: int, shrink: float) -> tuple[Tensor, Tensor]:
    low, high = groups.amin(2).clamp(max=0) * shrink, groups.amax(2).clamp(min=0) * shrink
    scale = torch.where(high > low, high - low, 1.0) / (2**bits - 1)
    return scale, -low / scale


def gptq(weight: Tensor, moment: Tensor, grid: Grid, damping: float = 0.01) -> Tensor:
    """The grid's numbers ``[N, K]`` whose products differ least from the weight's for inputs with the second moment
    ``[K, K]``: the features that matter most first, each one's error spread over those that are left.

    ``damping`` of the mean diagonal is added to it."""
    order = moment.diagonal().argsort(descending=True)
    inverse = _inverse_factor(moment[order][:, order], damping)
    rest, groups = weight[:, order].float(), order // grid.size
    scales, zeros = grid.scales[:, groups], grid.zeros[:, groups]
    numbers = torch.empty_like(rest)
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        errors = torch.empty_like(rest[:, start:end])
        for column in range(start, end):
            own = grid.nearest(rest[:, column], scales[:, column], zeros[:, column])
            numbers[:, column] = own
            error = (rest[:, column] - (own - zeros[:, column]) * scales[:, column]) / inverse[column, column]
            rest[:, column:end] -= torch.outer(error, inverse[column, column:end])
            errors[:, column - start] = error
        rest[:, end:] -= errors @ inverse[start:end, end:]
    return numbers[:, order.argsort()].to(weight.dtype)


def _inverse_factor(moment: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse; what the data never reached counts as the damping alone."""
    own = moment.double()
    own.diagonal().add_(damping * own.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(own))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()


def pack(numbers: Tensor, bits: int) -> Tensor:
    """uint8 from whole numbers along the last axis; two of 4 bits in a byte, the first one in the low half."""
    own = numbers.to(torch.uint8)
    if bits == 8:
        return own
    own = functional.pad(own, (0, own.shape[-1] % 2))
    return own[..., ::2] | (own[..., 1::2] << 4)
