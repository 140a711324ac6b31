"""Rules: a pattern, what stands in its place, and the reasons not to.

::

    class FuseSilu(Rule):
        '''x * sigmoid(x)  ->  silu(x)'''
        def pattern(self, op: Ops, x: TensorHole) -> Pattern:
            return op.mul(x, op.sigmoid(x))
        def rewrite(self, op: Build, m: Match) -> Value:
            require(m.x.type.dtype.is_floating_point, "not a floating tensor")
            return op.silu(m.x)

The engine checks that no inner value is used elsewhere, inserts the new nodes, lets them take the old names, removes what
is dead, extends ``origin`` and counts. ``rewrite`` may raise :class:`Refusal` (through ``require``) at any point: then the
graph is as it was, and the reason is reported. ``applies`` is for what a pattern cannot say and nobody needs to hear of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt import operators
from graphopt.dims import Dim, Size
from graphopt.errors import RewriteError
from graphopt.ir import Graph, Node, Value
from graphopt.patterns import Found, Item, Ops, holes_of, match, root_packets, watching
from graphopt.tensors import TensorType, Weight


class Refusal(Exception):
    """A match that is not rewritten, and why."""


def require(condition: object, reason: str) -> None:
    """Refuse the match with ``reason`` unless ``condition`` holds."""
    if not condition:
        raise Refusal(reason)


class NoMatch(Exception):
    """A match that is not the rule's business after all: nothing to report."""


def applies(condition: object) -> None:
    """What the pattern cannot say: the rule is not meant for this match unless ``condition`` holds."""
    if not condition:
        raise NoMatch


class Rule:
    """A rewrite. Subclasses write ``pattern`` and ``rewrite``; the docstring's first line shows before and after."""

    def pattern(self, op: Ops, *holes: Any) -> Any:
        """The expression to look for; a tuple if several of its values live on: the last op first."""
        raise NotImplementedError

    def rewrite(self, op: Build, m: Match) -> Value | tuple[Value, ...]:
        """The values to stand in the place of the pattern's, in its order."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        return type(self).__name__

    def compiled(self) -> tuple[Any, ...]:
        """The pattern's roots, holes filled in; made once."""
        if not hasattr(self, "_roots"):
            roots = self.pattern(Ops(), **holes_of(type(self).pattern))
            self._roots: tuple[Any, ...] = roots if isinstance(roots, tuple) else (roots,)
            if not root_packets(self._roots[0]):
                raise RewriteError(f"the pattern of {self.name} ends in no op")
        return self._roots


class Match:
    """What the pattern found: holes and tags as attributes. ``node`` is the root's node."""

    def __init__(self, found: Found, roots: tuple[Value, ...]) -> None:
        self.found, self.roots = found, roots
        node = roots[0].producer
        assert node is not None
        self.node: Node = node

    def __getattr__(self, name: str) -> Any:
        if name in self.found.holes:
            return self.found.holes[name]
        return self.found.tags.get(name)  # a hole or tag of an alternative that was not taken is None

    def dims(self, **layouts: str) -> dict[str, Size]:
        """Name the axes of holes, ``m.dims(q="b h s d", k="b h t d")``: one name is one size, digits are constants.

        Refusal if a rank or a size does not fit."""
        sizes: dict[str, Size] = {}
        for name, layout in layouts.items():
            if not isinstance(self.found.holes.get(name), Value):
                raise RewriteError(f"{name} is no tensor of this match", where=self.node.where)
            shape, axes = self.found.holes[name].type.shape, layout.split()
            require(len(shape) == len(axes), f"{name} has {len(shape)} dimensions, not {len(axes)} ({layout})")
            for axis, size in zip(axes, shape, strict=True):
                expected = int(axis) if axis.isdigit() else sizes.setdefault(axis, size)
                require(expected == size, f"{name} is {size} at {axis}, expected {expected}")
        return sizes


