"""Prove what an attention mask says.

``prove`` reads the sub-graphs that compute a mask (:mod:`graphopt.mask_reader`) as one condition of batch, head, query and
key position. Where the condition is a conjunction of known ones it returns them as a :class:`Mask`; where it is anything
else it returns :class:`Unproven` with the first thing that does not fit. Nothing is taken for granted: a mask that is not
proven stays a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.conditions import (
    BATCH,
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
    Or,
    Where,
    as_condition,
    as_integer,
    conjunction,
    describe,
    disjunction,
    moved,
    negation,
    positions,
)
from graphopt.dims import Call, Dim, Size
from graphopt.ir import Graph, Value
from graphopt.mask_moves import Unreadable
from graphopt.mask_reader import Reader, number_of
from graphopt.tensors import DimRange


@dataclass(frozen=True)
class Keys:
    """Keys by a tensor with an axis of keys and perhaps one of batches: those where it is not zero; or where it is."""

    value: Value
    where_zero: bool = False

    def __str__(self) -> str:
        return f"{'not ' * self.where_zero}%{self.value.name}"


@dataclass(frozen=True)
class Mask:
    """A mask as a conjunction: every condition that is set must hold for a key to be visible.

    ``causal``, ``window_left``, ``window_right``, ``chunk`` as in ``graphopt.attention``; ``prefix``: keys that these four do
    not hide (or how many first ones). ``keys``: all of them must show the key. ``segments``: a tensor whose element (or, of
    ``Keys``, whose truth) at the query and at the key must be equal."""

    causal: str = "none"
    window_left: int = -1
    window_right: int = -1
    chunk: int = 0
    prefix: Keys | int | None = None
    keys: tuple[Keys, ...] = ()
    segments: Value | Keys | None = None

    def __str__(self) -> str:
        parts = [f"causal ({self.causal})"] if self.causal != "none" else []
        parts += [f"window_left {self.window_left}"] if self.window_left >= 0 else []
        parts += [f"window_right {self.window_right}"] if self.window_right >= 0 else []
        parts += [f"chunks of {self.chunk}"] if self.chunk else []
        parts += [f"prefix {self.prefix}"] if self.prefix is not None else []
        parts += [f"key padding ({keys})" for keys in self.keys]
        if self.segments is not None:
            parts.append(f"segments ({self.segments if isinstance(self.segments, Keys) else '%' + self.segments.name})")
        return " and ".join(parts) or "none"


@dataclass(frozen=True)
class Unproven:
    """Why a mask stays a tensor."""

    reason: str


def prove(graph: Graph, masks: Value | Sequence[Value], queries: Size, keys: Size) -> Mask | Unproven:
    """What masks say together, each broadcast to ``[B, H, queries, keys]``: bool (true is visible) or added to the scores."""
    reader = Reader(graph)
    given = [masks] if isinstance(masks, Value) else masks
    batches = {mask.type.shape[0] for mask in given if len(mask.type.shape) == 4} - {1}
    try:
        parts = [condition_of(reader, mask) for mask in given]
        ranges = Ranges(graph.dims, queries, keys, batches.pop() if len(batches) == 1 else None)
        return _Classifier(reader, ranges).classify(conjunction(*parts))
    except Unreadable as stop:
        return Unproven(reader.reasons[0] if reader.reasons else str(stop))
    except RecursionError:
        return Unproven("what computes it is too long to be read")


def condition_of(reader: Reader, mask: Value) -> Condition:
    """Where a mask shows keys. Unreadable if it adds anything but zeros and lows."""
    expr = _element(reader, mask)
    return as_condition(expr) if mask.type.dtype == torch.bool else _visible(expr)


def truth_of(reader: Reader, mask: Value) -> Condition:
    """Where a tensor that is multiplied with scores is not zero. Unreadable if it holds anything but zeros and ones."""
    expr = _element(reader, mask)
    if isinstance(expr, Where) and {number_of(expr.then), number_of(expr.otherwise)} == {0.0, 1.0}:
        return as_condition(expr)
    raise Unreadable(f"%{mask.name} holds more than zeros and ones")


def _element(reader: Reader, mask: Value) -> Expr:
    shape = mask.type.shape
    if len(shape) > 4:
        raise Unreadable(f"%{mask.name} has {len(shape)} dimensions")
    axes = (BATCH, HEAD, QUERY, KEY)[4 - len(shape) :]
    return reader.read(mask, tuple(0 if size == 1 else axis for axis, size in zip(axes, shape, strict=True)))


def _visible(expr: Expr) -> Condition:
    """Where an additive mask adds nothing, if everywhere else it hides the key."""
    if isinstance(expr, Where):
        return disjunction(
            conjunction(expr.condition, _visible(expr.then)),
            conjunction(negation(expr.condition), _visible(expr.otherwise)),
        )
    number = number_of(expr)
    if number is None:
        raise Unreadable("it adds values that are neither 0 nor -inf")
    if number == 0:
        return Const(True)
    if hides(number):
        return Const(False)
    raise Unreadable(f"it adds {number:g}, which is neither 0 nor low enough to hide a key")


def hides(number: float) -> bool:
    """Whether adding ``number`` to a score hides its key: -inf, the lowest number of a dtype, or the -10000 of older models.
    The weight of a key that is 10000 below another underflows to zero; scores differ by tens."""
    return number <= -10000.0


class _Classifier:
    """Sorts the conditions of a conjunction into a Mask."""

    def __init__(self, reader: Reader, ranges: Ranges) -> None:
        self.reader, self.ranges = reader, ranges
        self.surplus: Size = ranges.keys - ranges.queries
        self.distances = _Distances()
        self.chunk = 0
        self.prefix: Keys | int | None = None
        self.keys: dict[Keys, None] = {}
        self.segments: Value | Keys | None = None

    def classify(self, condition: Condition) -> Mask | Unproven:
        waiting = [part for part in _conjuncts(condition) if not self.ranges.holds(part)]
        for part in (part for part in list(waiting) if self._take_key(part)):
            waiting.remove(part)
        while waiting:
            part = waiting.pop(0)
            if isinstance(part, AtMostZero) and self._take_equality(part.size, waiting):
                waiting.remove(AtMostZero(-part.size))
            elif not (self._take_distance(part) or self._take_query(part) or self._take_prefix(part)):
                return Unproven(self._why(part))
        return self._mask()

    def _why(self, part: Condition) -> str:
        if self.reader.reasons:
            return self.reader.reasons[0]
        return f"it holds a condition that is no known structure: {describe(part)}"

    def _take_key(self, part: Condition) -> bool:
        """A condition of the key alone, in a tensor that holds it."""
        keys = self._keys(part)
        if keys is not None:
            self.keys[keys] = None
        return keys is not None

    def _keys(self, part: Condition) -> Keys | None:
        """A tensor that holds the condition, or its negation; rather one that was given than one that was computed."""
        both = ((part, False), (negation(part), True))
        given = [(c.element, zero) for c, zero in both if isinstance(c, NonZero)]
        held = [(element, zero) for c, zero in both for element in self.reader.by_key.get(c, ())]
        numbers = [(e, zero) for element, zero in given for e in self.reader.by_key.get(as_integer(element), ())]
        rows = (Keys(element.value, zero) for element, zero in (*given, *held, *numbers) if self._is_row(element))
        return next(rows, None)

    def _is_row(self, element: Element) -> bool:
        """Whether an element's tensor is ``[T]`` or ``[B, T]`` but for axes of one element."""
        sizes = [(i, size) for i, size in zip(element.index, element.value.type.shape, strict=True) if size != 1]
        batch = self.ranges.batch
        if [i for i, _ in sizes] not in ([BATCH, KEY], [KEY]) or sizes[-1][1] != self.ranges.keys:
            return False
        return len(sizes) == 1 or batch is None or sizes[0][1] == batch

    def _take_distance(self, part: Condition) -> bool:
        """A bound of the distance between query and key; beside a prefix it would hide what the prefix shows."""
        return self.prefix is None and self.distances.take(part)

    def _take_query(self, part: Condition) -> bool:
        """``mask[q]`` beside ``mask[k]``: both show what ``mask[q] == mask[k]`` beside ``mask[k]`` shows."""
        if not isinstance(part, NonZero) or self.ranges.queries != self.ranges.keys:
            return False
        index = tuple(moved(i, QUERY, KEY) for i in part.element.index)
        at_key = Element(part.element.value, index)
        if index == part.element.index or not self._is_row(at_key) or Keys(at_key.value) not in self.keys:
            return False
        return self._take_segments(Keys(at_key.value))

    def _take_equality(self, size: Size, waiting: Sequence[Condition]) -> bool:
        """``f(key) == f(query)``, in two halves: chunks of one length, or a tensor of segment numbers."""
        if AtMostZero(-size) not in waiting:
            return False
        for difference in (size, -size):
            at_key, at_query = _split(difference)
            if at_key is None or at_query is None or moved(at_key, KEY, QUERY) != -at_query:
                continue
            chunk = _chunk(at_key)
            if chunk and self.chunk in (0, chunk):
                self.chunk = chunk
                return True
            rows = [element for element in self.reader.by_key.get(Int(at_key), ()) if self._is_row(element)]
            if rows and self.ranges.queries == self.ranges.keys:
                return self._take_segments(rows[0].value)
        return False

    def _take_segments(self, value: Value | Keys) -> bool:
        if self.segments not in (None, value):
            return False
        self.segments = value
        return True

    def _take_prefix(self, part: Condition) -> bool:
        """``causal or prefix[k]``, ``causal or k < n``."""
        if not isinstance(part, Or) or self.prefix is not None:
            return False
        inner = _Distances()
        prefixes: list[Keys | int] = []
        for alternative in part.parts:
            first = _first_keys(alternative)
            keys = first if first is not None else self._keys(alternative)
            if keys is not None:
                prefixes.append(keys)
            elif not inner.empty or not all(inner.take(each) for each in _conjuncts(alternative)):
                return False  # a second band beside the first is no conjunction of both
        if len(prefixes) != 1 or inner.empty or not self.distances.empty or self.chunk:
            return False
        self.distances, self.prefix = inner, prefixes[0]
        return True

    def _mask(self) -> Mask | Unproven:
        band = self.distances.band(self.surplus)
        if isinstance(band, Unproven):
            return band
        if self.prefix is not None and self.chunk:
            return Unproven("it has a prefix and chunks")
        causal, left, right = band
        if self.chunk and causal == "lower_right" and self.surplus != 0:
            return Unproven("its chunks count from the upper left, its causal part from the lower right")
        return Mask(causal, left, right, self.chunk, self.prefix, tuple(self.keys), self.segments)


