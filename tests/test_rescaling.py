"""The search for a strength of smoothing: what it finds on some rows holds on others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.passes.rescaling import searched_smoothing

LEVELS = 127


def rows(count: int, seed: int) -> Tensor:
    """Cubes of normal numbers, of which few are large."""
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed)) ** 3


def off(x: Tensor, weight: Tensor, factors: Tensor, largest: Tensor) -> float:
    """Of each row's products the share that 8 bits are off, cut off at the largest that is known."""
    step = (largest / factors).max() / LEVELS
    scale = (weight * factors).abs().amax(1, keepdim=True) / LEVELS
    rounded = (x / factors / step).round().clamp(-LEVELS, LEVELS) * step
    wanted = x @ weight.T
    got = rounded @ ((weight * factors / scale).round() * scale).T
    return float(((got - wanted).square().sum(1) / wanted.square().sum(1)).mean())


@pytest.mark.parametrize(("known", "sampled"), [(48, 48), (288, 48), (8192, 256)])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_searched_on_some_rows_is_no_worse_on_others(known: int, sampled: int, seed: int) -> None:
    """Few rows know little of the largest magnitudes, which great strengths make much of."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed + 100))
    calibrated = rows(known, seed)
    largest = calibrated.abs().amax(0)
    factors, _ = searched_smoothing(calibrated[:sampled], weight, largest, "tensor")
    others, as_it_is = rows(4096, seed + 1000), torch.ones(64)
    found = as_it_is if factors is None else factors
    assert off(others, weight, found, largest) <= 1.1 * off(others, weight, as_it_is, largest)


def test_many_rows_find_what_gains() -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(7))
    calibrated = rows(8192, 0)
    largest = calibrated.abs().amax(0)
    factors, gain = searched_smoothing(calibrated[:256], weight, largest, "tensor")
    assert factors is not None
    assert "strength" in gain
    assert off(rows(4096, 9), weight, factors, largest) < off(rows(4096, 9), weight, torch.ones(64), largest)
