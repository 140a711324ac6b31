"""masks.prove: what it proves, what it refuses, and that it never claims what is not so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from graphopt.dims import Dim, Size
from graphopt.execution import run
from graphopt.ir import DimRange, Graph, TensorType, Value
from graphopt.masks import Mask, Unproven, prove

LOWEST = torch.finfo(torch.float32).min
LOWEST_HALF = torch.finfo(torch.float16).min


class Builder:
    """A graph of masks for ``queries`` x ``keys`` positions: names of dims, or numbers. ``least`` is the dims' minimum."""

    def __init__(self, queries: str | int = "queries", keys: str | int = "keys", least: int = 1) -> None:
        self.graph = Graph()
        self.sizes = {name: None for name in ("batch", queries, keys) if isinstance(name, str)}
        self.graph.dims = {name: DimRange(1 if name == "batch" else least) for name in self.sizes}
        self.least = least
        self.batch: Size = Dim.named("batch")
        self.queries, self.keys = (Dim.named(n) if isinstance(n, str) else n for n in (queries, keys))
        self.graph.add_input("x", TensorType(torch.float32, (self.batch, self.queries, self.keys)))
        self.mask = self.input("mask", torch.bool)
        self.other = self.input("other", torch.bool)
        self.numbers = self.input("numbers", torch.int64)

    def input(self, name: str, dtype: torch.dtype, shape: tuple[Size, ...] | None = None) -> Value:
        return self.graph.add_input(name, TensorType(dtype, (self.batch, self.keys) if shape is None else shape))

    def op(self, name: str, /, **args: Any) -> Value:
        return self.graph.insert(name if name.startswith("aten.") else f"aten.{name}", args).output

    def arange(self, end: Size, start: Size = 0, dtype: torch.dtype = torch.int64) -> Value:
        return self.op("arange.start_step", start=start, end=end, dtype=dtype)

    def full(self, number: Any, dtype: torch.dtype = torch.float32, *shape: Size) -> Value:
        return self.op("full.default", size=shape, fill_value=number, dtype=dtype)

    def unsqueeze(self, value: Value, *axes: int) -> Value:
        for axis in axes:
            value = self.op("unsqueeze.default", self=value, dim=axis)
        return value

    def key(self, start: Size = 0, dtype: torch.dtype = torch.int64) -> Value:
        return self.arange(self.keys + start, start, dtype)

    def query(self, start: Size = 0, dtype: torch.dtype = torch.int64) -> Value:
        return self.unsqueeze(self.arange(self.queries + start, start, dtype), 1)

    def compare(self, relation: str, a: Value, b: Any) -> Value:
        overload = "Tensor" if isinstance(b, Value) else "Scalar"
        return self.op(f"{relation}.{overload}", self=a, other=b)

    def both(self, a: Value, b: Value) -> Value:
        return self.op("bitwise_and.Tensor", self=a, other=b)

    def either(self, a: Value, b: Value) -> Value:
        return self.op("bitwise_or.Tensor", self=a, other=b)

    def negate(self, a: Value) -> Value:
        return self.op("bitwise_not.default", self=a)

    def add(self, a: Value, b: Any) -> Value:
        return self.op("add.Tensor" if isinstance(b, Value) else "add.Scalar", self=a, other=b)

    def minus(self, a: Value, b: Any) -> Value:
        return self.op("sub.Tensor" if isinstance(b, Value) else "sub.Scalar", self=a, other=b)

    def cast(self, a: Value, dtype: torch.dtype) -> Value:
        return self.op("to.dtype", self=a, dtype=dtype)

    def causal(self) -> Value:
        return self.compare("le", self.key(), self.query())

    def lower_right(self) -> Value:
        return self.compare("le", self.key(), self.add(self.query(), self.keys - self.queries))

    def distance(self) -> Value:
        """Query minus key."""
        return self.minus(self.query(), self.key())

    def padding(self, mask: Value | None = None) -> Value:
        """``[batch, 1, 1, keys]``."""
        return self.unsqueeze(self.mask if mask is None else mask, 1, 1)

    def ones(self, dtype: torch.dtype = torch.bool) -> Value:
        return self.full(1, dtype, self.queries, self.keys)

    def added(self, hidden: Value, low: float = -math.inf) -> Value:
        """A float mask from a bool one that says which keys are hidden."""
        zeros = self.full(0.0, torch.float32, self.queries, self.keys)
        return self.op("masked_fill.Scalar", self=zeros, mask=hidden, value=low)

    def prove(self, value: Value) -> Mask | Unproven:
        return prove(self.graph, value, self.queries, self.keys)


