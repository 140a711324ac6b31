"""The pattern language: a pattern is the program it matches.

``op.add(op.mul(x, scale), bias)`` matches that expression; the parameters are holes. ``a | b`` tries ``a``, then ``b``,
and back-tracks; ``.tag(divides=True)`` records which was taken. An argument that is not written must have its schema
default, unless the last one is ``...``, which waives all of them. Operands of commutative ops match in either order.
``.shared()`` lets other nodes use an inner value too; without it the match is refused. ``op.repeated(start, step)`` is
``start`` under any number of steps, each with holes of its own.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from graphopt import operators
from graphopt.dims import Dim
from graphopt.ir import Node, Value

COMMUTATIVE = frozenset(
    {"add", "mul", "bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "eq", "ne"}
)


class Pattern:
    """What an argument may look like."""

    def __or__(self, other: Any) -> Pattern:
        return Either(self, other)

    def __ror__(self, other: Any) -> Pattern:
        return Either(other, self)

    def tag(self, **tags: Any) -> Pattern:
        """Record ``tags`` in a match that uses this alternative."""
        return Tagged(self, tags)


@dataclass(eq=False)
class Hole(Pattern):
    """A parameter of the pattern: matches anything, and the same thing wherever it stands."""

    name: str

    def accepts(self, arg: Any) -> bool:
        return True


class TensorHole(Hole):
    """A hole for a value of the graph."""

    def accepts(self, arg: Any) -> bool:
        return isinstance(arg, Value)


class NumberHole(Hole):
    """A hole for a constant number."""

    def accepts(self, arg: Any) -> bool:
        return isinstance(arg, (int, float)) and not isinstance(arg, bool)


@dataclass(eq=False)
class Either(Pattern):
    first: Any
    second: Any


@dataclass(eq=False)
class Tagged(Pattern):
    inner: Pattern
    tags: dict[str, Any]


@dataclass(eq=False)
class Item(Pattern):
    """One output of an op with several."""

    call: CallPattern
    index: int


@dataclass(eq=False)
class CallPattern(Pattern):
    """An op applied to patterns; ``overload`` None is any."""

    packet: str
    overload: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    waives: bool
    may_be_shared: bool = False

    def __getitem__(self, index: int) -> Item:
        return Item(self, index)

    def shared(self) -> CallPattern:
        self.may_be_shared = True
        return self


@dataclass(eq=False)
class Repeated(Pattern):
    """``start``, then ``step`` any number of times; a match keeps the steps under ``name``, the innermost first."""

    start: Any
    step: Callable[..., Any]
    name: str

    def one_more(self) -> tuple[Hole, Any]:
        """A step with fresh nodes: (the hole for what it is applied to, its pattern)."""
        holes = holes_of(self.step)
        inner, *_ = holes.values()
        return inner, self.step(Ops(), **holes)


class Step:
    """One step of a repetition: its holes and tags as attributes, None for those of alternatives that were not taken."""

    def __init__(self, holes: dict[str, Any], tags: dict[str, Any]) -> None:
        self.holes, self.tags = holes, tags

    def __getattr__(self, name: str) -> Any:
        return self.holes[name] if name in self.holes else self.tags.get(name)


def holes_of(function: Callable[..., Any]) -> dict[str, Hole]:
    """A hole for each parameter of a pattern after its namespace, of the class that it is annotated with."""
    hints = typing.get_type_hints(function)
    names = [name for name in inspect.signature(function).parameters if name not in ("self", "op")]
    return {name: _hole_class(hints.get(name))(name) for name in names}


def _hole_class(annotation: Any) -> type[Hole]:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Hole) else Hole


class Ops:
    """Namespace of patterns: ``op.add(a, b)`` is any overload of aten.add, ``op.graphopt.attention(...)`` one of ours."""

    def repeated(self, start: Any, step: Callable[..., Any], name: str = "steps") -> Repeated:
        """``start``, or ``step(op, x, ...)`` of it, or a step of that, and so on."""
        return Repeated(start, step, name)

    def __getattr__(self, name: str) -> OpPattern:
        return OpPattern(operators.path_of(name))


@dataclass(frozen=True)
class OpPattern:
    path: str

    def __getattr__(self, name: str) -> OpPattern:
        return OpPattern(f"{self.path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> CallPattern:
        namespace, name, *overload = self.path.split(".")
        waives = bool(args) and args[-1] is ...
        return CallPattern(
            f"{namespace}.{name}", overload[0] if overload else None, args[:-1] if waives else args, kwargs, waives
        )


@dataclass(frozen=True)
class Found:
    """What a pattern was matched with: holes by name, nodes by call pattern, tags."""

    holes: dict[str, Any] = field(default_factory=dict)
    nodes: dict[CallPattern, Node] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)


def match(pattern: Any, arg: Any, found: Found) -> Iterator[Found]:
    """Every way in which ``arg`` is what ``pattern`` says, given what was found so far."""
    if isinstance(pattern, Hole):
        yield from _match_hole(pattern, arg, found)
    elif isinstance(pattern, Repeated):
        yield from _match_repeated(pattern, arg, found)
    elif isinstance(pattern, Either):
        yield from match(pattern.first, arg, found)
        yield from match(pattern.second, arg, found)
    elif isinstance(pattern, Tagged):
        for inner in match(pattern.inner, arg, found):
            yield Found(inner.holes, inner.nodes, inner.tags | pattern.tags)
    elif isinstance(pattern, Item):
        yield from _match_call(pattern.call, arg, found, pattern.index)
    elif isinstance(pattern, CallPattern):
        yield from _match_call(pattern, arg, found, 0)
    elif isinstance(pattern, (tuple, list)):
        if isinstance(arg, tuple) and len(arg) == len(pattern):
            yield from _match_all(list(zip(pattern, arg, strict=True)), found)
    elif _equal(pattern, arg):
        yield found
    else:
        _missed(found, repr(pattern), arg)


def _match_hole(hole: Hole, arg: Any, found: Found) -> Iterator[Found]:
    if hole.name in found.holes:
        if found.holes[hole.name] is arg or _equal(found.holes[hole.name], arg):
            yield found
    elif hole.accepts(arg):
        yield Found(found.holes | {hole.name: arg}, found.nodes, found.tags)


def _match_repeated(pattern: Repeated, arg: Any, found: Found) -> Iterator[Found]:
    yield from match(pattern.start, arg, found)
    if not isinstance(arg, Value) or arg.producer is None:
        return
    inner, step = pattern.one_more()
    for outer in match(step, arg, Found({}, found.nodes)):
        rest = {name: value for name, value in outer.holes.items() if name != inner.name}
        for whole in _match_repeated(pattern, outer.holes[inner.name], Found(found.holes, outer.nodes, found.tags)):
            steps = (*whole.holes.get(pattern.name, ()), Step(rest, outer.tags))
            yield Found(whole.holes | {pattern.name: steps}, whole.nodes, whole.tags)


def _match_call(pattern: CallPattern, arg: Any, found: Found, index: int) -> Iterator[Found]:
    if not isinstance(arg, Value) or arg.producer is None or arg not in arg.producer.outputs[index : index + 1]:
        _missed(found, pattern.packet, arg)
        return
    node = arg.producer
    if pattern in found.nodes:
        if found.nodes[pattern] is node:
            yield found
        return
    yield from match_node(pattern, node, found)


def match_node(pattern: CallPattern, node: Node, found: Found) -> Iterator[Found]:
    """Every way in which ``node`` is what the call pattern says."""
    packet, _, overload = node.op.rpartition(".")
    if packet != pattern.packet or pattern.overload not in (None, overload):
        _missed(found, pattern.packet, node.outputs[0])
        return
    found = Found(found.holes, found.nodes | {pattern: node}, found.tags)
    for written in _assignments(pattern, node):
        rest = [name for name in node.args if name not in written]
        odd = [] if pattern.waives else [name for name in rest if not _is_default(node, name)]
        if odd:
            _missed(found, f"{packet} without {odd[0]}", node.outputs[0])
            continue
        yield from _match_all([(part, node.args[name]) for name, part in written.items()], found)


def _assignments(pattern: CallPattern, node: Node) -> Iterator[dict[str, Any]]:
    """The pattern's arguments by schema name; for commutative ops in both orders."""
    names = list(node.args)
    if len(pattern.args) > len(names) or not pattern.kwargs.keys() <= node.args.keys():
        return
    written = dict(zip(names, pattern.args, strict=False))
    yield written | pattern.kwargs
    symmetric = pattern.packet.split(".")[1] in COMMUTATIVE and node.args.get("alpha", 1) == 1
    if symmetric and len(pattern.args) >= 2:
        swapped = dict(zip(names, (pattern.args[1], pattern.args[0], *pattern.args[2:]), strict=False))
        yield swapped | pattern.kwargs


