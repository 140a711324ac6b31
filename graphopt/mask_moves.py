"""Where the element of a mask at an index comes from, for ops that only move elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeAlias

from graphopt.conditions import Token
from graphopt.dims import Size
from graphopt.ir import Node

#: The index in an op's operand of what the op has at an index.
Place: TypeAlias = "Callable[[Node, tuple[Size, ...]], tuple[Size, ...]]"


class Unreadable(Exception):
    """What the analysis cannot read, and where."""


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
        raise Unreadable(f"a negative start in {node.where}")
    return (*index[:axis], (start or 0) + index[axis] * node.args["step"], *index[axis + 1 :])


def _selected(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    axis, position = node.args["dim"], node.args["index"]
    if isinstance(position, int) and position < 0:
        position = node.args["self"].type.shape[axis] + position
    if not is_natural(position):
        raise Unreadable(f"a position that may count from the end in {node.where}")
    return (*index[:axis], position, *index[axis:])


def _reshaped(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    """A reshape that only adds or removes axes of size 1."""
    old, new = node.args["self"].type.shape, node.outputs[0].type.shape
    kept = [i for i, size in zip(index, new, strict=True) if size != 1]
    if [size for size in old if size != 1] != [size for size in new if size != 1]:
        raise Unreadable(f"a reshape that regroups elements in {node.where}")
    return tuple(0 if size == 1 else kept.pop(0) for size in old)


def _repeated(node: Node, index: tuple[Size, ...]) -> tuple[Size, ...]:
    """Axes of one element, or repeated once."""
    shape = node.args["self"].type.shape
    kept = index[len(index) - len(shape) :]
    repeats = node.args["repeats"][len(index) - len(shape) :]
    if any(size != 1 and times != 1 for size, times in zip(shape, repeats, strict=True)):
        raise Unreadable(f"a repetition of several elements in {node.where}")
    return tuple(0 if size == 1 else i for size, i in zip(shape, kept, strict=True))


def is_natural(size: Size) -> bool:
    """Whether a polynomial has no negative term and no unknown: with names >= 0 it is then >= 0."""
    if isinstance(size, int):
        return size >= 0
    plain = all(
        isinstance(atom, str) and not isinstance(atom, Token) for monomial, _ in size.terms for atom in monomial
    )
    return plain and all(number >= 0 for _, number in size.terms)


MOVES: Mapping[str, Place] = {
    "unsqueeze": _unsqueezed,
    "expand": _expanded,
    "transpose": _transposed,
    "permute": _permuted,
    "slice": _sliced,
    "select": _selected,
    "reshape": _reshaped,
    "repeat": _repeated,
}
