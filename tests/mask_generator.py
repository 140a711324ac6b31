"""Random masks: every structure that masks.prove knows, what is nearly one, and what these are combined to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import torch
from torch import Tensor

from graphopt.ir import Value
from tests.mask_builder import LOWEST, LOWEST_HALF, OLD_LOW, Builder

RELATIONS = ("le", "lt", "ge", "gt", "eq", "ne")
DTYPES = (*[torch.int64] * 8, torch.int32, torch.uint8, torch.int8)
CASTS = (*[None] * 8, torch.int32, torch.uint8, torch.int8, torch.float32, torch.float16)
FLOATS = (torch.float32, torch.float32, torch.float64, torch.float16)
LOWS = (-math.inf, -math.inf, LOWEST, LOWEST, LOWEST_HALF, OLD_LOW, -1e30, -1.0)
MOST = 8  # the largest size that masks are evaluated at
TABLE = 4 * MOST  # rows and columns of a constant table


@dataclass
class Generator:
    """Draws masks into a builder's graph."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    m: Builder

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def flip(self) -> bool:
        return bool(self.draw(st.booleans()))

    def number(self) -> int:
        return int(self.draw(st.integers(-4, 4)))

    def one_of(self, makers: Sequence[Callable[[Generator], Value]]) -> Value:
        made: Value = self.pick(makers)(self)
        return made

    @property
    def square(self) -> bool:
        return self.m.queries == self.m.keys

    def lengths(self) -> Value:
        """``[batch, 1]``"""
        return self.m.unsqueeze(self.m.input("lengths", torch.int64, (self.m.batch,)), 1)

    def whole(self, value: Value) -> Value:
        """``[batch, heads, queries, keys]``"""
        m, shape = self.m, value.type.shape
        return m.op("expand.default", self=value, size=(m.batch, *(shape[-3:-2] or (1,)), m.queries, m.keys))

    # Integers

    def key(self) -> Value:
        plain = self.m.key(abs(self.number()), self.pick(DTYPES))
        return self.m.unsqueeze(plain, 0, 0, 0) if self.flip() else plain

    def query(self) -> Value:
        plain = self.m.query(abs(self.number()), self.pick(DTYPES))
        return self.m.unsqueeze(plain, 0, 0) if self.flip() else plain

    def moved_on(self) -> Value:
        """A position with something added, or multiplied."""
        m = self.m
        at = self.key() if self.flip() else self.query()
        more = self.pick(("number", "number", "surplus", "surplus", "batch", "head", "scalar", "factor"))
        if more == "factor":
            return m.times(at, self.pick((2, -1)))
        if more == "batch":
            return m.add(at, m.each("lengths"))
        if more == "head":
            return m.add(at, m.unsqueeze(m.arange(2), 1, 2))
        if more == "scalar":
            return m.add(at, m.input("scalar", torch.int64, ()))
        return m.add(at, self.number() if more == "number" else m.keys - m.queries)

    def position(self) -> Value:
        m = self.m
        kind = self.pick(
            ("key", "query", "key - query", "query - key", "moved", "moved", "abs", "divided", "number", "chosen")
        )
        if kind == "key - query":
            return m.minus(self.key(), self.query())
        if kind == "query - key":
            return m.minus(self.query(), self.key())
        if kind == "abs":
            return m.op("abs.default", self=m.minus(self.key(), self.moved_on()))
        if kind == "divided":
            return m.divided(self.moved_on(), abs(self.number()) + 1)
        if kind == "moved":
            return self.moved_on()
        if kind == "number":
            return m.at_query(self.integers()) if self.square and self.flip() else m.padding(self.integers())
        if kind == "chosen":
            return m.op("where.self", condition=self.band(), self=self.key(), other=self.moved_on())
        return self.key() if kind == "key" else self.query()

    def integers(self) -> Value:
        """``[batch, keys]``: numbers of the keys."""
        m = self.m
        kind = self.pick(
            ("numbers", "numbers", "small", "wide", "counted", "divided", "shifted", "float", "sum", "gathered",
             "part of a larger one")
        )  # fmt: skip
        if kind == "small":
            return m.input("small", torch.int32)
        if kind == "wide":
            return m.cast(m.input("small", torch.int32), torch.int64)
        if kind == "counted":
            return m.numbered(m.numbers if self.flip() else self.spread(m.key(abs(self.number()))))
        if kind == "divided":
            return m.divided(self.integers(), abs(self.number()) + 1)
        if kind == "shifted":
            return m.op(self.pick(("add.Tensor", "sub.Tensor")), self=m.key(), other=self.lengths())
        if kind == "float":
            return m.cast(self.integers(), self.pick(FLOATS))
        if kind == "sum":
            return m.op(self.pick(("add.Tensor", "mul.Tensor")), self=m.numbers, other=m.input("small", torch.int32))
        if kind == "gathered":
            return self.gathered(self.integers())
        if kind == "part of a larger one":
            start, large = self.pick((0, 2)), m.input("large", torch.int64, (m.batch, m.keys + 3))
            return m.slice(large, 1, start, m.keys + start)
        return m.numbers

    def gathered(self, row: Value) -> Value:
        """Elements of a row for each key: its own, that of another, counted from the end where negative."""
        m, kind = self.m, self.pick(("own", "half", "mirrored", "before"))
        at = m.key()
        if kind == "half":
            at = m.divided(at, 2)
        elif kind == "mirrored":
            at = m.op("rsub.Scalar", self=at, other=m.keys - 1)
        elif kind == "before":
            at = m.divided(m.minus(at, 2), 3)
        return m.gather(row, m.unsqueeze(m.arange(m.batch), 1), at)

    def spread(self, row: Value) -> Value:
        """``[keys]`` for every batch."""
        m, wide = self.m, self.m.unsqueeze(row, 0)
        if self.flip():
            return m.op("repeat.default", self=wide, repeats=(m.batch, 1))
        return m.op("expand.default", self=wide, size=(m.batch, m.keys))

    # Conditions of the key alone

    def row(self) -> Value:
        """``[batch, keys]`` of truths."""
        m = self.m
        kind = self.pick(
            (*["mask"] * 4, "other", "other", "number", "compared", "shorter", "not", "both", "either", "bytes", "real",
             "same", "true", "logical", "gathered", "constant")
        )  # fmt: skip
        if kind == "number":
            return m.cast(self.integers(), torch.bool)
        if kind == "compared":
            return m.compare(self.pick(RELATIONS), self.integers(), self.pick((0, 0, 1, 2)))
        if kind == "shorter":
            return m.compare(self.pick(("lt", "ge", "gt")), m.key(abs(self.number())), self.lengths())
        if kind == "not":
            return m.negate(self.row())
        if kind == "both":
            return m.both(self.row(), self.row())
        if kind == "either":
            return m.either(self.row(), self.row())
        if kind in ("bytes", "real"):
            return m.cast(m.input(kind, torch.uint8 if kind == "bytes" else torch.float32), torch.bool)
        if kind == "same":
            return m.compare(self.pick(("eq", "ne")), m.mask, m.other)
        if kind == "true":
            return m.compare(self.pick(("eq", "ne")), m.mask, self.pick((True, False, 1, 0)))
        if kind == "logical":
            return m.op("logical_not.default", self=self.integers())
        if kind == "gathered":
            return self.gathered(m.mask)
        if kind == "constant" and isinstance(m.keys, int):
            return self.spread(m.table(torch.arange(m.keys) % 3 != 1))
        return m.other if kind == "other" else m.mask

    def padding(self) -> Value:
        m, row = self.m, self.row()
        kind = self.pick(("unsqueezed", "unsqueezed", "reshaped", "indexed", "repeated"))
        if kind == "indexed":
            return m.gather(row, m.unsqueeze(m.arange(m.batch), 1, 1, 1), m.unsqueeze(m.key(), 0, 0, 0))
        if kind == "reshaped":
            return m.op("reshape.default", self=row, shape=(m.batch, 1, 1, m.keys))
        if kind == "repeated":
            return m.op("repeat.default", self=m.padding(row), repeats=(1, 1, m.queries, 1))
        return m.padding(row)

    # Conditions that are likely to be proven

    def band(self) -> Value:
        m, kind = self.m, self.pick(("causal", "causal", "lower", "left", "right", "near", "lower left", "lower near"))
        surplus, reach = m.keys - m.queries, abs(self.number())
        if kind == "lower":
            return m.lower_right()
        if kind == "left":
            return m.window(reach)
        if kind == "right":
            return m.compare("ge", m.distance(), -reach)
        if kind == "near":
            return m.near(reach)
        if kind == "lower left":
            return m.both(m.lower_right(), m.window(reach - surplus))
        if kind == "lower near":
            away = m.op("abs.default", self=m.add(m.distance(), surplus))
            return m.both(m.compare("le", away, reach), m.lower_right())
        return m.causal()

    def chunk(self) -> Value:
        m, by = self.m, abs(self.number()) + 1
        if self.square and self.flip():
            offset = m.op(self.pick(("add.Tensor", "sub.Tensor")), self=m.key(), other=self.lengths())
            return m.same(m.divided(offset, by))
        return m.chunked(by, self.pick((0, 0, 1, 4)))

    def segments(self) -> Value:
        """A number at the query and at the key compared, or the truths of both."""
        m = self.m
        if not self.square:
            return self.chunk()
        if self.flip():
            row = self.row()
            pair = m.padding(row), m.at_query(self.pick((row, row, row, m.other)))
            return m.both(*pair) if self.flip() else m.both(*pair[::-1])
        numbers = self.integers()
        if self.flip():
            return m.same(numbers)
        relation = self.pick(("eq", "eq", "eq", "le", "ne"))
        return m.compare(relation, m.minus(m.at_query(numbers), m.padding(numbers)), self.pick((0, 0, 0, 0, 1)))

    def prefix(self) -> Value:
        """Keys that all see beside a band."""
        m = self.m
        first = m.compare("lt", self.key(), abs(self.number())) if self.flip() else self.padding()
        band = self.band() if self.flip() else m.both(self.band(), self.band())
        if self.flip():
            return m.either(band, first)
        return m.op("where.self", condition=first, self=self.always(), other=band)

    def always(self) -> Value:
        m, kind = self.m, self.pick(("keys", "queries", "full"))
        if kind == "full":
            return m.full(True, torch.bool)
        return m.compare("ge", self.key(), 0) if kind == "keys" else m.compare("lt", m.query(), m.queries)

    def table(self) -> Value:
        """A part of a constant table."""
        m, places = self.m, torch.arange(TABLE)
        offsets = places - places[:, None]
        above, below = self.pick((0, 0, 0, 1, 3, -1)), self.pick((0, 1, 3, -1))
        kind = self.pick(("low", "low", "low", "high", "band", "band", "blocks", "random"))
        shown = {
            "low": offsets <= above, "high": offsets >= -below, "band": (offsets <= above) & (offsets >= -below),
            "blocks": (places // 3)[:, None] == places // 3, "random": (places * places[:, None] + above) % 7 > 3,
        }[kind]  # fmt: skip
        value = self.cut(shown, self.pick((torch.bool, torch.uint8, torch.int64, torch.float32)))
        if value.type.dtype == torch.bool:
            return value
        return m.cast(value, torch.bool) if self.flip() else m.compare(self.pick(("ne", "eq")), value, 0)

    def cut(self, table: Tensor, dtype: torch.dtype) -> Value:
        m, row, column = self.m, self.pick((0, 0, 0, 1, 3)), self.pick((0, 0, 0, 1, 3))
        table = table.to(dtype)
        if row + column == 0 and self.flip():
            columns = m.slice(m.table(table), 1, 0, m.keys)
            return m.gather(columns, m.arange(m.queries)) if self.flip() else m.gather(columns, m.query(), m.key())
        return m.cut(table[(None,) * self.pick((0, 2))], row, column)

    def structures(self) -> Value:
        """Two or three that are likely to be proven, all of them or any."""
        m, join = self.m, self.pick(("both", "both", "both", "both", "either"))
        made = self.one_of(STRUCTURES)
        for _ in range(self.pick((1, 1, 2))):
            made = m.both(made, self.one_of(STRUCTURES)) if join == "both" else m.either(made, self.one_of(STRUCTURES))
        return made

    # Other conditions

    def comparison(self) -> Value:
        m, a, relation, dtype = self.m, self.position(), self.pick(RELATIONS), self.pick(CASTS)
        a = a if dtype is None else m.cast(a, dtype)
        if self.flip():
            return m.compare(relation, a, self.position())
        limits = (self.number(), self.number(), m.keys - 1, m.queries - 1, m.keys - m.queries, m.keys)
        return m.compare(relation, a, self.pick(limits))

    def bits(self) -> Value:
        """Bitwise ops on integers, which say nothing that a mask could say."""
        m = self.m
        if self.flip():
            return m.cast(m.negate(m.cast(self.band(), torch.int64)), torch.bool)
        number = self.position() if self.flip() else m.padding(m.numbers)
        if not number.type.dtype.is_floating_point:
            number = m.op("bitwise_and.Scalar", self=number, other=1)
        return m.cast(number, torch.bool)

    def triangle(self) -> Value:
        m, dtype = self.m, self.pick((torch.bool, torch.int64, torch.float32))
        diagonal = self.pick((self.number(), m.keys - m.queries))
        table = m.op(self.pick(("tril.default", "triu.default")), self=m.ones(dtype), diagonal=diagonal)
        return table if dtype == torch.bool else m.cast(table, torch.bool)

    def strided(self) -> Value:
        """Every second position."""
        m = self.m
        twice = m.op("slice.Tensor", self=m.arange(2 * m.keys), dim=0, start=0, end=2 * m.keys, step=2)
        return m.compare(self.pick(RELATIONS), twice, m.times(m.query(), self.pick((1, 2))))

    def rows(self) -> Value:
        """Keys in rows, then turned."""
        m = self.m
        rows = m.add(m.unsqueeze(m.arange(m.keys), 1), self.number())
        return m.turned(m.compare(self.pick(RELATIONS), rows, m.arange(m.queries)))

    def cut_out(self) -> Value:
        """A part of a triangle that is computed."""
        m, start, columns = self.m, abs(self.number()), self.pick((0, 2))
        shape = (m.queries + start, m.keys + columns)
        table = m.op("tril.default", self=m.full(1, torch.bool, *shape), diagonal=self.number())
        part = m.slice(m.slice(table, 0, start, shape[0]), 1, columns, shape[1])
        return part if self.flip() else m.unsqueeze(part, 0, 0)

    def moved(self, inner: Value) -> Value:
        """A condition whose elements are moved, repeated or cut off."""
        m, kind = self.m, self.pick(("transposed", "permuted", "expanded", "repeated", "triangle"))
        whole = self.whole(inner)
        if kind == "repeated" and len(inner.type.shape) == 4:
            pairs = zip(inner.type.shape, whole.type.shape, strict=True)
            return m.op("repeat.default", self=inner, repeats=tuple(want if size == 1 else 1 for size, want in pairs))
        if kind == "transposed" and self.square:
            return m.turned(whole)
        if kind == "permuted" and self.square:
            return m.op("permute.default", self=whole, dims=(0, 1, 3, 2))
        if kind == "triangle":
            return m.op(self.pick(("tril.default", "triu.default")), self=whole, diagonal=self.number())
        return whole

    def condition(self, depth: int) -> Value:
        m = self.m
        kind = self.pick(
            ("leaf", *["structures"] * 5, "and", "and", "or", "not", "choose", "same", "number", "moved", "of added")
        )  # fmt: skip
        if depth <= 0 or kind == "leaf":
            return self.one_of(LEAVES)
        if kind == "structures":
            return self.structures()
        if kind == "of added":
            low = self.pick((0.0, -math.inf, LOWEST, "rounded down"))
            return m.compare(self.pick(RELATIONS), self.added(depth - 1), -1e30 if isinstance(low, str) else low)
        a = self.condition(depth - 1)
        if kind == "moved":
            return self.moved(a)
        if kind == "not":
            return m.op(self.pick(("bitwise_not.default", "logical_not.default")), self=a)
        if kind == "number":
            number = m.cast(a, self.pick((torch.int64, torch.float32, torch.int32)))
            if self.flip():
                number = m.times(number, m.cast(self.padding(), number.type.dtype))
            return m.cast(number, torch.bool) if self.flip() else m.compare("ne", number, 0)
        b = self.condition(depth - 1)
        if kind == "choose":
            return m.op("where.self", condition=self.condition(depth - 2), self=a, other=b)
        if kind == "same":
            return m.compare(self.pick(("eq", "ne")), a, b)
        if kind == "or":
            return m.op(self.pick(("bitwise_or.Tensor", "logical_or.default")), self=a, other=b)
        return m.op(self.pick(("bitwise_and.Tensor", "logical_and.default", "mul.Tensor")), self=a, other=b)

    # Numbers that are added to the scores

    def spelled(self, condition: Value) -> Value:
        """A condition as it is, or in numbers."""
        m, kind, low = self.m, self.pick(("truths", "truths", "filled", "where", "inverted")), self.pick(LOWS[:-1])
        if kind == "truths":
            return condition
        if kind == "filled":
            return m.added(m.negate(condition), low)
        if kind == "where":
            return m.op("where.Scalar", condition=condition, self=0.0, other=low)
        return m.inverted(condition, self.pick((LOWEST, OLD_LOW)))

    def added(self, depth: int) -> Value:
        m, low = self.m, float(self.pick(LOWS))
        kind = self.pick(
            ("where", "where", "filled", "filled", "inverted", "triangle", "table", "sum", "sum", "filled into", "chosen",
             "cast")
        )  # fmt: skip
        if kind == "triangle":
            table = m.full(low, torch.float32, m.queries, m.keys)
            return m.op(self.pick(("tril.default", "triu.default")), self=table, diagonal=self.number())
        if kind == "table":
            shown = torch.arange(TABLE) - torch.arange(TABLE)[:, None] <= self.number()
            return self.cut(torch.where(shown, 0.0, low), torch.float32)
        if depth > 1 and kind == "sum":
            return m.add(self.added(depth - 1), self.added(depth - 1))
        if depth > 1 and kind == "cast":
            return m.cast(self.added(depth - 1), self.pick(FLOATS))
        condition = self.structures() if self.flip() else self.condition(depth - 1)
        if depth > 1 and kind == "filled into":
            low = self.pick((LOWEST_HALF, 0.0))
            return m.op("masked_fill.Scalar", self=self.added(depth - 1), mask=condition, value=low)
        if depth > 1 and kind == "chosen":
            return m.op("where.ScalarOther", condition=condition, self=self.added(depth - 1), other=low)
        if kind == "inverted":
            return m.inverted(self.shown(condition), low)
        if kind == "where":
            zero, hidden = m.full(0.0), m.full(low)
            pair = (zero, hidden) if self.flip() else (hidden, zero)
            return m.op("where.self", condition=condition, self=pair[0], other=pair[1])
        return m.added(condition if self.flip() else m.negate(condition), low)

    def shown(self, condition: Value) -> Value:
        """A condition, or numbers where it holds and zero elsewhere."""
        m, kind = self.m, self.pick(("truths", "truths", "numbers where", "truths where", "tril of numbers"))
        if kind == "truths":
            return condition
        row = m.input("truths", torch.int64) if kind == "truths where" else m.input("real", torch.float32)
        numbers = m.padding(self.pick((row, m.numbers)) if kind != "truths where" else row)
        if kind == "tril of numbers":
            return m.op("tril.default", self=self.whole(numbers))
        zeros = m.full(0, numbers.type.dtype, m.batch, 1, m.queries, m.keys)
        return m.cast(m.op("where.self", condition=condition, self=numbers, other=zeros), torch.float64)


STRUCTURES: tuple[Callable[[Generator], Value], ...] = (
    Generator.band, Generator.band, Generator.band, Generator.chunk, Generator.segments, Generator.prefix,
    Generator.table, Generator.padding, Generator.padding, Generator.always,
)  # fmt: skip
LEAVES: tuple[Callable[[Generator], Value], ...] = (
    *STRUCTURES, Generator.comparison, Generator.comparison, Generator.triangle, Generator.bits, Generator.rows,
    Generator.cut_out, Generator.strided,
)  # fmt: skip
#: (batch, queries, keys)
SHAPES: tuple[tuple[str | int, str | int, str | int], ...] = (
    ("batch", "sequence", "sequence"),
    ("batch", "sequence", "sequence"),
    ("batch", "queries", "keys"),
    ("batch", "queries", "past + queries"),
    ("batch", 3, 5),
    ("batch", 5, 3),
    ("batch", 1, "keys"),
    ("batch", 4, 4),
    (1, "sequence", "sequence"),
    (2, "queries", 6),
    (1, 4, 1),
    ("batch", "sequence", "sequence"),
    ("batch", "queries", "keys"),
)


@st.composite
def random_masks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[Builder, list[Value]]:
    """Masks that hold together: one as a rule."""
    batch, queries, keys = draw(st.sampled_from(SHAPES))
    builder = Builder(queries, keys, draw(st.sampled_from((1, 1, 3))), batch)
    builder.graph.truths.add("truths")
    generator = Generator(draw, builder)

    def mask() -> Value:
        depth = draw(st.sampled_from((0, 0, 0, 1, 2, 3)))
        if not depth:
            return generator.spelled(generator.structures())
        return generator.added(depth) if draw(st.booleans()) else generator.condition(depth)

    return builder, [mask() for _ in range(draw(st.sampled_from((1, 1, 1, 1, 2, 3))))]
