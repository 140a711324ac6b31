"""Observers: ranges from batches seen once, against numpy on the whole data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.calibration.observers import (
    BINS,
    Entropy,
    Histogram,
    LeastError,
    MinMax,
    MovingAverage,
    Observer,
    Percentile,
    make_observer,
)
from graphopt.errors import CalibrationError
from graphopt.schemas.calibration import Calibration

Numbers = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

MAKE: dict[str, Callable[[], Observer]] = {
    "min_max": MinMax,
    "moving_average": MovingAverage,
    "percentile": lambda: Percentile(99.9),
    "mse": LeastError,
    "entropy": Entropy,
}
HISTOGRAMS = ("percentile", "mse", "entropy")


def threshold(observer: Observer, *batches: Tensor) -> Numbers:
    for batch in batches:
        observer.see(batch)
    found: Numbers = observer.threshold().numpy().astype(np.float64)
    return found


def normal(channels: int = 1, count: int = 20_000, seed: int = 0) -> Tensor:
    return torch.randn(channels, count, generator=torch.Generator().manual_seed(seed))


def with_outliers(seed: int = 0) -> Tensor:
    """One in ten thousand lies at thirty deviations."""
    return torch.cat([normal(seed=seed), torch.tensor([[30.0, -30.0]])], 1)


def magnitudes(numbers: Tensor) -> Numbers:
    found: Numbers = numbers.abs().numpy().astype(np.float64)
    return found


def widest_bin(numbers: Tensor) -> Numbers:
    """A bin is as wide as the largest magnitude over BINS, or up to twice that where bins were widened."""
    found: Numbers = 2 * magnitudes(numbers).max(-1) / BINS
    return found


DATA = {
    "normal": normal(),
    "uniform": torch.rand(1, 5000, generator=torch.Generator().manual_seed(1)) * 7,
    "outliers": with_outliers(),
    "heavy tails": normal() ** 3,
    "a single number": torch.tensor([[-2.5]]),
    "small integers": torch.randint(-5, 6, (1, 1000), generator=torch.Generator().manual_seed(2)).float(),
    "mostly zeros": torch.where(normal() > 1, normal(seed=3), 0.0),
    "tiny": normal() * 1e-30,
    "huge": normal() * 1e30,
}


# One batch, against numpy


@pytest.mark.parametrize("name", DATA)
def test_min_max_is_the_largest_magnitude(name: str) -> None:
    assert threshold(MinMax(), DATA[name]) == np.max(magnitudes(DATA[name]))


@pytest.mark.parametrize("name", DATA)
def test_a_moving_average_begins_with_the_first_batch(name: str) -> None:
    assert threshold(MovingAverage(), DATA[name]) == np.max(magnitudes(DATA[name]))


def reached(found: Numbers, percent: float) -> float:
    """The smallest magnitude that so many percent of those other than 0 are not above."""
    ordered = np.sort(found[found > 0])
    return float(ordered[math.ceil(len(ordered) * percent / 100) - 1])


@pytest.mark.parametrize("percent", [60, 99, 99.9, 100])
@pytest.mark.parametrize("name", DATA)
def test_a_percentile_is_exact_within_a_bin(name: str, percent: float) -> None:
    expected = reached(magnitudes(DATA[name])[0], percent)
    got = float(threshold(Percentile(percent), DATA[name])[0])
    assert expected * (1 - 1e-6) <= got <= expected + widest_bin(DATA[name])[0]


def squared_error(numbers: Numbers, limit: float) -> float:
    """Of symmetric int8 whose largest level is the limit."""
    step = limit / 127
    rounded = np.clip(np.round(numbers / step), -127, 127) * step
    return float(((rounded - numbers) ** 2).sum())


def least_squared_error(numbers: Numbers) -> float:
    limits = np.abs(numbers).max() * np.linspace(0.01, 1, 300)
    return min(squared_error(numbers, limit) for limit in limits)


@pytest.mark.parametrize("name", ["normal", "uniform", "outliers", "heavy tails", "a single number", "small integers"])
def test_mse_is_close_to_the_least_error_of_all_limits(name: str) -> None:
    numbers = DATA[name][0].double().numpy()
    got = squared_error(numbers, float(threshold(LeastError(), DATA[name])[0]))
    assert got <= 1.02 * least_squared_error(numbers) + 1e-12


def test_mse_cuts_off_what_is_rare() -> None:
    numbers = normal()[0].double().numpy()
    limit = float(threshold(LeastError(), normal())[0])
    assert limit < np.abs(numbers).max()
    assert squared_error(numbers, limit) < 0.95 * squared_error(numbers, np.abs(numbers).max())


def test_mse_of_one_number_far_outside_ten_million() -> None:
    """Ten million normal numbers and a single 100: the best limit is near 4, a tenth of a percent of the error is the 100's."""
    batch = normal(count=200_000)
    got = float(threshold(LeastError(), *[batch] * 50, torch.tensor([[100.0]]))[0])
    numbers, far = batch[0].double().numpy(), np.array([100.0])

    def error(limit: float) -> float:
        return 50 * squared_error(numbers, limit) + squared_error(far, limit)

    assert error(got) <= 1.5 * min(error(limit) for limit in np.linspace(2, 100, 50))


