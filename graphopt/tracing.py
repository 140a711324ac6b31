"""nn.Module -> Graph, through ``torch.export``.

The export's ATen graph is imported node by node: sizes become expressions over the user's names, in-place ops are
functionalized first, inference no-ops are dropped at the door (:mod:`graphopt.normalize`).
"""

from __future__ import annotations

import contextlib
import io
import keyword
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from graphopt import operators, segments
from graphopt.dims import Dim, Size
from graphopt.eager import path_name, untouched
from graphopt.errors import GraphError, TracingError, nearest
from graphopt.guards import Axes, hold_guards
from graphopt.inference import infer, silent_logging, size_from_torch
from graphopt.ir import Graph, Value, map_arg
from graphopt.normalize import is_assertion, normalize
from graphopt.scalars import size_of
from graphopt.tensors import DimRange, TensorType, Weight
from graphopt.text import RESERVED

_GROUPS = "multiply each group by its matrix of one stack and join them in order, or use torch's grouped product"
_INLINED = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def trace(
    module: nn.Module,
    inputs: Mapping[str, Any],
    axes: Axes,
    dims: Mapping[str, DimRange | tuple[int, int | None]] | None = None,
    defaults: Mapping[str, DimRange] | None = None,
    truths: Collection[str] = (),
) -> Graph:
    """The graph of ``module(**inputs)``.

    ``inputs``: example tensors by argument name; None stands for an optional input that is left out. ``axes``: for each
    input the names of its dynamic axes, as in ``{"input_ids": ("batch", "sequence")}``, None for a fixed one; axes of one
    name are of one size. ``dims``: the range of each name, by default any size from 1. ``defaults``: ranges for names that
    ``dims`` leaves out; they give way to what the model allows. ``truths``: inputs that hold zeros and ones only, as a
    padding mask does: what is proven of masks may rest on it.

    TracingError names the node and source line of what cannot become a graph."""
    given = {name: value for name, value in inputs.items() if value is not None}
    ranges = {
        name: bounds if isinstance(bounds, DimRange) else DimRange(*bounds) for name, bounds in (dims or {}).items()
    }
    _check_request(module, given, axes, ranges)
    unasked = {name: bounds for name, bounds in (defaults or {}).items() if name not in ranges}
    program = _export(module, given, axes)
    taken_for_granted = list(getattr(program, "_guards_code", None) or ())
    if any(_mutates(node) for node in _all_nodes(program.graph_module)):
        program = _functionalized(program, module)
    graph = _Importer(program, given, axes, ranges, unasked).graph
    hold_guards(graph, taken_for_granted, module, given, axes, ranges)
    graph.truths.update(name for name in truths if name in graph.inputs)
    return graph


def _check_request(module: nn.Module, given: Mapping[str, Any], axes: Axes, dims: Mapping[str, DimRange]) -> None:
    if module.training:
        raise TracingError("the module is in training mode", hint="call module.eval() first")
    unknown = axes.keys() - given.keys()
    if unknown:
        raise TracingError(f"axes are named for {', '.join(sorted(unknown))}, which is no given input")
    for name, names in axes.items():
        if isinstance(given[name], torch.Tensor) and len(names) != given[name].ndim:
            raise TracingError(
                f"input {name!r} has {given[name].ndim} axes, {len(names)} are named",
                hint="name every axis, None where its size is fixed: ('batch', 'sequence', None)",
            )
    for axis in {axis for names in axes.values() for axis in names if axis}:
        if not axis.isidentifier() or keyword.iskeyword(axis) or axis in RESERVED:
            raise TracingError(f"{axis!r} cannot name a size", hint="use a plain name, as in batch or sequence")
    unused = dims.keys() - {axis for names in axes.values() for axis in names if axis}
    if unused:
        known = sorted({name for names in axes.values() for name in names if name is not None})
        raise TracingError(
            f"dims names {', '.join(sorted(unused))}, which no axis of any input has",
            where="dims",
            hint=nearest(min(unused), known) if known else "the model's sizes are all fixed",
        )