@dataclass
class _Distances:
    """Bounds of ``key - query`` (``above``) and ``query - key`` (``below``)."""

    above: list[Size] = field(default_factory=list)
    below: list[Size] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        return not self.above and not self.below

    def take(self, condition: Condition) -> bool:
        found = _distance(condition)
        if found is not None:
            (self.above if found[0] > 0 else self.below).append(found[1])
        return found is not None

    def band(self, surplus: Size) -> tuple[str, int, int] | Unproven:
        """(causal, window_left, window_right). Windows count from where the causal part has the query."""
        causal: str = "none"
        shift: Size = 0
        corners = {corner for size in self.above if (corner := _corner(size, surplus))}
        if len(corners) == 2:
            return Unproven("it is causal from both corners")
        if corners:
            causal = corners.pop()
            shift = surplus if causal == "lower_right" else 0
        right = _tightest("k - q", self.above, -shift, causal)
        left = _tightest("q - k", self.below, shift)
        if isinstance(right, Unproven) or isinstance(left, Unproven):
            return right if isinstance(right, Unproven) else left  # type: ignore[return-value]
        return causal, left, right


def _tightest(what: str, bounds: Sequence[Size], shift: Size, causal: str = "none") -> int | Unproven:
    """The smallest bound, counted from the query's place; -1 for none. Being causal is no window."""
    smallest = -1
    for bound in bounds:
        width = bound + shift
        if width == 0 and causal != "none":
            continue
        if not isinstance(width, int) or width < 0:
            return Unproven(f"it holds a condition that is no known structure: {what} <= {bound}")
        smallest = width if smallest < 0 else min(smallest, width)
    return smallest


