"""What stands in the place of a linear, scheme by scheme."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graphopt.dims import Size
from graphopt.ir import Graph, Node, Value
from graphopt.ops.quantization import FP8, unpacked
from graphopt.passes.quantized_weights import (
    FP8_LARGEST,
    LEVELS,
    REDUCED_LEVELS,
    Packing,
    Parts,
    fp8_rows,
    nearest_groups,
    nf4_groups,
    packed_groups,
    quantized_rows,
)
from graphopt.passes.rounding import Grid
from graphopt.schemas.quantization import Treatment
from graphopt.tensors import Weight

_ORIGIN = "quantize"
_PACKED = ("weight_only", "nf4")


@dataclass
class Measured:
    """What data says: by the name of an input its ``largest`` magnitude, the features that are ``outliers``, the ``mean`` of
    each feature; by the name of a weight and its treatment what GPTQ made of it; by the name of a weight how much each
    feature counts, by AWQ."""

    largest: Mapping[str, Tensor] = field(default_factory=dict)
    outliers: Mapping[str, Tensor] = field(default_factory=dict)
    means: Mapping[str, Tensor] = field(default_factory=dict)
    numbers: dict[tuple[str, str], tuple[Grid, Tensor]] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)


class Writer:
    """Replaces linears; weights and inputs that several of them share are quantized once. ``reduce_range``: weights of 7 bits
    instead of 8."""

    def __init__(self, graph: Graph, measured: Measured, *, reduce_range: bool = False) -> None:
        self.graph, self.measured = graph, measured
        self.levels = REDUCED_LEVELS if reduce_range else LEVELS
        self._inputs: dict[tuple[str, torch.dtype], tuple[Value, Value]] = {}
        self._rests: dict[str, tuple[Value, Value]] = {}
        self._weights: dict[tuple[str, str], tuple[Parts, dict[str, Value]]] = {}
        self._packings: dict[str, Treatment] = {}
        self._with: dict[tuple[str, int], Value] = {}
        self._matrices: dict[tuple[int, torch.dtype, int], Value] = {}

    def replace(self, node: Node, treatment: Treatment) -> None:
        """Let what ``treatment`` says stand in a linear's place."""
        parts, operands = self._weight(node.args["weight"], treatment)
        bias = self._bias(node, parts, treatment)
        x: Value = node.args["input"]
        if treatment.is_static:
            numbers, scale = self._quantized_input(x, node, FP8 if treatment.scheme == "fp8" else torch.int8)
            made = self._insert("graphopt.static_linear.default", node, x=numbers, x_scale=scale, **operands, bias=bias)
        elif treatment.scheme == "llm_int8" and len(self.measured.outliers[x.name]):
            made = self._split(node, operands, bias)
        elif treatment.scheme in _PACKED:
            of = {"bits": treatment.bits, "block": treatment.group}
            if treatment.fractions:
                x = self._with_means(x, node, Packing.of(treatment))
            operands = {**operands, "scales": self._cast(operands["scales"], node, x.type.dtype)}
            made = self._insert("graphopt.packed_linear.default", node, x=x, **operands, bias=bias, **of)
        else:
            by_token = treatment.scheme != "int8_dynamic"
            made = self._insert("graphopt.dynamic_linear.default", node, x=x, **operands, bias=bias, per_token=by_token)
        self.graph.stand_in(made, node)

    def has(self, weight: Value) -> bool:
        """Whether a weight is there in a form that rows can be looked up in."""
        return (weight.name, "rows") in self._weights or weight.name in self._packings

    def look_up(self, node: Node, *, tied: bool) -> None:
        """Look rows up in few bits; ``tied``, in the weight of the linear that was quantized."""
        table, places = node.args["weight"], node.args["indices"]
        packing = self._packings.get(table.name) if tied else None
        if packing is not None:
            _, quantized = self._weight(table, packing)
            parts = {
                name: own
                if name == "codebook"
                else self._insert("aten.index.Tensor", node, self=own, indices=(places,))
                for name, own in quantized.items()
            }
            parts["scales"] = self._cast(parts["scales"], node, node.output.type.dtype)
            made = self._unpacked(node, parts, packing)
        else:
            _, quantized = self._weight(table, Treatment(scheme="int8_dynamic"))
            column = self._insert("aten.unsqueeze.default", node, self=quantized["scale"], dim=1)
            rows, scales = (
                self._insert(node.op, node, **{**node.args, "weight": own}) for own in (quantized["weight"], column)
            )
            made = self._insert("graphopt.dequantize.default", node, x=rows, scale=scales)
        self.graph.stand_in(made, node)

    def _insert(self, op: str, before: Node, /, **args: object) -> Value:
        return self.graph.insert(op, args, before=before, origin=(*before.origin, _ORIGIN)).output

    def _cast(self, value: Value, node: Node, dtype: torch.dtype) -> Value:
        return value if value.type.dtype == dtype else self._insert("aten.to.dtype", node, self=value, dtype=dtype)

    def _add(self, name: str, tensor: Tensor) -> Value:
        return self.graph.add_weight(self.graph.unique(name), Weight.of(tensor))

    def _quantized_input(self, x: Value, node: Node, dtype: torch.dtype) -> tuple[Value, Value]:
        if (x.name, dtype) not in self._inputs:
            levels = FP8_LARGEST if dtype == FP8 else LEVELS
            own = self._add(f"{x.name}.scale", (self.measured.largest[x.name] / levels).to(x.type.dtype))
            numbers = self._insert(
                "graphopt.quantize.default", node, x=x, scale=own, dtype=None if dtype == torch.int8 else dtype
            )
            self._inputs[x.name, dtype] = numbers, own
        return self._inputs[x.name, dtype]

    def _with_means(self, x: Value, node: Node, of: Packing) -> Value:
        """An input and the means of its groups of features."""
        key = x.name, of.group
        if key not in self._with:
            means = self._insert(
                "aten.matmul.default", node, self=x, other=self._means(x.type.shape[-1], x.type.dtype, of)
            )
            last = len(x.type.shape) - 1
            self._with[key] = self._insert("aten.cat.default", node, tensors=(x, means), dim=last)
        return self._with[key]

    def _means(self, features: Size, dtype: torch.dtype, of: Packing) -> Value:
        assert isinstance(features, int)
        key = features, dtype, of.group
        if key not in self._matrices:
            self._matrices[key] = self._add(f"means_of_{of.group}_in_{features}", of.means(features).to(dtype))
        return self._matrices[key]

    def _unpacked(self, node: Node, parts: Mapping[str, Value], treatment: Treatment) -> Value:
        """Rows of a packed table; what whole zero points left of them stands behind them, times the group's size."""
        of, features = Packing.of(treatment), node.args["weight"].type.shape[1]
        if not of.fractions:
            return self._insert("graphopt.unpack_rows.default", node, **parts, bits=of.bits, features=features)
        means = self._means(features, node.output.type.dtype, of)
        whole = self._insert(
            "graphopt.unpack_rows.default", node, **parts, bits=of.bits, features=features + means.type.shape[1]
        )
        last = len(whole.type.shape) - 1
        rows, rests = (
            self._insert("aten.slice.Tensor", node, self=whole, dim=last, start=start, end=end, step=1)
            for start, end in ((0, features), (features, features + means.type.shape[1]))
        )
        spread = self._insert("aten.permute.default", node, self=means, dims=(1, 0))
        each = self._insert("aten.matmul.default", node, self=rests, other=spread)
        return self._insert("aten.add.Tensor", node, self=rows, other=each)

    def _split(self, node: Node, operands: Mapping[str, Value], bias: Value | None) -> Value:
        """The outliers among an input's features in floats, the others in integers by token (LLM.int8(), Dettmers et al. 2022).

        Among the integers the outliers are 0, so that they neither count there nor set a range."""
        x, outliers = node.args["input"], self.measured.outliers[node.args["input"].name]
        if x.name not in self._rests:
            kept = torch.ones(x.type.shape[-1], dtype=x.type.dtype).index_fill(0, outliers, 0.0)
            rest = self._insert("aten.mul.Tensor", node, self=x, other=self._add(f"{x.name}.kept", kept))
            places = self._add(f"{x.name}.outliers", outliers)
            columns = self._insert("aten.index_select.default", node, self=x, dim=len(x.type.shape) - 1, index=places)
            self._rests[x.name] = rest, columns
        rest, columns = self._rests[x.name]
        integers = self._insert("graphopt.dynamic_linear.default", node, x=rest, **operands, per_token=True)
        weight = self.graph.weight_of(node.args["weight"])
        assert weight is not None
        stem = node.args["weight"].name.removesuffix(".weight")
        own = self._add(f"{stem}.outliers", weight.load()[:, outliers].clone())
        floats = self._insert("aten.linear.default", node, input=columns, weight=own, bias=bias)
        return self._insert("aten.add.Tensor", node, self=integers, other=floats)

    def _bias(self, node: Node, parts: Parts, treatment: Treatment) -> Value | None:
        """The bias, with what rounding the weight takes from the mean of the product (Nagel et al. 2019)."""
        bias: Value | None = node.args["bias"]
        mean = self.measured.means.get(node.args["input"].name)
        if mean is None:
            return bias
        if treatment.scheme == "llm_int8":  # what stays in floats loses nothing
            mean = mean.index_fill(0, self.measured.outliers[node.args["input"].name], 0.0)
        weight = self.graph.weight_of(node.args["weight"])
        given = None if bias is None else self.graph.weight_of(bias)
        if weight is None or (bias is not None and given is None):
            return bias
        reached = mean
        if treatment.fractions:
            reached = torch.cat([mean, mean @ Packing.of(treatment).means(len(mean))])
        lost = weight.load().float() @ mean - restored(parts)[:, : len(reached)] @ reached
        total = lost if given is None else given.load().float() + lost
        stem = node.args["weight"].name.removesuffix(".weight")
        return self._add(f"{stem}.corrected_bias", total.to(weight.type.dtype))

    def _weight(self, weight: Value, treatment: Treatment) -> tuple[Parts, dict[str, Value]]:
        form = str(treatment) if treatment.scheme in (*_PACKED, "fp8") else "rows"
        key = weight.name, form
        if key not in self._weights:
            parts = self._parts(weight, treatment)
            self._weights[key] = parts, parts.added_to(self.graph, weight.name)
            if treatment.scheme in _PACKED:
                self._packings[weight.name] = treatment
        return self._weights[key]

    def _parts(self, weight: Value, treatment: Treatment) -> Parts:
        own = self.graph.weight_of(weight)
        assert own is not None
        packing = Packing.of(treatment)
        if treatment.scheme == "fp8":
            return fp8_rows(own)
        if treatment.scheme == "nf4":
            return nf4_groups(own, treatment.group)
        if treatment.algorithm == "gptq":
            grid, numbers = self.measured.numbers[weight.name, str(treatment)]
            return packed_groups(own, lambda: grid, numbers.float, packing)
        if treatment.scheme == "weight_only":
            return nearest_groups(own, packing, self.measured.importance.get(weight.name))
        return quantized_rows(own, self.levels)


def restored(parts: Parts) -> Tensor:
    """The weight ``[N, K]``, f32, that parts stand for; K may be filled up to whole groups."""
    own = {name: weight.load() for name, (_, weight) in parts.weights.items()}
    if "packed" not in own:
        return own["weight"].float() * own["scale"].float()[:, None]
    zeros, codebook = own.get("zeros"), own.get("codebook")
    return unpacked(own["packed"], own["scales"].float(), zeros, codebook, parts.bits)
