"""Read the elements of a mask: the sub-graph that computes it, as one expression of batch, head, query and key position.

What cannot be read is an :class:`~graphopt.conditions.Element`, a number of which nothing is known but where it stands."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch

from graphopt.conditions import (
    CONDITIONS,
    Condition,
    Const,
    Distance,
    Element,
    Expr,
    Int,
    NonZero,
    Not,
    Real,
    Token,
    Where,
    as_condition,
    as_integer,
    at_most_zero,
    conjunction,
    disjunction,
    negation,
    positions,
    relation,
    within,
)
from graphopt.dims import Dim, Size, floordiv
from graphopt.ir import Graph, Node, Value
from graphopt.mask_moves import MOVES, Place, Unreadable, is_natural
from graphopt.tensors import Weight


class Reader:
    """Elements of values as expressions of an index.

    ``by_key``: for each expression that depends on batch and key alone, the tensors that hold it. ``reasons``: what could not
    be read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.by_key: dict[Expr, list[Element]] = {}
        self.reasons: list[str] = []
        self._read: dict[tuple[Value, tuple[Size, ...]], Expr] = {}
        self._tables: dict[str, tuple[Size, Size, Expr, Expr] | None] = {}

    def read(self, value: Value, index: tuple[Size, ...]) -> Expr:
        """The element of ``value`` at ``index``."""
        key = value, index
        if key not in self._read:
            self._read[key] = expr = self._element(value, index)
            where = frozenset().union(*map(positions, index))
            if "@k" in where and where <= {"@b", "@k"}:
                self.by_key.setdefault(as_integer(expr), []).append(Element(value, index))
        return self._read[key]

    def _element(self, value: Value, index: tuple[Size, ...]) -> Expr:
        node = value.producer
        if node is None:
            return self._weight(value, index)
        reader = _READERS.get(node.op.split(".")[1]) if node.op.startswith("aten.") else None
        if reader is None:
            return Element(value, index)
        try:
            return reader(self, node, index)
        except Unreadable as reason:
            self.reasons.append(str(reason))
            return Element(value, index)

    def _weight(self, value: Value, index: tuple[Size, ...]) -> Expr:
        """A number, an input's element, or one of a table that says which keys each query may see."""
        weight = self.graph.weight_of(value)
        if weight is None:
            element = Element(value, index)
            is_truth = value.name in self.graph.truths and value.type.dtype != torch.bool
            return _as_number(NonZero(element), value.type.dtype) if is_truth else element
        if not value.type.shape:
            return _literal(weight.load().item())
        if value.name not in self._tables:
            self._tables[value.name] = _band(value, weight)
        band = self._tables[value.name]
        if band is None:
            return Element(value, index)
        above, below, inside, outside = band
        row, column = index[-2:]
        ends = ((column - row, above, value.type.shape[-1]), (row - column, below, value.type.shape[-2]))
        near = conjunction(*(at_most_zero(far - end) for far, end, size in ends if end != size - 1))
        return _where(near, inside, outside)

    def arg(self, arg: Any, index: tuple[Size, ...], rank: int) -> Expr:
        """An operand of an element-wise op, broadcast; or a constant."""
        if not isinstance(arg, Value):
            return _literal(arg)
        shape = arg.type.shape
        kept = index[rank - len(shape) :]
        return self.read(arg, tuple(0 if size == 1 else i for size, i in zip(shape, kept, strict=True)))


LARGEST_TABLE = 1 << 24  # elements; a table of 4096 positions


def _band(value: Value, weight: Weight) -> tuple[Size, Size, Expr, Expr] | None:
    """A constant ``[..., N, M]`` with one number where ``-below <= column - row <= above`` and another elsewhere."""
    shape = value.type.shape
    if len(shape) < 2 or any(size != 1 for size in shape[:-2]) or weight.nbytes > 8 * LARGEST_TABLE or 1 in shape[-2:]:
        return None
    table = weight.load().reshape(shape[-2:])  # type: ignore[arg-type]
    middle = table[0, 0].item()
    same = table == middle
    numbers = torch.unique(table[~same])
    if len(numbers) != 1:
        return None
    offsets = torch.arange(table.shape[1]) - torch.arange(table.shape[0])[:, None]
    above, below = int(offsets[same].max()), int((-offsets)[same].max())
    if not torch.equal(same, (offsets <= above) & (-offsets <= below)):
        return None
    exact = table.dtype
    kind: Callable[[Any], Expr] = Const if exact == torch.bool else Real if exact.is_floating_point else Int
    return above, below, kind(middle), kind(numbers[0].item())