def _corner(distance: Size, surplus: Size) -> str | None:
    """Which causal mask ``k - q <= distance`` is, if one; where queries and keys are as many the two are one."""
    return "upper_left" if distance == 0 else "lower_right" if distance == surplus else None


def _distance(condition: Condition) -> tuple[int, Size] | None:
    """``(+1, d)`` for ``k - q <= d``, ``(-1, d)`` for ``q - k <= d``, else None."""
    if not isinstance(condition, AtMostZero):
        return None
    for sign, rest in ((1, condition.size - (KEY - QUERY)), (-1, condition.size - (QUERY - KEY))):
        if not positions(rest) and not _unknowns(rest):
            return sign, -rest
    return None


def _unknowns(size: Size) -> bool:
    """Whether a polynomial has terms that no size of the graph gives."""
    return isinstance(size, Dim) and any("%" in name for name in size.names)


def _first_keys(condition: Condition) -> int | None:
    """n for ``k < n``."""
    if not isinstance(condition, AtMostZero):
        return None
    rest = condition.size - KEY
    return 1 - rest if isinstance(rest, int) and rest <= 0 else None


def _split(size: Size) -> tuple[Size, Size] | tuple[None, None]:
    """The terms that depend on the key, and those that depend on the query, if there are no others."""
    at_key: Size = 0
    at_query: Size = 0
    for monomial, coefficient in size.terms if isinstance(size, Dim) else ():
        term = Dim(((monomial, coefficient),)) if monomial else coefficient
        where = positions(term)
        if "@k" in where and not where & {"@q", "@h"}:
            at_key = at_key + term
        elif "@q" in where and not where & {"@k", "@h"}:
            at_query = at_query + term
        else:
            return None, None
    return at_key, at_query


def _chunk(size: Size) -> int:
    """c for ``k // c``, else 0."""
    if not isinstance(size, Dim) or len(size.terms) != 1 or size.terms[0][1] != 1 or len(size.terms[0][0]) != 1:
        return 0
    (atom,) = size.terms[0][0]
    is_chunk = isinstance(atom, Call) and atom.fn == "//" and atom.a == KEY and isinstance(atom.b, int)
    return int(atom.b) if is_chunk else 0  # type: ignore[union-attr, arg-type]


def _conjuncts(condition: Condition) -> Sequence[Condition]:
    return condition.parts if isinstance(condition, And) else (condition,)


@dataclass(frozen=True)
class Ranges:
    """What is known of positions and sizes: ``0 <= @q < queries``, ``0 <= @k < keys``, dims at least their minimum."""

    dims: Mapping[str, DimRange]
    queries: Size
    keys: Size
    batch: Size | None = None

    def holds(self, condition: Condition) -> bool:
        """Whether a condition is shown to hold everywhere."""
        return condition == Const(True) or (
            isinstance(condition, AtMostZero) and self.always_at_most_zero(condition.size)
        )

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