def test_entropy_cuts_off_outliers_and_keeps_the_bulk() -> None:
    """Of a normal distribution at least two and a half deviations, and far less than the outliers' thirty."""
    for seed in range(3):
        assert 2.5 < float(threshold(Entropy(), with_outliers(seed))[0]) < 10


@pytest.mark.parametrize(
    "numbers", [[1.0], [2.0, -2.0, 2.0], [3.0, -1.0, 0.5, 0.0], [-4.0, 0.001], list(range(-60, 61))]
)
def test_entropy_keeps_all_of_a_few_values(numbers: list[float]) -> None:
    """Each has a level of its own, so that nothing is lost."""
    got = threshold(Entropy(), torch.tensor([numbers], dtype=torch.float32))
    np.testing.assert_allclose(got, np.abs(numbers).max(), rtol=1e-6)


# Channels


@pytest.mark.parametrize("name", MAKE)
def test_channels_are_apart(name: str) -> None:
    """Each channel gets what it gets alone, whatever the magnitudes of the others; one of them is always 0."""
    scales = torch.tensor([1.0, 1e-6, 0.0, 300.0])[:, None]
    batches = [normal(4, 3000, seed) * scales * (1 + seed) for seed in range(3)]
    alone = [threshold(MAKE[name](), *(batch[channel : channel + 1] for batch in batches)) for channel in range(4)]
    np.testing.assert_allclose(threshold(MAKE[name](), *batches), np.concatenate(alone), rtol=1e-6)


def test_a_channel_that_grows_leaves_the_others_as_they_are() -> None:
    seen = Histogram()
    first = normal(2, 2000)
    seen.see(first)
    assert seen.counts is not None
    kept = seen.counts[1].clone()
    seen.see(torch.tensor([[1e4], [0.0]]))
    assert torch.equal(seen.counts[1], kept)
    assert float(seen.counts[0].sum()) == 2001


# Batches


def test_min_max_of_batches_is_that_of_the_whole() -> None:
    whole = normal(3)
    assert (threshold(MinMax(), *parts_of(whole, range(777, 20_000, 777))) == magnitudes(whole).max(1)).all()


def test_a_moving_average_follows_its_formula() -> None:
    batches = [normal(2, 100, seed) * (seed + 1) for seed in range(6)]
    expected = magnitudes(batches[0]).max(1)
    for batch in batches[1:]:
        expected = 0.9 * expected + 0.1 * magnitudes(batch).max(1)
    np.testing.assert_allclose(threshold(MovingAverage(), *batches), expected, rtol=1e-5)


