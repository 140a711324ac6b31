"""Observers: the magnitude up to which numbers are kept, for each channel, from batches that are seen once.

Memory does not depend on how much is seen: the largest magnitudes, or a histogram of magnitudes for each channel whose
bins double their width when something falls behind the last one.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from graphopt.errors import CalibrationError
from graphopt.schemas.calibration import Calibration

BINS = 2048
LEVELS = 128  # of magnitudes in int8
MOMENTUM = 0.9  # of the moving average


class Observer(Protocol):
    """Sees ``[channels, numbers]`` batch by batch; ``threshold`` ``[channels]`` is the largest magnitude to keep."""

    def see(self, numbers: Tensor) -> None: ...

    def threshold(self) -> Tensor: ...


def make_observer(config: Calibration) -> Observer:
    match config.observer:
        case "min_max":
            return MinMax()
        case "moving_average":
            return MovingAverage()
        case "percentile":
            return Percentile(config.percentile)
        case "mse":
            return LeastError()
        case "entropy":
            return Entropy()


class MinMax:
    """The largest magnitude of all."""

    def __init__(self) -> None:
        self.largest: Tensor | None = None

    def see(self, numbers: Tensor) -> None:
        own = _largest(numbers)
        self.largest = own if self.largest is None else torch.maximum(self.largest, own)

    def threshold(self) -> Tensor:
        return _seen(self.largest)


class MovingAverage:
    """The exponentially moving average of each batch's largest magnitude."""

    def __init__(self) -> None:
        self.average: Tensor | None = None

    def see(self, numbers: Tensor) -> None:
        if not numbers.shape[1]:
            return
        own = _largest(numbers)
        self.average = own if self.average is None else MOMENTUM * self.average + (1 - MOMENTUM) * own

    def threshold(self) -> Tensor:
        return _seen(self.average)


class Histogram:
    """Counts of magnitudes, ``[channels, BINS]``; ``width`` ``[channels]`` of a bin. Numbers that are 0 are not counted: they
    are represented exactly, whatever the threshold."""

    def __init__(self) -> None:
        self.counts: Tensor | None = None
        self.width = torch.zeros(0, dtype=torch.float64)

    def see(self, numbers: Tensor) -> None:
        magnitudes = numbers.abs().double()
        largest = _largest(numbers).double()
        if self.counts is None:
            self.counts = torch.zeros(len(numbers), BINS, dtype=torch.float64)
            self.width = largest / BINS
        self._widen(largest)
        places = (
            (magnitudes / self.width.clamp(min=torch.finfo(torch.float64).tiny)[:, None]).long().clamp(max=BINS - 1)
        )
        self.counts.scatter_add_(1, places, (magnitudes > 0).double())

    def _widen(self, largest: Tensor) -> None:
        """Two bins as one, until the largest number falls into the last one."""
        assert self.counts is not None
        fresh = self.width == 0
        self.width = torch.where(fresh, largest / BINS, self.width)
        while bool((narrow := largest > self.width * BINS * (1 + 1e-9)).any()):
            halves = self.counts.view(len(self.counts), BINS // 2, 2).sum(-1)
            doubled = torch.cat([halves, torch.zeros_like(halves)], 1)
            self.counts = torch.where(narrow[:, None], doubled, self.counts)
            self.width = torch.where(narrow, 2 * self.width, self.width)

    @property
    def largest(self) -> Tensor:
        """The upper edge of the last bin that holds anything, ``[channels]``."""
        counts = _seen(self.counts)
        last = torch.where(counts > 0, torch.arange(1, BINS + 1), 0).amax(1)
        return last * self.width


class Percentile(Histogram):
    """The magnitude that so many percent of all numbers other than 0 stay below."""

    def __init__(self, percentile: float) -> None:
        super().__init__()
        self.percentile = percentile

    def threshold(self) -> Tensor:
        counts = _seen(self.counts)
        below = counts.cumsum(1)
        places = (below < below[:, -1:] * self.percentile / 100).sum(1)
        return ((places + 1) * self.width).minimum(self.largest).float()


class LeastError(Histogram):
    """The threshold with the least sum of squared errors of what is rounded and what is cut off."""

    CANDIDATES = 100

    def threshold(self) -> Tensor:
        counts, largest = _seen(self.counts), self.largest
        centers = (torch.arange(BINS) + 0.5) * self.width[:, None]
        best, least = largest.clone(), torch.full_like(largest, float("inf"))
        for share in torch.logspace(0, math.log10(LEVELS / BINS), self.CANDIDATES, dtype=torch.float64):
            limit = largest * share
            step = (limit / (LEVELS - 1)).clamp(min=torch.finfo(torch.float64).tiny)[:, None]
            rounded = (centers / step).round().clamp(max=LEVELS - 1) * step
            error = (counts * (rounded - centers) ** 2).sum(1)
            best = torch.where(error < least, limit, best)
            least = error.minimum(least)
        return best.float()


class Entropy(Histogram):
    """The threshold whose quantized distribution has the least KL divergence from what was seen, what is cut off counted
    with the last level (Migacz, 8-bit Inference with TensorRT, GTC 2017)."""

    STEP = 16

    def threshold(self) -> Tensor:
        counts = _seen(self.counts)
        return torch.stack(
            [self._of_channel(own) * width for own, width in zip(counts, self.width, strict=True)]
        ).float()

    def _of_channel(self, counts: Tensor) -> Tensor:
        used = int(torch.where(counts > 0, torch.arange(1, BINS + 1), 0).amax())
        if used <= LEVELS:
            return torch.tensor(float(used), dtype=torch.float64)
        candidates = [*range(LEVELS, used, self.STEP), used]
        divergences = [_divergence(counts, bins) for bins in candidates]
        return torch.tensor(
            float(candidates[min(range(len(candidates)), key=divergences.__getitem__)]), dtype=torch.float64
        )


def _divergence(counts: Tensor, bins: int) -> float:
    """KL divergence of the first ``bins`` in ``LEVELS`` levels from them with the rest added to the last."""
    kept = counts[:bins]
    wanted = kept.clone()
    wanted[-1] += counts[bins:].sum()
    level = torch.arange(bins) * LEVELS // bins
    filled = (kept > 0).double()
    sums = torch.zeros(LEVELS, dtype=torch.float64).scatter_add_(0, level, kept)
    places = torch.zeros(LEVELS, dtype=torch.float64).scatter_add_(0, level, filled)
    spread = (sums / places.clamp(min=1))[level] * filled
    if float(spread.sum()) == 0:
        return float("inf")
    p, q = wanted / wanted.sum(), spread / spread.sum()
    smooth = 1e-9  # where a level is empty that something was cut off into
    terms = torch.where(p > 0, p * ((p + smooth) / (q + smooth)).log(), 0.0)
    return float(terms.sum())


def _largest(numbers: Tensor) -> Tensor:
    largest = numbers.abs().amax(1) if numbers.shape[1] else numbers.new_zeros(len(numbers))
    if not bool(largest.isfinite().all()):
        raise CalibrationError("there is NaN or infinity")
    return largest.float()


def _seen(found: Tensor | None) -> Tensor:
    if found is None:
        raise CalibrationError("no data reached it")
    return found