class Build:
    """Makes nodes before a place in the graph: ``op.linear(x, w)``, ``op.mul.Tensor(a, b)``, ``op.graphopt.attention(...)``."""

    def __init__(self, graph: Graph, before: Node, origin: tuple[str, ...]) -> None:
        self._graph, self._before, self._origin = graph, before, origin
        self.made: list[Node] = []
        self.weights: list[Value] = []

    def __getattr__(self, name: str) -> BuildOp:
        return BuildOp(self, operators.path_of(name))

    def node(self, op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Node:
        bound = operators.bind(op, args, kwargs)
        made = self._graph.insert(op, bound, before=self._before, origin=self._origin)
        self.made.append(made)
        return made

    def call(self, op: str, args: Mapping[str, Any]) -> tuple[Value, ...]:
        """The op of this full name; its outputs always as a tuple."""
        return self.node(op, (), dict(args)).outputs

    def reuse(self, path: str, *args: Any, **kwargs: Any) -> Value:
        """``op.<path>(...)``, or the value of the same call that stands earlier in the graph."""
        op = f"aten.{path}" if path.count(".") == 1 else path
        bound = operators.bind(op, args, kwargs)
        for operand in (arg for arg in bound.values() if isinstance(arg, Value)):
            for user in operand.users:
                if user.op == op and user.args == bound and self._graph.precedes(user, self._before):
                    return user.output
            break
        return self.node(op, args, kwargs).output

    def weight(self, name: str, weight: Weight) -> Value:
        """A new weight in the graph."""
        self.weights.append(self._graph.add_weight(self._graph.unique(name), weight))
        return self.weights[-1]


@dataclass(frozen=True)
class BuildOp:
    build: Build
    path: str

    def __getattr__(self, name: str) -> BuildOp:
        return BuildOp(self.build, f"{self.path}.{name}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        path = self.path if self.path.count(".") == 2 else f"{self.path}.default"
        outputs = self.build.node(path, args, kwargs).outputs
        return outputs[0] if len(outputs) == 1 else outputs


@dataclass(frozen=True)
class Refused:
    """A rule that matched at a node and did not rewrite it."""

    rule: str
    where: str
    reason: str


@dataclass
class RewriteLog:
    """What a set of rules did: matches by rule, refusals in order."""

    matches: dict[str, int] = field(default_factory=dict)
    refusals: list[Refused] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(self.matches.values())

    def add(self, other: RewriteLog) -> None:
        """Count what was done elsewhere too."""
        for rule, count in other.matches.items():
            self.matches[rule] = self.matches.get(rule, 0) + count
        self.refusals.extend(other.refusals)


def apply_rules(graph: Graph, rules: Sequence[Rule], label: str) -> RewriteLog:
    """Rewrite until no rule matches. ``label`` is what the new nodes' origin is extended with."""
    return _Rewriter(graph, rules, label).run()


def near_miss(rule: Rule, node: Node) -> str | None:
    """Why ``rule`` does not match at ``node``: the first thing that is not as it expects, on the way that leads furthest.

    None if it does match."""
    first = rule.compiled()[0]
    index = first.index if isinstance(first, Item) else 0
    with watching() as miss:
        for _ in match(first, node.outputs[index], Found()):
            return None
    return str(miss)


class _Rewriter:
    def __init__(self, graph: Graph, rules: Sequence[Rule], label: str) -> None:
        self.graph, self.label, self.log = graph, label, RewriteLog()
        self.by_packet: dict[str, list[Rule]] = {}
        for rule in rules:
            for packet in sorted(root_packets(rule.compiled()[0])):
                self.by_packet.setdefault(packet, []).append(rule)
        self.refused: set[tuple[Rule, Node]] = set()

    def run(self) -> RewriteLog:
        queue = deque(self.graph.nodes)
        waiting = set(queue)
        budget = 20 * len(queue) + 1000
        while queue:
            node = queue.popleft()
            waiting.discard(node)
            if node.graph is not self.graph:
                continue
            touched = self._rewrite(node)
            budget -= 1
            if budget < 0:
                raise RewriteError(f"the rules of {self.label} do not come to an end", where=node.where)
            for again in touched:
                if again not in waiting:
                    waiting.add(again)
                    queue.appendleft(again)
        return self.log

    def _rewrite(self, node: Node) -> Iterable[Node]:
        """Try the rules on one node; the nodes to look at again after a rewrite, last first."""
        for rule in self.by_packet.get(node.op.rpartition(".")[0], ()):
            reasons: list[str] = []
            for roots, found in self._matches(rule, node):
                try:
                    new, made = self._attempt(rule, roots, found)
                except NoMatch:
                    continue
                except Refusal as refusal:
                    reasons.append(str(refusal))
                    continue
                self.log.matches[rule.name] = self.log.matches.get(rule.name, 0) + 1
                users = [user for value in new for user in value.users]
                return [*reversed(users), *reversed(made)]
            if reasons and (rule, node) not in self.refused:
                self.refused.add((rule, node))
                self.log.refusals.append(Refused(rule.name, node.where, reasons[0]))
        return ()

    def _matches(self, rule: Rule, node: Node) -> Iterable[tuple[tuple[Value, ...], Found]]:
        first, *others = rule.compiled()
        index = first.index if isinstance(first, Item) else 0
        for found in match(first, node.outputs[index], Found()):
            values = [node.outputs[index]]
            for pattern in others:
                call = pattern.call if isinstance(pattern, Item) else pattern
                if call not in found.nodes:
                    raise RewriteError(f"the pattern of {rule.name} has a value that its first one does not lead to")
                outputs, place = found.nodes[call].outputs, pattern.index if isinstance(pattern, Item) else 0
                values += outputs[place : place + 1]
            if len(values) == 1 + len(others):  # else an op gives fewer results than the pattern has
                yield tuple(values), found

    def _attempt(self, rule: Rule, roots: tuple[Value, ...], found: Found) -> tuple[tuple[Value, ...], list[Node]]:
        self._check_escapes(roots, found)
        place = self._place(roots, found)
        origin = _origin_of(roots, self.label)
        build = Build(self.graph, place, origin)
        try:
            result = rule.rewrite(build, Match(found, roots))
            new = result if isinstance(result, tuple) else (result,)
            self._check_result(rule, roots, new, build)
        except BaseException:
            for made in reversed(build.made):
                self.graph.remove(made)
            for weight in build.weights:
                self.graph.remove_weight(weight)
            raise
        for old, value in zip(roots, new, strict=True):
            self.graph.replace(old, value)
            if value.producer in build.made:
                self.graph.take_name(value, old)
        self.graph.remove_dead(list(found.nodes.values()))
        self.graph.remove_dead(build.made)
        return new, [node for node in build.made if node.graph is self.graph]

    def _check_escapes(self, roots: tuple[Value, ...], found: Found) -> None:
        inside = set(found.nodes.values())
        for pattern, node in found.nodes.items():
            for value in node.outputs:
                if value in roots or pattern.may_be_shared:
                    continue
                outside = [user for user in value.users if user not in inside]
                if outside or self.graph.is_output(value):
                    user = outside[0].op if outside else "an output"
                    raise Refusal(f"%{value.name} ({node.op}) is also used by {user}")

    def _place(self, roots: tuple[Value, ...], found: Found) -> Node:
        """Before the first root; what the new nodes may read must be there already."""
        producers = [root.producer for root in roots if root.producer is not None]
        place = producers[0]
        for producer in producers[1:]:
            if self.graph.precedes(producer, place):
                place = producer
        if len(producers) > 1:
            for name, arg in found.holes.items():
                if isinstance(arg, Value) and arg.producer and not self.graph.precedes(arg.producer, place):
                    raise Refusal(f"{name} is computed after %{place.outputs[0].name}")
        return place

    def _check_result(self, rule: Rule, roots: tuple[Value, ...], new: tuple[Any, ...], build: Build) -> None:
        where = roots[0].producer.where if roots[0].producer else None
        if len(roots) != len(new):
            raise RewriteError(f"{rule.name} replaces {len(roots)} values by {len(new)}", where=where)
        for old, value in zip(roots, new, strict=True):
            if not isinstance(value, Value):
                raise RewriteError(f"{rule.name} replaces {old!r} by {value!r}", where=where)
            if _may_be_equal(old.type, value.type):
                raise Refusal(f"{old.type} and {value.type} are not known to be the same sizes")
            if old.type != value.type:
                raise RewriteError(f"{rule.name} replaces {old!r} by {value!r}: the types differ", where=where)
        for made in build.made:
            if any(operand in roots for operand in made.operands):
                raise RewriteError(f"{rule.name} makes {made.op} of a value that it replaces", where=where)


def _may_be_equal(one: TensorType, other: TensorType) -> bool:
    """Whether types differ in sizes alone that are written in different ways, and may be the same numbers."""
    if one.dtype != other.dtype or len(one.shape) != len(other.shape):
        return False
    differing = [pair for pair in zip(one.shape, other.shape, strict=True) if pair[0] != pair[1]]
    return bool(differing) and all(any(_is_expression(size) for size in pair) for pair in differing)


def _is_expression(size: Size) -> bool:
    return isinstance(size, Dim) and size.name is None


def _origin_of(roots: tuple[Value, ...], label: str) -> tuple[str, ...]:
    origin = roots[0].producer.origin if roots[0].producer else ()
    return origin if origin[-1:] == (label,) else (*origin, label)
