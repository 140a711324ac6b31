"""Sizes as expressions over named dimensions.

A size is an ``int`` or a :class:`Dim`: an integer polynomial over names (``batch``, ``sequence``) and over the calls
``a // b``, ``a % b``, ``max(a, b)``, ``min(a, b)``. The polynomial is kept in one canonical form, so equal sizes are
equal objects: ``2 * (s + 1) - s == s + 2``. All names stand for sizes, that is integers >= 0.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

from graphopt.errors import ParseError

Size: TypeAlias = "int | Dim"


@dataclass(frozen=True, slots=True)
class Call:
    """``fn(a, b)`` where the polynomial form ends: fn is one of ``// % max min``."""

    fn: str
    a: Size
    b: Size

    def __str__(self) -> str:
        if self.fn in ("max", "min"):
            return f"{self.fn}({self.a}, {self.b})"
        return f"{_factor(self.a)} {self.fn} {_factor(self.b)}"


Atom: TypeAlias = "str | Call"
Monomial: TypeAlias = "tuple[Atom, ...]"


def _factor(size: Size) -> str:
    text = str(size)
    return text if text.isidentifier() or text.isdigit() else f"({text})"


def _order(monomial: Monomial) -> tuple[int, str]:
    return -len(monomial), "*".join(map(str, monomial))


@dataclass(frozen=True, slots=True)
class Dim:
    """A size that is not a constant: ``sum(coefficient * product of atoms)``, terms in a fixed order."""

    terms: tuple[tuple[Monomial, int], ...]

    @staticmethod
    def named(name: str) -> Dim:
        return Dim((((name,), 1),))

    @staticmethod
    def parse(text: str) -> Size:
        """The size written as Python arithmetic: ``"2*sequence + 1"``, ``"max(a, b) // 4"``."""
        try:
            return _from_ast(ast.parse(text, mode="eval").body)
        except (SyntaxError, ValueError, ZeroDivisionError) as error:
            raise ParseError(
                f"not a size: {text!r} ({error})", hint="use names, + - * // %, max(a, b), min(a, b)"
            ) from None

    def __add__(self, other: Size) -> Size:
        terms = dict(self.terms)
        for monomial, coefficient in _terms(other):
            terms[monomial] = terms.get(monomial, 0) + coefficient
        return _from_terms(terms)

    def __mul__(self, other: Size) -> Size:
        terms: dict[Monomial, int] = {}
        for m1, c1 in self.terms:
            for m2, c2 in _terms(other):
                product = tuple(sorted(m1 + m2, key=str))
                terms[product] = terms.get(product, 0) + c1 * c2
        return _from_terms(terms)

    def __neg__(self) -> Size:
        return self * -1

    def __sub__(self, other: Size) -> Size:
        return self + -other

    def __rsub__(self, other: int) -> Size:
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__

    def __floordiv__(self, other: Size) -> Size:
        return cast("Size", floordiv(self, other))

    def __rfloordiv__(self, other: int) -> Size:
        return cast("Size", floordiv(other, self))

    def __mod__(self, other: Size) -> Size:
        return cast("Size", mod(self, other))

    def __rmod__(self, other: int) -> Size:
        return cast("Size", mod(other, self))

    def __str__(self) -> str:
        text = ""
        for monomial, coefficient in self.terms:
            lone = len(monomial) == 1 and len(self.terms) == 1 and coefficient == 1
            body = "*".join(_atom_text(atom, lone) for atom in monomial)
            amount = abs(coefficient)
            if not monomial:
                body = str(amount)
            elif amount != 1:
                body = f"{amount}*{body}"
            sign = "-" if coefficient < 0 else "+"
            text += f" {sign} {body}" if text else (body if sign == "+" else f"-{body}")
        return text

    __repr__ = __str__

    @property
    def name(self) -> str | None:
        """The name, if the size is just a name."""
        if len(self.terms) == 1:
            monomial, coefficient = self.terms[0]
            if coefficient == 1 and len(monomial) == 1 and isinstance(monomial[0], str):
                return monomial[0]
        return None

    @property
    def names(self) -> frozenset[str]:
        found: set[str] = set()
        for monomial, _ in self.terms:
            for atom in monomial:
                found |= {atom} if isinstance(atom, str) else names_of(atom.a) | names_of(atom.b)
        return frozenset(found)

    def evaluate(self, env: Mapping[str, Any]) -> Any:
        """The size under ``env``: ints give an int, Sizes a Size, torch SymInts a SymInt."""
        total: Any = 0
        for monomial, coefficient in self.terms:
            product: Any = coefficient
            for atom in monomial:
                product = product * (env[atom] if isinstance(atom, str) else _call(atom, env))
            total = total + product
        return total