Build: TypeAlias = Callable[[Builder], Value]
SIZES = (
    {"batch": 2, "queries": 4, "keys": 6},
    {"batch": 3, "queries": 7, "keys": 5},
    {"batch": 1, "queries": 1, "keys": 1},
)


# A claim against the evaluated mask, by other means than graphopt's


def inputs_at(builder: Builder, sizes: dict[str, int], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, value in builder.graph.inputs.items():
        shape = [int(size) for size in value.type.concrete(sizes).shape]  # type: ignore[arg-type]
        made[name] = torch.randint(0, 2 if value.type.dtype == torch.bool else 4, shape, generator=generator)
        made[name] = made[name].to(value.type.dtype)
    return made


def evaluated(builder: Builder, value: Value, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mask and every inner value, run."""
    seen = dict(inputs)
    builder.graph.outputs = {"mask": value}
    out = run(builder.graph, inputs, tap=lambda inner, tensor: seen.__setitem__(inner.name, tensor))
    return out["mask"], seen


def visible_keys(mask: Tensor) -> Tensor:
    """Which keys a mask shows; each element must either add nothing or hide its key."""
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= LOWEST_HALF
    assert bool(((mask == 0) | hidden).all()), f"it adds {mask}"
    return ~hidden


def claimed_keys(claim: Mask, queries: int, keys: int, key_mask: Tensor | None) -> Tensor:
    """What a claim says, cut out of a table of ones."""
    table = torch.ones(queries, keys)
    shift = keys - queries if claim.causal == "lower_right" else 0
    if claim.causal != "none":
        table = table.tril(shift)
    if claim.window_left >= 0:
        table = table.triu(shift - claim.window_left)
    if claim.window_right >= 0:
        table = table.tril(shift + claim.window_right)
    found = table.bool()[None, None]
    return found if key_mask is None else found & (key_mask != 0)[:, None, None, :]


def assert_true(builder: Builder, value: Value, claim: Mask, sizes: dict[str, int], seed: int) -> None:
    """The claim holds elementwise at these sizes."""
    inputs = inputs_at(builder, sizes, seed)
    mask, seen = evaluated(builder, value, inputs)
    batch, queries, keys = inputs["x"].shape
    key_mask = seen[claim.key_mask.name] if claim.key_mask is not None else None
    expected = claimed_keys(claim, queries, keys, key_mask).expand(batch, 1, queries, keys)
    got = visible_keys(mask).expand(batch, 1, queries, keys)
    assert torch.equal(got, expected), (
        f"claimed {claim}, but at {sizes} it is\n{got.int()}\nnot\n{expected.int()}\n{builder.graph}"
    )


def check(build: Build, expected: Mask | str, queries: str | int = "queries", keys: str | int = "keys") -> None:
    """``prove`` says ``expected``: a mask, which must be true as well, or the reason why not."""
    builder = Builder(queries, keys)
    value = build(builder)
    found = builder.prove(value)
    if isinstance(expected, str):
        assert found == Unproven(expected)
        return
    assert isinstance(found, Mask), found
    assert (found.causal, found.window_left, found.window_right) == (
        expected.causal, expected.window_left, expected.window_right,
    )  # fmt: skip
    assert (found.key_mask is None) == (expected.key_mask is None)
    for seed, sizes in enumerate(SIZES):
        assert_true(builder, value, found, {name: sizes.get(name, sizes["keys"]) for name in builder.sizes}, seed)


PADDED = Value("any", TensorType(torch.bool, ()), None)  # stands for "a key mask" in what is expected
CAUSAL = Mask("upper_left")
LOWER = Mask("lower_right")
PADDING = Mask(key_mask=PADDED)
BOTH = Mask("upper_left", key_mask=PADDED)


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
          "it holds a condition that is no known structure: k - q + 1 <= 0")  # fmt: skip


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
        (lambda m: m.compare("eq", m.query(), m.key()), Mask("upper_left", window_left=0)),
        (
            lambda m: m.both(m.compare("ge", m.distance(), 0), m.compare("ge", m.distance(), -2)),
            Mask("upper_left", window_right=2),
        ),
    ],
)
def test_windows(build: Build, expected: Mask) -> None:
    check(build, expected)
    check(build, expected, "sequence", "sequence")


def test_a_window_of_the_lower_right_is_unproven() -> None:
    reason = "its window counts from the upper left, its causal part from the lower right"
    check(lambda m: m.both(m.lower_right(), m.compare("le", m.distance(), 3)), reason)


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
        gathered,
    ],
)
def test_key_padding(build: Build) -> None:
    check(build, PADDING)
    check(lambda m: m.both(m.causal(), build(m)), BOTH)
    check(lambda m: m.both(build(m), m.causal()), BOTH, "sequence", "sequence")


def test_the_key_mask_is_the_value_that_was_given() -> None:
    builder = Builder()
    assert builder.prove(builder.padding()) == Mask(key_mask=builder.mask)
    assert builder.prove(builder.padding(builder.cast(builder.numbers, torch.bool))) == Mask(key_mask=builder.numbers)


def test_a_causal_window_with_padding() -> None:
    def build(m: Builder) -> Value:
        near = m.both(m.causal(), m.compare("lt", m.distance(), 4))
        return m.both(near, m.padding())

    check(build, Mask("upper_left", window_left=3, key_mask=PADDED))


# Added to the scores


@pytest.mark.parametrize("low", [-math.inf, LOWEST, LOWEST_HALF, torch.finfo(torch.bfloat16).min, -1e30])
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


def inverted(m: Builder, condition: Value, low: float = LOWEST) -> Value:
    """``(1 - mask) * low``."""
    return m.op("mul.Scalar", self=m.op("rsub.Scalar", self=m.cast(condition, torch.float32), other=1.0), other=low)


def test_one_minus_a_mask_times_a_low() -> None:
    check(lambda m: inverted(m, m.causal()), CAUSAL)
    check(lambda m: inverted(m, m.both(m.causal(), m.padding())), BOTH)


def test_one_minus_a_bool_key_mask_times_a_low() -> None:
    check(lambda m: inverted(m, m.padding()), PADDING)


def test_one_minus_a_number_is_unproven() -> None:
    """A key mask of other numbers than 0 and 1 would add something else."""
    check(lambda m: inverted(m, m.padding(m.numbers)), "arithmetic on values that are not positions or constants")


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
    ("low", "written"), [(-1.0, "-1"), (-10000.0, "-10000"), (-65000.0, "-65000"), (1.0, "1"), (math.inf, "inf")]
)
def test_a_penalty_that_is_not_low_enough(low: float, written: str) -> None:
    reason = f"it adds {written}, which is neither 0 nor low enough to hide a key"
    check(lambda m: m.added(m.negate(m.causal()), low), reason)


def test_zero_times_infinity_is_no_mask() -> None:
    check(lambda m: inverted(m, m.causal(), -math.inf), "arithmetic that gives NaN")


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
    assert isinstance(builder.prove(fails), Unproven)


@pytest.mark.parametrize("queries", [1, "queries"])
def test_one_query_sees_all_keys_from_the_lower_right(queries: str | int) -> None:
    check(lambda m: m.lower_right(), LOWER if queries == "queries" else Mask(), queries)


def test_one_query_at_the_upper_left_sees_one_key() -> None:
    check(lambda m: m.causal(), "it holds a condition that is no known structure: k <= 0", 1)


def test_what_never_holds_is_unproven() -> None:
    check(lambda m: m.full(0, torch.bool, m.queries, m.keys), "it holds a condition that is no known structure: false")


# What is no Mask


def prefix(m: Builder) -> Value:
    """A prefix that all see, causal after it."""
    return m.either(m.causal(), m.compare("lt", m.key(), 3))


def packed(m: Builder) -> Value:
    """Sequences one after another in a row: keys of the query's own segment."""
    rows = m.unsqueeze(m.numbers, 1)
    return m.unsqueeze(m.compare("eq", m.unsqueeze(m.numbers, 2), rows), 1)


def positions_from_data(m: Builder) -> Value:
    length = m.input("lengths", torch.int64, (m.batch,))
    return m.compare("lt", m.key(), m.unsqueeze(length, 1, 1, 1))


def gathered_by_data(m: Builder) -> Value:
    order = m.input("order", torch.int64, (m.keys,))
    return m.op("index.Tensor", self=m.causal(), indices=(m.query(), order))


def gathered_some(m: Builder) -> Value:
    return m.op("index.Tensor", self=m.causal(), indices=(None, m.key()))


def regrouped(m: Builder) -> Value:
    flat = m.op("reshape.default", self=m.causal(), shape=(m.queries * m.keys,))
    return m.op("reshape.default", self=flat, shape=(m.queries, m.keys))


STRUCTURE = "it holds a condition that is no known structure: "


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (prefix, f"{STRUCTURE}(k - q <= 0) or (k - 2 <= 0)"),
        (lambda m: m.either(m.causal(), m.padding()), f"{STRUCTURE}(k - q <= 0) or (%mask[b, k])"),
        (positions_from_data, "a comparison (lt) of values that are not positions"),
        (gathered_by_data, "an index that is not a position in %index = aten.index.Tensor"),
        (gathered_some, "an index that skips axes in %index = aten.index.Tensor"),
        (regrouped, "a reshape that regroups elements in %reshape_1 = aten.reshape.default"),
        (lambda m: m.both(m.padding(), m.padding(m.other)), "it has two key padding masks"),
        (lambda m: m.negate(m.padding()), f"{STRUCTURE}not %mask[b, k]"),
        (lambda m: m.compare("lt", m.key(), 3), f"{STRUCTURE}k - 2 <= 0"),
        (lambda m: m.compare("ge", m.query(), 3), f"{STRUCTURE}-q + 3 <= 0"),
        (lambda m: m.compare("ne", m.query(), m.key()), f"{STRUCTURE}(k - q + 1 <= 0) or (-k + q + 1 <= 0)"),
        (lambda m: m.unsqueeze(m.unsqueeze(m.causal(), 0, 0), 0), "%unsqueeze_3 has 5 dimensions"),
        (
            lambda m: m.compare("le", m.op("arange.start_step", start=0, end=m.keys, dtype=torch.float32), 3),
            "a range of real numbers in %arange = aten.arange.start_step",
        ),
        (
            lambda m: m.compare("lt", m.op("abs.default", self=m.distance()), 3),
            "a comparison (lt) of values that are not positions",
        ),
    ],
)
def test_what_is_no_structure_is_unproven(build: Build, reason: str) -> None:
    check(build, reason)


