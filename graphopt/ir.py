"""The graph: SSA over torch ops, sizes as expressions, weights by name.

A :class:`Graph` owns its nodes and values; every edit goes through its methods, which keep uses true. Values have no
strides, so ``view`` and ``reshape`` are one op. ``graph.text()`` is the form to read; :mod:`graphopt.execution` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from graphopt import operators
from graphopt.dims import Dim
from graphopt.errors import GraphError
from graphopt.tensors import DimRange, TensorType, Weight

if TYPE_CHECKING:
    import networkx as nx

    from graphopt.execution import GraphModule


class Value:
    """A tensor in the graph: an input, a weight, or one output of a node. ``users`` keep insertion order."""

    __slots__ = ("name", "producer", "type", "users")

    def __init__(self, name: str, type: TensorType, producer: Node | None) -> None:
        self.name, self.type, self.producer = name, type, producer
        self.users: dict[Node, int] = {}  # how often each node uses it

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


def types_of(values: Mapping[str, Value]) -> dict[str, TensorType]:
    """Of a graph's inputs or outputs, by name."""
    return {name: value.type for name, value in values.items()}


Arg: TypeAlias = "Value | Dim | int | float | bool | str | torch.dtype | tuple[Arg, ...] | None"


def map_arg(arg: Any, fn: Callable[[Any], Any]) -> Any:
    """``arg`` with ``fn`` applied to every leaf."""
    if isinstance(arg, tuple):
        return tuple(map_arg(item, fn) for item in arg)
    return fn(arg)


def _as_tuples(arg: Any) -> Any:
    return tuple(map(_as_tuples, arg)) if isinstance(arg, (list, tuple)) else arg


def leaves(arg: Any) -> Iterator[Any]:
    if isinstance(arg, tuple):
        for item in arg:
            yield from leaves(item)
    else:
        yield arg


class Node:
    """One op applied to arguments named by its schema. ``origin``: module path, source line, then the passes that made it."""

    __slots__ = ("_next", "_position", "_previous", "args", "graph", "op", "origin", "outputs")

    def __init__(self, graph: Graph, op: str, args: dict[str, Any], origin: tuple[str, ...]) -> None:
        self.graph: Graph | None = graph
        self.op, self.args, self.origin = op, args, origin
        self.outputs: tuple[Value, ...] = ()
        self._previous: Node | None = None
        self._next: Node | None = None
        self._position = 0

    @property
    def following(self) -> Node | None:
        """The node after this one."""
        return self._next

    @property
    def output(self) -> Value:
        """The only output. GraphError if there are several."""
        if len(self.outputs) != 1:
            raise GraphError(f"{self.op} has {len(self.outputs)} outputs, not one", where=self.where)
        return self.outputs[0]

    @property
    def operands(self) -> Iterator[Value]:
        """The values it reads, with repetition, in argument order."""
        return (leaf for arg in self.args.values() for leaf in leaves(arg) if isinstance(leaf, Value))

    @property
    def where(self) -> str:
        """Name, module and source line, for messages."""
        name = f"%{self.outputs[0].name}" if self.outputs else "a node"
        return f"{name} = {self.op}" + (f", from {' | '.join(self.origin)}" if self.origin else "")

    def __repr__(self) -> str:
        from graphopt.text import node_text

        return node_text(self)


_GAP = 1 << 20  # room between the positions of neighbours


