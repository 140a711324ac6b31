"""masks.prove: causal masks, windows, key padding, what is added to the scores, what always holds and what is no mask."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from graphopt.ir import Value
from graphopt.masks import Keys, Mask, Unproven
from tests.mask_builder import (
    LOWEST,
    LOWEST_HALF,
    OLD_LOW,
    SIZES,
    SOME,
    Build,
    Builder,
    assert_true,
    check,
    never_wrong,
    visible_keys,
)

CAUSAL = Mask("upper_left")
LOWER = Mask("lower_right")
PADDING = Mask(keys=(Keys(SOME),))
BOTH = Mask("upper_left", keys=(Keys(SOME),))
STRUCTURE = "it holds a condition that is no known structure: "


def test_the_check_can_fail() -> None:
    builder = Builder()
    value = builder.causal()
    with pytest.raises(AssertionError, match="claimed causal"):
        assert_true(builder, value, LOWER, SIZES[0], 0)
    with pytest.raises(AssertionError, match="it adds"):
        visible_keys(torch.tensor([0.0, -1.0]))


# Causal


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.causal(),
        lambda m: m.compare("ge", m.query(), m.key()),
        lambda m: m.compare("lt", m.key(), m.query(1)),
        lambda m: m.compare("gt", m.query(1), m.key()),
        lambda m: m.compare("ge", m.distance(), 0),
        lambda m: m.compare("gt", m.distance(), -1),
        lambda m: m.compare("le", m.minus(m.key(), m.query()), 0),
        lambda m: m.negate(m.compare("gt", m.key(), m.query())),
        lambda m: m.op("logical_not.default", self=m.compare("gt", m.key(), m.query())),
        lambda m: m.op("tril.default", self=m.ones()),
        lambda m: m.cast(m.op("tril.default", self=m.ones(torch.int64)), torch.bool),
        lambda m: m.cast(m.op("tril.default", self=m.ones(torch.float32)), torch.bool),
        lambda m: m.compare("eq", m.op("triu.default", self=m.ones(torch.float32), diagonal=1), 0),
        lambda m: m.negate(m.op("triu.default", self=m.ones(), diagonal=1)),
        lambda m: m.unsqueeze(m.causal(), 0, 0),
        lambda m: m.op("expand.default", self=m.causal(), size=(m.batch, 1, m.queries, m.keys)),
        lambda m: m.op("reshape.default", self=m.causal(), shape=(1, 1, m.queries, m.keys)),
        lambda m: m.compare("le", m.key(5), m.query(5)),
        lambda m: m.compare("le", m.cast(m.key(), torch.float32), m.cast(m.query(), torch.float32)),
        lambda m: m.op("mul.Tensor", self=m.causal(), other=m.causal()),
        lambda m: m.op("where.self", condition=m.causal(), self=m.ones(), other=m.full(0, torch.bool)),
    ],
)
def test_causal_from_the_upper_left(build: Build) -> None:
    check(build, CAUSAL)
    check(build, CAUSAL, "sequence", "sequence")


def transposed(m: Builder) -> Value:
    """``[keys, queries]``, then turned."""
    rows = m.unsqueeze(m.arange(m.keys), 1)
    return m.op("transpose.int", self=m.compare("le", rows, m.arange(m.queries)), dim0=0, dim1=1)


def permuted(m: Builder) -> Value:
    rows = m.unsqueeze(m.arange(m.keys), 1)
    table = m.unsqueeze(m.compare("le", rows, m.arange(m.queries)), 0, 0)
    return m.op("permute.default", self=table, dims=(1, 0, 3, 2))


def sliced(m: Builder) -> Value:
    """The first rows and columns of a table that is larger."""
    table = m.op("tril.default", self=m.full(1, torch.bool, m.queries + 9, m.keys + 9))
    rows = m.op("slice.Tensor", self=table, dim=0, start=0, end=m.queries)
    return m.op("slice.Tensor", self=rows, dim=1, start=0, end=m.keys)


def sliced_off(m: Builder) -> Value:
    """Rows that begin two later see two keys more."""
    table = m.op("tril.default", self=m.full(1, torch.bool, m.queries + 2, m.keys))
    return m.op("slice.Tensor", self=table, dim=0, start=2, end=m.queries + 2)


def selected(m: Builder) -> Value:
    table = m.unsqueeze(m.causal(), 0)
    return m.op("select.int", self=m.op("expand.default", self=table, size=(3, m.queries, m.keys)), dim=0, index=-1)


@pytest.mark.parametrize("build", [transposed, permuted, sliced, selected])
def test_causal_by_moving_elements(build: Build) -> None:
    check(build, CAUSAL)
    check(build, CAUSAL, "sequence", "sequence")


def test_a_slice_shifts_positions() -> None:
    check(sliced_off, Mask(window_right=2))


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.lower_right(),
        lambda m: m.op("tril.default", self=m.ones(), diagonal=m.keys - m.queries),
        lambda m: m.compare("le", m.add(m.key(), m.queries - m.keys), m.query()),
        lambda m: m.compare("ge", m.distance(), m.queries - m.keys),
    ],
)
def test_causal_from_the_lower_right(build: Build) -> None:
    check(build, LOWER)
    check(build, CAUSAL, "sequence", "sequence")
    check(build, LOWER, 3, 5)


def test_causal_from_both_corners_is_neither() -> None:
    """Which of the two is stricter depends on the sizes."""
    builder = Builder()
    for first, second in ((builder.causal(), builder.lower_right()), (builder.lower_right(), builder.causal())):
        assert isinstance(builder.prove(builder.both(first, second)), Unproven)


def test_a_strictly_causal_mask_is_unproven() -> None:
    check(lambda m: m.compare("lt", m.key(), m.query()),
          f"{STRUCTURE}k - q <= -1")  # fmt: skip


# Windows


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda m: m.compare("le", m.distance(), 3), Mask(window_left=3)),
        (lambda m: m.compare("lt", m.distance(), 3), Mask(window_left=2)),
        (lambda m: m.compare("gt", m.key(), m.minus(m.query(), 3)), Mask(window_left=2)),
        (lambda m: m.compare("ge", m.distance(), -2), Mask(window_right=2)),
        (lambda m: m.op("triu.default", self=m.ones(), diagonal=-2), Mask(window_left=2)),
        (lambda m: m.op("tril.default", self=m.ones(), diagonal=2), Mask(window_right=2)),
        (
            lambda m: m.op("triu.default", self=m.op("tril.default", self=m.ones(), diagonal=1), diagonal=-2),
            Mask(window_left=2, window_right=1),
        ),
        (lambda m: m.both(m.causal(), m.compare("le", m.distance(), 3)), Mask("upper_left", window_left=3)),
        (
            lambda m: m.both(m.compare("le", m.distance(), 3), m.compare("le", m.distance(), 2)),
            Mask(window_left=2),
        ),
        (
            lambda m: m.both(m.compare("ge", m.distance(), 0), m.compare("ge", m.distance(), -2)),
            Mask("upper_left", window_right=2),
        ),
    ],
)
def test_windows(build: Build, expected: Mask) -> None:
    check(build, expected)
    check(build, expected, "sequence", "sequence")


def test_each_query_sees_itself() -> None:
    check(lambda m: m.compare("eq", m.query(), m.key()), Mask("upper_left", window_left=0))
    never_wrong(lambda m: m.compare("eq", m.query(), m.key()), "sequence", "sequence")


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda m: m.near(2), Mask(window_left=2, window_right=2)),
        (lambda m: m.compare("lt", m.op("abs.default", self=m.minus(m.key(), m.query())), 3), Mask("none", 2, 2)),
        (lambda m: m.negate(m.compare("gt", m.op("abs.default", self=m.distance()), 2)), Mask("none", 2, 2)),
        (lambda m: m.negate(m.compare("ge", m.op("abs.default", self=m.distance()), 2)), Mask("none", 1, 1)),
        (lambda m: m.added(m.compare("gt", m.op("abs.default", self=m.distance()), 2)), Mask("none", 2, 2)),
        (
            lambda m: m.compare("le", m.op("abs.default", self=m.cast(m.distance(), torch.float32)), 2),
            Mask("none", 2, 2),
        ),
        (lambda m: m.both(m.causal(), m.near(2)), Mask("upper_left", 2, 2)),
    ],
)
def test_a_distance(build: Build, expected: Mask) -> None:
    check(build, expected)
    check(build, expected, "sequence", "sequence")


def from_lower_right(m: Builder) -> Value:
    """Query minus key, where the last query stands at the last key."""
    return m.add(m.distance(), m.keys - m.queries)


@pytest.mark.parametrize("keys", ["keys", "past + queries"])
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda m: m.both(m.lower_right(), m.compare("le", from_lower_right(m), 2)), Mask("lower_right", 2)),
        (lambda m: m.both(m.compare("lt", from_lower_right(m), 3), m.lower_right()), Mask("lower_right", 2)),
        (lambda m: m.both(m.lower_right(), m.window(2 + m.queries - m.keys)), Mask("lower_right", 2)),
        (
            lambda m: m.both(m.lower_right(), m.compare("le", m.op("abs.default", self=from_lower_right(m)), 2)),
            Mask("lower_right", 2, 2),
        ),
    ],
)
def test_a_window_from_the_lower_right(build: Build, expected: Mask, keys: str) -> None:
    check(build, expected, "queries", keys)


def test_a_window_from_the_lower_right_of_as_many_keys() -> None:
    check(lambda m: m.both(m.lower_right(), m.compare("le", from_lower_right(m), 2)), Mask("upper_left", 2), "sequence",
          "sequence")  # fmt: skip


def test_a_window_from_the_other_corner_than_the_causal_part() -> None:
    check(lambda m: m.both(m.lower_right(), m.window(3)), f"{STRUCTURE}q - k <= 3")
    check(
        lambda m: m.both(m.causal(), m.compare("le", from_lower_right(m), 3)),
        f"{STRUCTURE}q - k <= -keys + queries + 3",
    )
    check(lambda m: m.compare("le", from_lower_right(m), 3), f"{STRUCTURE}q - k <= -keys + queries + 3")


def test_a_window_from_the_other_corner_at_known_sizes() -> None:
    """By numbers the one is the other."""
    check(lambda m: m.both(m.lower_right(), m.window(1)), Mask("lower_right", 3), 3, 5)
    check(lambda m: m.both(m.lower_right(), m.window(3)), Mask("lower_right", 1), 5, 3)


# Key padding


def numbers_on(m: Builder) -> Value:
    return m.compare("ne", m.numbers, 0)


def gathered(m: Builder) -> Value:
    """``mask[batch index, key index]``, as transformers writes it."""
    rows = m.unsqueeze(m.arange(m.batch), 1, 1, 1)
    columns = m.unsqueeze(m.key(), 0, 0, 0)
    return m.op("index.Tensor", self=m.mask, indices=(rows, columns))


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.padding(),
        lambda m: m.padding(m.cast(m.numbers, torch.bool)),
        lambda m: m.padding(numbers_on(m)),
        lambda m: m.padding(m.negate(m.compare("eq", m.numbers, 0))),
        lambda m: m.op("reshape.default", self=m.mask, shape=(m.batch, 1, 1, m.keys)),
        lambda m: m.op("expand.default", self=m.padding(), size=(m.batch, 1, m.queries, m.keys)),
        lambda m: m.op("repeat.default", self=m.padding(), repeats=(1, 1, m.queries, 1)),
        lambda m: m.padding(m.cast(m.input("bytes", torch.uint8), torch.bool)),
        lambda m: m.padding(m.cast(m.input("real", torch.float32), torch.bool)),
        lambda m: m.padding(m.compare("ne", m.input("real", torch.float32), 0)),
        lambda m: m.padding(m.compare("eq", m.mask, True)),
        lambda m: m.padding(m.compare("gt", m.numbers, 0)),
        lambda m: m.padding(m.compare("ge", m.numbers, 1)),
        lambda m: m.padding(m.compare("ne", m.numbers, 3)),
        lambda m: m.padding(m.compare("gt", m.input("real", torch.float32), 0.5)),
        lambda m: m.padding(m.either(m.mask, m.other)),
        lambda m: m.either(m.padding(), m.padding(m.other)),
        lambda m: m.padding(m.compare("eq", m.mask, m.other)),
        lambda m: m.padding(m.op("flip.default", self=m.mask, dims=(1,))),
        gathered,
    ],
)
def test_key_padding(build: Build) -> None:
    check(build, PADDING)
    check(lambda m: m.both(m.causal(), build(m)), BOTH)
    check(lambda m: m.both(build(m), m.causal()), BOTH, "sequence", "sequence")


def test_the_key_mask_is_the_value_that_was_given() -> None:
    builder = Builder()
    assert builder.prove(builder.padding()) == Mask(keys=(Keys(builder.mask),))
    assert builder.prove(builder.negate(builder.padding())) == Mask(keys=(Keys(builder.mask, where_zero=True),))
    numbers = builder.cast(builder.numbers, torch.bool)
    assert builder.prove(builder.padding(numbers)) == Mask(keys=(Keys(builder.numbers),))


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.negate(m.padding()),
        lambda m: m.op("logical_not.default", self=m.padding()),
        lambda m: m.op("logical_not.default", self=m.padding(m.numbers)),
        lambda m: m.padding(m.compare("eq", m.mask, False)),
        lambda m: m.padding(m.compare("eq", m.numbers, 0)),
        lambda m: m.added(m.padding()),
        lambda m: m.added(m.padding(numbers_on(m))),
        lambda m: m.op("where.Scalar", condition=m.padding(), self=-math.inf, other=0.0),
        lambda m: m.times(m.cast(m.padding(), torch.float32), LOWEST),
    ],
)
def test_a_mask_of_hidden_keys(build: Build) -> None:
    check(build, Mask(keys=(Keys(SOME, where_zero=True),)))


def test_two_key_masks_are_both_named() -> None:
    builder = Builder()
    shown, hidden = builder.padding(), builder.negate(builder.padding(builder.other))
    expected = Mask(keys=(Keys(builder.mask), Keys(builder.other, where_zero=True)))
    assert builder.prove(builder.both(shown, hidden)) == expected
    assert builder.prove(shown, hidden) == expected
    assert str(expected) == "key padding (%mask) and key padding (not %other)"
    check(lambda m: m.both(m.padding(), m.negate(m.padding(m.other))), Mask(keys=(Keys(SOME), Keys(SOME, True))))
    check(lambda m: m.both(m.padding(), m.negate(m.padding())), Mask(keys=(Keys(SOME), Keys(SOME, True))))


def test_several_masks_hold_together() -> None:
    builder = Builder()
    masks = builder.causal(), builder.added(builder.negate(builder.padding())), builder.window(2)
    found = builder.prove(*masks)
    assert found == Mask("upper_left", 2, keys=(Keys(builder.mask),))
    for seed, sizes in enumerate(SIZES):
        assert_true(builder, masks, found, sizes, seed)
    bias = builder.input("bias", torch.float32, (builder.queries, builder.keys))
    assert isinstance(builder.prove(*masks, bias), Unproven)


def test_numbers_that_are_zeros_and_ones_may_be_taken_from_one() -> None:
    def build(m: Builder) -> Value:
        m.graph.truths.add("numbers")
        return m.inverted(m.padding(m.cast(m.numbers, torch.float32)))

    check(build, PADDING)


def test_a_causal_window_with_padding() -> None:
    def build(m: Builder) -> Value:
        near = m.both(m.causal(), m.compare("lt", m.distance(), 4))
        return m.both(near, m.padding())

    check(build, Mask("upper_left", window_left=3, keys=(Keys(SOME),)))


# Added to the scores


@pytest.mark.parametrize("low", [-math.inf, LOWEST, LOWEST_HALF, torch.finfo(torch.bfloat16).min, -1e30, OLD_LOW])
@pytest.mark.parametrize(
    "build",
    [
        lambda m, low: m.added(m.negate(m.causal()), low),
        lambda m, low: m.op("where.ScalarSelf", condition=m.causal(), self=0.0, other=m.full(low)),
        lambda m, low: m.op("where.self", condition=m.causal(), self=m.full(0.0), other=m.full(low)),
        lambda m, low: m.op("triu.default", self=m.full(low, torch.float32, m.queries, m.keys), diagonal=1),
        lambda m, low: m.add(m.added(m.negate(m.causal()), low), m.added(m.negate(m.causal()), low)),
    ],
)
def test_added_lows_hide(build: Callable[[Builder, float], Value], low: float) -> None:
    check(lambda m: build(m, low), CAUSAL)


def test_one_minus_a_mask_times_a_low() -> None:
    check(lambda m: m.inverted(m.causal()), CAUSAL)
    check(lambda m: m.inverted(m.both(m.causal(), m.padding())), BOTH)


def test_one_minus_a_bool_key_mask_times_a_low() -> None:
    check(lambda m: m.inverted(m.padding()), PADDING)


def test_one_minus_a_number_is_unproven() -> None:
    """A key mask of other numbers than 0 and 1 would add something else."""
    check(lambda m: m.inverted(m.padding(m.numbers)), "arithmetic on values that are not positions or constants")


def test_two_added_masks_hide_where_either_does() -> None:
    def build(m: Builder) -> Value:
        return m.add(m.added(m.negate(m.causal()), LOWEST), m.added(m.negate(m.padding()), LOWEST))

    check(build, BOTH)


def test_a_mask_that_is_filled_into_another() -> None:
    def build(m: Builder) -> Value:
        causal = m.added(m.negate(m.causal()))
        return m.op("masked_fill.Scalar", self=causal, mask=m.negate(m.padding()), value=-math.inf)

    check(build, BOTH)


@pytest.mark.parametrize(
    ("low", "written"), [(-1.0, "-1"), (-9999.0, "-9999"), (1e4, "10000"), (1.0, "1"), (math.inf, "inf")]
)
def test_a_penalty_that_is_not_low_enough(low: float, written: str) -> None:
    reason = f"it adds {written}, which is neither 0 nor low enough to hide a key"
    check(lambda m: m.added(m.negate(m.causal()), low), reason)


def test_zero_times_infinity_is_no_mask() -> None:
    check(lambda m: m.inverted(m.causal(), -math.inf), "arithmetic that gives NaN")


def test_a_factor_of_the_sum_is_refused() -> None:
    builder = Builder()
    causal = builder.added(builder.negate(builder.causal()))
    scaled = builder.op("add.Tensor", self=causal, other=causal, alpha=2)
    assert builder.prove(scaled) == Unproven("alpha is not 1 in %add = aten.add.Tensor")


def test_an_added_input_is_unproven() -> None:
    builder = Builder()
    bias = builder.input("bias", torch.float32, (builder.queries, builder.keys))
    assert builder.prove(bias) == Unproven("it adds values that are neither 0 nor -inf")
    mixed = builder.op("where.ScalarOther", condition=builder.causal(), self=bias, other=-math.inf)
    assert builder.prove(mixed) == Unproven("it adds values that are neither 0 nor -inf")


# What always holds


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.ones(),
        lambda m: m.full(True, torch.bool),
        lambda m: m.compare("ge", m.key(), 0),
        lambda m: m.unsqueeze(m.compare("ge", m.key(), 0), 0),
        lambda m: m.compare("lt", m.key(), m.keys),
        lambda m: m.compare("ge", m.query(), 0),
        lambda m: m.compare("lt", m.query(), m.queries),
        lambda m: m.compare("lt", m.distance(), m.queries),
        lambda m: m.compare("eq", m.key(), m.key()),
        lambda m: m.either(m.causal(), m.ones()),
        lambda m: m.full(0.0, torch.float32, m.queries, m.keys),
        lambda m: m.negate(m.compare("lt", m.key(), 0)),
    ],
)
def test_what_always_holds_is_no_mask(build: Build) -> None:
    check(build, Mask())
    check(lambda m: m.both(m.causal(), build(m)), CAUSAL) if build(Builder()).type.dtype == torch.bool else None


def test_what_holds_by_the_range_of_a_dim() -> None:
    """``keys`` is at least 4, so that ``k <= k + keys - 4`` always holds, and ``k <= k + keys - 5`` need not."""
    builder = Builder(least=4)
    holds = builder.compare("le", builder.key(), builder.minus(builder.key(), 4 - builder.keys))
    assert builder.prove(holds) == Mask()
    fails = builder.compare("le", builder.key(), builder.minus(builder.key(), 5 - builder.keys))
    assert builder.prove(fails) == Mask(keys=(Keys(fails),))


@pytest.mark.parametrize("queries", [1, "queries"])
def test_one_query_sees_all_keys_from_the_lower_right(queries: str | int) -> None:
    check(lambda m: m.lower_right(), LOWER if queries == "queries" else Mask(), queries)


def test_one_query_at_the_upper_left_sees_one_key() -> None:
    check(lambda m: m.causal(), PADDING, 1)


def test_what_never_holds_is_unproven() -> None:
    check(lambda m: m.full(0, torch.bool, m.queries, m.keys), "it holds a condition that is no known structure: false")