def _match_all(pairs: list[tuple[Any, Any]], found: Found) -> Iterator[Found]:
    if not pairs:
        yield found
        return
    (pattern, arg), *rest = pairs
    for inner in match(pattern, arg, found):
        yield from _match_all(rest, inner)


def _is_default(node: Node, name: str) -> bool:
    return operators.has_default(node.op, name) and _equal(operators.default(node.op, name), node.args[name])


def _equal(expected: Any, arg: Any) -> bool:
    """Equal constants; floats to the last few bits, for constants that were computed."""
    if isinstance(expected, Value) or isinstance(arg, Value):
        return expected is arg
    if isinstance(expected, bool) or isinstance(arg, bool) or expected is None or arg is None:
        return expected is arg
    if isinstance(expected, (int, float)) and isinstance(arg, (int, float)):
        both_whole = isinstance(expected, int) and isinstance(arg, int)
        return expected == arg or (not both_whole and math.isclose(expected, arg, rel_tol=1e-6))
    if isinstance(expected, (int, Dim)) or isinstance(arg, (int, Dim)):
        return type(expected) is type(arg) and bool(expected == arg)
    return bool(expected == arg)


# Near misses


@dataclass
class NearMiss:
    """Where the match that came furthest ended: after ``depth`` nodes, ``expected`` did not stand at ``found``."""

    depth: int = 0
    expected: list[str] = field(default_factory=list)
    found: Any = None

    def note(self, depth: int, expected: str, found: Any) -> None:
        if depth > self.depth or (depth == self.depth and self.found is None):
            self.depth, self.expected, self.found = depth, [expected], found
        elif depth == self.depth and found is self.found and expected not in self.expected:
            self.expected.append(expected)

    def __str__(self) -> str:
        wanted = " or ".join(self.expected)
        if not isinstance(self.found, Value):
            return f"expected {wanted}, not {self.found!r}"
        node = self.found.producer
        return f"expected {wanted}, not %{self.found.name}, {'an input' if node is None else node.op}" + (
            f" from {' | '.join(node.origin)}" if node is not None and node.origin else ""
        )


_watching: NearMiss | None = None


@contextmanager
def watching() -> Iterator[NearMiss]:
    """Record where matches fail while this lasts."""
    global _watching  # noqa: PLW0603 - it observes the recursion and decides nothing
    _watching = NearMiss()
    try:
        yield _watching
    finally:
        _watching = None


def _missed(found: Found, expected: str, arg: Any) -> None:
    if _watching is not None:
        _watching.note(len(found.nodes), expected, arg)


def root_packets(pattern: Any) -> set[str]:
    """The ops that a match of ``pattern`` can end in."""
    if isinstance(pattern, CallPattern):
        return {pattern.packet}
    if isinstance(pattern, Either):
        return root_packets(pattern.first) | root_packets(pattern.second)
    if isinstance(pattern, Tagged):
        return root_packets(pattern.inner)
    if isinstance(pattern, Item):
        return {pattern.call.packet}
    if isinstance(pattern, Repeated):
        return root_packets(pattern.start) | root_packets(pattern.one_more()[1])
    return set()