def _atom_text(atom: Atom, lone: bool) -> str:
    return str(atom) if isinstance(atom, str) or lone or atom.fn in ("max", "min") else f"({atom})"


def _call(call: Call, env: Mapping[str, Any]) -> Any:
    return FUNCTIONS[call.fn](evaluate(call.a, env), evaluate(call.b, env))


def _terms(size: Size) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Dim) else (((), int(size)),)


def _from_terms(terms: Mapping[Monomial, int]) -> Size:
    kept = sorted(((m, c) for m, c in terms.items() if c), key=lambda term: _order(term[0]))
    if not kept:
        return 0
    if len(kept) == 1 and not kept[0][0]:
        return kept[0][1]
    return Dim(tuple(kept))


def _opaque(fn: str, a: Size, b: Size) -> Dim:
    if fn in ("max", "min"):
        a, b = sorted((a, b), key=lambda size: (isinstance(size, int), str(size)))
    return Dim((((Call(fn, a, b),), 1),))


def floordiv(a: Any, b: Any) -> Any:
    """``a // b``: exact where ``b`` divides ``a``'s terms, symbolic where it does not."""
    if isinstance(b, int) and b == 0:
        raise ZeroDivisionError(f"{a} // 0")
    if not (isinstance(a, Dim) or isinstance(b, Dim)):
        return a // b
    quotient, rest = _divide(a, b)
    if rest == 0:
        return quotient
    return quotient + (rest // b if isinstance(rest, int) and isinstance(b, int) else _opaque("//", rest, b))


def mod(a: Any, b: Any) -> Any:
    """``a % b``: what is left of the terms that ``b`` does not divide."""
    if isinstance(b, int) and b == 0:
        raise ZeroDivisionError(f"{a} % 0")
    if not (isinstance(a, Dim) or isinstance(b, Dim)):
        return a % b
    _, rest = _divide(a, b)
    if isinstance(rest, int) and (isinstance(b, int) or rest == 0):
        return rest % b if rest else 0
    return _opaque("%", rest, b)


def _divide(a: Size, b: Size) -> tuple[Size, Size]:
    """(quotient, rest) with ``a == quotient * b + rest``, dividing term by term by a ``b`` of one term."""
    divisor = _terms(b)
    if len(divisor) != 1:
        return (1, 0) if a == b else (0, a)
    by, factor = divisor[0]
    quotient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    for monomial, coefficient in _terms(a):
        left = list(monomial)
        divides = coefficient % factor == 0
        for atom in by:
            divides = divides and atom in left
            if divides:
                left.remove(atom)
        if divides:
            quotient[tuple(left)] = coefficient // factor
        else:
            rest[monomial] = coefficient
    return _from_terms(quotient), _from_terms(rest)


def _extreme(fn: str, pick: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if a is b or (isinstance(a, Dim) and a == b):
            return a
        if isinstance(a, Dim) or isinstance(b, Dim):
            return _opaque(fn, a, b)
        if isinstance(a, int) and isinstance(b, int):
            return pick(a, b)
        import torch

        return (torch.sym_max if fn == "max" else torch.sym_min)(a, b)  # type: ignore[no-untyped-call]

    return apply


maximum = _extreme("max", max)
minimum = _extreme("min", min)
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {"//": floordiv, "%": mod, "max": maximum, "min": minimum}


def rest_of(size: Size, name: str) -> Size | None:
    """``size - name`` where that does not mention the name any more; None where the size is no such sum."""
    rest = size - Dim.named(name)
    return None if name in names_of(rest) else rest


def names_of(size: Size) -> frozenset[str]:
    return size.names if isinstance(size, Dim) else frozenset()


def evaluate(size: Any, env: Mapping[str, Any]) -> Any:
    """``size`` under ``env``; a constant is itself."""
    return size.evaluate(env) if isinstance(size, Dim) else size


_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: floordiv,
    ast.Mod: mod,
}


def _from_ast(node: ast.expr) -> Size:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.Name):
        return Dim.named(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_from_ast(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return cast("Size", _BINARY[type(node.op)](_from_ast(node.left), _from_ast(node.right)))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("max", "min"):
        if len(node.args) != 2 or node.keywords:
            raise ValueError(f"{node.func.id} takes two sizes")
        return cast("Size", FUNCTIONS[node.func.id](*map(_from_ast, node.args)))
    raise ValueError(f"cannot read {ast.unparse(node)}")
