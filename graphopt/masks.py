"""Prove what an attention mask says.

``prove`` reads the sub-graph that computes a mask (arange, comparisons, and/or, where, index, expand, additive -inf ...) as
one expression of batch, head, query and key position, and simplifies it. Where the expression is a conjunction of known
conditions it returns them as a :class:`Mask`; where it is anything else it returns :class:`Unproven` with the first thing
that does not fit. Nothing is taken for granted: a mask that is not proven stays a tensor.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from graphopt.conditions import (
    BATCH,
    CONDITIONS,
    HEAD,
    KEY,
    QUERY,
    And,
    AtMostZero,
    Condition,
    Const,
    Element,
    Expr,
    Int,
    NonZero,
    Not,
    Real,
    Where,
    as_condition,
    at_most_zero,
    conjunction,
    describe,
    disjunction,
    negation,
    relation,
)
from graphopt.dims import Dim, Size
from graphopt.ir import DimRange, Graph, Node, Value


@dataclass(frozen=True)
class Mask:
    """A mask as a conjunction: every condition that is set must hold for a key to be visible.

    ``window_left``, ``window_right`` as in ``graphopt.attention``; ``key_mask`` is a value ``[B, T]`` whose non-zero
    elements are visible keys."""

    causal: str = "none"
    window_left: int = -1
    window_right: int = -1
    key_mask: Value | None = None

    def __str__(self) -> str:
        parts = [f"causal ({self.causal})"] if self.causal != "none" else []
        parts += [f"window_left {self.window_left}"] if self.window_left >= 0 else []
        parts += [f"window_right {self.window_right}"] if self.window_right >= 0 else []
        parts += [f"key padding (%{self.key_mask.name})"] if self.key_mask is not None else []
        return " and ".join(parts) or "none"


@dataclass(frozen=True)
class Unproven:
    """Why a mask stays a tensor."""

    reason: str


class _Stop(Exception):
    """What the analysis cannot read."""


def prove(graph: Graph, mask: Value, queries: Size, keys: Size) -> Mask | Unproven:
    """What ``mask`` says, broadcast to ``[B, H, queries, keys]``: bool (true is visible) or added to the scores."""
    shape = mask.type.shape
    if len(shape) > 4:
        return Unproven(f"%{mask.name} has {len(shape)} dimensions")
    axes = (BATCH, HEAD, QUERY, KEY)[4 - len(shape) :]
    index = tuple(0 if size == 1 else axis for axis, size in zip(axes, shape, strict=True))
    try:
        expr = Reader(graph).read(mask, index)
        visible = as_condition(expr) if mask.type.dtype == torch.bool else _visible(expr)
        return _classify(_conjuncts(visible), _Ranges(graph.dims, queries, keys), queries, keys)
    except _Stop as stop:
        return Unproven(str(stop))


# Reading the graph


class Reader:
    """Elements of values as expressions of an index."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def read(self, value: Value, index: tuple[Size, ...]) -> Expr:
        node = value.producer
        if node is None:
            weight = self.graph.weight_of(value)
            if weight is not None and not value.type.shape:
                return _literal(weight.load().item())
            return Element(value, index)
        reader = _READERS.get(node.op.split(".")[1]) if node.op.startswith("aten.") else None
        return reader(self, node, index) if reader is not None else Element(value, index)

    def arg(self, arg: Any, index: tuple[Size, ...], rank: int) -> Expr:
        """An operand of an element-wise op, broadcast; or a constant."""
        if not isinstance(arg, Value):
            return _literal(arg)
        shape = arg.type.shape
        kept = index[rank - len(shape) :]
        return self.read(arg, tuple(0 if size == 1 else i for size, i in zip(shape, kept, strict=True)))


def _literal(number: Any) -> Expr:
    if isinstance(number, bool):
        return Const(number)
    return Int(number) if isinstance(number, (int, Dim)) else Real(float(number))


#: Integers that hold every position and every difference of two; the others wrap.
EXACT = frozenset({torch.bool, torch.int32, torch.int64})


def _require_exact(dtype: torch.dtype, node: Node) -> None:
    if not (dtype in EXACT or dtype.is_floating_point):
        raise _Stop(f"integers of a dtype that may wrap in {node.where}")