def test_packed_sequences_are_unproven() -> None:
    check(packed, "a comparison (eq) of values that are not positions", "sequence", "sequence")
    check(lambda m: m.both(m.causal(), packed(m)), "a comparison (eq) of values that are not positions",
          "sequence", "sequence")  # fmt: skip


def test_a_mask_of_each_head_is_unproven() -> None:
    builder = Builder()
    heads = builder.unsqueeze(builder.arange(4), 1, 2)
    assert builder.prove(builder.compare("le", builder.key(), builder.add(builder.query(), heads))) == Unproven(
        f"{STRUCTURE}-h + k - q <= 0"
    )


# Numbers that are no truths: a wrong reading would be a wrong claim


def never_wrong(build: Build) -> None:
    """Whatever is claimed is true."""
    for queries, keys in (("queries", "keys"), ("sequence", "sequence")):
        builder = Builder(queries, keys)
        value = build(builder)
        found = builder.prove(value)
        if isinstance(found, Mask):
            for seed, sizes in enumerate(SIZES):
                given_sizes = {name: sizes.get(name, sizes["keys"]) for name in builder.sizes}
                assert_true(builder, value, found, given_sizes, seed)


def odd_distance(m: Builder) -> Value:
    return m.cast(m.op("bitwise_and.Scalar", self=m.distance(), other=1), torch.bool)


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.negate(odd_distance(m)),
        lambda m: m.padding(m.cast(m.op("bitwise_and.Scalar", self=m.numbers, other=1), torch.bool)),
        lambda m: m.cast(m.negate(m.cast(m.negate(m.causal()), torch.int64)), torch.bool),
        lambda m: m.cast(m.cast(m.full(0.5, torch.float32, m.queries, m.keys), torch.int64), torch.bool),
        lambda m: m.cast(m.cast(m.distance(), torch.uint8), torch.bool),
        lambda m: m.compare("ge", m.cast(m.distance(), torch.uint8), 0),
        lambda m: m.cast(m.op("mul.Scalar", self=m.cast(m.causal(), torch.float32), other=0.5), torch.int64),
        lambda m: m.compare("ge", m.minus(m.query(0, torch.uint8), m.key(0, torch.uint8)), 0),
        lambda m: m.compare("ge", m.minus(m.cast(m.causal(), torch.uint8), 1), 0),
    ],
    ids=[
        "parity of the distance",
        "lowest bit",
        "not of integers",
        "half",
        "distance in a byte",
        "sign in a byte",
        "halves",
        "range of bytes",
        "one less in a byte",
    ],
)
def test_integers_are_no_truths(build: Build) -> None:
    never_wrong(build)


