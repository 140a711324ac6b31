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
LOWS = (-math.inf, -math.inf, LOWEST, LOWEST, LOWEST_HALF, OLD_LOW, -1e30, -1.0)
MOST = 8  # the largest size that masks are evaluated at
TABLE = MOST + 4  # rows and columns of a constant table


@dataclass
class Generator:
    """Draws masks into a builder's graph."""

    draw: Callable[[st.SearchStrategy[Any]], Any]
    m: Builder

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def one_of(self, makers: Sequence[Callable[[Generator], Value]]) -> Value:
        made: Value = self.pick(makers)(self)
        return made

    def flip(self) -> bool:
        return bool(self.draw(st.booleans()))

    def number(self) -> int:
        return int(self.draw(st.integers(-4, 4)))

    @property
    def square(self) -> bool:
        return self.m.queries == self.m.keys

    # Integers

    def key(self) -> Value:
        plain = self.m.key(abs(self.number()), self.pick(DTYPES))
        return self.m.unsqueeze(plain, 0, 0, 0) if self.flip() else plain

    def query(self) -> Value:
        plain = self.m.query(abs(self.number()), self.pick(DTYPES))
        return self.m.unsqueeze(plain, 0, 0) if self.flip() else plain

    def moved_on(self) -> Value:
        """A position and a number, or the surplus of keys, or a number of its batch."""
        m = self.m
        at = self.key() if self.flip() else self.query()
        more = self.pick(("number", "surplus", "batch", "twice"))
        if more == "twice":
            return m.times(at, self.pick((2, -1)))
        return m.add(at, {"number": self.number(), "surplus": m.keys - m.queries}.get(more) or m.each("lengths"))

    def position(self) -> Value:
        m = self.m
        kind = self.pick(("key", "query", "key - query", "query - key", "moved", "moved", "abs", "divided", "number"))
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
        return self.key() if kind == "key" else self.query()

    def integers(self) -> Value:
        """``[batch, keys]``: numbers of the keys."""
        m = self.m
        kind = self.pick(
            ("numbers", "numbers", "small", "wide", "counted", "divided", "shifted", "float", "sum", "part")
        )
        if kind == "small":
            return m.input("small", torch.int32)
        if kind == "wide":
            return m.cast(m.input("small", torch.int32), torch.int64)
        if kind == "counted":
            return m.numbered(m.numbers if self.flip() else self.spread(m.key(abs(self.number()))))
        if kind == "divided":
            return m.divided(self.integers(), abs(self.number()) + 1)
        if kind == "shifted":
            return m.add(m.key(), m.unsqueeze(m.input("lengths", torch.int64, (m.batch,)), 1))
        if kind == "float":
            return m.cast(self.integers(), torch.float32)
        if kind == "sum":
            return m.op(self.pick(("add.Tensor", "mul.Tensor")), self=m.numbers, other=m.input("small", torch.int32))
        if kind == "part":
            start = self.pick((0, 2))
            large = m.input("large", torch.int64, (m.batch, m.keys + 3))
            return m.slice(large, 1, start, m.keys + start)
        return m.numbers

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
            ("mask", "mask", "other", "number", "compared", "shorter", "not", "both", "either", "bytes", "same")
        )
        if kind == "number":
            return m.cast(self.integers(), torch.bool)
        if kind == "compared":
            return m.compare(self.pick(RELATIONS), self.integers(), self.pick((0, 0, 1, 2)))
        if kind == "shorter":
            lengths = m.unsqueeze(m.input("lengths", torch.int64, (m.batch,)), 1)
            return m.compare(self.pick(("lt", "ge", "gt")), m.key(abs(self.number())), lengths)
        if kind == "not":
            return m.negate(self.row())
        if kind == "both":
            return m.both(self.row(), self.row())
        if kind == "either":
            return m.either(self.row(), self.row())
        if kind == "bytes":
            return m.cast(m.input("bytes", torch.uint8), torch.bool)
        if kind == "same":
            return m.compare(self.pick(("eq", "ne")), m.mask, m.other)
        return m.mask if kind == "mask" else m.other

    def padding(self) -> Value:
        m, row = self.m, self.row()
        kind = self.pick(("unsqueezed", "unsqueezed", "reshaped", "gathered", "repeated"))
        if kind == "gathered":
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
        m, by, start = self.m, abs(self.number()) + 1, self.pick((0, 0, 1, 4))
        if self.square and self.flip():
            offset = m.unsqueeze(m.input("lengths", torch.int64, (m.batch,)), 1)
            return m.same(m.divided(m.op(self.pick(("add.Tensor", "sub.Tensor")), self=m.key(), other=offset), by))
        return m.chunked(by, start)

    def segments(self) -> Value:
        """A number at the query and at the key compared, or the truths of both."""
        m = self.m
        if not self.square:
            return self.chunk()
        if self.flip():
            row = self.row()
            pair = m.padding(row), m.at_query(row if self.flip() else self.row())
            return m.both(*pair) if self.flip() else m.both(*pair[::-1])
        numbers = self.integers()
        if self.flip():
            return m.same(numbers)
        relation = self.pick(("eq", "eq", "le", "ne"))
        return m.compare(relation, m.minus(m.at_query(numbers), m.padding(numbers)), self.pick((0, 0, 0, 1)))

    def prefix(self) -> Value:
        """Keys that all see beside a band."""
        m = self.m
        first = m.compare("lt", self.key(), abs(self.number())) if self.flip() else self.padding()
        band = self.band() if self.flip() else m.both(self.band(), self.band())
        if self.flip():
            return m.either(band, first)
        return m.op("where.self", condition=first, self=self.always(), other=band)

    def always(self) -> Value:
        m = self.m
        return self.pick(
            (m.compare("ge", self.key(), 0), m.full(True, torch.bool), m.compare("lt", m.query(), m.queries))
        )

    def table(self) -> Value:
        """A part of a constant table."""
        m, offsets = self.m, torch.arange(TABLE) - torch.arange(TABLE)[:, None]
        above, below, kind = self.number(), self.number(), self.pick(("low", "low", "high", "band", "blocks", "random"))
        shown = {
            "low": offsets <= above, "high": offsets >= -below, "band": (offsets <= above) & (offsets >= -below),
            "blocks": (torch.arange(TABLE) // 3)[:, None] == torch.arange(TABLE) // 3,
            "random": torch.rand(TABLE, TABLE, generator=torch.Generator().manual_seed(above)) > 0.5,
        }[kind]  # fmt: skip
        value = self.cut(shown, self.pick((torch.bool, torch.uint8, torch.int64, torch.float32)))
        if value.type.dtype == torch.bool:
            return value
        return m.cast(value, torch.bool) if self.flip() else m.compare(self.pick(("ne", "eq")), value, 0)

    def cut(self, table: Tensor, dtype: torch.dtype) -> Value:
        m, row, column = self.m, self.pick((0, 0, 1, 3)), self.pick((0, 0, 1, 3))
        table = table.to(dtype)[(None,) * self.pick((0, 2))]
        if row + column == 0 and self.flip():
            columns = m.slice(m.table(table.reshape(TABLE, TABLE)), 1, 0, m.keys)
            return m.gather(columns, m.arange(m.queries)) if self.flip() else m.gather(columns, m.query(), m.key())
        return m.cut(table, row, column)

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
        number = self.pick((self.position(), m.padding(m.numbers)))
        if number.type.dtype.is_floating_point:
            return m.cast(number, torch.bool)
        return m.cast(m.op("bitwise_and.Scalar", self=number, other=1), torch.bool)

    def triangle(self) -> Value:
        m, dtype = self.m, self.pick((torch.bool, torch.int64, torch.float32))
        diagonal = self.pick((self.number(), m.keys - m.queries))
        table = m.op(self.pick(("tril.default", "triu.default")), self=m.ones(dtype), diagonal=diagonal)
        return table if dtype == torch.bool else m.cast(table, torch.bool)

    def moved(self, depth: int) -> Value:
        m, kind = self.m, self.pick(("rows", "transposed", "permuted", "expanded", "repeated", "cut", "cut columns"))
        if kind == "rows":
            rows = m.add(m.unsqueeze(m.arange(m.keys), 1), self.number())
            return m.turned(m.compare(self.pick(RELATIONS), rows, m.arange(m.queries)))
        inner = self.condition(depth - 1)
        whole = m.op("expand.default", self=inner, size=(m.batch, 1, m.queries, m.keys))
        if kind == "repeated":
            shape = inner.type.shape if len(inner.type.shape) == 4 else whole.type.shape
            source = inner if len(inner.type.shape) == 4 else whole
            wanted = (m.batch, 1, m.queries, m.keys)
            repeats = tuple(want if size == 1 else 1 for size, want in zip(shape, wanted, strict=True))
            return m.op("repeat.default", self=source, repeats=repeats)
        if kind in ("transposed", "permuted") and self.square:
            return m.turned(whole) if kind == "transposed" else m.op("permute.default", self=whole, dims=(0, 1, 3, 2))
        if kind.startswith("cut"):
            start, columns = abs(self.number()), 2 * (kind == "cut columns")
            shape = (m.queries + start, m.keys + columns)
            table = m.op("tril.default", self=m.full(1, torch.bool, *shape), diagonal=self.number())
            rows = m.slice(m.slice(table, 0, start, shape[0]), 1, columns, shape[1])
            return rows if self.flip() else m.unsqueeze(rows, 0, 0)
        return whole

    def condition(self, depth: int) -> Value:
        m = self.m
        kind = self.pick(
            ("leaf", "structures", "structures", "and", "and", "or", "not", "choose", "same", "number", "moved")
        )
        if depth <= 0 or kind == "leaf":
            return self.one_of(LEAVES)
        if kind == "structures":
            return m.both(self.one_of(STRUCTURES), self.one_of(STRUCTURES))
        if kind == "moved":
            return self.moved(depth)
        a = self.condition(depth - 1)
        if kind == "not":
            return m.op(self.pick(("bitwise_not.default", "logical_not.default")), self=a)
        if kind == "number":
            number = m.cast(a, self.pick((torch.int64, torch.float32, torch.int32)))
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

    def added(self, depth: int) -> Value:
        m, low = self.m, float(self.pick(LOWS))
        kind = self.pick(
            ("where", "filled", "inverted", "triangle", "table", "sum", "sum", "filled into", "chosen", "cast")
        )
        if kind == "triangle":
            table = m.full(low, torch.float32, m.queries, m.keys)
            return m.op(self.pick(("tril.default", "triu.default")), self=table, diagonal=self.number())
        if kind == "table":
            shown = torch.arange(TABLE) - torch.arange(TABLE)[:, None] <= self.number()
            return self.cut(torch.where(shown, 0.0, low), torch.float32)
        if depth > 1 and kind == "sum":
            return m.add(self.added(depth - 1), self.added(depth - 1))
        if depth > 1 and kind == "cast":
            return m.cast(self.added(depth - 1), self.pick((torch.float16, torch.float64, torch.float32)))
        condition = self.one_of(STRUCTURES) if self.flip() else self.condition(depth - 1)
        if depth > 1 and kind == "filled into":
            return m.op(
                "masked_fill.Scalar", self=self.added(depth - 1), mask=condition, value=self.pick((LOWEST_HALF, 0.0))
            )
        if depth > 1 and kind == "chosen":
            return m.op("where.ScalarOther", condition=condition, self=self.added(depth - 1), other=low)
        if kind == "inverted":
            return m.inverted(condition, low)
        if kind == "where":
            zero, hidden = m.full(0.0), m.full(low)
            pair = (zero, hidden) if self.flip() else (hidden, zero)
            return m.op("where.self", condition=condition, self=pair[0], other=pair[1])
        return m.added(condition if self.flip() else m.negate(condition), low)


STRUCTURES: tuple[Callable[[Generator], Value], ...] = (
    Generator.band, Generator.band, Generator.chunk, Generator.segments, Generator.prefix, Generator.table,
    Generator.padding, Generator.padding, Generator.always,
)  # fmt: skip
LEAVES: tuple[Callable[[Generator], Value], ...] = (
    *STRUCTURES, Generator.comparison, Generator.comparison, Generator.triangle, Generator.bits,
)  # fmt: skip
SHAPES: tuple[tuple[str | int, str | int], ...] = (
    ("sequence", "sequence"),
    ("sequence", "sequence"),
    ("queries", "keys"),
    (3, 5),
    (5, 3),
    (1, "keys"),
    (4, 4),
)


@st.composite
def random_masks(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[Builder, list[Value]]:
    """Masks that hold together: one as a rule."""
    queries, keys = draw(st.sampled_from(SHAPES))
    builder = Builder(queries, keys, least=draw(st.sampled_from((1, 1, 3))))
    generator = Generator(draw, builder)

    def mask() -> Value:
        depth = draw(st.integers(0, 3))
        return generator.added(depth) if draw(st.booleans()) else generator.condition(depth)

    return builder, [mask() for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3))))]
