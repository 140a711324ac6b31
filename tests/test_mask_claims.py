"""masks.prove: claims that were wrong once, and structures that it ought to prove; where one of these begins to pass, take
away its mark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.ir import Value
from graphopt.masks import Keys, Mask
from tests.mask_builder import LARGE, LOWEST, SIZES, SOME, Build, Builder, check, never_wrong

SQUARE = "sequence", "sequence"
OBLONG = "queries", "keys"
Sizes = Sequence[Mapping[str, int]]
Inputs = Callable[[Builder, Mapping[str, int]], Mapping[str, Tensor]]


def wrong(
    name: str, build: Build, reason: str, shape: tuple[str | int, str | int] = ("queries", "keys"), sizes: Sizes = SIZES,
    inputs: Inputs | None = None,
) -> Any:  # fmt: skip
    """A claim that was wrong, and why."""
    assert reason
    return pytest.param(build, shape, sizes, inputs, id=name)


def rows(name: str, numbers: Tensor) -> Inputs:
    """Inputs ``[batch, keys]`` of these numbers."""

    def made(builder: Builder, sizes: Mapping[str, int]) -> Mapping[str, Tensor]:
        shape = [int(size) for size in builder.graph.inputs[name].type.concrete(sizes).shape]  # type: ignore[arg-type]
        picked = torch.randint(0, len(numbers), shape, generator=torch.Generator().manual_seed(sum(shape)))
        return {name: numbers[picked]}

    return made


# Prefixes

ORDER = "a band after the prefix is taken as if the prefix were free of it, as one before the prefix is not"
BANDS = "two bands of a disjunction are taken as a conjunction"


def prefixed(m: Builder) -> Value:
    return m.either(m.causal(), m.padding())


# Rows

LARGER = "Keys and segments name a tensor of more elements than there are keys, which was cut or repeated"


def cut_off(m: Builder) -> Value:
    large = m.input("large", torch.int64, (m.batch, m.keys + 3))
    return m.slice(large, 1, 0, m.keys)


def cut_batches(m: Builder) -> Value:
    return m.slice(m.input("large", torch.int64, (16, m.keys)), 0, 0, m.batch)


def repeated(m: Builder) -> Value:
    twice = m.op("repeat.default", self=m.mask, repeats=(1, 2))
    return m.padding(m.slice(twice, 1, 0, m.keys))


# Numbers in other dtypes

NARROW = "a cast of an unknown integer is taken to keep it"
CHOICE = "an unknown number inside a choice is cast as if it were a truth"


def where_causal(m: Builder, numbers: Value) -> Value:
    """Numbers ``[batch, keys]`` where the query may see the key, and zero elsewhere."""
    return m.op("where.self", condition=m.causal(), self=m.padding(numbers), other=m.full(0, numbers.type.dtype))


def lower_part(m: Builder) -> Value:
    wide = m.op("expand.default", self=m.padding(m.numbers), size=(m.batch, 1, m.queries, m.keys))
    return m.op("tril.default", self=wide)


def filled_with_two(m: Builder) -> Value:
    shown = m.op("masked_fill.Scalar", self=m.full(0, torch.bool, m.queries, m.keys), mask=m.causal(), value=2)
    return m.compare("ne", m.cast(shown, torch.int64), 1)


# Numbers that round or wrap

ROUNDS = "numbers are compared and computed in double precision, and not in the dtype that they have"
WRAPS = "integers are taken to have no bounds"
NEGATIVE = "an index is taken to be no less than zero that may be less, and counts from the end then"


def lows_of_single(m: Builder, low: float) -> Value:
    return m.op("where.self", condition=m.causal(), self=m.full(0.0), other=m.full(low))


def counted_from_the_end(m: Builder) -> Value:
    at = m.divided(m.minus(m.arange(8), 5), 4)  # from -2 to 0
    numbers = m.gather(m.arange(2), at)
    return m.compare("eq", m.unsqueeze(numbers, 1), numbers)


def selected_from_the_end(m: Builder) -> Value:
    third = {"self": m.arange(16), "dim": 0, "index": m.queries - 3}
    number = m.graph.insert("aten.select.int", third, [m.full(0, torch.int64).type]).output
    return m.compare("le", m.op("expand.default", self=number, size=(m.queries, m.keys)), m.queries)


@pytest.mark.parametrize(
    ("build", "shape", "sizes", "inputs"),
    [
        wrong("window after a prefix", lambda m: m.both(prefixed(m), m.window(2)), ORDER),
        wrong("causal after a prefix", lambda m: m.both(prefixed(m), m.causal()), ORDER),
        wrong(
            "window after a prefix of a number",
            lambda m: m.both(m.either(m.causal(), m.compare("lt", m.key(), 2)), m.window(1)),
            ORDER,
        ),
        wrong("two bands or a prefix", lambda m: m.either(prefixed(m), m.compare("ge", m.distance(), -2)), BANDS),
        wrong("window or causal or a prefix", lambda m: m.either(m.window(1), prefixed(m)), BANDS),
        wrong("keys of a larger tensor", lambda m: m.padding(m.cast(cut_off(m), torch.bool)), LARGER),
        wrong("batches of a larger tensor", lambda m: m.padding(m.cast(cut_batches(m), torch.bool)), LARGER),
        wrong("keys of a repeated tensor", repeated, LARGER),
        wrong("segments of a larger tensor", lambda m: m.same(cut_off(m)), LARGER, SQUARE),
        wrong("prefix of a larger tensor", lambda m: m.either(m.causal(), m.padding(m.cast(cut_off(m), torch.bool))), LARGER),
        wrong(
            "segments in half", lambda m: m.same(m.cast(m.numbers, torch.float16)), NARROW, SQUARE,
            inputs=rows("numbers", LARGE[4:6]),
        ),
        wrong(
            "segments in single", lambda m: m.same(m.cast(m.numbers, torch.float32)), NARROW, SQUARE,
            inputs=rows("numbers", LARGE[-2:]),
        ),
        wrong(
            "segments in 32 bits", lambda m: m.same(m.cast(m.add(m.numbers, 0), torch.int32)), NARROW, SQUARE,
            inputs=rows("numbers", torch.tensor([0, 1, 1 << 32])),
        ),
        wrong(
            "keys in 32 bits", lambda m: m.padding(m.cast(m.cast(m.add(m.numbers, 0), torch.int32), torch.bool)), NARROW,
            inputs=rows("numbers", torch.tensor([0, 1, 1 << 32])),
        ),
        wrong(
            "one minus chosen numbers",
            lambda m: m.inverted(m.cast(where_causal(m, m.input("real", torch.float32)), torch.float64)), CHOICE,
        ),
        wrong("one minus the lower part of numbers", lambda m: m.inverted(lower_part(m)), CHOICE),
        wrong(
            "chosen numbers in half",
            lambda m: m.cast(m.cast(where_causal(m, m.input("real", torch.float32)), torch.float16), torch.bool), CHOICE,
            inputs=rows("real", torch.tensor([0.0, 1.0, 1e-9])),
        ),
        wrong("a truth that is two", filled_with_two, "a number that is filled into truths is no truth"),
        wrong("not -1e30", lambda m: m.compare("ne", lows_of_single(m, -1e30), -1e30), ROUNDS),
        wrong("not 0.1", lambda m: m.compare("ne", m.full(0.1, torch.float32, m.queries, m.keys), 0.1), ROUNDS),
        wrong(
            "small in half",
            lambda m: m.cast(m.times(m.full(1.0, torch.float16, m.queries, m.keys), 1e-9), torch.bool), ROUNDS,
        ),
        wrong(
            "a sum of lows in single",
            lambda m: m.add(m.add(m.full(-16777216.0, torch.float32, m.queries, m.keys), 16777217.0), -1.0), ROUNDS,
        ),
        wrong("positions by 2**30", lambda m: m.compare("ge", m.times(m.key(0, torch.int32), 1 << 30), 0), WRAPS),
        wrong(
            "2**40 in 32 bits",
            lambda m: m.compare("lt", m.key(0, torch.int32), m.cast(m.full(1 << 40, torch.int64), torch.int32)), WRAPS, (5, 5),
        ),
        wrong(
            "a product of numbers", lambda m: m.padding(m.compare("ne", m.times(m.input("small", torch.int32), 1 << 16), 0)),
            WRAPS, inputs=rows("small", torch.tensor([0, 1, 1 << 16], dtype=torch.int32)),
        ),
        wrong("an index below zero", counted_from_the_end, NEGATIVE, (8, 8)),
        wrong("a selection below zero", selected_from_the_end, NEGATIVE, sizes=({"batch": 1, "queries": 1, "keys": 4},)),
    ],
)  # fmt: skip
def test_a_claim_that_was_wrong(
    build: Build, shape: tuple[str | int, str | int], sizes: Sizes, inputs: Inputs | None
) -> None:
    never_wrong(build, *shape, sizes, inputs)


def test_a_mask_of_many_steps_is_not_read() -> None:
    def build(m: Builder) -> Value:
        mask = m.causal()
        for reach in range(300):
            mask = m.both(mask, m.window(reach + 5))
        return mask

    check(build, "what computes it is too long to be read")


# What ought to be proven

#: Of what ought to be proven, what is.
PROVEN = {
    "filled beyond a length", "hidden beyond a length", "filled below a number", "a part from 1 on", "gathered segments",
}  # fmt: skip

KEYS = Keys(SOME)
HIDDEN = Mask(keys=(Keys(SOME, True),))


def gathered_segments(m: Builder) -> Value:
    return m.same(m.gather(m.numbers, m.unsqueeze(m.arange(m.batch), 1), m.divided(m.key(), 2)))


def positions_in_a_buffer(m: Builder) -> Value:
    places = m.table(torch.arange(16)[None])
    return m.compare("le", m.slice(places, 1, 0, m.keys), m.turned(m.slice(places, 1, 0, m.queries)))


def unhidden(m: Builder) -> Value:
    """As older prefix models write it: the hidden keys of the prefix get their zero back."""
    return m.op("masked_fill.Scalar", self=m.added(m.negate(m.causal())), mask=m.padding(), value=0.0)


def no_lower_than_lowest(m: Builder) -> Value:
    both = m.add(m.added(m.negate(m.causal()), LOWEST), m.added(m.negate(m.padding()), LOWEST))
    return m.op("clamp.default", self=both, min=LOWEST)


def truncated(m: Builder, a: Value) -> Value:
    return m.op("div.Scalar_mode", self=a, other=3, rounding_mode="trunc")


def next_key(m: Builder) -> Value:
    return m.slice(m.input("longer", torch.bool, (m.batch, m.keys + 1)), 1, 1, m.keys + 1)


@pytest.mark.parametrize(
    ("build", "expected", "shape"),
    [
        (lambda m: m.added(m.compare("ge", m.key(), m.each("lengths"))), HIDDEN, OBLONG),
        (
            lambda m: m.op(
                "where.Scalar", condition=m.compare("ge", m.key(), m.each("lengths")), self=-math.inf, other=0.0
            ), HIDDEN, OBLONG,
        ),
        (lambda m: m.added(m.padding(m.compare("lt", m.numbers, 1))), HIDDEN, OBLONG),
        (lambda m: m.padding(m.compare("eq", m.numbers, 1)), Mask(keys=(KEYS,)), OBLONG),
        (lambda m: m.padding(next_key(m)), Mask(keys=(KEYS,)), OBLONG),
        (lambda m: m.times(m.causal(), m.padding()), Mask("upper_left", keys=(KEYS,)), OBLONG),
        (lambda m: m.compare("eq", m.query(), m.key()), Mask("upper_left", 0), SQUARE),
        (lambda m: m.compare("eq", m.op("abs.default", self=m.distance()), 0), Mask("upper_left", 0), OBLONG),
        (
            lambda m: m.compare("le", m.op("abs.default", self=m.cast(m.distance(), torch.float32)), 2.0),
            Mask("none", 2, 2), OBLONG,
        ),
        (positions_in_a_buffer, Mask("upper_left"), OBLONG),
        (
            lambda m: m.compare("eq", truncated(m, m.query()), truncated(m, m.key())), Mask(chunk=3), OBLONG,
        ),
        (unhidden, Mask("upper_left", prefix=KEYS), OBLONG),
        (lambda m: m.either(m.causal(), m.padding(m.either(m.mask, m.other))), Mask("upper_left", prefix=KEYS), OBLONG),
        (no_lower_than_lowest, Mask("upper_left", keys=(KEYS,)), OBLONG),
        (lambda m: m.same(m.mask), Mask(segments=SOME), SQUARE),
        (gathered_segments, Mask(segments=SOME), SQUARE),
        (
            lambda m: m.both(m.shorter(), m.compare("lt", m.query(), m.each("lengths"))),
            Mask(keys=(KEYS,), segments=KEYS), SQUARE,
        ),
    ],
    ids=[
        "filled beyond a length", "hidden beyond a length", "filled below a number", "equal to a number", "a part from 1 on",
        "product of truths", "the diagonal", "no distance", "a real distance", "positions in a buffer", "division to zero",
        "a prefix unhidden", "a prefix of either", "no lower than lowest", "truths as segments",
        "gathered segments", "lengths of queries and keys",
    ],
)  # fmt: skip
def test_what_ought_to_be_proven(
    build: Build, expected: Mask, shape: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    if request.node.callspec.id not in PROVEN:
        request.applymarker(pytest.mark.xfail(strict=True, raises=AssertionError, reason="not proven yet"))
    check(build, expected, *shape)
