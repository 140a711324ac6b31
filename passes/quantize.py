"""Linears in few bits: weights int8 by channel, or packed in groups; inputs by calibration, by their own range, or as they are.

``scheme: int8_static`` scales every input by the largest magnitude that calibration found::

    %y = aten.linear.default(                       %i = graphopt.quantize.default(x=%x, scale=%x.scale)
        input=%x, weight=%w, bias=%b)        ->     %y = graphopt.static_linear.default(x=%i, x_scale=%x.scale,
                                                        weight=%w.int8, scale=%w.scale, bias=%b)

``int8_smooth`` does so after the outliers of inputs were shared with weights (SmoothQuant: see ``smooth_activations``), and
``fp8`` with numbers of float8_e4m3fn.

``scheme: int8_dynamic`` scales by the input's own smallest and largest element, when it runs::

    %y = graphopt.dynamic_linear.default(x=%x, weight=%w.int8, scale=%w.scale, bias=%b)

and ``scheme: int8_token`` each token by its own largest magnitude: ``per_token=true``, for the inputs where few tokens hold
numbers that are far larger than all others (the last linears of a decoder's layers). ``llm_int8`` does so for all features but
those whose magnitude passes ``outliers`` in calibration; these stay in floats::

    %r = aten.mul.Tensor(self=%x, other=%x.kept)               # 0 where %x.outliers are
    %i = graphopt.dynamic_linear.default(x=%r, weight=%w.int8, scale=%w.scale, per_token=true)
    %c = aten.index_select.default(self=%x, dim=2, index=%x.outliers)
    %o = aten.linear.default(input=%c, weight=%w.outliers, bias=%b)
    %y = aten.add.Tensor(self=%i, other=%o)

``scheme: weight_only`` leaves inputs as they are and packs weights of ``bits`` in groups of ``group`` input features::

    %y = graphopt.packed_linear.default(x=%x, packed=%w.packed, scales=%w.scales, bias=%b, bits=4, block=32)

with zero points unless ``symmetric``; with ``fractions`` what whole zero points leave of a group's weights is the weight of the
mean of the group's inputs, in groups of its own behind the others (``%means`` has a column for each group)::

    %m = aten.matmul.default(self=%x, other=%means)
    %z = aten.cat.default(tensors=[%x, %m], dim=2)
    %y = graphopt.packed_linear.default(x=%z, packed=%w.packed, scales=%w.scales, zeros=%w.zeros, bias=%b, bits=4, block=32)

``algorithm: rtn`` rounds to nearest; ``gptq`` lets the weights of later features make up
for what earlier ones lost, layer after layer on what the layers before have made of the data; ``awq`` scales the features up
that count most. ``nf4`` is the same with the numbers of NormalFloat, which are products of floats when they run.

A table that embeds tokens and is a linear's weight as well stays one: rows are looked up in few bits and scaled then.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

from graphopt.calibration import Tapped
from graphopt.ir import Graph, Node, Value
from graphopt.parity import Contract
from graphopt.passes.linear_schemes import Measured, Writer
from graphopt.passes.mixed_precision import fewest_kept
from graphopt.passes.quantized_weights import (
    Packing,
    is_linear,
    matches,
    module_of,
    refuse_unknown,
)
from graphopt.passes.rescaling import (
    by_input,
    protecting,
    reason_not_to,
    rescale,
    searched_smoothing,
    smoothing,
    weights_of,
)
from graphopt.passes.rounding import Grid, gptq
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refused, RewriteLog
from graphopt.schemas.calibration import Calibration
from graphopt.schemas.pipeline import Budget
from graphopt.schemas.quantization import Algorithm, AnyScheme, Bits, Group, LayerScheme, Scales, Scheme, Treatment
from graphopt.schemas.report import LayerPrecision

FLOAT: Literal["fp32"] = "fp32"
LARGE = 100_000  # numbers in a table that is worth fewer bits
_OF_WEIGHT_ONLY = {"algorithm": "rtn", "fractions": False, "scales": "fp32"}
_STAYS = Treatment(scheme=FLOAT)
_AGAINST_FAULTS = Budget(metric="cosine", limit=0.8)


#: Options that only some schemes have.
_OPTIONS = {
    "bits": ("weight_only",), "symmetric": ("weight_only",), "group": ("weight_only", "nf4"), "outliers": ("llm_int8",),
    "strength": ("int8_smooth",),
}  # fmt: skip


class Quantize(Pass):
    """Linears in few bits, where modules, overrides, sizes and a budget say so."""

    kind: Literal["quantize"] = "quantize"
    scheme: Scheme
    modules: tuple[str, ...] = ("*",)
    """The paths of modules that are quantized, with ``*`` and ``?``."""
    skip: tuple[str, ...] = ()
    """Those of them that stay as they are."""
    overrides: dict[str, AnyScheme] = Field(default_factory=dict)
    """Another scheme for modules whose path matches, by name or with ``bits``, ``group`` ... of its own; the last that does."""
    ops: Annotated[tuple[Literal["linear", "embedding"], ...], Field(min_length=1)] = ("linear", "embedding")
    """Which ops: products with weights, tables that tokens are looked up in (``embeddings`` says how)."""
    min_weights: PositiveInt = 1
    """Linears with fewer weights stay as they are."""
    bits: Bits = 4
    """Of packed weights."""
    group: Group = 32
    """How many input features share a scale in packed weights."""
    symmetric: bool = True
    """Packed weights without zero points."""
    fractions: bool = False
    """With zero points: those between whole numbers as well, by a small product with the mean of each group's inputs."""
    scales: Scales = "fp32"
    """What scales of packed weights are stored in; products have them in the model's dtype."""
    algorithm: Algorithm = "rtn"
    """How packed weights are rounded."""
    strength: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = "search"
    """``int8_smooth``: how much of the inputs' magnitudes moves into the weights; ``search``: for each input what loses least."""
    outliers: PositiveFloat = 6.0
    """``llm_int8``: features with larger magnitudes stay in floats."""
    reduce_range: bool = False
    """int8 weights of 7 bits: for x86 processors without VNNI, whose products of uint8 by int8 saturate."""
    bias_correction: bool = False
    """Give biases what rounding the weights takes from the mean of the products."""
    embeddings: bool | Literal["int8"] = True
    """Keep tables that tokens are looked up in in few bits: as the linear whose weight they are too, the others as int8, each row
    by its own scale. ``int8``: all of them so, beside what the linear becomes. What is looked up is scaled then."""
    calibration: Calibration | None = None
    """The data for schemes and options that need some."""
    budget: Budget = _AGAINST_FAULTS
    """How far the outputs may go from eager's: on random inputs, against faults; with ``fallback`` on the calibration data."""
    fallback: AnyScheme | None = None
    """Keep the fewest layers in this (``fp32``, or a scheme of more bits) that meet the budget on the calibration data."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})
    provides: ClassVar[frozenset[str]] = frozenset({"quantized"})

    @model_validator(mode="after")
    def _has_its_data(self) -> Quantize:
        treatments = [self.treatment(each) for each in (None, *self.overrides.values(), self.fallback)]
        wants = [
            next(
                (f"scheme: {each.scheme}" for each in treatments if each.is_static or each.scheme == "llm_int8"), None
            ),
            next((f"algorithm: {each.algorithm}" for each in treatments if each.algorithm != "rtn"), None),
            "bias_correction" if self.bias_correction else None,
            "fallback" if self.fallback is not None else None,
        ]
        wanted = next((want for want in wants if want), None)
        if wanted and self.calibration is None:
            raise ValueError(f"{wanted} needs calibration: {{data: ...}}")
        if not wanted and self.calibration is not None:
            raise ValueError(f"nothing needs calibration in scheme: {self.scheme}")
        return self

    @model_validator(mode="after")
    def _heeds_its_options(self) -> Quantize:
        used = {self.treatment(each).scheme for each in (None, *self.overrides.values(), self.fallback)}
        for name, schemes in _OPTIONS.items():
            if name in self.model_fields_set and not used.intersection(schemes):
                raise ValueError(f"{name} is for scheme: {' or '.join(schemes)}")
        return self

    def treatment(self, own: LayerScheme | None = None) -> Treatment:
        """The pass's own, or what an override makes of it."""
        given = {
            name: getattr(self, name)
            for name in ("scheme", "bits", "group", "symmetric", "fractions", "scales", "algorithm")
        }
        if own is not None:
            given |= own.model_dump(exclude_none=True)
        asked = set() if own is None else own.model_fields_set
        if given["scheme"] not in (self.scheme, "weight_only"):  # what is the pass's, not the override's
            given |= {name: value for name, value in _OF_WEIGHT_ONLY.items() if name not in asked}
        if given["symmetric"] and "symmetric" in asked and "fractions" not in asked:
            given["fractions"] = False
        if given["scheme"] == "nf4":
            given["bits"] = 4
        return Treatment(**given)

    def contract(self) -> Contract:
        return self.budget if self.fallback is None else _AGAINST_FAULTS

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        chosen, reasons = self._choose(graph, context)
        importance = self._rescale(graph, context, chosen)
        measured = self._measure(graph, context, chosen)
        measured.importance = importance
        effects = self._keep_some(graph, context, measured, chosen, reasons)
        self._report(graph, chosen, reasons, effects, log, context)

        writer = Writer(graph, measured, reduce_range=self.reduce_range)
        for node, treatment in chosen.items():
            if treatment.scheme != FLOAT:
                writer.replace(node, treatment)
                log.matches[treatment.scheme] = log.matches.get(treatment.scheme, 0) + 1
        wanted = self.embeddings and "embedding" in self.ops
        tables = [node for node in graph.nodes if _is_lookup(graph, node)] if wanted else []
        for node in tables:
            tied = self.embeddings is True and writer.has(node.args["weight"])
            precision = "as its linear" if tied else "int8 rows"
            context.layers.append(LayerPrecision(module=module_of(node), precision=precision))
            writer.look_up(node, tied=tied)
        if tables:
            log.matches["embedding"] = len(tables)
        graph.prune()
        return log

    # Which linears

    def _choose(self, graph: Graph, context: Context) -> tuple[dict[Node, Treatment], dict[Node, str]]:
        """What is to become of each linear, and why some stay as they are."""
        linears = {node: module_of(node) for node in graph.nodes if is_linear(graph, node)}
        refuse_unknown(self.kind, (*self.modules, *self.skip, *self.overrides), list(linears.values()), context)
        chosen, reasons = {}, {}
        for node, path in linears.items():
            reason = self._reason_not_to(node, path)
            if reason is not None:
                reasons[node] = reason
            chosen[node] = _STAYS if reason is not None else self.treatment(self._override_of(path))
        return chosen, reasons

    def _reason_not_to(self, node: Node, path: str) -> str | None:
        weight: Value = node.args["weight"]
        if "linear" not in self.ops:
            return "not among ops"
        if not matches(path, self.modules):
            return "not among modules"
        if matches(path, self.skip) or self.treatment(self._override_of(path)).scheme == FLOAT:
            return "skipped"
        count = weight.type.shape[0] * weight.type.shape[1]
        if isinstance(count, int) and count < self.min_weights:
            return f"{count} weights, fewer than {self.min_weights}"
        return None

    def _override_of(self, path: str) -> LayerScheme | None:
        return next((own for pattern, own in reversed(self.overrides.items()) if fnmatch.fnmatch(path, pattern)), None)

    # What the data says

    def _rescale(self, graph: Graph, context: Context, chosen: dict[Node, Treatment]) -> dict[str, Tensor]:
        """Channels of inputs that are divided before anything is rounded: the same function so far. How much each feature
        counts, by the names of weights, where that was measured."""
        wanted = {node for node, own in chosen.items() if own.scheme == "int8_smooth" or own.algorithm == "awq"}
        groups = {}
        for x, group in by_input(node for node in chosen if node in wanted).items():
            treatments = {chosen[user] for user in x.users if user in chosen}
            alone = len(treatments) == 1
            reason = reason_not_to(graph, group) if alone else "linears of different schemes read them"
            if reason is None:
                groups[x] = group
            else:
                context.notes.append(f"{_names(group)}: inputs stay as they are: {reason}")
        smooth = {x: group for x, group in groups.items() if chosen[group[0]].scheme == "int8_smooth"}
        protect = {x: group for x, group in groups.items() if x not in smooth}
        if smooth:
            self._smooth(graph, context, smooth)
        return self._protect(graph, context, protect, chosen) if protect else {}

    def _smooth(self, graph: Graph, context: Context, groups: dict[Value, list[Node]]) -> None:
        data = self._data()
        largest = context.calibrate(graph, data, [Tapped(x.name, (len(x.type.shape) - 1,)) for x in groups])
        samples = context.sample(graph, data, [x.name for x in groups], 256) if self.strength == "search" else {}
        for x, group in groups.items():
            weight = weights_of(graph, group)
            if self.strength == "search":
                factors, gain = searched_smoothing(samples[x.name], weight, largest[x.name], "tensor")
                context.notes.append(f"{_names(group)}: {gain}")
            else:
                factors = smoothing(largest[x.name], weight, float(self.strength))
            if factors is not None:
                rescale(graph, group, factors, self.kind)

    def _protect(
        self, graph: Graph, context: Context, groups: dict[Value, list[Node]], chosen: dict[Node, Treatment]
    ) -> dict[str, Tensor]:
        names = {x.name: group for x, group in groups.items()}
        scaled: list[tuple[list[Node], Tensor]] = []
        importance: dict[str, Tensor] = {}
        for name, moment in context.second_moments(graph, self._data(), names):
            group, own = names[name], chosen[names[name][0]]

            def rounded(weight: Tensor, own: Treatment = own) -> Tensor:
                grid = Packing.of(own).grid(weight)
                return grid.values(grid.numbers(weight))

            factors, gain = protecting(weights_of(graph, group), moment, rounded)
            context.notes.append(f"{_names(group)}: {gain}")
            if factors is not None:
                scaled.append((group, factors))
            counts = moment.diagonal() / (1.0 if factors is None else factors.square())
            importance |= {node.args["weight"].name: counts for node in group}
        for group, factors in scaled:
            rescale(graph, group, factors, self.kind)
        return importance

    def _measure(self, graph: Graph, context: Context, chosen: dict[Node, Treatment]) -> Measured:
        """Ranges, outliers, means and roundings of the layers, as the data has them."""
        measured = Measured()
        if self.calibration is None:
            return measured
        data = self.calibration
        wanted = {node: each for node, each in chosen.items() if each.scheme != FLOAT}
        kept_as = {} if self.fallback is None else dict.fromkeys(wanted, self.treatment(self.fallback))
        own = [*wanted.items(), *kept_as.items()]
        inputs = {node: node.args["input"] for node in chosen}
        ranged = dict.fromkeys(inputs[node].name for node, each in own if each.is_static)
        split = {inputs[node].name: inputs[node] for node, each in own if each.scheme == "llm_int8"}
        if ranged:
            measured.largest = context.calibrate(graph, data, [Tapped(name) for name in ranged])
        if split:
            taps = [Tapped(name, (len(x.type.shape) - 1,)) for name, x in split.items()]
            magnitudes = context.calibrate(graph, data, taps)
            measured.outliers = {name: (each > self.outliers).nonzero().squeeze(1) for name, each in magnitudes.items()}
        if self.bias_correction:
            names = dict.fromkeys(inputs[node].name for node in wanted)
            measured.means = context.means(graph, data, names)
        for treatments in (wanted, kept_as):
            rounded = {node: each for node, each in treatments.items() if each.algorithm == "gptq"}
            if rounded:
                context.in_order(graph, data, rounded.keys(), _Gptq(graph, rounded, measured.numbers))
        return measured

    def _data(self) -> Calibration:
        assert self.calibration is not None
        return self.calibration

    # What is kept

    def _keep_some(
        self,
        graph: Graph,
        context: Context,
        measured: Measured,
        chosen: dict[Node, Treatment],
        reasons: dict[Node, str],
    ) -> dict[Node, float]:
        """Give the fewest layers the fallback that meet the budget; the effect of each layer on the metric."""
        if self.fallback is None:
            return {}
        kept_as = self.treatment(self.fallback)
        quantized = [node for node, own in chosen.items() if own.scheme != FLOAT]

        def variant(treatments: dict[str, Treatment]) -> Graph:
            own = graph.clone()
            writer = Writer(own, measured, reduce_range=self.reduce_range)
            for name, treatment in treatments.items():
                node = own.value(name).producer
                if treatment.scheme != FLOAT and node is not None:
                    writer.replace(node, treatment)
            own.prune()
            return own

        probes = list(context.feeds(graph, self._data()))
        treatments = {node.output.name: chosen[node] for node in quantized}
        found = fewest_kept(graph, probes, treatments, kept_as, self.budget, variant, context.progress)
        context.notes.append(found.summary)
        names = {node.output.name: node for node in quantized}
        for name in found.kept:
            chosen[names[name]] = kept_as
            reasons[names[name]] = "among the most sensitive"
        return {names[name]: effect for name, effect in found.effects.items()}

    def _report(
        self,
        graph: Graph,
        chosen: dict[Node, Treatment],
        reasons: dict[Node, str],
        effects: dict[Node, float],
        log: RewriteLog,
        context: Context,
    ) -> None:
        """What each layer of the graph computes in, and why in no fewer bits."""
        for node, treatment in chosen.items():
            reason = reasons.get(node)
            if reason is not None and treatment.scheme == FLOAT:
                log.refusals.append(Refused("Quantize", node.where, reason))
            context.layers.append(
                LayerPrecision(
                    module=module_of(node),
                    precision=_floats(node.output) if treatment.scheme == FLOAT else str(treatment),
                    reason=reason,
                    effect=effects.get(node),
                )
            )
        for node in graph.nodes:
            weight = _other_weight(graph, node)
            if weight is not None:
                reason = f"{node.op.removesuffix('.default')} is not quantized"
                module = weight.name.removesuffix(".weight")
                context.layers.append(LayerPrecision(module=module, precision=_floats(node.outputs[0]), reason=reason))