def test_a_size_as_a_number_is_no_crash() -> None:
    never_wrong(lambda m: m.compare("lt", m.key(), m.full(m.keys, torch.int64)))


# Random masks


@dataclass
class Seen:
    """What the property test met, so that it cannot pass by proving nothing."""

    examples: int = 0
    proven: int = 0
    kinds: dict[str, int] = field(default_factory=dict)

    def count(self, found: Mask | Unproven) -> None:
        self.examples += 1
        if isinstance(found, Mask):
            self.proven += 1
            for kind in str(found).split(" and "):
                kind = kind.split(" (%", maxsplit=1)[0].rstrip("0123456789 ")
                self.kinds[kind] = self.kinds.get(kind, 0) + 1


RELATIONS = ("le", "lt", "ge", "gt", "eq", "ne")


DTYPES = (*[torch.int64] * 8, torch.int32, torch.uint8, torch.int8)
CASTS = (*[None] * 8, torch.int32, torch.uint8, torch.int8, torch.float32, torch.float16)


@dataclass
class Generator:
    """Draws masks into a builder's graph."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    m: Builder

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def number(self) -> int:
        return int(self.draw(st.integers(-4, 4)))

    def key(self) -> Value:
        plain = self.m.key(abs(self.number()), self.pick(DTYPES))
        return self.m.unsqueeze(plain, 0, 0, 0) if self.draw(st.booleans()) else plain

    def query(self) -> Value:
        plain = self.m.query(abs(self.number()), self.pick(DTYPES))
        return self.m.unsqueeze(plain, 0, 0) if self.draw(st.booleans()) else plain

    def position(self) -> Value:
        kind = self.pick(
            ("key", "query", "key - query", "query - key", "query + sizes", "key + number", "query + number")
        )
        if kind == "key":
            return self.key()
        if kind == "query":
            return self.query()
        if kind == "key - query":
            return self.m.minus(self.key(), self.query())
        if kind == "query - key":
            return self.m.minus(self.query(), self.key())
        if kind == "query + sizes":
            return self.m.add(self.query(), self.m.keys - self.m.queries)
        return self.m.add(self.key() if kind.startswith("key") else self.query(), self.number())

    def comparison(self) -> Value:
        a, relation, dtype = self.position(), self.pick(RELATIONS), self.pick(CASTS)
        a = a if dtype is None else self.m.cast(a, dtype)
        if self.draw(st.booleans()):
            return self.m.compare(relation, a, self.position())
        limit = self.pick(
            (self.number(), self.m.keys - 1, self.m.queries - 1, self.m.keys - self.m.queries, self.m.keys)
        )
        return self.m.compare(relation, a, limit)

    def structure(self) -> Value:
        """A condition that is likely to be proven."""
        m, kind = self.m, self.pick(("causal", "lower", "left", "right", "padding", "padding", "gathered", "true"))
        if kind in ("causal", "lower"):
            return m.causal() if kind == "causal" else m.lower_right()
        if kind == "left":
            return m.compare("le", m.distance(), abs(self.number()))
        if kind == "right":
            return m.compare("ge", m.distance(), -abs(self.number()))
        if kind == "true":
            return m.compare("ge", self.key(), 0)
        return gathered(m) if kind == "gathered" else self.padding()

    def padding(self) -> Value:
        m, kind = self.m, self.pick(("mask", "mask", "mask", "numbers", "other", "numbers != 0"))
        if kind == "numbers != 0":
            return m.padding(numbers_on(m))
        if kind == "numbers":
            return m.padding(m.cast(m.numbers, torch.bool))
        return m.padding(m.mask if kind == "mask" else m.other)

    def bits(self) -> Value:
        """Bitwise ops on integers, which say nothing that a mask could say."""
        m = self.m
        if self.draw(st.booleans()):
            return m.cast(m.negate(m.cast(self.structure(), torch.int64)), torch.bool)
        number = self.pick((self.position(), m.padding(m.numbers)))
        return m.cast(m.op("bitwise_and.Scalar", self=number, other=1), torch.bool)

    def triangle(self) -> Value:
        m, dtype = self.m, self.pick((torch.bool, torch.int64, torch.float32))
        diagonal = self.pick((self.number(), m.keys - m.queries))
        table = m.op(self.pick(("tril.default", "triu.default")), self=m.ones(dtype), diagonal=diagonal)
        return table if dtype == torch.bool else m.cast(table, torch.bool)

    def moved(self, depth: int) -> Value:
        m, kind = self.m, self.pick(("transposed", "sliced", "expanded", "cut"))
        if kind == "transposed":
            rows = m.add(m.unsqueeze(m.arange(m.keys), 1), self.number())
            table = m.compare(self.pick(RELATIONS), rows, m.arange(m.queries))
            return m.op("transpose.int", self=table, dim0=0, dim1=1)
        if kind == "expanded":
            inner = self.condition(depth - 1)
            return m.op("expand.default", self=inner, size=(m.batch, 1, m.queries, m.keys))
        start = abs(self.number())
        end = m.queries + start
        table = m.op("tril.default", self=m.full(1, torch.bool, end, m.keys), diagonal=self.number())
        rows = m.op("slice.Tensor", self=table, dim=0, start=start, end=end)
        return rows if kind == "cut" else m.unsqueeze(rows, 0, 0)

    def condition(self, depth: int) -> Value:
        m = self.m
        kind = self.pick(("leaf", "structures", "and", "and", "or", "not", "choose", "same", "number", "moved"))
        if depth <= 0 or kind == "leaf":
            leaf = self.pick((*LEAVES, *LEAVES, Generator.bits))
            made: Value = leaf(self)
            return made
        if kind == "structures":
            return m.both(self.structure(), self.structure())
        if kind == "moved":
            return self.moved(depth)
        a = self.condition(depth - 1)
        if kind == "not":
            return m.op(self.pick(("bitwise_not.default", "logical_not.default")), self=a)
        if kind == "number":
            dtype = self.pick((torch.int64, torch.float32, torch.int32))
            number = m.cast(a, dtype)
            return m.cast(number, torch.bool) if self.draw(st.booleans()) else m.compare("ne", number, 0)
        b = self.condition(depth - 1)
        if kind == "choose":
            return m.op("where.self", condition=self.condition(depth - 2), self=a, other=b)
        if kind == "same":
            return m.compare(self.pick(("eq", "ne")), a, b)
        if kind == "or":
            return m.op(self.pick(("bitwise_or.Tensor", "logical_or.default")), self=a, other=b)
        return m.op(self.pick(("bitwise_and.Tensor", "logical_and.default", "mul.Tensor")), self=a, other=b)

    def low(self) -> float:
        return float(self.pick((-math.inf, -math.inf, LOWEST, LOWEST, LOWEST_HALF, -1e4, -1.0)))

    def added(self, depth: int) -> Value:
        """A mask that is added to the scores."""
        m, low = self.m, self.low()
        kind = self.pick(("where", "filled", "inverted", "triangle", "sum", "sum", "filled into", "chosen"))
        if kind == "triangle":
            table = m.full(low, torch.float32, m.queries, m.keys)
            return m.op(self.pick(("tril.default", "triu.default")), self=table, diagonal=self.number())
        if depth > 1 and kind == "sum":
            return m.add(self.added(depth - 1), self.added(depth - 1))
        condition = self.condition(depth - 1)
        if depth > 1 and kind == "filled into":
            return m.op("masked_fill.Scalar", self=self.added(depth - 1), mask=condition, value=low)
        if depth > 1 and kind == "chosen":
            return m.op("where.ScalarOther", condition=condition, self=self.added(depth - 1), other=low)
        if kind == "inverted":
            return inverted(m, condition, low)
        if kind == "where":
            zero, hidden = m.full(0.0), m.full(low)
            pair = (zero, hidden) if self.draw(st.booleans()) else (hidden, zero)
            return m.op("where.self", condition=condition, self=pair[0], other=pair[1])
        return m.added(m.negate(condition), low)


LEAVES = (
    Generator.comparison, Generator.structure, Generator.structure, Generator.padding, Generator.triangle,
)  # fmt: skip
SHAPES: tuple[tuple[str | int, str | int], ...] = (
    ("sequence", "sequence"),
    ("queries", "keys"),
    (3, 5),
    (1, "keys"),
    (4, 4),
)


@st.composite
def random_masks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[Builder, Value]:
    queries, keys = draw(st.sampled_from(SHAPES))
    builder = Builder(queries, keys, least=draw(st.sampled_from((1, 1, 3))))
    generator = Generator(draw, builder)
    depth = draw(st.integers(1, 3))
    return builder, generator.added(depth) if draw(st.booleans()) else generator.condition(depth)


def claims_are_true(examples: int, derandomize: bool) -> Seen:
    """Every claim about ``examples`` random masks holds at random sizes with random key masks."""
    seen = Seen()

    @settings(
        max_examples=examples, deadline=None, derandomize=derandomize, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(random_masks(), st.data())
    def property_holds(made: tuple[Builder, Value], data: st.DataObject) -> None:
        builder, value = made
        found = builder.prove(value)
        seen.count(found)
        if isinstance(found, Mask):
            for _ in range(3):
                sizes = {name: data.draw(st.integers(builder.least, 8), name) for name in builder.sizes}
                assert_true(builder, value, found, sizes, data.draw(st.integers(0, 1000), "seed"))

    property_holds()
    return seen


def assert_not_vacuous(seen: Seen, examples: int) -> None:
    assert seen.examples >= examples
    assert seen.proven >= examples // 6, f"proven {seen.proven} of {seen.examples}"
    expected = {"none", "causal (upper_left)", "causal (lower_right)", "window_left", "window_right", "key padding"}
    assert seen.kinds.keys() == expected, seen.kinds


def test_claims_about_random_masks_are_true() -> None:
    assert_not_vacuous(claims_are_true(300, derandomize=True), 300)


MANY = 2_500  # a minute or two


@pytest.mark.slow
def test_claims_about_many_random_masks_are_true() -> None:
    assert_not_vacuous(claims_are_true(MANY, derandomize=False), MANY)
