"""Attention that is spelled out as products and a softmax: the rule that reads it, in whatever layout and order it comes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from graphopt import masks
from graphopt.dims import Size
from graphopt.ir import Graph, Value
from graphopt.mask_moves import Unreadable
from graphopt.mask_reader import Reader
from graphopt.patterns import Hole, NumberHole, Ops, Pattern, Step, TensorHole
from graphopt.rewrite import Build, Match, Rule, require


def score_step(
    op: Ops, x: TensorHole, number: NumberHole, tensor: TensorHole, fill: NumberHole, shape: Hole
) -> Pattern:
    """What may be done to scores between the product and the softmax, in any order and number."""
    return (
        op.mul(x, number).tag(kind="times")
        | op.div(x, number).tag(kind="over")
        | op.mul(op.tanh(op.div(x, number)), number).tag(kind="cap")
        | op.add(x, tensor).tag(kind="plus")
        | op.masked_fill(x, tensor, fill).tag(kind="hide")
        | op.where(tensor, fill, x).tag(kind="hide")
        | op.where(tensor, x, fill).tag(kind="show")
        | op.mul(x, tensor).tag(kind="by")
        | op.maximum(x, tensor).tag(kind="floor")
        | op.clamp(x, fill).tag(kind="clamp")
        | op.reshape(x, shape).tag(kind="view")
        | op.to.dtype(x, ...).tag(kind="cast")
    )


def weight_step(op: Ops, x: TensorHole, tensor: TensorHole, shape: Hole) -> Pattern:
    """What may be done to weights between the softmax and the product with the values."""
    return (
        op.to.dtype(x, ...).tag(kind="cast")
        | op.reshape(x, shape).tag(kind="view")
        | op.mul(x, tensor).tag(kind="by")
    )  # fmt: skip


class FuseSpelledAttention(Rule):
    """softmax(steps(q @ k.T)) @ v  ->  attention(q, k, v, bias, ...)"""

    def pattern(
        self,
        op: Ops,
        q: TensorHole,
        keys: TensorHole,
        v: TensorHole,
        q_scale: NumberHole,
        added: TensorHole,
        alpha: NumberHole,
        beta: NumberHole,
        sink: TensorHole,
        axis: NumberHole,
        end: Hole,
    ) -> Any:
        query = op.mul(q, q_scale).tag(q_kind="times") | op.div(q, q_scale).tag(q_kind="over") | q
        product = op.matmul(query, keys) | op.bmm(query, keys)
        product = product | op.baddbmm(added, query, keys, beta=beta, alpha=alpha)
        scores = op.repeated(product, score_step, "scores")
        joined = op.cat([scores, sink], axis)
        shifted = (
            op.sub(joined, op.max.dim(joined, axis, True)[0]) | op.sub(joined, op.amax(joined, [axis], True)) | joined
        )
        weights = op.softmax(scores, axis, ...) | op.slice(op.softmax(shifted, axis, ...), axis, 0, end).tag(
            joined=True
        )
        weights = op.repeated(weights, weight_step, "weights")
        return op.matmul(weights, v) | op.bmm(weights, v)

    def rewrite(self, op: Build, m: Match) -> Value:
        require(m.q.type.dtype == m.keys.type.dtype == m.v.type.dtype, "mixed dtypes")
        layout = _Layout(op, m)
        scores = _Scores(op, m, layout)
        q, k, v = layout.query(m.q), layout.keys(m.keys), layout.values(m.v)
        for factor in scores.query_factors:
            q = op.mul.Tensor(q, factor)
        sinks = _sink_of_each_head(op, m, layout) if m.joined else None
        _require_fit(q, k, v)
        graph = m.node.graph
        assert graph is not None
        bias = scores.bias(graph)
        result = op.graphopt.attention(
            q, k, v, bias, sinks=sinks, scale=scores.scale, softcap=scores.softcap,
        )  # fmt: skip
        _require_plain_steps(m)
        for step in m.weights or ():
            if step.kind == "by":
                result = op.mul.Tensor(result, _of_heads(op, step.tensor, layout, "the weights"))
        shape = m.roots[0].type.shape
        whole: Value = result if result.type.shape == shape else op.reshape(result, shape)
        return whole


def _require_fit(q: Value, k: Value, v: Value) -> None:
    heads, shared = q.type.shape[1], k.type.shape[1]
    require(k.type.shape[0] == q.type.shape[0], f"q has {q.type.shape[0]} batches, k {k.type.shape[0]}")
    require(k.type.shape[:3] == v.type.shape[:3], f"k is {k.type}, v {v.type}")
    require(k.type.shape[3] == q.type.shape[3], f"q is {q.type}, k {k.type}")
    require(shared in (1, heads), f"q has {heads} heads, k {shared}")


def _require_plain_steps(m: Match) -> None:
    """Casts stay floating, views keep queries and keys apart."""
    ends = _softmax_of(m).type.shape[-2:]
    keys = m.v.type.shape[-2:-1]
    for node in m.found.nodes.values():
        if node.op == "aten.to.dtype":
            require(node.output.type.dtype.is_floating_point, f"the scores are cast to {node.output.type.dtype}")
        if node.op == "aten.reshape.default":
            shapes = {node.args["self"].type.shape[-2:], node.output.type.shape[-2:]}
            kept = shapes == {ends} or shapes == {(ends[0], *keys)}
            require(kept, f"%{node.output.name} is viewed as other queries or keys")


class _Layout:
    """How the product's axes become ``[B, H, S, T]``: three are one head for each batch, unless the heads are found in the
    batch; of five and more the first ones are batches."""

    def __init__(self, op: Build, m: Match) -> None:
        self.op = op
        softmax = _softmax_of(m)
        shape = softmax.type.shape
        require(len(shape) >= 3, f"the scores have {len(shape)} dimensions")
        require(m.axis == len(shape) - 1, "the softmax is not over the keys")
        self.lead: tuple[Size, Size]
        if len(shape) == 3:
            split = _unmerged(op, m.q)
            self.lead = (shape[0], 1) if split is None else (split.type.shape[0], split.type.shape[1])
        else:
            self.lead = (math.prod(shape[:-3]), shape[-3])

    def query(self, q: Value) -> Value:
        return self._placed(q)

    def keys(self, keys: Value) -> Value:
        """``[B, H, T, D]`` from the keys as they are multiplied, ``[..., D, T]``."""
        placed = self._placed(keys)
        turned: Value = self.op.transpose.int(placed, 2, 3)
        return turned

    def values(self, v: Value) -> Value:
        return self._placed(v)

    def _placed(self, value: Value) -> Value:
        shape = value.type.shape
        if len(shape) == 4 and shape[0] == self.lead[0]:
            return value
        split = _unmerged(self.op, value) if len(shape) == 3 else None
        if split is not None and split.type.shape[:2] == self.lead:
            return split
        require(math.prod(shape[:-2]) == math.prod(self.lead), f"%{value.name} is {value.type}: its heads differ")
        placed: Value = self.op.reshape(value, (*self.lead, *shape[-2:]))
        return placed

    def part(self, value: Value, scores: tuple[Size, ...]) -> Value:
        """Something that is added to scores of this shape, for scores of four axes."""
        rank = len(scores)
        shape = (1,) * (rank - len(value.type.shape)) + tuple(value.type.shape)
        if rank == 4:
            return value
        if all(size == 1 for size in shape[: max(rank - 3, 1)]):
            return value if len(value.type.shape) <= 3 else self._reshaped(value, (1, *shape[-3:]))
        if rank == 3:
            return self._reshaped(value, (*self.lead, *shape[1:]))
        whole = (*scores[:-3], *shape[-3:])
        spread = value if shape == whole else self.op.expand(self._reshaped(value, shape), whole)
        return self._reshaped(spread, (self.lead[0], *shape[-3:]))

    def _reshaped(self, value: Value, shape: tuple[Size, ...]) -> Value:
        placed: Value = value if value.type.shape == shape else self.op.reshape(value, shape)
        return placed


def _softmax_of(m: Match) -> Value:
    """The softmax that was matched."""
    found = (node for node in m.found.nodes.values() if node.op.startswith("aten.softmax."))
    operand: Value = next(found).args["self"]
    return operand


def _unmerged(op: Build, value: Value) -> Value | None:
    """``[B, H, X, Y]`` for a value ``[B*H, X, Y]`` that was made of it."""
    node = value.producer
    if node is None or len(value.type.shape) != 3:
        return None
    source = node.args.get("self")
    if not isinstance(source, Value):
        return None
    result: Value | None = None
    if node.op == "aten.reshape.default" and len(source.type.shape) == 4:
        result = source if source.type.shape[2:] == value.type.shape[1:] else None
    elif node.op == "aten.transpose.int" and (node.args["dim0"], node.args["dim1"]) == (1, 2):
        inner = _unmerged(op, source)
        result = None if inner is None else op.transpose.int(inner, 2, 3)
    elif node.op == "aten.transpose.int" and (node.args["dim0"], node.args["dim1"]) == (0, 1):
        result = _heads_of_sequence_first(op, source)
    elif node.op in ("aten.mul.Tensor", "aten.div.Tensor") and not isinstance(node.args["other"], Value):
        inner = _unmerged(op, source)
        result = None if inner is None else op.call(node.op, {"self": inner, "other": node.args["other"]})[0]
    return result


def _heads_of_sequence_first(op: Build, value: Value) -> Value | None:
    """``[B, H, S, D]`` from ``[S, B*H, D]`` that was ``[S, B, H*D]`` (torch.nn.MultiheadAttention)."""
    node = value.producer
    if node is None or node.op != "aten.reshape.default" or len(node.args["self"].type.shape) != 3:
        return None
    sequence, batch, features = node.args["self"].type.shape
    size = value.type.shape[2]
    if value.type.shape[0] != sequence or not (isinstance(features, int) and isinstance(size, int)) or features % size:
        return None
    heads = op.reshape(node.args["self"], (sequence, batch, features // size, size))
    turned: Value = op.permute(heads, (1, 2, 0, 3))
    return turned


class _Scores:
    """What the steps between product and softmax amount to."""

    def __init__(self, op: Build, m: Match, layout: _Layout) -> None:
        self.op, self.layout, self.graph = op, layout, m.node.graph
        self.scale, self.softcap = 1.0, 0.0
        self.query_factors: list[Value] = []
        self.added: list[Value] = []  # floating, to be added
        self.shown: list[Value] = []  # boolean: which keys are visible
        self.gates: list[Value] = []
        self.fills: list[float] = []  # what hidden scores became
        shape = _product_shape(m)
        if m.q_scale is not None:
            self._times(float(m.q_scale) if m.q_kind == "times" else 1 / _not_zero(m.q_scale))
        if m.added is not None:
            require(m.beta != 0, "it adds zero times a tensor")
            self._times(float(m.alpha))
            bias = m.added if m.beta == 1 else op.mul.Tensor(m.added, m.beta)
            self._plus(bias, shape)
        for step in m.scores or ():
            self._take(step, shape)
            shape = step.shape if step.kind == "view" else shape

    def _take(self, step: Step, shape: tuple[Size, ...]) -> None:
        if step.kind == "times":
            self._times(float(step.number))
        elif step.kind == "over":
            self._times(1 / _not_zero(step.number))
        elif step.kind == "cap":
            require(not self.added and not self.shown and not self.softcap, "the scores are capped after a mask")
            require(float(step.number) > 0, f"the scores are capped at {step.number:g}")
            self.softcap = float(step.number)
        elif step.kind == "plus":
            self._plus(step.tensor, shape)
        elif step.kind in ("hide", "show"):
            require(step.tensor.type.dtype == torch.bool, "what hides keys is not boolean")
            require(masks.hides(float(step.fill)), f"hidden scores become {step.fill:g}, which does not hide them")
            self.fills.append(float(step.fill))
            visible = step.tensor
            if step.kind == "hide":
                visible = self.op.reuse("bitwise_not.default", visible)
            self.shown.append(self.layout.part(visible, shape))
        elif step.kind == "by":
            self._by(step.tensor, shape)
        elif step.kind in ("floor", "clamp"):
            lowest = _constant(self.graph, step.tensor) if step.kind == "floor" else float(step.fill)
            require(
                lowest is not None and masks.hides(lowest),
                "the scores are raised to a number that hidden keys are not below",
            )
            self.fills.append(lowest or 0.0)

    def _times(self, number: float) -> None:
        require(not self.softcap, "the scores are scaled after they are capped")
        require(number > 0 or not (self.added or self.shown), "a mask is turned round")
        self.fills = [fill * number for fill in self.fills]
        require(all(map(masks.hides, self.fills)), "hidden scores are scaled until they do not hide")
        self.scale *= number
        self.added = [self.op.mul.Tensor(bias, number) for bias in self.added] if number != 1 else self.added

    def _plus(self, bias: Value, shape: tuple[Size, ...]) -> None:
        require(bias.type.dtype.is_floating_point, "what is added to the scores is not floating")
        self.added.append(self.layout.part(bias, shape))

    def _by(self, factor: Value, shape: tuple[Size, ...]) -> None:
        """A factor for each head goes to the query; one for each key must be a mask that the next summand says again."""
        if all(size == 1 for size in factor.type.shape[-2:]):
            require(not (self.added or self.shown or self.softcap), "the scores are multiplied after a mask")
            self.query_factors.append(self.layout.part(factor, shape))
        else:
            require(not (self.added or self.shown), "the scores are multiplied after a mask")
            self.gates.append(self.layout.part(factor, shape))

    def bias(self, graph: Graph) -> Value | None:
        """Everything that was added and hidden as one operand, None for nothing."""
        for gate in self.gates:
            said = any(_say_the_same(graph, gate, bias) for bias in self.added)
            require(said, f"the scores are multiplied by %{gate.name}, which is no mask that is added as well")
        return combined(self.op, self.added, self.shown)


def combined(op: Build, added: Sequence[Value], shown: Sequence[Value]) -> Value | None:
    """One mask that says what these say: numbers to add, and truths of what is visible."""
    total = reduce(lambda a, b: op.reuse("add.Tensor", a, b), added) if added else None
    visible = reduce(lambda a, b: op.reuse("bitwise_and.Tensor", a, b), shown) if shown else None
    if total is None or visible is None:
        return visible if total is None else total
    low = torch.finfo(total.type.dtype).min
    return op.reuse("where.ScalarOther", visible, total, low)


def _constant(graph: Graph | None, value: Value) -> float | None:
    """The number that a tensor of one element is, if it is constant."""
    node, weight = value.producer, None if graph is None else graph.weight_of(value)
    if weight is not None and math.prod(value.type.shape) == 1:
        return float(weight.load().item())
    filled = node is not None and node.op == "aten.full.default" and not isinstance(node.args["fill_value"], Value)
    return float(node.args["fill_value"]) if node is not None and filled else None


def _say_the_same(graph: Graph, gate: Value, bias: Value) -> bool:
    """Whether a bias hides just the keys where a gate of zeros and ones is zero."""
    reader = Reader(graph)
    try:
        return masks.condition_of(reader, bias) == masks.truth_of(reader, gate)
    except Unreadable:
        return False


def _not_zero(number: Any) -> float:
    require(number != 0, "the scores are divided by zero")
    return float(number)


def _product_shape(m: Match) -> tuple[Size, ...]:
    packets = ("aten.matmul", "aten.bmm", "aten.baddbmm")
    for node in m.found.nodes.values():
        if node.op.startswith(packets) and node is not m.node and m.keys in node.operands:
            shape: tuple[Size, ...] = node.output.type.shape
            return shape
    raise AssertionError("the pattern has a product")


def _sink_of_each_head(op: Build, m: Match, layout: _Layout) -> Value:
    """``[H]``: the sinks that were spread over batches and queries."""
    value: Value = m.sink
    node = value.producer
    while node is not None and node.op in ("aten.expand.default", "aten.reshape.default", "aten.to.dtype"):
        value = node.args["self"]
        node = value.producer
    heads = layout.lead[1]
    require(
        math.prod(value.type.shape) == heads, f"what joins the softmax is {m.sink.type}, not one score for each head"
    )
    require(m.end == _softmax_of(m).type.shape[-1] - 1, "the weights of some keys are left out")
    flat: Value = value if value.type.shape == (heads,) else op.reshape(value, (heads,))
    return flat


def _of_heads(op: Build, factor: Value, layout: _Layout, what: str) -> Value:
    """A factor that is one number for each head and batch."""
    shape = factor.type.shape
    fits = len(shape) <= 4 and all(size == 1 for size in shape[-2:])
    require(fits, f"{what} are multiplied by %{factor.name} ({factor.type}), which is not one number for each head")
    return layout.part(factor, (*layout.lead, 1, 1))