def parts_of(numbers: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    places = sorted(cuts)
    return [numbers[:, first:last] for first, last in zip([0, *places], [*places, numbers.shape[1]], strict=True)]


CUTS = st.lists(st.integers(0, 400), max_size=8)
VALUES = st.lists(
    st.builds(lambda number, power: number * 2.0**power, st.integers(-(10**6), 10**6), st.integers(-60, 60)),
    min_size=1,
    max_size=60,
)


def assert_counts_are_numpys(seen: Histogram, channel: int, numbers: Numbers) -> None:
    """Up to the upper edge of every bin as many as there are; what lies on an edge may count on either side of it."""
    assert seen.counts is not None
    edges = np.arange(1, BINS + 1) * float(seen.width[channel])
    ordered = np.sort(numbers[numbers > 0])
    got = seen.counts[channel].cumsum(0).numpy()
    assert (np.searchsorted(ordered, edges * (1 - 1e-6), side="left") <= got).all()
    assert (got <= np.searchsorted(ordered, edges * (1 + 1e-6), side="right")).all()
    assert got[-1] == len(ordered)
    if len(ordered):
        assert edges[-1] / 2 * (1 - 1e-6) <= ordered[-1] <= edges[-1] * (1 + 1e-6)


@settings(deadline=None, max_examples=60)
@given(VALUES, st.lists(st.integers(0, 60), max_size=6))
def test_a_histogram_counts_as_numpy_does_however_the_data_comes(values: list[float], cuts: list[int]) -> None:
    numbers = torch.tensor([values], dtype=torch.float32)
    seen = Histogram()
    for part in parts_of(numbers, [min(cut, len(values)) for cut in cuts]):
        seen.see(part)
    assert_counts_are_numpys(seen, 0, magnitudes(numbers)[0])


@settings(deadline=None, max_examples=30)
@given(CUTS, st.sampled_from(sorted(MAKE)))
def test_any_split_gives_the_same_once_the_largest_is_seen(cuts: list[int], name: str) -> None:
    """Bins are as wide as the first batch says, so that nothing depends on how the rest is split."""
    if name == "moving_average":
        return
    numbers = torch.cat([torch.full((2, 1), 9.0), normal(2, 400)], 1)
    got = threshold(MAKE[name](), *parts_of(numbers, [cut + 1 for cut in cuts]))
    np.testing.assert_array_equal(got, threshold(MAKE[name](), numbers))


@settings(deadline=None, max_examples=30)
@given(CUTS, st.integers(0, 5), st.sampled_from((60, 99, 100)))
def test_any_split_gives_the_percentile_within_a_bin(cuts: list[int], seed: int, percent: float) -> None:
    numbers = normal(2, 400, seed) * torch.linspace(0.01, 5, 400)  # later ones are larger
    got = threshold(Percentile(percent), *parts_of(numbers, cuts))
    expected = np.array([reached(channel, percent) for channel in magnitudes(numbers)])
    assert (expected * (1 - 1e-6) <= got).all()
    assert (got <= expected + widest_bin(numbers)).all()


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_batches_of_growing_magnitude_give_what_the_whole_gives(name: str) -> None:
    """From a thousandth to a thousand: bins double their width some twenty times."""
    batches = [normal(1, 4000, index) * 4.0**index / 1e3 for index in range(11)]
    whole = torch.cat(batches, 1)
    got, expected = threshold(MAKE[name](), *batches), threshold(MAKE[name](), whole)
    if name == "mse":
        numbers = whole[0].double().numpy()
        assert squared_error(numbers, float(got[0])) <= 1.03 * squared_error(numbers, float(expected[0]))
    else:
        np.testing.assert_allclose(got, expected, rtol=0.03)


@pytest.mark.parametrize("factor", [1e3, 1e30, 1e38])
def test_a_histogram_widens_at_once_by_any_factor(factor: float) -> None:
    seen = Histogram()
    seen.see(torch.tensor([[1.0, -0.5]]))
    seen.see(torch.tensor([[factor]]))
    assert_counts_are_numpys(seen, 0, np.array([1.0, 0.5, factor]))


# Nothing, zeros, and what is no number


@pytest.mark.parametrize("name", MAKE)
def test_all_zeros_have_no_range(name: str) -> None:
    assert threshold(MAKE[name](), torch.zeros(2, 10), torch.zeros(2, 5)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["min_max", *HISTOGRAMS])
def test_zeros_before_and_between_change_nothing(name: str) -> None:
    numbers = normal(2, 1000)
    zeros = torch.zeros(2, 50)
    got = threshold(MAKE[name](), zeros, numbers, zeros)
    np.testing.assert_array_equal(got, threshold(MAKE[name](), numbers))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", MAKE)
def test_what_is_no_number_is_refused_and_not_counted(name: str, bad: float) -> None:
    observer, numbers = MAKE[name](), normal(2, 100)
    observer.see(numbers)
    before = observer.threshold().clone()
    worse = numbers.clone()
    worse[1, 7] = bad
    with pytest.raises(CalibrationError, match="there is NaN or infinity"):
        observer.see(worse)
    assert torch.equal(observer.threshold(), before)


@pytest.mark.parametrize("name", MAKE)
def test_a_first_batch_that_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(CalibrationError, match="there is NaN or infinity"):
        MAKE[name]().see(torch.tensor([[1.0, float("nan")]]))


@pytest.mark.parametrize("name", MAKE)
def test_without_data_there_is_no_range(name: str) -> None:
    with pytest.raises(CalibrationError, match="no data reached it"):
        MAKE[name]().threshold()


EMPTY = torch.zeros(2, 0)


@pytest.mark.parametrize(
    "name",
    [
        "min_max",
        "moving_average",
        *HISTOGRAMS,
    ],
)
def test_batches_without_numbers_change_nothing(name: str) -> None:
    numbers = normal(2, 1000)
    got = threshold(MAKE[name](), EMPTY, numbers, EMPTY)
    np.testing.assert_array_equal(got, threshold(MAKE[name](), numbers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", MAKE)
def test_numbers_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    numbers = normal(2, 500).to(dtype)
    got = MAKE[name]()
    got.see(numbers)
    assert got.threshold().dtype == torch.float32
    np.testing.assert_allclose(got.threshold(), threshold(MAKE[name](), numbers.float()), rtol=1e-6)


# Memory


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_memory_does_not_grow_with_the_data(name: str) -> None:
    observer = MAKE[name]()
    assert isinstance(observer, Histogram)
    for index in range(40):
        observer.see(normal(3, 100 * (index + 1), index) * 1.5**index)
        assert observer.counts is not None
        assert observer.counts.shape == (3, BINS)
        assert observer.width.shape == (3,)


@pytest.mark.parametrize("name", ["min_max", "moving_average"])
def test_largest_magnitudes_are_all_that_is_kept(name: str) -> None:
    observer = MAKE[name]()
    for index in range(5):
        observer.see(normal(3, 1000, index))
    kept = [value for value in vars(observer).values() if isinstance(value, Tensor)]
    assert [tensor.shape for tensor in kept] == [(3,)]


# By name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("min_max", MinMax), ("moving_average", MovingAverage), ("percentile", Percentile), ("mse", LeastError),
        ("entropy", Entropy),
    ],
)  # fmt: skip
def test_the_config_names_its_observer(name: str, kind: type[Observer]) -> None:
    assert type(make_observer(Calibration.model_validate({"data": [], "observer": name}))) is kind


def test_the_percentile_is_the_configs() -> None:
    observer = make_observer(Calibration(data=[], observer="percentile", percentile=75))
    assert float(threshold(observer, normal())[0]) == pytest.approx(1.15, abs=0.02)