Read: TypeAlias = "Callable[[Reader, Node, tuple[Size, ...]], Expr]"


def _elementwise(fn: Callable[..., Expr]) -> Read:
    """A reader for an op that works element by element on its operands in schema order."""

    def read(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
        if node.args.get("alpha", 1) != 1:
            raise _Stop(f"alpha is not 1 in {node.where}")
        for value in (*node.operands, *node.outputs):
            _require_exact(value.type.dtype, node)
        operands = [arg for name, arg in node.args.items() if name != "alpha"]
        return fn(*(reader.arg(arg, index, len(index)) for arg in operands))

    return read


def _moved(place: Callable[[Node, tuple[Size, ...]], tuple[Size, ...]]) -> Read:
    """A reader for an op that only moves elements: the same element at another index."""
    return lambda reader, node, index: reader.read(node.args["self"], place(node, index))


def _unsqueezed(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    axis = node.args["dim"]
    return index[:axis] + index[axis + 1 :]


def _expanded(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    shape = node.args["self"].type.shape
    return tuple(0 if size == 1 else i for size, i in zip(shape, index[len(index) - len(shape) :], strict=True))


def _transposed(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    swapped = list(index)
    a, b = node.args["dim0"], node.args["dim1"]
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return tuple(swapped)


def _permuted(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    source: list[Size] = [0] * len(index)
    for axis, size in zip(node.args["dims"], index, strict=True):
        source[axis] = size
    return tuple(source)


def _sliced(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    axis, start = node.args["dim"], node.args["start"]
    if isinstance(start, int) and start < 0:
        raise _Stop(f"a negative start in {node.where}")
    return (*index[:axis], (start or 0) + index[axis] * node.args["step"], *index[axis + 1 :])


def _selected(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    axis, position = node.args["dim"], node.args["index"]
    if isinstance(position, int) and position < 0:
        position = node.args["self"].type.shape[axis] + position
    return (*index[:axis], position, *index[axis:])


def _reshaped(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    """A reshape that only adds or removes axes of size 1."""
    old, new = node.args["self"].type.shape, node.outputs[0].type.shape
    kept = [i for i, size in zip(index, new, strict=True) if size != 1]
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        raise _Stop(f"a reshape that regroups elements in {node.where}")
    return tuple(0 if size == 1 else kept.pop(0) for size in old)


def _arange(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    _require_exact(node.outputs[0].type.dtype, node)
    start, step = node.args.get("start", 0), node.args.get("step", 1)
    if isinstance(start, float) or isinstance(step, float) or node.outputs[0].type.dtype.is_floating_point:
        raise _Stop(f"a range of real numbers in {node.where}")
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
        same = not expr.value.type.dtype.is_floating_point and (dtype.is_floating_point or dtype == torch.int64)
        return expr if same else Element(node.outputs[0], index)
    return _converted(expr, dtype, node)


def _converted(expr: Expr, dtype: torch.dtype, node: Node) -> Expr:
    """The expression in another dtype, where that is exact or rounds as torch does."""
    if dtype == torch.bool:
        return as_condition(expr)
    if isinstance(expr, (Element, *CONDITIONS)):
        one, zero = (Real(1.0), Real(0.0)) if dtype.is_floating_point else (Int(1), Int(0))
        return _where(expr, one, zero)
    if isinstance(expr, Where):
        return Where(expr.condition, _converted(expr.then, dtype, node), _converted(expr.otherwise, dtype, node))
    if isinstance(expr, Int) and dtype in (torch.int64, torch.int32):
        return expr
    number = _number(expr)
    if number is None:
        if dtype in (torch.float32, torch.float64):
            return expr  # positions are far below 2 ** 24, up to which float32 is exact
        raise _Stop(f"positions in a dtype that may not hold them in {node.where}")
    if not dtype.is_floating_point and not math.isfinite(number):
        raise _Stop(f"infinity as an integer in {node.where}")
    converted = torch.tensor(number, dtype=torch.float64).to(dtype).item()
    return Real(float(converted)) if dtype.is_floating_point else Int(int(converted))


def _indexed(reader: Reader, node: Node, index: tuple[Size, ...]) -> Expr:
    """``x[i, j, ...]`` with an index tensor for each of the first axes."""
    source, indices = node.args["self"], node.args["indices"]
    if any(position is None for position in indices):
        raise _Stop(f"an index that skips axes in {node.where}")
    rest = len(source.type.shape) - len(indices)
    width = len(index) - rest
    places: list[Size] = []
    for position in indices:
        expr = reader.arg(position, index[:width], width)
        if not isinstance(expr, Int) or not _is_natural(expr.size):
            raise _Stop(f"an index that is not a position in {node.where}")
        places.append(expr.size)
    return reader.read(source, (*places, *index[width:]))


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
        if isinstance(a, Element) and b in (Int(0), Real(0.0), Const(False)) and name in ("ne", "eq"):
            return NonZero(a) if name == "ne" else Not(NonZero(a))
        if isinstance(a, CONDITIONS) and isinstance(b, CONDITIONS) and name in ("ne", "eq"):
            same = disjunction(conjunction(a, b), conjunction(negation(a), negation(b)))
            return same if name == "eq" else negation(same)
        numbers = [x.number if isinstance(x, Real) else x.size for x in (a, b) if isinstance(x, (Real, Int))]
        if len(numbers) == 2 and not any(isinstance(number, Dim) for number in numbers):
            return Const(bool(getattr(operator, name)(*numbers)))
        raise _Stop(f"a comparison ({name}) of values that are not positions")

    return _elementwise(compare)


def _arithmetic(fn: Callable[[Any, Any], Any]) -> Callable[[Expr, Expr], Expr]:
    def combine(a: Expr, b: Expr) -> Expr:
        if isinstance(a, Where) or isinstance(b, Where):
            return _lift(combine, a, b)
        if isinstance(a, Int) and isinstance(b, Int):
            return Int(fn(a.size, b.size))
        numbers = [_number(x) for x in (a, b)]
        if None in numbers:
            raise _Stop("arithmetic on values that are not positions or constants")
        result = float(fn(*numbers))
        if math.isnan(result):
            raise _Stop("arithmetic that gives NaN")
        return Real(result)

    return combine


def _number(expr: Expr) -> float | None:
    if isinstance(expr, Real):
        return expr.number
    return float(expr.size) if isinstance(expr, Int) and isinstance(expr.size, int) else None


def _lift(fn: Callable[[Expr, Expr], Expr], a: Expr, b: Expr) -> Expr:
    if isinstance(a, Where):
        return _where(a.condition, fn(a.then, b), fn(a.otherwise, b))
    assert isinstance(b, Where)
    return _where(b.condition, fn(a, b.then), fn(a, b.otherwise))


def _where(condition: Expr, then: Expr, otherwise: Expr) -> Expr:
    truth = as_condition(condition)
    if isinstance(truth, Const):
        return then if truth.truth else otherwise
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
            raise _Stop(f"a bitwise op on integers in {node.where}")
        return read(reader, node, index)

    return truths


_READERS: Mapping[str, Read] = {
    "arange": _arange,
    "full": _full,
    "to": _cast,
    "unsqueeze": _moved(_unsqueezed),
    "expand": _moved(_expanded),
    "transpose": _moved(_transposed),
    "permute": _moved(_permuted),
    "slice": _moved(_sliced),
    "select": _moved(_selected),
    "reshape": _moved(_reshaped),
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
    "add": _elementwise(_arithmetic(operator.add)),
    "sub": _elementwise(_arithmetic(operator.sub)),
    "rsub": _elementwise(lambda a, b: _arithmetic(operator.sub)(b, a)),
    "mul": _elementwise(_multiply),
    "where": _elementwise(_where),
    "masked_fill": _elementwise(_masked_fill),
}


def _visible(expr: Expr) -> Condition:
    """Where an additive mask adds nothing, if everywhere else it hides the key."""
    if isinstance(expr, Where):
        return disjunction(
            conjunction(expr.condition, _visible(expr.then)),
            conjunction(negation(expr.condition), _visible(expr.otherwise)),
        )
    number = _number(expr)
    if number is None:
        raise _Stop("it adds values that are neither 0 nor -inf")
    if number == 0:
        return Const(True)
    if hides(number):
        return Const(False)
    raise _Stop(f"it adds {number:g}, which is neither 0 nor low enough to hide a key")


def hides(number: float) -> bool:
    """Whether adding ``number`` to a score hides its key: -inf, or the lowest number of a dtype of 16 bits or more, or
    sums of such. Scores are smaller by 30 orders of magnitude (by three for float16, whose range they share)."""
    return number == -math.inf or number <= torch.finfo(torch.float16).min


def _conjuncts(condition: Condition) -> Sequence[Condition]:
    return condition.parts if isinstance(condition, And) else (condition,)


def _is_natural(size: Size) -> bool:
    """Whether a polynomial has no negative term: with names >= 0 it is then >= 0."""
    return size >= 0 if isinstance(size, int) else all(coefficient >= 0 for _, coefficient in size.terms)


@dataclass(frozen=True)
class _Ranges:
    """What is known of positions and sizes: ``0 <= @q < queries``, ``0 <= @k < keys``, dims at least their minimum."""

    dims: Mapping[str, DimRange]
    queries: Size
    keys: Size

    def always_at_most_zero(self, size: Size) -> bool:
        """Whether ``size <= 0`` for every position: shown by putting each position to the end that is worst."""
        if isinstance(size, Dim):
            coefficient = dict(size.terms)
            worst: dict[str, Any] = {name: Dim.named(name) for name in size.names}
            for axis, end in (("@q", self.queries), ("@k", self.keys)):
                if axis in worst:
                    worst[axis] = end - 1 if coefficient.get((axis,), 0) > 0 else 0
            if any(
                len(monomial) > 1 or not all(isinstance(atom, str) for atom in monomial) for monomial in coefficient
            ):
                return False
            size = size.evaluate(worst)
        if isinstance(size, int):
            return size <= 0
        bound = 0
        for monomial, number in size.terms:
            if not monomial:
                bound += number
            elif number > 0 or len(monomial) > 1 or monomial[0] not in self.dims:
                return False
            else:
                bound += number * self.dims[str(monomial[0])].min
        return bound <= 0


def _classify(conditions: Sequence[Condition], ranges: _Ranges, queries: Size, keys: Size) -> Mask | Unproven:
    """The conjunction as a Mask, or what in it is no known condition."""
    causal, left, right = "none", -1, -1
    key_mask: Value | None = None
    for condition in conditions:
        if condition == Const(True) or (
            isinstance(condition, AtMostZero) and ranges.always_at_most_zero(condition.size)
        ):
            continue
        if isinstance(condition, NonZero) and condition.element.index == (BATCH, KEY):
            if key_mask is not None and key_mask is not condition.element.value:
                return Unproven("it has two key padding masks")
            key_mask = condition.element.value
            continue
        offset = _distance(condition)
        if offset is None:
            return Unproven(f"it holds a condition that is no known structure: {describe(condition)}")
        sign, distance = offset
        corner = _corner(sign, distance, keys - queries)
        if corner is not None:
            if causal not in ("none", corner):
                return Unproven("it is causal from both corners")
            causal = corner
        elif isinstance(distance, int) and distance >= 0:
            left = distance if sign < 0 and left < 0 else min(left, distance) if sign < 0 else left
            right = distance if sign > 0 and right < 0 else min(right, distance) if sign > 0 else right
        else:
            return Unproven(f"it holds a condition that is no known structure: {describe(condition)}")
    if causal == "lower_right" and (left >= 0 or right >= 0) and keys != queries:
        return Unproven("its window counts from the upper left, its causal part from the lower right")
    return Mask(causal, left, right, key_mask)


def _corner(sign: int, distance: Size, surplus: Size) -> str | None:
    """Which causal mask ``k - q <= distance`` is, if one; where queries and keys are as many the two are one."""
    if sign < 0:
        return None
    return "upper_left" if distance == 0 else "lower_right" if distance == surplus else None


def _distance(condition: Condition) -> tuple[int, Size] | None:
    """``(+1, d)`` for ``k - q <= d``, ``(-1, d)`` for ``q - k <= d``, else None."""
    if not isinstance(condition, AtMostZero):
        return None
    for sign, rest in ((1, condition.size - (KEY - QUERY)), (-1, condition.size - (QUERY - KEY))):
        if not isinstance(rest, Dim) or not rest.names & {"@b", "@h", "@q", "@k"}:
            return sign, -rest
    return None
