"""masks.prove: each structure in each spelling, evaluated; and what is nearly one, by the reason it is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from graphopt.ir import Value
from graphopt.masks import Keys, Mask
from tests.mask_builder import LOWEST, LOWEST_HALF, OLD_LOW, SOME, Build, Builder, check

STRUCTURE = "it holds a condition that is no known structure: "
TABLE = 12
WIDE = (
    {"batch": 2, "queries": 2, "keys": 6},
    {"batch": 3, "queries": 5, "keys": 5},
    {"batch": 1, "queries": 1, "keys": 1},
)
KEYS = Keys(SOME)


def triangle(diagonal: int = 0) -> torch.Tensor:
    """A causal table, ``[1, 1, TABLE, TABLE]``, as older models have in a buffer."""
    return torch.ones(1, 1, TABLE, TABLE).tril(diagonal).bool()


def lower_window(m: Builder) -> Value:
    return m.both(m.lower_right(), m.compare("lt", m.add(m.distance(), m.keys - m.queries), 3))


def left_padded(m: Builder) -> Value:
    return m.compare("ge", m.key(), m.each("starts"))


def offset_chunks(m: Builder) -> Value:
    """Chunks that begin where the text of each row begins."""
    return m.same(
        m.divided(m.op("sub.Tensor", self=m.key(), other=m.unsqueeze(m.input("starts", torch.int64, (m.batch,)), 1)))
    )


def prefix_of_lengths(m: Builder) -> Value:
    return m.either(m.causal(), m.shorter())


@dataclass(frozen=True)
class Structure:
    build: Build
    expected: Mask
    queries: str | int = "queries"
    keys: str | int = "keys"


SQUARE = "sequence", "sequence"
STRUCTURES = {
    "causal": Structure(lambda m: m.causal(), Mask("upper_left")),
    "lower right": Structure(lambda m: m.lower_right(), Mask("lower_right")),
    "lower right of a cache": Structure(lambda m: m.lower_right(), Mask("lower_right"), "queries", "past + queries"),
    "window": Structure(lambda m: m.both(m.causal(), m.window(2)), Mask("upper_left", 2)),
    "distance": Structure(lambda m: m.near(2), Mask("none", 2, 2)),
    "window of the lower right": Structure(lower_window, Mask("lower_right", 2)),
    "chunks": Structure(lambda m: m.chunked(), Mask(chunk=3)),
    "causal chunks": Structure(lambda m: m.both(m.chunked(), m.causal()), Mask("upper_left", chunk=3)),
    "chunks in a window": Structure(lambda m: m.both(m.near(2), m.chunked(4)), Mask("none", 2, 2, chunk=4)),
    "chunks from a start": Structure(lambda m: m.chunked(3, 1), Mask(segments=SOME), *SQUARE),
    "chunks of each row": Structure(offset_chunks, Mask(segments=SOME), *SQUARE),
    "key padding": Structure(lambda m: m.padding(), Mask(keys=(KEYS,))),
    "hidden keys": Structure(lambda m: m.negate(m.padding()), Mask(keys=(Keys(SOME, True),))),
    "key padding twice": Structure(lambda m: m.both(m.padding(), m.padding(m.other)), Mask(keys=(KEYS, KEYS))),
    "lengths": Structure(lambda m: m.shorter(), Mask(keys=(KEYS,))),
    "left padding": Structure(lambda m: m.both(left_padded(m), m.causal()), Mask("upper_left", keys=(KEYS,))),
    "segments": Structure(lambda m: m.packed(), Mask(segments=SOME), *SQUARE),
    "causal segments": Structure(lambda m: m.both(m.causal(), m.packed()), Mask("upper_left", segments=SOME), *SQUARE),
    "segments by positions": Structure(lambda m: m.same(m.numbered(m.numbers)), Mask(segments=SOME), *SQUARE),
    "query and key": Structure(
        lambda m: m.both(m.at_query(m.mask), m.padding()), Mask(keys=(KEYS,), segments=KEYS), *SQUARE
    ),
    "causal query and key": Structure(
        lambda m: m.both(m.causal(), m.both(m.padding(), m.at_query(m.mask))),
        Mask("upper_left", keys=(KEYS,), segments=KEYS), *SQUARE,
    ),
    "prefix": Structure(lambda m: m.either(m.causal(), m.padding()), Mask("upper_left", prefix=KEYS)),
    "prefix of a number": Structure(
        lambda m: m.either(m.compare("lt", m.key(), 3), m.causal()), Mask("upper_left", prefix=3)
    ),
    "prefix of lengths": Structure(prefix_of_lengths, Mask("upper_left", prefix=KEYS)),
    "prefix and padding": Structure(
        lambda m: m.both(m.either(m.causal(), m.padding()), m.padding(m.other)), Mask("upper_left", prefix=KEYS, keys=(KEYS,))
    ),
    "prefix of the lower right": Structure(
        lambda m: m.either(m.lower_right(), m.padding()), Mask("lower_right", prefix=KEYS)
    ),
    "prefix beside a window": Structure(
        lambda m: m.either(m.both(m.causal(), m.window(1)), m.negate(m.padding())),
        Mask("upper_left", 1, prefix=Keys(SOME, True)),
    ),
    "prefix of segments": Structure(
        lambda m: m.both(m.packed(), m.either(m.causal(), m.padding())), Mask("upper_left", prefix=KEYS, segments=SOME),
        *SQUARE,
    ),
    "table": Structure(lambda m: m.cut(triangle()), Mask("upper_left")),
    "table of a band": Structure(lambda m: m.cut(triangle(1) & ~triangle(-3)), Mask("none", 2, 1)),
}  # fmt: skip


def where_half(m: Builder, condition: Value) -> Value:
    zero, low = m.full(0.0, torch.float16), m.full(LOWEST_HALF, torch.float16)
    return m.op("where.self", condition=condition, self=zero, other=low)


def added_twice(m: Builder, condition: Value) -> Value:
    hidden = m.negate(condition)
    return m.add(m.added(hidden, LOWEST), m.added(hidden, LOWEST))


def filled_with_a_tensor(m: Builder, condition: Value) -> Value:
    zeros = m.full(0.0, torch.float32, m.queries, m.keys)
    return m.op("masked_fill.Tensor", self=zeros, mask=m.negate(condition), value=m.full(-math.inf))


#: From a condition of what is visible to a mask that says it.
SPELLINGS: dict[str, Callable[[Builder, Value], Value]] = {
    "truths": lambda m, condition: condition,
    "truths through integers": lambda m, condition: m.compare("ne", m.cast(condition, torch.int64), 0),
    "truths through bytes": lambda m, condition: m.cast(m.cast(condition, torch.uint8), torch.bool),
    "where, infinity": lambda m, condition: m.op("where.Scalar", condition=condition, self=0.0, other=-math.inf),
    "where hidden, lowest": lambda m, condition: m.op(
        "where.ScalarSelf", condition=m.negate(condition), self=LOWEST, other=m.full(0.0)
    ),
    "where in half": where_half,
    "filled, infinity": lambda m, condition: m.added(m.negate(condition)),
    "filled, lowest": lambda m, condition: m.added(m.negate(condition), LOWEST),
    "filled, -10000": lambda m, condition: m.added(m.negate(condition), OLD_LOW),
    "filled with a tensor": filled_with_a_tensor,
    "one minus it, lowest": lambda m, condition: m.inverted(condition),
    "one minus it, -10000": lambda m, condition: m.inverted(condition, OLD_LOW),
    "lowest as half": lambda m, condition: m.cast(m.inverted(condition), torch.float16),
    "added twice": added_twice,
    "filled into zeros, where it is lowest": lambda m, condition: m.compare(
        "gt", m.added(m.negate(condition), LOWEST), LOWEST
    ),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", STRUCTURES)
def test_a_structure_in_a_spelling(name: str, spelling: str) -> None:
    structure = STRUCTURES[name]
    check(lambda m: SPELLINGS[spelling](m, structure.build(m)), structure.expected, structure.queries, structure.keys)


# Chunks


def divided_by(m: Builder, a: Value, mode: str) -> Value:
    return m.op("div.Scalar_mode", self=a, other=3, rounding_mode=mode)


def whole_chunks_later(m: Builder) -> Value:
    """Positions that are a number of chunks more in each row."""
    more = m.times(m.each("starts"), 3)
    return m.compare("eq", m.divided(m.add(m.query(), more)), m.divided(m.add(m.key(), more)))


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.compare("eq", m.divided(m.query()), m.divided(m.key())),
        lambda m: m.negate(m.compare("ne", m.divided(m.query()), m.divided(m.key()))),
        lambda m: m.compare("eq", m.minus(m.divided(m.query()), m.divided(m.key())), 0),
        lambda m: m.compare("lt", m.op("abs.default", self=m.minus(m.divided(m.query()), m.divided(m.key()))), 1),
        lambda m: m.compare("eq", divided_by(m, m.query(), "floor"), divided_by(m, m.key(), "floor")),
        lambda m: m.both(
            m.compare("le", m.divided(m.key()), m.divided(m.query())),
            m.compare("ge", m.divided(m.key()), m.divided(m.query())),
        ),
        lambda m: m.chunked(3, 6),
        lambda m: m.compare("eq", m.divided(m.minus(m.query(), 3)), m.divided(m.minus(m.key(), 3))),
        whole_chunks_later,
        lambda m: m.compare("eq", m.divided(m.cast(m.query(), torch.float32)), m.divided(m.cast(m.key(), torch.float32))),
    ],
)  # fmt: skip
def test_chunks(build: Build) -> None:
    check(build, Mask(chunk=3))
    check(build, Mask(chunk=3), *SQUARE)


@pytest.mark.parametrize("start", [-5, -3, -1])
def test_chunks_of_positions_below_zero(start: int) -> None:
    """Where division rounds down, and not to zero."""
    expected = Mask(chunk=3) if start % 3 == 0 else Mask(segments=SOME)
    check(
        lambda m: m.compare("eq", m.divided(m.add(m.query(), start)), m.divided(m.add(m.key(), start))),
        expected,
        *SQUARE,
    )


def test_chunks_of_two_lengths_at_once() -> None:
    check(lambda m: m.both(m.chunked(3), m.chunked(4)), Mask(chunk=3, segments=SOME), *SQUARE)
    check(lambda m: m.both(m.chunked(3), m.chunked(3)), Mask(chunk=3))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda m: m.both(m.chunked(), m.lower_right()),
            "its chunks count from the upper left, its causal part from the lower right",
        ),
        (lambda m: m.both(m.chunked(3), m.chunked(4)), f"{STRUCTURE}((k) // 4) - ((q) // 4) <= 0"),
        (lambda m: m.chunked(3, 1), f"{STRUCTURE}((k + 1) // 3) - ((q + 1) // 3) <= 0"),
        (
            lambda m: m.compare("eq", m.divided(m.key(), 3), m.divided(m.query(), 4)),
            f"{STRUCTURE}((k) // 3) - ((q) // 4) <= 0",
        ),
        (
            lambda m: m.compare("le", m.divided(m.key()), m.divided(m.query())),
            f"{STRUCTURE}((k) // 3) - ((q) // 3) <= 0",
        ),
        (lambda m: m.compare("eq", m.divided(m.key()), m.query()), f"{STRUCTURE}((k) // 3) - q <= 0"),
        (
            lambda m: m.compare("eq", divided_by(m, m.query(), "trunc"), divided_by(m, m.key(), "trunc")),
            "a division in %div = aten.div.Scalar_mode",
        ),
        (
            lambda m: m.compare("eq", m.op("div.Scalar", self=m.query(), other=3), m.op("div.Scalar", self=m.key(), other=3)),
            "a division in %div = aten.div.Scalar",
        ),
        (
            lambda m: m.compare("eq", m.divided(m.query(), -3), m.divided(m.key(), -3)),
            "a division of what are no positions",
        ),
    ],
)  # fmt: skip
def test_what_are_no_chunks(build: Build, reason: str) -> None:
    check(build, reason)


# Segments


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.same(m.input("segments", torch.int32)),
        lambda m: m.same(m.cast(m.input("segments", torch.int32), torch.int64)),
        lambda m: m.same(m.cast(m.numbers, torch.int32)),
        lambda m: m.negate(m.compare("ne", m.at_query(m.numbers), m.padding(m.numbers))),
        lambda m: m.compare("eq", m.minus(m.padding(m.numbers), m.at_query(m.numbers)), 0),
        lambda m: m.same(m.op("cumsum.default", self=m.compare("eq", m.numbers, 0), dim=1)),
        lambda m: m.same(m.times(m.numbers, 2)),
        lambda m: m.same(m.minus(m.key(), m.numbers)),
        lambda m: m.both(
            m.compare("le", m.padding(m.numbers), m.at_query(m.numbers)),
            m.compare("ge", m.padding(m.numbers), m.at_query(m.numbers)),
        ),
    ],
)
def test_segments(build: Build) -> None:
    check(build, Mask(segments=SOME), *SQUARE)
    check(lambda m: m.both(build(m), m.lower_right()), Mask("upper_left", segments=SOME), *SQUARE)


def test_the_segments_are_the_value_that_was_given() -> None:
    builder = Builder(*SQUARE)
    assert builder.prove(builder.same(builder.numbers)) == Mask(segments=builder.numbers)
    counted = builder.numbered(builder.numbers)
    assert builder.prove(builder.same(counted)) == Mask(segments=counted)
    found = builder.prove(builder.both(builder.at_query(builder.mask), builder.padding()))
    assert found == Mask(keys=(Keys(builder.mask),), segments=Keys(builder.mask))
    assert str(Mask(segments=counted)) == "segments (%cumsum)"


@pytest.mark.parametrize("start", [0, 5])
def test_positions_without_a_break_are_one_segment(start: int) -> None:
    """What transformers computes where no positions are given: all queries and keys are of the sequence 0."""
    check(lambda m: m.same(m.numbered(m.unsqueeze(m.key(start), 0))), Mask(), *SQUARE)
    check(lambda m: m.both(m.same(m.numbered(m.unsqueeze(m.key(start), 0))), m.causal()), Mask("upper_left"), *SQUARE)


def of_queries(m: Builder) -> Value:
    """``[batch, 1, queries, 1]``"""
    return m.unsqueeze(m.input("of queries", torch.int64, (m.batch, m.queries)), 1, 3)


def test_segments_of_other_queries_than_keys() -> None:
    check(lambda m: m.compare("eq", of_queries(m), m.padding(m.numbers)),
          f"{STRUCTURE}-%numbers[b, k] + %of queries[b, q] <= 0")  # fmt: skip


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda m: m.compare("eq", m.at_query(m.numbers), m.padding(m.input("segments", torch.int64))),
            f"{STRUCTURE}%numbers[b, q] - %segments[b, k] <= 0",
        ),
        (lambda m: m.both(m.packed(), m.same(m.numbers)), f"{STRUCTURE}-%numbers[b, k] + %numbers[b, q] <= 0"),
        (
            lambda m: m.compare("le", m.at_query(m.numbers), m.padding(m.numbers)),
            f"{STRUCTURE}-%numbers[b, k] + %numbers[b, q] <= 0",
        ),
        (
            lambda m: m.compare("eq", m.at_query(m.add(m.numbers, 1)), m.padding(m.numbers)),
            f"{STRUCTURE}-%numbers[b, k] + %numbers[b, q] + 1 <= 0",
        ),
        (
            lambda m: m.compare("eq", m.at_query(m.input("real", torch.float32)), m.padding(m.input("real", torch.float32))),
            "a comparison (eq) of values that are not positions",
        ),
        (
            lambda m: m.compare("eq", m.at_query(m.input("bytes", torch.uint8)), m.padding(m.input("bytes", torch.uint8))),
            "integers of a dtype that may wrap in %eq = aten.eq.Tensor",
        ),
        (
            lambda m: m.compare("ne", m.times(m.at_query(m.numbers), m.padding(m.input("segments", torch.int64))), 0),
            f"{STRUCTURE}%numbers[b, q]",
        ),
        (lambda m: m.both(m.padding(), m.at_query(m.other)), f"{STRUCTURE}%other[b, q]"),
        (lambda m: m.either(m.padding(), m.at_query(m.mask)), f"{STRUCTURE}(%mask[b, k]) or (%mask[b, q])"),
    ],
)  # fmt: skip
def test_what_are_no_segments(build: Build, reason: str) -> None:
    check(build, reason, *SQUARE)


def test_an_index_that_may_be_negative() -> None:
    def by_numbers(m: Builder) -> Value:
        return m.gather(m.slice(m.table(triangle()[0, 0]), 1, 0, m.keys), m.input("order", torch.int64, (m.queries,)))

    check(by_numbers, "an index that is not a position in %index = aten.index.Tensor")
    check(lambda m: m.gather(m.causal(), m.minus(m.query(), 1), m.key()),
          "an index that is not a position in %index = aten.index.Tensor")  # fmt: skip


# Prefixes


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.either(m.padding(), m.causal()),
        lambda m: m.either(m.causal(), m.negate(m.negate(m.padding()))),
        lambda m: m.op("logical_or.default", self=m.causal(), other=m.padding()),
        lambda m: m.negate(m.both(m.negate(m.causal()), m.negate(m.padding()))),
        lambda m: m.either(m.causal(), m.padding(m.compare("gt", m.numbers, 1))),
        lambda m: m.either(m.causal(), m.padding(m.both(m.mask, m.other))),
    ],
)
def test_a_prefix(build: Build) -> None:
    check(build, Mask("upper_left", prefix=KEYS))
    check(build, Mask("upper_left", prefix=KEYS), *SQUARE)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda m: m.both(m.chunked(), m.either(m.causal(), m.padding())), f"{STRUCTURE}(k - q <= 0) or (%mask[b, k])"),
        (lambda m: m.both(m.either(m.causal(), m.padding()), m.chunked()), "it has a prefix and chunks"),
        (lambda m: m.both(m.window(2), m.either(m.causal(), m.padding())), f"{STRUCTURE}(k - q <= 0) or (%mask[b, k])"),
        (
            lambda m: m.both(m.either(m.causal(), m.padding()), m.either(m.causal(), m.padding(m.other))),
            f"{STRUCTURE}(k - q <= 0) or (%other[b, k])",
        ),
        (
            lambda m: m.either(m.either(m.causal(), m.padding()), m.padding(m.other)),
            f"{STRUCTURE}(k - q <= 0) or (%mask[b, k]) or (%other[b, k])",
        ),
        (
            lambda m: m.either(m.causal(), m.compare("lt", m.query(), 3)),
            f"{STRUCTURE}(k - q <= 0) or (q - 2 <= 0)",
        ),
        (lambda m: m.either(m.causal(), m.compare("ge", m.distance(), -2)), f"{STRUCTURE}(k - q <= 0) or (k - q - 2 <= 0)"),
        (lambda m: m.either(m.causal(), m.both(m.padding(), m.window(2))),
         f"{STRUCTURE}(k - q <= 0) or ((%mask[b, k]) and (-k + q - 2 <= 0))"),
    ],
)  # fmt: skip
def test_what_is_no_prefix(build: Build, reason: str) -> None:
    check(build, reason)


# Constant tables


@pytest.mark.parametrize("low", [-math.inf, LOWEST, OLD_LOW])
def test_a_table_that_is_added(low: float) -> None:
    check(lambda m: m.cut(torch.full((TABLE, TABLE), low).triu(1)), Mask("upper_left"))
    check(lambda m: m.cut(torch.full((1, 1, TABLE, TABLE), low).triu(3)), Mask("none", -1, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32])
def test_a_table_of_zeros_and_ones(dtype: torch.dtype) -> None:
    check(lambda m: m.cast(m.cut(triangle().to(dtype)), torch.bool), Mask("upper_left"))
    check(lambda m: m.inverted(m.cut(triangle().to(dtype))), Mask("upper_left"))


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [(0, 0, Mask("upper_left")), (2, 0, Mask("none", -1, 2)), (3, 3, Mask("upper_left")), (2, 1, Mask("none", -1, 1))],
)
def test_a_table_from_an_offset(row: int, column: int, expected: Mask) -> None:
    check(lambda m: m.cut(triangle(), row, column), expected)


def test_the_last_rows_of_a_table() -> None:
    """As GPT-2 with a cache."""
    check(lambda m: m.cut(triangle(), m.keys - m.queries), Mask("lower_right"), sizes=WIDE)
    check(lambda m: m.cut(triangle(), m.keys - m.queries), Mask("lower_right"), "queries", "past + queries")
    check(
        lambda m: m.op("where.self", condition=m.cut(triangle(), m.keys - m.queries), self=m.full(0.0), other=m.full(LOWEST)),
        Mask("lower_right"), sizes=WIDE,
    )  # fmt: skip


@pytest.mark.parametrize(
    "build",
    [
        lambda m: m.gather(m.table(triangle()[0, 0]), m.query(), m.key()),
        lambda m: m.gather(m.slice(m.table(triangle()[0, 0]), 1, 0, m.keys), m.arange(m.queries)),
        lambda m: m.negate(m.cut(~triangle())),
        lambda m: m.compare("gt", m.cut(triangle().float()), 0.5),
        lambda m: m.compare("eq", m.cut(triangle().long()), 1),
        lambda m: m.op("where.self", condition=m.cut(triangle()), self=m.ones(), other=m.full(False, torch.bool)),
    ],
)
def test_a_table_in_other_spellings(build: Build) -> None:
    check(build, Mask("upper_left"))


def test_a_table_of_just_these_sizes() -> None:
    at = ({"batch": 2, "keys": 5},)
    check(lambda m: m.table(torch.ones(3, 5).tril(2).bool()), Mask("lower_right"), 3, 5, at)
    check(lambda m: m.table(torch.ones(5, 3).tril().bool()), Mask("upper_left"), 5, 3, at)
    check(
        lambda m: m.table(torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -1e9)),
        Mask("upper_left"),
        4,
        4,
        at,
    )


ONES = torch.ones(TABLE, TABLE)
NO_BANDS = {
    "blocks": torch.arange(TABLE).div(3).floor()[:, None] == torch.arange(TABLE).div(3).floor(),
    "every third": torch.arange(TABLE * TABLE).reshape(TABLE, TABLE) % 3 > 0,
    "a prefix": ONES.tril().bool() | (torch.arange(TABLE) < 3),
    "one element off": ONES.tril().index_put((torch.tensor(3), torch.tensor(2)), torch.tensor(0.0)).bool(),
    "all the same": ONES.bool(),
}


@pytest.mark.parametrize("name", NO_BANDS)
def test_a_table_that_is_no_band(name: str) -> None:
    check(lambda m: m.cut(NO_BANDS[name]), f"{STRUCTURE}%table[q, k]")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (triangle(-1), f"{STRUCTURE}k - q <= -1"),
        (torch.ones(1, 2, TABLE, TABLE).tril().bool(), f"{STRUCTURE}%table[0, h, q, k]"),
        (ONES.tril(-1), "it adds 1, which is neither 0 nor low enough to hide a key"),
        (ONES.tril() + ONES.tril(-2), "it adds values that are neither 0 nor -inf"),
        (ONES * math.nan, "it adds values that are neither 0 nor -inf"),
        ((ONES - 1).fill_diagonal_(math.nan), "it adds values that are neither 0 nor -inf"),
    ],
    ids=["strictly causal", "heads", "ones", "three numbers", "nan", "nan on the diagonal"],
)
def test_a_table_that_is_no_mask(table: torch.Tensor, reason: str) -> None:
    check(lambda m: m.cut(table), reason)