def _export(module: nn.Module, given: Mapping[str, Any], axes: Axes) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = {
        name: {axis: dynamic for axis, dim in enumerate(axes[name]) if dim} if axes.get(name) else None
        for name in given
    }
    for name, dims in shapes.items():
        for axis in dims or ():
            if given[name].shape[axis] < 2:
                raise TracingError(
                    f"example input {name!r} has size {given[name].shape[axis]} at its dynamic axis {axis}",
                    hint="trace with an example of at least 2 there: torch takes 0 and 1 for constants",
                )
    try:
        with torch.no_grad(), _quiet(), untouched(module):
            return torch.export.export(module, (), dict(given), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise TracingError(
            f"torch.export cannot trace {type(module).__name__}: {_first_line(error)}",
            where=_source_of(error),
            hint=_remedy(str(error)),
        ) from error


def _functionalized(program: torch.export.ExportedProgram, module: nn.Module) -> torch.export.ExportedProgram:
    """The program without in-place ops: torch rewrites them, at twice the trace's cost."""
    try:
        with _quiet():
            done: torch.export.ExportedProgram = program.run_decompositions({})
            return done
    except Exception as error:
        raise TracingError(
            f"torch.export cannot take the in-place ops out of {type(module).__name__}: {_first_line(error)}",
            where=_source_of(error),
            hint="write them without changing tensors in place",
        ) from error


_REMEDIES = (
    ("data-dependent", "a size or branch depends on tensor values: rewrite it with torch.where or fixed sizes"),
    ("unbacked", "a size depends on tensor values: rewrite it with fixed sizes"),
    (
        "Constraints violated",
        "the model fixes a size that is named dynamic: leave that axis out of axes, or change the model",
    ),
    (
        "must match the size of tensor",
        "the model works at one size of an axis that is named dynamic: leave that axis out of axes",
    ),
    ("DynamicCache", "set config.use_cache = False before tracing"),
    ("pytree", "return tensors, tuples, dicts or registered dataclasses only"),
)


def _remedy(message: str) -> str:
    found = [remedy for sign, remedy in _REMEDIES if sign in message]
    return found[0] if found else "try torch.export.export on the module alone to see the whole message"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _source_of(error: BaseException) -> str | None:
    """The innermost line outside torch in the message's user stack, or in the traceback."""
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    traceback = error.__traceback__
    while traceback is not None:
        frames.append((traceback.tb_frame.f_code.co_filename, str(traceback.tb_lineno)))
        traceback = traceback.tb_next
    outside = [(file, line) for file, line in frames if "/torch/" not in file and not file.startswith("<")]
    outside = [frame for frame in outside if Path(frame[0]).resolve() != Path(__file__).resolve()]
    return source_line(*outside[-1]) if outside else None


def source_line(file: str, line: str | int) -> str:
    """``transformers/models/bert/modeling_bert.py:155``: the path below the place it is installed at."""
    path = Path(file)
    parts = path.parts
    for anchor in ("site-packages", "dist-packages"):
        if anchor in parts:
            path = Path(*parts[parts.index(anchor) + 1 :])
            break
    else:
        with contextlib.suppress(ValueError):
            path = path.relative_to(Path.cwd())
        if path.is_absolute():
            path = Path(path.name)
    return f"{path}:{line}"


def _all_nodes(module: torch.fx.GraphModule) -> Iterator[torch.fx.Node]:
    for part in module.modules():
        if isinstance(part, torch.fx.GraphModule):
            yield from part.graph.nodes


def _mutates(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Importer:
    """One pass over the exported program; ``graph`` is the result."""

    def __init__(
        self,
        program: torch.export.ExportedProgram,
        given: Mapping[str, Any],
        axes: Axes,
        dims: dict[str, DimRange],
        defaults: dict[str, DimRange],
    ) -> None:
        self.program, self.defaults = program, defaults
        self.graph = Graph()
        self.meaning: dict[str, Size] = {}
        self._weights: dict[Any, Value] = {}
        placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
        signature = zip(placeholders, program.graph_signature.input_specs, strict=True)
        self._input_names = {node.name for node, spec in signature if spec.kind is InputKind.USER_INPUT}
        self._name_dims(placeholders, given, axes, dims)
        env = {
            node: value
            for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True)
            if (value := self._placeholder(node, spec)) is not None
        }
        results = self._import(program.graph_module, env)
        self._name_outputs(results)
        self.graph.prune()
        try:
            self.graph.verify()
        except GraphError as error:
            raise TracingError(
                f"the model does not work at every size that dims allows: {error.what}",
                where=error.where,
                hint="take the axis out of axes, or change the model",
            ) from error

    def _name_dims(
        self, placeholders: list[torch.fx.Node], given: Mapping[str, Any], axes: Axes, dims: dict[str, DimRange]
    ) -> None:
        """Give each symbol of the trace the user's name of its axis, and each name its range."""
        constraints = {str(symbol): bounds for symbol, bounds in self.program.range_constraints.items()}
        by_name = {node.name: node for node in placeholders}
        for name, names in axes.items():
            node = by_name.get(name)
            if node is None:
                continue
            for axis, dim in enumerate(names):
                if dim is None:
                    continue
                size = node.meta["val"].shape[axis]
                if isinstance(size, int):
                    raise TracingError(
                        f"the model fixes axis {axis} of {name!r} ({dim}) to {size}",
                        hint="leave it out of axes, or change the model",
                    )
                self._name_symbol(str(size.node.expr), dim, constraints, dims, f"axis {axis} of {name!r}")

    def _name_symbol(
        self, symbol: str, dim: str, constraints: Mapping[str, Any], dims: Mapping[str, DimRange], where: str
    ) -> None:
        known = self.meaning.setdefault(symbol, Dim.named(dim))
        if str(known) != dim:
            raise TracingError(
                f"{dim} and {known} are always equal in this model", where=where, hint="give them one name"
            )
        bounds = constraints.get(symbol)
        low, high = (int(bounds.lower), _finite(bounds.upper)) if bounds is not None else (0, None)
        low = 0 if low <= 2 else low  # torch's own assumption about 0 and 1; parity is proven at the smallest size
        asked = dims.get(dim) or self.graph.dims.get(dim) or self.defaults.get(dim) or DimRange(1, None)
        if dim in dims and (asked.min < low or (high is not None and (asked.max is None or asked.max > high))):
            raise TracingError(
                f"dims asks for {dim} in {asked}, the model allows {DimRange(low, high)}",
                where=where,
                hint=f"set dims: {{{dim}: [{max(asked.min, low)}, {high}]}}",
            )
        asked = DimRange(max(asked.min, low), asked.max)
        if high is not None and (asked.max is None or asked.max > high):
            asked = DimRange(asked.min, high)
        self.graph.dims[dim] = asked

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> Value | None:
        if spec.kind is InputKind.USER_INPUT:
            if not isinstance(node.meta.get("val"), torch.Tensor):
                return None
            return self.graph.add_input(node.name, self._type(node.meta["val"], node))
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            stored = self.program.state_dict if spec.target in self.program.state_dict else self.program.constants
            return self._weight(spec.target, stored[spec.target])
        raise TracingError(f"input {node.name} is a {spec.kind.name}, which a graph cannot hold")

    def _weight(self, name: str, tensor: torch.Tensor) -> Value:
        """The weight's value; tensors that share their memory (tied weights) share it."""
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype) if tensor.numel() else name
        if key not in self._weights:
            own = f"self.{name}" if name in self._input_names else name
            self._weights[key] = self.graph.add_weight(self.graph.unique(own), Weight.of(tensor))
        return self._weights[key]

    def _import(self, module: torch.fx.GraphModule, env: dict[torch.fx.Node, Any]) -> Any:
        """Import one graph module under ``env``; its results, as its output node has them."""
        for node in module.graph.nodes:
            if node.op == "output":
                return _map_fx(node.args[0], lambda leaf: env.get(leaf, leaf))
            if node.op == "get_attr":
                env[node] = self._attribute(module, str(node.target))
            elif node.op == "call_function":
                self._call(node, env)
        return ()

    def _attribute(self, module: torch.fx.GraphModule, target: str) -> Any:
        found: Any = module
        for part in target.split("."):
            found = getattr(found, part)
        return self._weight(target, found) if isinstance(found, torch.Tensor) else found

    def _call(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> None:
        meta = node.meta.get("val")
        name = getattr(node.target, "__name__", str(node.target))
        if name == "getitem" and isinstance(env.get(node.args[0]), tuple):  # type: ignore[arg-type]
            env[node] = env[node.args[0]][node.args[1]]  # type: ignore[index]
        elif isinstance(meta, (torch.SymInt, int)) and not isinstance(meta, bool):
            env[node] = self._size_or_unknown(meta, node, env)
        elif isinstance(node.target, torch._ops.HigherOrderOperator):
            env[node] = self._inline(node, env)
        elif isinstance(node.target, torch._ops.OpOverload):
            env[node] = self._op(node, env)
        elif not node.users or isinstance(meta, (torch.SymBool, bool)):
            return  # guards on sizes, which the declared ranges state
        else:
            raise self._refusal(f"{name} has no form in a graph", node)

    def _inline(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        autocast = node.target.name() == "wrap_with_autocast"  # type: ignore[union-attr]
        if autocast and node.args[2]:
            raise self._refusal(
                "it computes under autocast, which a graph does not hold", node, "trace outside torch.autocast"
            )
        if node.target.name() not in _INLINED:  # type: ignore[union-attr]
            raise self._refusal(
                f"{node.target} is control flow, which a graph cannot hold", node,
                hint="rewrite it with torch.where, or compile the branches apart",
            )  # fmt: skip
        found = [
            arg
            for arg in node.args
            if isinstance(arg, torch.fx.Node) and isinstance(env.get(arg), torch.fx.GraphModule)
        ]
        body = env[found[0]]
        operands = node.args[node.args.index(found[0]) + 1 :]
        placeholders = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        return self._import(body, dict(zip(placeholders, (env[arg] for arg in operands), strict=True)))  # type: ignore[index]

    def _op(self, node: torch.fx.Node, env: dict[torch.fx.Node, Any]) -> Any:
        op = _op_name(node.target)  # type: ignore[arg-type]
        if is_assertion(op):
            return None
        grouped = segments.read(op, node, env, self.graph, _origin(node))
        if grouped is not None:
            return grouped
        try:
            args = {
                name: map_arg(_map_fx(arg, lambda leaf: self._leaf(leaf, env, node)), lambda leaf: leaf)
                for name, arg in operators.bind(op, node.args, node.kwargs).items()
            }
        except GraphError as error:
            raise self._refusal(error.what, node, error.hint) from error
        meta = node.meta["val"]
        parts = meta if isinstance(meta, (tuple, list)) else (meta,)
        if not all(isinstance(part, torch.Tensor) for part in parts):
            raise self._refusal(f"{op} gives a number that depends on data", node, "keep it a tensor")
        types = self._types(op, args, parts, node)
        call = normalize(op, args, types)
        if isinstance(call, Value):
            return call
        names = [node.name] if len(types) == 1 else [f"{node.name}_{index}" for index in range(len(types))]
        made = self.graph.insert(call.op, call.args, types, names=names, origin=_origin(node))
        return made.outputs if isinstance(meta, (tuple, list)) else made.output

    def _leaf(self, leaf: Any, env: Mapping[torch.fx.Node, Any], node: torch.fx.Node) -> Any:
        if isinstance(leaf, torch.fx.Node):
            if leaf not in env:
                raise self._refusal(f"argument {leaf.name} of {node.target} is neither a tensor nor a size", node)
            if isinstance(env[leaf], TracingError):
                raise env[leaf]
            if isinstance(env[leaf], segments.Segment):
                raise self._refusal(f"{leaf.name} has a number of rows that depends on data", node, _GROUPS)
            return env[leaf]
        if isinstance(leaf, (torch.device, torch.layout, torch.memory_format)):
            return None
        return leaf

    def _size_or_unknown(self, size: Any, node: torch.fx.Node, env: Mapping[torch.fx.Node, Any]) -> Size | TracingError:
        """A size; or, for one that depends on data, the refusal to raise where it is used."""
        if node.target is torch.ops.aten.item.default and isinstance(size, torch.SymInt):
            found = size_of(self.graph, env[node.args[0]])  # type: ignore[index]
            if found is not None:
                self.meaning[str(size.node.expr)] = found
        try:
            return self._size(size, node)
        except TracingError as refusal:
            return refusal

    def _types(
        self, op: str, args: Mapping[str, Any], parts: Sequence[Any], node: torch.fx.Node
    ) -> tuple[TensorType, ...]:
        """The results' types as the trace has them. Where torch lost sight of a size, as it follows from the operands."""
        try:
            return tuple(self._type(part, node) for part in parts)
        except TracingError as refusal:
            try:
                types = infer(op, operators.bind(op, (), args))
            except GraphError:
                raise refusal from None
        for part, type in zip(parts, types, strict=True):
            for size, found in zip(part.shape, type.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                    self.meaning.setdefault(str(size.node.expr), found)
        return types

    def _type(self, tensor: torch.Tensor, node: torch.fx.Node) -> TensorType:
        return TensorType(tensor.dtype, tuple(self._size(size, node) for size in tensor.shape))

    def _size(self, size: Any, node: torch.fx.Node) -> Size:
        try:
            return size_from_torch(size, self.meaning)
        except GraphError as error:
            raise self._refusal(error.what, node, "make the size a function of the inputs' shapes") from error

    def _refusal(self, what: str, node: torch.fx.Node, hint: str | None = None) -> TracingError:
        return TracingError(what, where=" | ".join((f"%{node.name}", *_origin(node))), hint=hint)

    def _name_outputs(self, results: Sequence[Any]) -> None:
        """Name outputs by their place in what the module returns: ``logits``, ``hidden_states.3``, ``output``."""
        specs = self.program.graph_signature.output_specs
        kept = [
            result
            for result, spec in zip(results, specs, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT or _refuse_output(spec)
        ]
        tree = pytree.tree_unflatten(list(range(len(kept))), self.program.call_spec.out_spec)
        for path, index in pytree.tree_flatten_with_path(tree)[0]:
            name = path_name(path)
            if name in self.graph.outputs:
                raise TracingError(
                    f"two outputs have the name {name!r}", hint="name them apart in what the module returns"
                )
            if isinstance(kept[index], Value):
                self.graph.outputs[name] = kept[index]


def _refuse_output(spec: Any) -> bool:
    if spec.kind is OutputKind.BUFFER_MUTATION:
        return False  # a buffer kept from call to call: an engine has no state, its next call starts anew
    raise TracingError(
        f"the module writes into {spec.target!r} ({spec.kind.name})", hint="do not change inputs in place"
    )


def _op_name(target: torch._ops.OpOverload) -> str:
    namespace, name = target._schema.name.split("::")
    return f"{namespace}.{name}.{target._overloadname}"


def _map_fx(arg: Any, fn: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return tuple(_map_fx(item, fn) for item in arg)
    return fn(arg)


def _finite(bound: Any) -> int | None:
    return int(bound) if bound.is_Integer else None


def _origin(node: torch.fx.Node) -> tuple[str, ...]:
    """(module path, source line) of a traced node, whichever is known."""
    modules = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    written = [frame for frame in frames if not frame[0].startswith("<")]
    outside = [frame for frame in written if "/torch/" not in frame[0]] or written
    parts = (modules[-1] if modules else "", source_line(*outside[-1]) if outside else "")
    return tuple(part for part in parts if part)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals, and prints half a graph where it fails; what matters to the user comes as
    an error. What the model itself prints stays."""
    printed = io.StringIO()
    with warnings.catch_warnings(), silent_logging(), contextlib.redirect_stderr(printed):
        warnings.simplefilter("ignore")
        yield
    sys.stderr.write(printed.getvalue())