def _literal(number: Any) -> Expr:
    if isinstance(number, bool):
        return Const(number)
    return Int(number) if isinstance(number, (int, Dim)) else Real(float(number))


#: Integers that hold every position and every difference of two; the others wrap.
EXACT = frozenset({torch.bool, torch.int32, torch.int64})


def _require_exact(dtype: torch.dtype, node: Node) -> None:
    if not (dtype in EXACT or dtype.is_floating_point):
        raise Unreadable(f"integers of a dtype that may wrap in {node.where}")


Read: TypeAlias = "Callable[[Reader, Node, tuple[Size, ...]], Expr]"


def _elementwise(fn: Callable[..., Expr]) -> Read:
    """A reader for an op that works element by element on its operands in schema order."""

    def read(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
        if node.args.get("alpha", 1) != 1:
            raise Unreadable(f"alpha is not 1 in {node.where}")
        for value in (*node.operands, *node.outputs):
            _require_exact(value.type.dtype, node)
        operands = [arg for name, arg in node.args.items() if name != "alpha"]
        inner = next((value.type.dtype for value in node.operands if value.type.dtype.is_floating_point), None)
        exprs = [as_integer(reader.arg(arg, index, len(index))) for arg in operands]
        if inner is not None:  # constants take the operands' dtype before they are computed with
            exprs = [
                expr if isinstance(arg, Value) else _rounded(expr, inner)
                for expr, arg in zip(exprs, operands, strict=True)
            ]
        dtype = node.outputs[0].type.dtype
        result = fn(*exprs)
        if dtype == torch.bool:
            return as_condition(result)
        return _rounded(result, dtype) if dtype.is_floating_point else result

    return read


def _rounded(expr: Expr, dtype: torch.dtype) -> Expr:
    """Real constants as the dtype holds them."""
    if isinstance(expr, Real):
        return Real(float(torch.tensor(expr.number, dtype=torch.float64).to(dtype).item()))
    if isinstance(expr, Where):
        return _where(expr.condition, _rounded(expr.then, dtype), _rounded(expr.otherwise, dtype))
    return expr


def _moved(place: Place) -> Read:
    """A reader for an op that only moves elements: the same element at another index."""
    return lambda reader, node, index: reader.read(node.args["self"], place(node, index))


def _arange(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    _require_exact(node.outputs[0].type.dtype, node)
    start, step = node.args.get("start", 0), node.args.get("step", 1)
    if isinstance(start, float) or isinstance(step, float) or node.outputs[0].type.dtype.is_floating_point:
        raise Unreadable(f"a range of real numbers in {node.where}")
    return Int(start + index[0] * step)


def _full(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    number = node.args["fill_value"]
    if isinstance(number, Value):
        return reader.arg(number, (), 0)
    dtype = node.outputs[0].type.dtype
    return _converted(_literal(number), dtype, node)


def _cast(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    expr, dtype = reader.read(node.args["self"], index), node.args["dtype"]
    if isinstance(expr, Element) and torch.bool not in (expr.value.type.dtype, dtype):
        widened = not expr.value.type.dtype.is_floating_point and dtype == torch.int64
        return expr if widened else Element(node.outputs[0], index)
    return _converted(expr, dtype, node)


def _converted(expr: Expr, dtype: torch.dtype, node: Node) -> Expr:
    """The expression in another dtype, where that is exact or rounds as torch does."""
    if dtype == torch.bool:
        return as_condition(expr)
    if isinstance(expr, Element) and expr.value.type.dtype != torch.bool:
        raise Unreadable(f"a choice of numbers in another dtype in {node.where}")
    if isinstance(expr, (Element, *CONDITIONS)):
        return _as_number(expr, dtype)
    if isinstance(expr, Where):
        return Where(expr.condition, _converted(expr.then, dtype, node), _converted(expr.otherwise, dtype, node))
    unknown = (
        isinstance(expr, Int) and isinstance(expr.size, Dim) and any(isinstance(n, Token) for n in expr.size.names)
    )
    if unknown and dtype != torch.int64:
        raise Unreadable(f"unknown integers in a dtype that may not hold them in {node.where}")
    if isinstance(expr, Int) and dtype in (torch.int64, torch.int32) and not _is_large(expr.size, 2**31):
        return expr
    number = number_of(expr)
    if number is None:
        if dtype in (torch.float32, torch.float64):
            return expr  # positions are far below 2 ** 24, up to which float32 is exact
        raise Unreadable(f"positions in a dtype that may not hold them in {node.where}")
    if not dtype.is_floating_point and not math.isfinite(number):
        raise Unreadable(f"infinity as an integer in {node.where}")
    converted = torch.tensor(number, dtype=torch.float64).to(dtype).item()
    return Real(float(converted)) if dtype.is_floating_point else Int(int(converted))


def _as_number(truth: Expr, dtype: torch.dtype) -> Expr:
    one, zero = (Real(1.0), Real(0.0)) if dtype.is_floating_point else (Int(1), Int(0))
    return _where(truth, one, zero)


def _indexed(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    """``x[i, j, ...]`` with an index tensor for each of the first axes."""
    source, indices = node.args["self"], node.args["indices"]
    if any(position is None for position in indices):
        raise Unreadable(f"an index that skips axes in {node.where}")
    rest = len(source.type.shape) - len(indices)
    width = len(index) - rest
    places: list[Size] = []
    for position in indices:
        expr = reader.arg(position, index[:width], width)
        if not isinstance(expr, Int) or not is_natural(expr.size):
            raise Unreadable(f"an index that is not a position in {node.where}")
        places.append(expr.size)
    return reader.read(source, (*places, *index[width:]))


def _difference(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    """``x[i] - x[i - 1]``, and ``x[0] - prepend``."""
    source, first, axis = node.args["self"], node.args["prepend"], node.args["dim"]
    _require_exact(source.type.dtype, node)
    if node.args["n"] != 1 or node.args["append"] is not None or first is None or first.type.shape[axis] != 1:
        raise Unreadable(f"differences of other than neighbours in {node.where}")

    def at(value: Value, position: Size) -> Expr:
        return as_integer(reader.read(value, (*index[:axis], position, *index[axis + 1 :])))

    minus = _arithmetic(operator.sub)
    inner = minus(at(source, index[axis]), at(source, index[axis] - 1))
    return _where(relation("eq", index[axis]), minus(at(source, 0), at(first, 0)), inner)


def _running_sum(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    """A sum of nothing but zeros is zero."""
    summand = reader.read(node.args["self"], index)
    if summand in (Const(False), Int(0)) and not node.outputs[0].type.dtype.is_floating_point:
        return Int(0)
    return Element(node.outputs[0], index)


def _absolute(expr: Expr) -> Expr:
    if isinstance(expr, Int):
        return Distance(expr.size)
    number = number_of(expr)
    if number is None:
        raise Unreadable("the absolute value of what is no position")
    return Real(abs(number))


def _floor_divide(a: Expr, b: Expr) -> Expr:
    if isinstance(a, Int) and isinstance(b, Int) and isinstance(b.size, int) and b.size > 0:
        return Int(floordiv(a.size, b.size))
    raise Unreadable("a division of what are no positions")


def _division(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    if node.args.get("rounding_mode") != "floor":
        raise Unreadable(f"a division in {node.where}")
    operands = (as_integer(reader.arg(node.args[name], index, len(index))) for name in ("self", "other"))
    return _floor_divide(*operands)


def _triangle(keep: Callable[[Size, Size, Size], Condition]) -> Read:
    def read(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
        inner = reader.read(node.args["self"], index)
        condition = keep(index[-2], index[-1], node.args["diagonal"])
        if isinstance(inner, CONDITIONS):
            return conjunction(condition, inner)
        return Where(condition, inner, Int(0) if isinstance(inner, Int) else Real(0.0))

    return read


def _compare(name: str) -> Read:
    def compare(a: Expr, b: Expr) -> Expr:
        if isinstance(a, Where) or isinstance(b, Where):
            return _lift(compare, a, b)
        if isinstance(a, Int) and isinstance(b, Int):
            return relation(name, a.size - b.size)
        if isinstance(a, Distance) and isinstance(b, Int) and name in ("le", "lt", "ge", "gt"):
            near = within(a, b.size if name in ("le", "gt") else b.size - 1)
            return near if name in ("le", "lt") else negation(near)
        if isinstance(a, Element) and b in (Int(0), Real(0.0), Const(False)) and name in ("ne", "eq"):
            return NonZero(a) if name == "ne" else Not(NonZero(a))
        if isinstance(a, CONDITIONS) and isinstance(b, CONDITIONS) and name in ("ne", "eq"):
            same = disjunction(conjunction(a, b), conjunction(negation(a), negation(b)))
            return same if name == "eq" else negation(same)
        numbers = [x.number if isinstance(x, Real) else x.size for x in (a, b) if isinstance(x, (Real, Int))]
        if len(numbers) == 2 and not any(isinstance(number, Dim) for number in numbers):
            return Const(bool(getattr(operator, name)(*numbers)))
        raise Unreadable(f"a comparison ({name}) of values that are not positions")

    return _elementwise(compare)


def _arithmetic(fn: Callable[[Any, Any], Any]) -> Callable[[Expr, Expr], Expr]:
    def combine(a: Expr, b: Expr) -> Expr:
        if isinstance(a, Where) or isinstance(b, Where):
            return _lift(combine, a, b)
        if isinstance(a, Int) and isinstance(b, Int):
            size = fn(a.size, b.size)
            if _is_large(size, 2**15):
                raise Unreadable("integers that may wrap")
            return Int(size)
        numbers = [number_of(x) for x in (a, b)]
        if None in numbers:
            raise Unreadable("arithmetic on values that are not positions or constants")
        result = float(fn(*numbers))
        if math.isnan(result):
            raise Unreadable("arithmetic that gives NaN")
        return Real(result)

    return combine


def number_of(expr: Expr) -> float | None:
    """The constant that an expression is, if it is one."""
    if isinstance(expr, Real):
        return expr.number
    return float(expr.size) if isinstance(expr, Int) and isinstance(expr.size, int) else None


def _lift(fn: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr:
    if isinstance(a, Where):
        return _where(a.condition, fn(a.then, b), fn(a.otherwise, b))
    assert isinstance(b, Where)
    return _where(b.condition, fn(a, b.then), fn(a, b.otherwise))


def _is_large(size: Size, limit: int) -> bool:
    """Whether a polynomial has factors so large that 32 bits may not hold it; a constant, whether it is that large."""
    if isinstance(size, int):
        return abs(size) >= max(limit, 2**31)
    return any(abs(number) > limit for monomial, number in size.terms if monomial)


def _where(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    truth = as_condition(condition)
    if isinstance(truth, Const):
        return then if truth.truth else otherwise
    if then == otherwise:
        return then
    if isinstance(then, CONDITIONS) and isinstance(otherwise, CONDITIONS):
        return disjunction(conjunction(truth, then), conjunction(negation(truth), otherwise))
    return Where(truth, then, otherwise)


def _multiply(a: Expr, b: Expr) -> Expr:
    if isinstance(a, CONDITIONS) and isinstance(b, CONDITIONS):
        return conjunction(a, b)
    return _arithmetic(operator.mul)(a, b)


def _masked_fill(source: Expr, mask: Expr, value: Expr) -> Expr:
    return _where(mask, value, source)


def _of_truths(read: Read) -> Read:
    """A bitwise op, which is a logical one on booleans only."""

    def truths(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
        if node.outputs[0].type.dtype != torch.bool:
            raise Unreadable(f"a bitwise op on integers in {node.where}")
        return read(reader, node, index)

    return truths


_READERS: Mapping[str, Read] = {
    **{name: _moved(place) for name, place in MOVES.items()},
    "arange": _arange,
    "full": _full,
    "to": _cast,
    "index": _indexed,
    "tril": _triangle(lambda row, column, diagonal: at_most_zero(column - row - diagonal)),
    "triu": _triangle(lambda row, column, diagonal: at_most_zero(row + diagonal - column)),
    **{name: _compare(name) for name in ("le", "lt", "ge", "gt", "eq", "ne")},
    "logical_and": (_and := _elementwise(lambda a, b: conjunction(*map(as_condition, (a, b))))),
    "logical_or": (_or := _elementwise(lambda a, b: disjunction(*map(as_condition, (a, b))))),
    "logical_not": (_not := _elementwise(lambda a: negation(as_condition(a)))),
    "bitwise_and": _of_truths(_and),
    "bitwise_or": _of_truths(_or),
    "bitwise_not": _of_truths(_not),
    "diff": _difference,
    "cumsum": _running_sum,
    "abs": _elementwise(_absolute),
    "floor_divide": _elementwise(_floor_divide),
    "div": _division,
    "add": _elementwise(_arithmetic(operator.add)),
    "sub": _elementwise(_arithmetic(operator.sub)),
    "rsub": _elementwise(lambda a, b: _arithmetic(operator.sub)(b, a)),
    "mul": _elementwise(_multiply),
    "where": _elementwise(_where),
    "masked_fill": _elementwise(_masked_fill),
}
