"""Sizes: one canonical form, arithmetic that evaluation agrees with, text that parses back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from graphopt.dims import Dim, Size, evaluate, floordiv, maximum, minimum, mod, names_of
from graphopt.errors import ParseError

a, b, s = Dim.named("a"), Dim.named("b"), Dim.named("s")
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "//": floordiv, "%": mod, "max": maximum, "min": minimum,
}  # fmt: skip
PLAIN: dict[str, Callable[[int, int], int]] = OPERATIONS | {
    "//": operator.floordiv, "%": operator.mod, "max": max, "min": min,
}  # fmt: skip


def _combine(sizes: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def apply(operation: str, x: Any, y: Any) -> Any:
        assume(not (operation in "//%" and y == 0))
        return OPERATIONS[operation](x, y)

    return st.builds(apply, st.sampled_from(sorted(OPERATIONS)), sizes, sizes)


LEAVES: st.SearchStrategy[Any] = st.integers(-6, 6) | st.sampled_from([a, b, s])
SIZES: st.SearchStrategy[Any] = st.recursive(LEAVES, _combine, max_leaves=6)
ENVS = st.fixed_dictionaries({name: st.integers(1, 40) for name in ("a", "b", "s")})


@settings(deadline=None, max_examples=150)
@given(SIZES)
def test_text_parses_back(size: Size) -> None:
    assert Dim.parse(str(size)) == size


@settings(deadline=None, max_examples=150)
@given(SIZES, SIZES, ENVS, st.sampled_from(sorted(OPERATIONS)))
def test_evaluation_is_a_homomorphism(x: Size, y: Size, env: dict[str, int], operation: str) -> None:
    try:
        left, right = evaluate(x, env), evaluate(y, env)
        expected = PLAIN[operation](left, right)
    except ZeroDivisionError:
        assume(False)
    assume(not (operation in "//%" and y == 0))
    assert evaluate(OPERATIONS[operation](x, y), env) == expected


@settings(deadline=None, max_examples=100)
@given(SIZES, SIZES, SIZES)
def test_sums_and_products_do_not_depend_on_their_order(x: Size, y: Size, z: Size) -> None:
    assert x + y == y + x
    assert x * y == y * x
    assert (x + y) + z == x + (y + z)
    assert x * (y + z) == x * y + x * z


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (s, "s"),
        (2 * (s + 1) - s, "s + 2"),
        (s * 12 * 32, "384*s"),
        (s * s - 1, "s*s - 1"),
        (b * a, "a*b"),
        (-s, "-s"),
        (1 - s, "-s + 1"),
        (s // 2, "s // 2"),
        (3 * (s // 2), "3*(s // 2)"),
        (s // 2 + 1, "(s // 2) + 1"),
        ((s + 1) // 2, "(s + 1) // 2"),
        (7 // s, "7 // s"),
        (-7 % s, "(-7) % s"),
        (maximum(s, 4), "max(s, 4)"),
        (2 * minimum(a, b), "2*min(a, b)"),
        ((s // 2) % 3, "(s // 2) % 3"),
    ],
)
def test_text(size: Size, text: str) -> None:
    assert str(size) == text


@pytest.mark.parametrize(
    ("size", "simple"),
    [
        (s - s, 0),
        (s + 2 - s, 2),
        (0 * s, 0),
        (4 * s // 2, 2 * s),
        ((4 * s + 6) // 2, 2 * s + 3),
        ((s + 4) // 4, 1 + s // 4),
        ((2 * s + 3) // 2, s + 1),
        ((2 * s + 3) % 2, 1),
        (a * s // s, a),
        (a * s % s, 0),
        (s // s, 1),
        ((a + b) // (a + b), 1),
        ((a + b) % (a + b), 0),
        (s // 1, s),
        (s % 1, 0),
        (0 // s, 0),
        (maximum(s, s), s),
        (minimum(s + 1, 1 + s), s + 1),
        (maximum(2, 3), 3),
        (minimum(2, 3), 2),
        (floordiv(7, 2), 3),
        (mod(7, 2), 1),
    ],
)
def test_canonical_form(size: Size, simple: Size) -> None:
    assert size == simple
    assert type(size) is type(simple)


def test_equal_sizes_are_one_key() -> None:
    assert {2 * s + 2: "x"}[(s + 1) * 2] == "x"


@pytest.mark.parametrize("fn", [maximum, minimum])
def test_extremes_do_not_depend_on_their_order(fn: Callable[[Any, Any], Size]) -> None:
    assert fn(a, b) == fn(b, a)


@pytest.mark.parametrize(("size", "name"), [(s, "s"), (2 * s, None), (s * s, None), (s + 1, None), (s // 2, None)])
def test_name(size: Dim, name: str | None) -> None:
    assert size.name == name


def test_names() -> None:
    assert maximum(a, b * 2 // s).names == {"a", "b", "s"}
    assert names_of(a + 1) == {"a"}
    assert names_of(3) == frozenset()


def test_evaluates_to_sizes_too() -> None:
    assert evaluate(2 * a + b, {"a": s, "b": 3 - 2 * s}) == 3


def test_evaluates_on_symints() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    from torch._dynamo.source import ConstantSource

    source = ConstantSource("s")
    symbol = shapes.create_unspecified_symbol(7, source)
    symint = shapes.create_symintnode(symbol, hint=7, source=source)
    found = evaluate(maximum(s, 3) + s // 2, {"s": symint})
    assert isinstance(found, torch.SymInt)
    assert found.node.hint == 10


def test_constants_evaluate_to_themselves() -> None:
    assert evaluate(5, {}) == 5
    assert evaluate(None, {}) is None


@pytest.mark.parametrize(
    ("text", "size"),
    [("5", 5), ("-5", -5), ("2*s+1", 2 * s + 1), ("s * (a - 1) ", a * s - s), ("max(s, 2) % 3", maximum(s, 2) % 3)],
)
def test_parse(text: str, size: Size) -> None:
    assert Dim.parse(text) == size


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid syntax"),
        ("a b", "invalid syntax"),
        ("a / b", "cannot read a / b"),
        ("1.5", "cannot read 1.5"),
        ("True", "cannot read True"),
        ("f(a)", "cannot read f(a)"),
        ("a.b", "cannot read a.b"),
        ("[a]", "cannot read [a]"),
    ],
)
def test_text_that_is_no_size(text: str, reason: str) -> None:
    with pytest.raises(ParseError) as error:
        Dim.parse(text)
    assert error.value.what.startswith(f"not a size: {text!r}")
    assert reason in error.value.what
    assert error.value.hint == "use names, + - * // %, max(a, b), min(a, b)"


@pytest.mark.parametrize("text", ["s // 0", "s % 0", "5 // 0", "max(a)", "min(a, b, s)", "max(a, key=b)"])
def test_calls_that_have_no_value_are_no_size(text: str) -> None:
    with pytest.raises(ParseError, match="not a size"):
        Dim.parse(text)
