"""Expressions of mask elements: what :mod:`graphopt.masks` reads a mask's sub-graph as, and their simplification.

Positions are the variables ``@b @h @q @k``; integers are polynomials over them and the graph's dims
(:class:`graphopt.dims.Dim`), so that ``k <= q + 0`` and ``k - q <= 0`` are the same condition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from graphopt.dims import Dim, Size
from graphopt.ir import Value

BATCH, HEAD, QUERY, KEY = (Dim.named(f"@{axis}") for axis in "bhqk")


@dataclass(frozen=True)
class Int:
    """An integer that is a polynomial of positions and sizes."""

    size: Size


@dataclass(frozen=True)
class Distance:
    """The absolute value of a polynomial."""

    size: Size


@dataclass(frozen=True)
class Real:
    number: float


@dataclass(frozen=True)
class Element:
    """One element of a tensor that is not looked into: an input, or the result of an op that is not a mask's."""

    value: Value
    index: tuple[Size, ...]


class Token(str):
    """The name of an unknown integer in polynomials: an element of which nothing is known but where it stands."""

    __slots__ = ("element",)
    element: Element

    @staticmethod
    def of(element: Element) -> Dim:
        token = Token(f"%{element.value.name}[{', '.join(map(str, element.index))}]")
        token.element = element
        return Dim.named(token)


@dataclass(frozen=True)
class Const:
    truth: bool


@dataclass(frozen=True)
class AtMostZero:
    """``size <= 0``."""

    size: Size


@dataclass(frozen=True)
class NonZero:
    element: Element


@dataclass(frozen=True)
class Not:
    inner: Condition


@dataclass(frozen=True)
class And:
    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Or:
    parts: tuple[Condition, ...]


@dataclass(frozen=True)
class Where:
    condition: Condition
    then: Expr
    otherwise: Expr


Condition: TypeAlias = "Const | AtMostZero | NonZero | Not | And | Or"
Expr: TypeAlias = "Int | Distance | Real | Element | Where | Condition"
CONDITIONS = (Const, AtMostZero, NonZero, Not, And, Or)


def relation(relation: str, difference: Size) -> Condition:
    """``difference <relation> 0`` over integers."""
    if relation in ("eq", "ne") and (unknown := _unknown_factors(difference)):
        zero = disjunction(*(Not(NonZero(element)) for element in unknown))
        return zero if relation == "eq" else negation(zero)
    if relation == "le":
        return at_most_zero(difference)
    if relation == "lt":
        return at_most_zero(difference + 1)
    if relation == "ge":
        return at_most_zero(-difference)
    if relation == "gt":
        return at_most_zero(-difference + 1)
    both = conjunction(at_most_zero(difference), at_most_zero(-difference))
    return both if relation == "eq" else negation(both)


def _unknown_factors(size: Size) -> list[Element]:
    """The elements whose product ``size`` is, up to a factor; none if it is anything else."""
    if not isinstance(size, Dim) or len(size.terms) != 1:
        return []
    monomial, _ = size.terms[0]
    return [atom.element for atom in monomial if isinstance(atom, Token)] if _all_tokens(monomial) else []


def _all_tokens(monomial: tuple[object, ...]) -> bool:
    return all(isinstance(atom, Token) for atom in monomial)


def as_integer(expr: Expr) -> Expr:
    """An element of an integer tensor as a polynomial; everything else as it is."""
    if isinstance(expr, Element) and expr.value.type.dtype in (torch.int32, torch.int64):
        return Int(Token.of(expr))
    return expr


def moved(size: Size, source: Dim, target: Dim) -> Size:
    """A polynomial with one position in the place of another, inside the index of unknowns too."""
    if not isinstance(size, Dim):
        return size
    env: dict[str, Any] = {}
    for name in size.names:
        if isinstance(name, Token):
            place = tuple(moved(i, source, target) for i in name.element.index)
            env[name] = Token.of(Element(name.element.value, place))
        else:
            env[name] = target if name == source.name else Dim.named(name)
    result: Size = size.evaluate(env)
    return result


def positions(size: Size) -> frozenset[str]:
    """The positions that a polynomial depends on, through unknowns too."""
    found: set[str] = set()
    for name in size.names if isinstance(size, Dim) else ():
        found |= _index_positions(name.element) if isinstance(name, Token) else {name} & {"@b", "@h", "@q", "@k"}
    return frozenset(found)


def _index_positions(element: Element) -> frozenset[str]:
    return frozenset().union(*(positions(i) for i in element.index))


def within(distance: Distance, reach: Size) -> Condition:
    """``|distance| <= reach``."""
    return conjunction(at_most_zero(distance.size - reach), at_most_zero(-distance.size - reach))


def at_most_zero(size: Size) -> Condition:
    return Const(size <= 0) if isinstance(size, int) else AtMostZero(size)


def as_condition(expr: Expr) -> Condition:
    """An expression as a truth: true where it is not zero."""
    if isinstance(expr, CONDITIONS):
        return expr
    if isinstance(expr, Element):
        return NonZero(expr)
    if isinstance(expr, Real):
        return Const(expr.number != 0)
    if isinstance(expr, (Int, Distance)):
        return relation("ne", expr.size)
    assert isinstance(expr, Where)
    then, otherwise = as_condition(expr.then), as_condition(expr.otherwise)
    return disjunction(conjunction(expr.condition, then), conjunction(negation(expr.condition), otherwise))


def conjunction(*parts: Condition) -> Condition:
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, And) else (part,))]
    if any(part == Const(False) for part in flat):
        return Const(False)
    kept = tuple(dict.fromkeys(part for part in flat if part != Const(True)))
    return Const(True) if not kept else kept[0] if len(kept) == 1 else And(kept)


def disjunction(*parts: Condition) -> Condition:
    flat = [inner for part in parts for inner in (part.parts if isinstance(part, Or) else (part,))]
    if any(part == Const(True) for part in flat):
        return Const(True)
    kept = tuple(dict.fromkeys(part for part in flat if part != Const(False)))
    return Const(False) if not kept else kept[0] if len(kept) == 1 else Or(kept)


def negation(condition: Condition) -> Condition:
    if isinstance(condition, Const):
        return Const(not condition.truth)
    if isinstance(condition, Not):
        return condition.inner
    if isinstance(condition, AtMostZero):
        return at_most_zero(-condition.size + 1)
    if isinstance(condition, And):
        return disjunction(*map(negation, condition.parts))
    if isinstance(condition, Or):
        return conjunction(*map(negation, condition.parts))
    return Not(condition)


def describe(expr: Expr) -> str:
    """An expression for people: ``k - q <= 0 or %mask[b, k]``."""
    if isinstance(expr, AtMostZero):
        return f"{expr.size} <= 0".replace("@", "")
    if isinstance(expr, NonZero):
        return describe(expr.element)
    if isinstance(expr, Element):
        return f"%{expr.value.name}[{', '.join(map(str, expr.index))}]".replace("@", "")
    if isinstance(expr, Not):
        return f"not {describe(expr.inner)}"
    if isinstance(expr, (And, Or)):
        return (" and " if isinstance(expr, And) else " or ").join(f"({describe(part)})" for part in expr.parts)
    if isinstance(expr, Const):
        return str(expr.truth).lower()
    return str(expr)
