"""Graph -> onnx-ir model, node by node through a lowering table.

A lowering is a function ``(emitter, node) -> value or values`` that builds ONNX nodes with ``e.op("MatMul", a, b)``. Sizes
are computed in the ONNX graph from the inputs' shapes, once each. Two shapes of one row-major buffer are one thing to the
emitter: a lowering may give a result in another shape (``e.Reshaped``), and a reshape that meets it costs nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backends.quirks import Quirk
from graphopt.dims import Call, Dim, Size, names_of, rest_of
from graphopt.errors import LoweringError
from graphopt.ir import Graph, Node, Value
from graphopt.tensors import TensorType, Weight

DTYPES: dict[torch.dtype, ir.DataType] = {
    torch.float32: ir.DataType.FLOAT, torch.float64: ir.DataType.DOUBLE, torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16, torch.int64: ir.DataType.INT64, torch.int32: ir.DataType.INT32,
    torch.int16: ir.DataType.INT16, torch.int8: ir.DataType.INT8, torch.uint8: ir.DataType.UINT8,
    torch.bool: ir.DataType.BOOL, torch.complex64: ir.DataType.COMPLEX64, torch.complex128: ir.DataType.COMPLEX128,
    torch.float8_e4m3fn: ir.DataType.FLOAT8E4M3FN, torch.float8_e5m2: ir.DataType.FLOAT8E5M2,
}  # fmt: skip


#: Nodes tell by this name where they come from: module, source line, passes.
ORIGIN = "graphopt.origin"
#: Integers of the same size, for dtypes that numpy has not.
PLAIN = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8}
#: Ops that are newer than the opset that dialects are written in.
_SINCE = {"TensorScatter": 24}


@dataclass(frozen=True)
class Reshaped:
    """A lowering's result whose elements are right and whose shape is not the value's."""

    value: ir.Value


T = TypeVar("T")
Lowered: TypeAlias = "ir.Value | Reshaped | Sequence[ir.Value | Reshaped]"
Lowering: TypeAlias = "Callable[[Emitter, Node], Lowered]"


class Table(dict[str, Lowering]):
    """Lowerings by op packet (``aten.add``)."""

    def lowers(self, *packets: str) -> Callable[[Lowering], Lowering]:
        """Register a lowering for op packets."""

        def register(lowering: Lowering) -> Lowering:
            self.update(dict.fromkeys(packets, lowering))
            return lowering

        return register


class Unsupported(Exception):
    """A form that cannot express a node, why, and what to do. The emitter tries the next one."""

    def __init__(self, reason: str, hint: str | None = None) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Dialect:
    """What a reader of ONNX takes: opsets by domain, and how each op is lowered.

    ``lowerings`` by op packet (``aten.add``); ``forms``: for ops with several correct lowerings, each by name, the first
    being the default that ``tactics: fixed`` takes."""

    name: str
    opsets: Mapping[str, int]
    lowerings: Mapping[str, Lowering]
    forms: Mapping[str, Mapping[str, Lowering]] = field(default_factory=dict)
    quirks: Sequence[Quirk] = ()


def _needed(nodes: list[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that outputs depend on: a lowering may have read past another's result."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if any(value in wanted for value in node.outputs):
            kept.append(node)
            wanted.update(value for each in _with_branches([node]) for value in each.inputs if value is not None)
    return kept[::-1]


def _with_branches(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """Nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _with_branches(attribute.as_graph())


def packet(node: Node) -> str:
    return node.op.rpartition(".")[0]


