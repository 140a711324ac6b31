"""Linears on integers: weights int8 by channel, or packed in groups; inputs int8 by calibration or by their own range.

``scheme: int8_static`` scales every input by the largest magnitude that calibration found::

    %y = aten.linear.default(                       %i = graphopt.quantize.default(x=%x, scale=%x.scale)
        input=%x, weight=%w, bias=%b)        ->     %y = graphopt.static_linear.default(x=%i, x_scale=%x.scale,
                                                        weight=%w.int8, scale=%w.scale, bias=%b)

``scheme: int8_dynamic`` by its own smallest and largest element, when it runs::

    %y = graphopt.dynamic_linear.default(x=%x, weight=%w.int8, scale=%w.scale, bias=%b)

and ``scheme: int8_token`` each token by its own largest magnitude: ``per_token=true``, for the inputs where few tokens hold
numbers that are far larger than all others (the last linears of a decoder's layers).

``scheme: weight_only`` leaves inputs as they are and packs weights of ``bits`` in groups of ``group`` input features::

    %y = graphopt.packed_linear.default(x=%x, packed=%w.packed, scales=%w.scales, bias=%b, bits=4, block=32)

A table that embeds tokens and is a linear's weight as well stays one: rows are looked up in integers and scaled then.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from graphopt.calibration import Tapped
from graphopt.ir import Graph, Node, Value, Weight
from graphopt.parity import Contract
from graphopt.passes.quantized_weights import (
    LEVELS,
    is_linear,
    matches,
    module_of,
    packed_groups,
    quantized_rows,
    refuse_unknown,
)
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refused, RewriteLog
from graphopt.schemas.calibration import Calibration
from graphopt.schemas.pipeline import Budget
from graphopt.schemas.report import LayerPrecision

Scheme = Literal["int8_static", "int8_dynamic", "int8_token", "weight_only"]
FLOAT = "fp32"
LARGE = 100_000  # numbers in a table that is worth fewer bits


class Quantize(Pass):
    """Linears on integers, where modules, overrides and sizes say so."""

    kind: Literal["quantize"] = "quantize"
    scheme: Scheme
    modules: tuple[str, ...] = ("*",)
    """The paths of modules that are quantized, with ``*`` and ``?``."""
    skip: tuple[str, ...] = ()
    """Those of them that stay as they are."""
    overrides: dict[str, Scheme] = Field(default_factory=dict)
    """Another scheme for modules whose path matches; the last one that does."""
    min_weights: PositiveInt = 1
    """Linears with fewer weights stay as they are."""
    bits: Literal[4, 8] = 4
    """Of packed weights."""
    group: Literal[16, 32, 64, 128, 256] = 32
    """How many input features share a scale in packed weights."""
    embeddings: bool = True
    """Keep tables that tokens are looked up in as int8 as well, each row by its own scale; what is looked up is scaled then."""
    calibration: Calibration | None = None
    """What ``int8_static`` is scaled by."""
    budget: Budget = Budget(metric="cosine", limit=0.9)
    """How far the outputs may go from eager's on random inputs: against faults, for which your own metric is too slow."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})

    @model_validator(mode="after")
    def _has_its_data(self) -> Quantize:
        static = "int8_static" in (self.scheme, *self.overrides.values())
        if static and self.calibration is None:
            raise ValueError("scheme: int8_static needs calibration: {data: ...}")
        if not static and self.calibration is not None:
            raise ValueError("calibration is for int8_static")
        return self

    def contract(self) -> Contract:
        return self.budget

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        chosen = self._choose(graph, log, context)
        scales = self._scales(graph, context, [node for node, scheme in chosen.items() if scheme == "int8_static"])
        writer = _Writer(graph, self.bits, self.group, scales)
        for node, scheme in chosen.items():
            writer.replace(node, scheme)
            log.matches[scheme] = log.matches.get(scheme, 0) + 1
        tables = [node for node in graph.nodes if _is_lookup(graph, node)] if self.embeddings else []
        for node in tables:
            precision = "as its linear" if writer.has(node.args["weight"]) else "int8 rows"
            context.layers.append(LayerPrecision(module=module_of(node), precision=precision))
            writer.look_up(node)
        if tables:
            log.matches["embedding"] = len(tables)
        graph.prune()
        return log

    def _choose(self, graph: Graph, log: RewriteLog, context: Context) -> dict[Node, Scheme]:
        """What becomes of each linear, and the report of it."""
        linears = {node: module_of(node) for node in graph.nodes if is_linear(graph, node)}
        refuse_unknown(self.kind, (*self.modules, *self.skip, *self.overrides), list(linears.values()), context)
        chosen: dict[Node, Scheme] = {}
        for node, path in linears.items():
            reason = self._reason_not_to(node, path)
            scheme = self._scheme_of(path)
            if reason is None:
                chosen[node] = scheme
            else:
                log.refusals.append(Refused("Quantize", node.where, reason))
            precision = self._precision(scheme) if reason is None else FLOAT
            context.layers.append(LayerPrecision(module=path, precision=precision, reason=reason))
        return chosen

    def _reason_not_to(self, node: Node, path: str) -> str | None:
        weight: Value = node.args["weight"]
        if not matches(path, self.modules):
            return "not among modules"
        if matches(path, self.skip):
            return "skipped"
        count = weight.type.shape[0] * weight.type.shape[1]
        if isinstance(count, int) and count < self.min_weights:
            return f"{count} weights, fewer than {self.min_weights}"
        return None

    def _scheme_of(self, path: str) -> Scheme:
        return next(
            (own for pattern, own in reversed(self.overrides.items()) if fnmatch.fnmatch(path, pattern)), self.scheme
        )

    def _precision(self, scheme: Scheme) -> str:
        return f"int{self.bits} in groups of {self.group}" if scheme == "weight_only" else scheme

    def _scales(self, graph: Graph, context: Context, nodes: Sequence[Node]) -> Mapping[str, Tensor]:
        """The magnitude of each static linear's input, by the value's name."""
        if not nodes:
            return {}
        assert self.calibration is not None
        names = dict.fromkeys(node.args["input"].name for node in nodes)
        return context.calibrate(graph, self.calibration, [Tapped(name) for name in names])