class _Gptq:
    """Rounds the linears that it is given in order, and keeps their numbers by the weight's name and what is to become of it."""

    def __init__(
        self, graph: Graph, treatments: dict[Node, Treatment], numbers: dict[tuple[str, str], tuple[Grid, Tensor]]
    ) -> None:
        self.graph, self.treatments, self.numbers = graph, treatments, numbers

    def __call__(self, node: Node, moment: Tensor) -> Tensor:
        own, weight = self.treatments[node], self.graph.weight_of(node.args["weight"])
        assert weight is not None
        numbers = weight.load().float()
        grid = Packing.of(own).grid(numbers, moment.diagonal())
        found = gptq(numbers, moment, grid)
        self.numbers[node.args["weight"].name, str(own)] = grid, found.to(torch.uint8)
        return grid.values(found).to(weight.type.dtype)


def _floats(value: Value) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}.get(value.type.dtype, FLOAT)


def _names(group: Sequence[Node]) -> str:
    return ", ".join(module_of(node) for node in group)


def _is_lookup(graph: Graph, node: Node) -> bool:
    """A large table of the model that tokens are looked up in."""
    if node.op != "aten.embedding.default" or graph.weight_of(node.args["weight"]) is None:
        return False
    rows, features = node.args["weight"].type.shape
    return bool(rows * features >= LARGE)


def _other_weight(graph: Graph, node: Node) -> Value | None:
    """The weight of a layer that no scheme is for: a convolution, a product with a matrix of the model."""
    if node.op == "aten.embedding.default" or not node.op.startswith("aten.") or is_linear(graph, node):
        return None
    own = [operand for operand in node.operands if graph.weight_of(operand) is not None]
    large = [value for value in own if len(value.type.shape) >= 2 and graph.weights[value.name].nbytes >= LARGE]
    products = ("conv", "mm", "matmul", "linear", "einsum")
    return large[0] if large and any(word in node.op for word in products) else None