class Emitter:
    """One emission; ``model`` is the result. ``choose`` names the form of a node that has several (None: the default).
    ``show``: further values of the graph that become outputs, for bisecting."""

    def __init__(
        self,
        graph: Graph,
        dialect: Dialect,
        choose: Callable[[Node], str | None] = lambda node: None,
        show: Sequence[str] = (),
    ) -> None:
        self.graph, self.dialect, self.choose = graph, dialect, choose
        self.used_forms: dict[str, int] = {}
        self.weights: dict[str, Weight] = {}  # by initializer name, to be written as external data
        self._nodes: list[ir.Node] = []
        self._functions: dict[Any, ir.Function] = {}
        self._initializers: list[ir.Value] = []
        #: Faults of the target that forms were passed over for, and where.
        self.avoided: dict[Quirk, list[str]] = {}
        self._outputs: list[ir.Value] = []
        self._values: dict[Value, ir.Value] = {}
        self._packed: set[Value] = set()
        self._elements: dict[Value, ir.Value] = {}
        self._memo: dict[Hashable, Any] = {}
        self._journal: list[Hashable] = []  # keys of the memo in the order they came, to take back a refused lowering
        self._counts: dict[str, int] = {}
        self._names: set[str] = {value.name for value in graph.values.values()} | set(graph.outputs)
        self._origin = ""
        self._scope = "shapes"
        self.model = self._emit(show)

    # What lowerings use

    def op(self, op_type: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add an ONNX node with one result. An attribute that is None is left out."""
        return self.op_several(op_type, *inputs, domain=domain, outputs=1, **attributes)[0]

    def op_several(
        self, op_type: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> tuple[ir.Value, ...]:
        """Add an ONNX node with several results."""
        given = {name: value for name, value in attributes.items() if value is not None}
        node = ir.node(op_type, list(inputs), given, domain=domain, num_outputs=outputs, name=self._unique(op_type))
        return self.add(node)

    def add(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Add a node made elsewhere."""
        for index, value in enumerate(node.outputs):
            value.name = self._unique(f"{self._scope}.{node.op_type.lower()}" + (f".{index}" if index else ""))
        if self._origin:
            node.metadata_props[ORIGIN] = self._origin
        self._nodes.append(node)
        return tuple(node.outputs)

    def either(self, condition: ir.Value, then: Callable[[], ir.Value], otherwise: Callable[[], ir.Value]) -> ir.Value:
        """What one of the two makes, whichever the boolean scalar says when the model runs."""
        return self.op("If", condition, then_branch=self._branch(then), else_branch=self._branch(otherwise))

    def _branch(self, make: Callable[[], ir.Value]) -> ir.Graph:
        """What ``make`` adds as a graph of its own, which reads the values around it."""
        nodes, journal = len(self._nodes), len(self._journal)
        result = make()
        own = self._nodes[nodes:]
        self._take_back(nodes, len(self._initializers), journal)  # nothing else can read what is in there
        return ir.Graph([], [result], nodes=own, name=self._unique("branch"))

    def value(self, value: Value) -> ir.Value:
        """The ONNX value of a graph value, in its own shape."""
        if value in self._values:
            return self._values[value]
        return self.once(("shaped", value.name), lambda: self.reshape(self._elements[value], value.type.shape))

    def elements(self, value: Value) -> ir.Value:
        """Some ONNX value with the same elements in row-major order, whatever its shape: for lowerings that reshape."""
        if value in self._elements:
            return self._elements[value]
        node = value.producer
        if node is not None and node.op == "aten.reshape.default" and value not in self._values:
            return self.elements(node.args["self"])
        return self.value(value)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` builds, built once for each key."""
        if key not in self._memo:
            self._memo[key] = make()
            self._journal.append(key)
        found: T = self._memo[key]
        return found

    def constant(self, array: Any, dtype: torch.dtype | None = None) -> ir.Value:
        """A small constant in the graph; equal ones are shared."""
        if dtype is not None:
            tensor = torch.as_tensor(array, dtype=dtype)
            numbers = tensor.view(PLAIN[dtype]).numpy() if dtype in PLAIN else tensor.numpy()
            made = ir.Tensor(numbers.view(DTYPES[dtype].numpy()) if dtype in PLAIN else numbers, DTYPES[dtype])
        else:
            numbers = np.asarray(array)
            made = ir.Tensor(numbers)
        key = "constant", numbers.tobytes(), made.dtype, tuple(numbers.shape)
        return self.once(key, lambda: self._initializer(self._unique("constant"), made))

    def is_weight(self, value: Value) -> bool:
        return self.graph.weight_of(value) is not None

    def signed(self, packed: Value, shape: Sequence[int], bits: int) -> ir.Value:
        """A weight of packed numbers around ``2 ** (bits - 1)`` as an initializer of int4 or int8, zero in the middle."""
        weight, dtype = self.graph.weights[packed.name], {4: ir.DataType.INT4, 8: ir.DataType.INT8}[bits]

        def make() -> ir.Value:
            flipped = Weight(weight.type, lambda: weight.load() ^ {4: 0x88, 8: 0x80}[bits])
            value = self.external(f"{packed.name}.signed", flipped)
            value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
            return value

        return self.once(("signed", packed.name), make)

    def arg(self, arg: Any, dtype: torch.dtype) -> ir.Value:
        """An operand as a value of ``dtype``: a tensor, a number, or a size."""
        if isinstance(arg, Value):
            return self.cast(self.value(arg), arg.type.dtype, dtype)
        if isinstance(arg, Dim):
            return self.cast(self.scalar(arg), torch.int64, dtype)
        return self.constant(arg, dtype)

    def cast(self, value: ir.Value, source: torch.dtype, target: torch.dtype) -> ir.Value:
        return value if source == target else self.op("Cast", value, to=DTYPES[target])

    def reshape(self, source: ir.Value, shape: Sequence[Size]) -> ir.Value:
        """``source`` in another shape; one unknown size is left to ONNX."""
        unknown = [axis for axis, size in enumerate(shape) if isinstance(size, Dim)]
        empty = any(size == 0 for size in shape)
        sizes: list[Size] = list(shape)
        if unknown and not empty:
            sizes[unknown[-1]] = -1
        return self.op("Reshape", source, self.vector(sizes))

    def vector(self, sizes: Sequence[Size]) -> ir.Value:
        """Sizes as one int64 vector."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(np.array(sizes, np.int64))
        parts: list[ir.Value] = []
        run: list[int] = []
        for size in sizes:
            if isinstance(size, int):
                run.append(size)
                continue
            if run:
                parts.append(self.constant(np.array(run, np.int64)))
                run = []
            parts.append(self.size(size))
        if run:
            parts.append(self.constant(np.array(run, np.int64)))
        key = "vector", tuple(part.name for part in parts)
        return parts[0] if len(parts) == 1 else self.once(key, lambda: self.op("Concat", *parts, axis=0))

    def size(self, size: Size) -> ir.Value:
        """A size as an int64 vector of one element."""
        if isinstance(size, int):
            return self.constant(np.array([size], np.int64))
        return self.once(("size", size), lambda: self._size(size))

    def scalar(self, size: Size) -> ir.Value:
        """A size as an int64 scalar."""
        if isinstance(size, int):
            return self.constant(np.array(size, np.int64))
        return self.once(("scalar", size), lambda: self.op("Squeeze", self.size(size)))

    def numbers(self, size: Size) -> ir.Value:
        """0, 1 ... size - 1, int64."""
        return self.once(("numbers", size), lambda: self.op("Range", self.scalar(0), self.scalar(size), self.scalar(1)))

    def attach(self, function: ir.Function) -> None:
        """Carry a model-local function that the nodes call."""
        self._functions[function.identifier()] = function

    # Emission

    def _size(self, size: Dim) -> ir.Value:
        if size.name is not None:
            return self._named_size(size.name)
        total: ir.Value | None = None
        for monomial, coefficient in size.terms:
            factors = [self.size(Dim.named(atom)) if isinstance(atom, str) else self._call(atom) for atom in monomial]
            if coefficient != 1 or not factors:
                factors.append(self.size(coefficient))
            term = functools.reduce(lambda a, b: self.op("Mul", a, b), factors)
            total = term if total is None else self.op("Add", total, term)
        assert total is not None
        return total

    def _call(self, call: Call) -> ir.Value:
        a, b = self.size(call.a), self.size(call.b)
        if call.fn == "//":  # ONNX truncates; what the remainder leaves divides evenly
            return self.op("Div", self.op("Sub", a, self.op("Mod", a, b)), b)
        return self.op({"%": "Mod", "max": "Max", "min": "Min"}[call.fn], a, b)

    def _named_size(self, name: str) -> ir.Value:
        for value in self.graph.inputs.values():
            for axis, size in enumerate(value.type.shape):
                if isinstance(size, Dim) and size.name == name:
                    return self.op("Shape", self.value(value), start=axis, end=axis + 1)
        for value in self.graph.inputs.values():  # in a sum with names that stand alone
            for axis, size in enumerate(value.type.shape):
                rest = rest_of(size, name) if name in names_of(size) else None
                if rest is not None:
                    whole = self.op("Shape", self.value(value), start=axis, end=axis + 1)
                    return self.op("Sub", whole, self.size(rest))
        raise LoweringError(f"no input has the size {name!r}")

    def _emit(self, show: Sequence[str]) -> ir.Model:
        inputs = []
        for name, value in self.graph.inputs.items():
            self._values[value] = self.typed(ir.Value(name=name), value.type)
            inputs.append(self._values[value])
        for name, weight in self.graph.weights.items():
            self._values[self.graph.value(name)] = self.external(name, weight)
        for node in self.graph.nodes:
            self._lower(node)
        outputs = [self._output(name, value) for name, value in self.graph.outputs.items()]
        outputs += [self._output(name, self.graph.value(name)) for name in show if name not in self.graph.outputs]
        self._nodes = _needed(self._nodes, outputs)
        self._drop_unread()
        every = list(_with_branches(self._nodes))
        opsets = {d: v for d, v in self.dialect.opsets.items() if d == "" or any(n.domain == d for n in every)}
        opsets[""] = max(opsets[""], *(_SINCE.get(node.op_type, 0) for node in every), 0)
        opsets |= {function.domain: 1 for function in self._functions.values()}
        graph = ir.Graph(
            inputs, outputs, nodes=self._nodes, initializers=self._initializers, opset_imports=opsets, name="graphopt"
        )
        return ir.Model(graph, ir_version=10, producer_name="graphopt", functions=list(self._functions.values()))

    def _drop_unread(self) -> None:
        """Leave out weights that lowerings made others of."""
        read = {value for node in _with_branches(self._nodes) for value in node.inputs}
        self._initializers = [value for value in self._initializers if value in read]
        kept = {value.name for value in self._initializers}
        self.weights = {name: weight for name, weight in self.weights.items() if name in kept}

    def _lower(self, node: Node) -> None:
        self._origin, self._scope = " | ".join(node.origin), node.outputs[0].name
        lowered = self._lowered(node)
        results = lowered if isinstance(lowered, Sequence) else (lowered,)
        for value, result in zip(node.outputs, results, strict=True):
            if isinstance(result, Reshaped):
                self._elements[value] = result.value
            else:
                self._values[value] = result
                if result.type is None and result.producer() is not None:
                    self.typed(result, value.type, packed=self._is_packed(node))
        self._origin, self._scope = "", "shapes"

    def _lowered(self, node: Node) -> Lowered:
        name, hint = packet(node), "add a lowering for it, or rewrite it in a pass before"
        reasons = []
        for form, lowering in self._candidates(node):
            faults = (quirk for quirk in self.dialect.quirks if quirk.action != "widen")
            fault = next((quirk for quirk in faults if quirk.condition(node, form)), None)
            if fault is not None and fault.action == "refuse":
                raise LoweringError(f"{name}: {fault.text} ({fault.reference})", where=node.where)
            if fault is not None:
                reasons.append(f"{form}: {fault.text} ({fault.reference})")
                places = self.avoided.setdefault(fault, [])
                if node.where not in places[-1:]:  # once for all forms
                    places.append(node.where)
                continue
            mark = len(self._nodes), len(self._initializers), len(self._journal)
            try:
                lowered = lowering(self, node)
            except Unsupported as reason:
                self._take_back(*mark)
                reasons.append(f"{form}: {reason}" if form else str(reason))
                hint = reason.hint or hint
                continue
            if form:
                self.used_forms[form] = self.used_forms.get(form, 0) + 1
            return lowered
        raise LoweringError(
            f"{name} cannot be expressed in the {self.dialect.name} dialect"
            + (f" ({'; '.join(reasons)})" if reasons else ""),
            where=node.where,
            hint=hint,
        )

    def _take_back(self, nodes: int, initializers: int, journal: int) -> None:
        del self._nodes[nodes:], self._initializers[initializers:]
        for key in self._journal[journal:]:
            del self._memo[key]
        del self._journal[journal:]

    def _candidates(self, node: Node) -> list[tuple[str, Lowering]]:
        """Lowerings to try, in order: the chosen form, the other forms, the table, the single-op fallback."""
        name = packet(node)
        forms = dict(self.dialect.forms.get(name, {}))
        chosen = self.choose(node) if forms else None
        ordered = sorted(forms.items(), key=lambda item: item[0] != chosen)  # stable: the chosen one comes first
        if name in self.dialect.lowerings:
            ordered.append(("", self.dialect.lowerings[name]))
        if name.startswith("aten."):
            from graphopt.backends.onnx.fallback import lower_by_export

            ordered.append(("", lower_by_export))
        return ordered

    def _output(self, name: str, value: Value) -> ir.Value:
        """A named output. It is its producer's own value where it may take the name; else an Identity makes one."""
        source = self.value(value)
        if (
            source.producer() is None
            or source in self._outputs
            or name in self.graph.inputs
            or name in self.graph.weights
        ):
            node = ir.node("Identity", [source], {}, name=self._unique("Identity"))
            self._nodes.append(node)
            source = node.outputs[0]
        source.name = name
        self._outputs.append(source)
        return source if source.type is not None else self.typed(source, value.type)

    def typed(self, value: ir.Value, type: TensorType, packed: bool = False) -> ir.Value:
        """A value that is declared to be of a type."""
        value.type = ir.TensorType(DTYPES[type.dtype.to_real() if type.dtype.is_complex else type.dtype])
        shape = [size if isinstance(size, int) else str(size) for size in type.shape]
        shape += [2] * type.dtype.is_complex  # a complex number is a pair of reals, as torch.onnx has it
        value.shape = ir.Shape(["real tokens", *shape[1:]] if packed else shape)
        return value

    def _is_packed(self, node: Node) -> bool:
        """Whether a node's results hold real tokens only, so that their first size is not the declared one."""
        if node.op == "graphopt.unpack_tokens.default":
            return False
        packed = node.op == "graphopt.pack_tokens.default" or any(operand in self._packed for operand in node.operands)
        if packed:
            self._packed.update(node.outputs)
        return packed

    def external(self, name: str, weight: Weight) -> ir.Value:
        """A weight as an initializer in the data file."""
        self.weights[name] = weight
        value = self.typed(ir.Value(name=name), weight.type)
        self._initializers.append(value)
        return value

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        tensor.name = name
        self._initializers.append(value)
        return value

    def _unique(self, name: str) -> str:
        while True:
            self._counts[name] = count = self._counts.get(name, 0) + 1
            candidate = f"{name}_{count}"
            if candidate not in self._names:
                self._names.add(candidate)
                return candidate