def _is_lookup(graph: Graph, node: Node) -> bool:
    """A large table of the model that tokens are looked up in."""
    if node.op != "aten.embedding.default" or graph.weight_of(node.args["weight"]) is None:
        return False
    rows, features = node.args["weight"].type.shape
    return bool(rows * features >= LARGE)


class _Writer:
    """Replaces linears; weights and inputs that several of them share are quantized once."""

    def __init__(self, graph: Graph, bits: int, group: int, largest: Mapping[str, Tensor]) -> None:
        self.graph, self.bits, self.group, self.largest = graph, bits, group, largest
        self.inputs: dict[str, tuple[Value, Value]] = {}
        self.weights: dict[tuple[str, str], dict[str, Value]] = {}

    def replace(self, node: Node, scheme: Scheme) -> None:
        x, bias = node.args["input"], node.args["bias"]
        weight = self._weight(node.args["weight"], "packed" if scheme == "weight_only" else "rows")
        parts = {"bias": bias, **weight}
        if scheme == "int8_static":
            integers, scale = self._quantized_input(x, node)
            op, parts = "graphopt.static_linear.default", {"x": integers, "x_scale": scale, **parts}
        elif scheme in ("int8_dynamic", "int8_token"):
            op, parts = "graphopt.dynamic_linear.default", {"x": x, **parts, "per_token": scheme == "int8_token"}
        else:
            op, parts = "graphopt.packed_linear.default", {"x": x, **parts, "bits": self.bits, "block": self.group}
        self._put(self._insert(op, node, **parts), node)

    def _insert(self, op: str, before: Node, /, **args: object) -> Value:
        return self.graph.insert(op, args, before=before, origin=(*before.origin, "quantize")).output

    def _put(self, made: Value, node: Node) -> None:
        """Let a value stand in a node's place, under its name."""
        self.graph.replace(node.output, made)
        self.graph.take_name(made, node.output)
        self.graph.remove(node)

    def _quantized_input(self, x: Value, node: Node) -> tuple[Value, Value]:
        if x.name not in self.inputs:
            scale = Weight.of((self.largest[x.name] / LEVELS).to(x.type.dtype))
            own = self.graph.add_weight(self.graph.unique(f"{x.name}.scale"), scale)
            self.inputs[x.name] = self._insert("graphopt.quantize.default", node, x=x, scale=own), own
        return self.inputs[x.name]

    def _weight(self, weight: Value, form: Literal["rows", "packed"]) -> dict[str, Value]:
        key = weight.name, form
        if key not in self.weights:
            own = self.graph.weight_of(weight)
            assert own is not None
            make = quantized_rows(own) if form == "rows" else packed_groups(own, self.bits, self.group)
            self.weights[key] = make.added_to(self.graph, weight.name)
        return self.weights[key]

    def has(self, weight: Value) -> bool:
        """Whether a weight is there in integers."""
        return any(name == weight.name for name, _ in self.weights)

    def look_up(self, node: Node) -> None:
        """Look rows up in integers; the table of a linear that was quantized is that linear's weight."""
        table, places = node.args["weight"], node.args["indices"]
        form: Literal["rows", "packed"] = "packed" if (table.name, "packed") in self.weights else "rows"
        quantized = self._weight(table, form)

        if form == "packed":
            parts = {
                name: self._insert("aten.index.Tensor", node, self=own, indices=(places,))
                for name, own in quantized.items()
            }
            made = self._insert(
                "graphopt.unpack_rows.default", node, **parts, bits=self.bits, features=table.type.shape[1]
            )
        else:
            column = self._insert("aten.unsqueeze.default", node, self=quantized["scale"], dim=1)
            rows, scales = (
                self._insert(node.op, node, **{**node.args, "weight": own}) for own in (quantized["weight"], column)
            )
            made = self._insert("graphopt.dequantize.default", node, x=rows, scale=scales)
        self._put(made, node)