@dataclass(eq=False)
class Graph:
    """Inputs, nodes in order, named outputs; weights and dims by name. ``truths``: inputs that hold zeros and ones only.

    ``prologue``: a graph that runs once before this one runs many times: its outputs are inputs of this one, by name, or
    results of the whole."""

    dims: dict[str, DimRange] = field(default_factory=dict)
    inputs: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    truths: set[str] = field(default_factory=set)
    prologue: Graph | None = None

    def __post_init__(self) -> None:
        self._values: dict[str, Value] = {}
        self._first: Node | None = None
        self._last: Node | None = None
        self._size = 0
        self._names: dict[str, int] = {}

    # Reading

    @property
    def nodes(self) -> Iterator[Node]:
        """Nodes in order. The current node may be removed, and nodes inserted, while iterating."""
        node = self._first
        while node is not None:
            following = node._next
            yield node
            node = following

    def __len__(self) -> int:
        return self._size

    def value(self, name: str) -> Value:
        if name not in self._values:
            raise GraphError(f"the graph has no value %{name}")
        return self._values[name]

    @property
    def values(self) -> Mapping[str, Value]:
        return self._values

    def weight_of(self, value: Any) -> Weight | None:
        """The weight behind a value, if it is one."""
        return self.weights.get(value.name) if isinstance(value, Value) and value.producer is None else None

    def is_output(self, value: Value) -> bool:
        return any(out is value for out in self.outputs.values())

    def precedes(self, a: Node, b: Node) -> bool:
        """Whether ``a`` stands before ``b``."""
        return a._position < b._position

    # Building and editing

    def add_input(self, name: str, type: TensorType) -> Value:
        value = self._new_value(name, type, None)
        self.inputs[name] = value
        return value

    def add_weight(self, name: str, weight: Weight) -> Value:
        value = self._new_value(name, weight.type, None)
        self.weights[name] = weight
        return value

    def set_weight(self, name: str, weight: Weight) -> None:
        """Let a weight have other numbers, of the same type."""
        if name not in self.weights or self.weights[name].type != weight.type:
            raise GraphError(f"there is no weight %{name} of type {weight.type}")
        self.weights[name] = weight

    def insert(
        self,
        op: str,
        args: Mapping[str, Any],
        types: Sequence[TensorType] | None = None,
        *,
        names: Sequence[str] = (),
        before: Node | None = None,
        origin: tuple[str, ...] = (),
    ) -> Node:
        """Add a node before another one, or at the end. Missing arguments take their schema default; types are inferred
        unless given; names are made unique."""
        node = Node(self, op, operators.bind(op, (), args), origin)
        if types is None:
            from graphopt.inference import infer

            types = infer(op, node.args)
        self._check_own(node)
        base = op.split(".")[1]
        names = names or [base] * len(types)
        if len(names) != len(types):
            raise GraphError(f"{op} has {len(types)} outputs, {len(names)} names are given")
        node.outputs = tuple(
            self._new_value(self.unique(name), type, node) for name, type in zip(names, types, strict=True)
        )
        self._link(node, before)
        self._count(node, node.operands)
        return node

    def set_args(self, node: Node, args: Mapping[str, Any]) -> None:
        """Replace some arguments of a node."""
        self._check_own(node, args)
        unknown = args.keys() - node.args.keys()
        if unknown:
            raise GraphError(f"{node.op} has no argument {', '.join(sorted(unknown))}", where=node.where)
        self._uncount(node)
        node.args.update({name: _as_tuples(arg) for name, arg in args.items()})
        self._count(node, node.operands)

    def replace(self, old: Value, new: Value) -> None:
        """Let every user of ``old`` use ``new``, graph outputs included. The types must be the same."""
        if old is new:
            return
        if old.type != new.type:
            raise GraphError(f"cannot replace {old!r} by {new!r}: the types differ")
        for user in list(old.users):
            swapped = {name: map_arg(arg, lambda leaf: new if leaf is old else leaf) for name, arg in user.args.items()}
            self.set_args(user, swapped)
        for name, value in self.outputs.items():
            if value is old:
                self.outputs[name] = new

    def remove(self, node: Node) -> None:
        """Take out a node that nothing uses."""
        for value in node.outputs:
            if value.users or self.is_output(value):
                raise GraphError(f"%{value.name} is still used and cannot be removed", where=node.where)
        self._uncount(node)
        for value in node.outputs:
            del self._values[value.name]
        self._unlink(node)
        node.graph = None

    def remove_weight(self, value: Value) -> None:
        """Take out a weight that nothing uses."""
        if value.users or self.is_output(value):
            raise GraphError(f"%{value.name} is still used and cannot be removed")
        del self.weights[value.name], self._values[value.name]

    def remove_input(self, value: Value) -> None:
        """Take out an input that nothing uses."""
        if value.users or self.is_output(value):
            raise GraphError(f"%{value.name} is still used and cannot be removed")
        del self.inputs[value.name], self._values[value.name]
        self.truths.discard(value.name)

    def rename_input(self, value: Value, name: str) -> None:
        """Give an input another free name."""
        if name in self._values:
            raise GraphError(f"%{name} exists already")
        self.inputs = {name if key == value.name else key: kept for key, kept in self.inputs.items()}
        self._values = {name if key == value.name else key: kept for key, kept in self._values.items()}
        if value.name in self.truths:
            self.truths = (self.truths - {value.name}) | {name}
        value.name = name

    def remove_dead(self, roots: Iterable[Node]) -> None:
        """Remove those of ``roots`` that nothing uses, and whatever only they used."""
        queue = [node for node in roots if node.graph is self]
        while queue:
            node = queue.pop()
            if node.graph is not self or any(v.users or self.is_output(v) for v in node.outputs):
                continue
            producers = [operand.producer for operand in node.operands if operand.producer is not None]
            self.remove(node)
            queue += producers

    def prune(self) -> int:
        """Remove every node and weight that no output needs; how many nodes went."""
        before = len(self)
        self.remove_dead(reversed(list(self.nodes)))
        for value in [self._values[name] for name in self.weights]:
            if not value.users and not self.is_output(value):
                self.remove_weight(value)
        return before - len(self)

    def rename(self, value: Value, name: str) -> None:
        """Give a node's output another free name."""
        if name in self._values:
            raise GraphError(f"%{name} exists already")
        if value.producer is None:
            raise GraphError(f"%{value.name} is an input or a weight, which goes by its name")
        del self._values[value.name]
        value.name = name
        self._values[name] = value

    def take_name(self, new: Value, old: Value) -> None:
        """Let ``new`` go by the name of ``old``, so that stages before and after a rewrite can be compared by name."""
        if new.producer is None or old.producer is None:
            return
        name = old.name
        self.rename(old, self.unique(name))
        self.rename(new, name)

    def stand_in(self, made: Value, node: Node) -> None:
        """Let a value stand in the place of a node with one output, under its name."""
        self.replace(node.output, made)
        self.take_name(made, node.output)
        self.remove(node)

    def unique(self, name: str) -> str:
        if name not in self._values:
            return name
        count = self._names.get(name, 0)
        while True:
            count += 1
            if f"{name}_{count}" not in self._values:
                self._names[name] = count
                return f"{name}_{count}"

    def clone(self) -> Graph:
        """A graph of its own that shares the weights."""
        from graphopt.execution import copy_into

        other = Graph(dims=dict(self.dims), truths=set(self.truths))
        mapping: dict[Value, Value] = {}
        for name, value in self.inputs.items():
            mapping[value] = other.add_input(name, value.type)
        copy_into(other, self, mapping)
        other.outputs = {name: mapping[value] for name, value in self.outputs.items()}
        other.prologue = None if self.prologue is None else self.prologue.clone()
        return other

    # Views and checks

    def verify(self) -> None:
        """Check every invariant (:mod:`graphopt.invariants`). GraphError names the first that does not hold."""
        from graphopt.invariants import verify

        verify(self)

    def as_networkx(self) -> nx.MultiDiGraph[Any]:
        """The graph's algorithms' view: nodes and values are vertices, uses and productions are edges."""
        import networkx as nx

        view: nx.MultiDiGraph[Any] = nx.MultiDiGraph()
        for value in self._values.values():
            view.add_node(value, kind="value", label=f"%{value.name}\n{value.type}")
        for node in self.nodes:
            view.add_node(node, kind="node", label=node.op)
            for name, arg in node.args.items():
                for leaf in leaves(arg):
                    if isinstance(leaf, Value):
                        view.add_edge(leaf, node, argument=name)
            for value in node.outputs:
                view.add_edge(node, value)
        return view

    def as_module(self) -> GraphModule:
        """A trainable nn.Module that computes the graph; its state dict has the weights' names."""
        from graphopt.execution import GraphModule

        return GraphModule(self)

    def text(self, *, origins: bool = False) -> str:
        from graphopt.text import graph_text

        return graph_text(self, origins=origins)

    __str__ = text

    def __eq__(self, other: object) -> bool:
        """Same inputs, dims, weights' types, nodes and outputs, names included; not where the nodes came from."""
        return isinstance(other, Graph) and self.text() == other.text()

    __hash__ = None  # type: ignore[assignment]

    def op_counts(self) -> dict[str, int]:
        """How often each op occurs, the most frequent first."""
        counts: dict[str, int] = {}
        for node in self.nodes:
            counts[node.op] = counts.get(node.op, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights.values())

    # Keeping uses and order

    def _new_value(self, name: str, type: TensorType, producer: Node | None) -> Value:
        if name in self._values:
            raise GraphError(f"%{name} exists already")
        value = Value(name, type, producer)
        self._values[name] = value
        return value

    def _check_own(self, node: Node, args: Mapping[str, Any] | None = None) -> None:
        for arg in (node.args if args is None else args).values():
            for leaf in leaves(arg):
                if isinstance(leaf, Value) and self._values.get(leaf.name) is not leaf:
                    raise GraphError(f"%{leaf.name} is not a value of this graph", where=node.where)

    def _count(self, node: Node, operands: Iterable[Value]) -> None:
        for operand in operands:
            operand.users[node] = operand.users.get(node, 0) + 1

    def _uncount(self, node: Node) -> None:
        for operand in node.operands:
            operand.users[node] -= 1
            if not operand.users[node]:
                del operand.users[node]

    def _link(self, node: Node, before: Node | None) -> None:
        node._next = before
        node._previous = before._previous if before else self._last
        if node._previous:
            node._previous._next = node
        else:
            self._first = node
        if before:
            before._previous = node
        else:
            self._last = node
        self._size += 1
        self._place(node)

    def _place(self, node: Node) -> None:
        """Give a linked node a position between its neighbours'; renumber all where there is no room."""
        low = node._previous._position if node._previous else 0
        high = node._next._position if node._next else low + 2 * _GAP
        node._position = (low + high) // 2
        if node._position in (low, high):
            for index, each in enumerate(self.nodes, 1):
                each._position = index * _GAP

    def _unlink(self, node: Node) -> None:
        if node._previous:
            node._previous._next = node._next
        else:
            self._first = node._next
        if node._next:
            node._next._previous = node._previous
        else:
            self._last = node._previous
        self._size -= 1
