"""Activations whose channels are of like magnitude, for linears that are quantized next (SmoothQuant, Xiao et al. 2022).

::

    %g = aten.gelu.default(self=%h)                             %g = aten.gelu.default(self=%h)
    %y = aten.linear.default(input=%g, weight=%w)          ->   %s = aten.mul.Tensor(self=%g, other=%g.smooth)
                                                                %y = aten.linear.default(input=%s, weight=%w)

Channel j of an input is divided by ``s[j] = max|x[j]| ** strength / max|w[:, j]| ** (1 - strength)``, and column j of the weights
that read it multiplied by it: the same function, with the outliers shared between both. The division goes into what makes the
channels where that can take it, a norm's weight or the rows of an earlier linear; elsewhere, as here, a product is inserted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphopt.calibration import Tapped
from graphopt.ir import Graph, Node, Value, Weight, map_arg
from graphopt.passes.quantized_weights import LEVELS, is_linear, matches, module_of, refuse_unknown, row_scale
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refused, RewriteLog
from graphopt.schemas.calibration import Calibration

_NORMS = frozenset({"aten.rms_norm", "aten.layer_norm", "graphopt.add_rms_norm", "graphopt.add_layer_norm"})
LOOKUP = "aten.embedding.default"
_STRENGTHS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)


class SmoothActivations(Pass):
    """Share the outliers of activations with the weights that read them."""

    kind: Literal["smooth_activations"] = "smooth_activations"
    strength: Annotated[float, Field(ge=0, le=1)] | Literal["search"] = 0.7
    """How much of the magnitudes moves into the weights; ``search``: for each input what rounds its products least."""
    rounds: Literal["tensor", "token"] = "tensor"
    """What the search takes inputs to be rounded by: one scale, or one for each token."""
    modules: tuple[str, ...] = ("*",)
    """The paths of modules whose inputs are smoothed, with ``*`` and ``?``."""
    calibration: Calibration
    """What magnitudes are measured on."""
    rows: int = Field(default=256, ge=16)
    """How many tokens the search looks at."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        groups = _groups(graph)
        paths = [module_of(node) for group in groups.values() for node in group]
        refuse_unknown(self.kind, self.modules, paths, context)
        groups = {x: group for x, group in groups.items() if self._are_meant(group)}
        taps = [Tapped(x.name, (len(x.type.shape) - 1,)) for x in groups]
        largest = context.calibrate(graph, self.calibration, taps)
        samples: Mapping[str, Tensor] = {}
        if self.strength == "search":
            samples = context.sample(graph, self.calibration, [x.name for x in groups], self.rows)
        for x, group in groups.items():
            reason = _reason_not_to(graph, group)
            if reason is not None:
                log.refusals.append(Refused("SmoothActivations", group[0].where, reason))
                continue
            factors = self._factors(graph, group, largest[x.name], samples.get(x.name), context)
            if factors is None:
                continue
            own = group[0].args["input"]  # a product by now, if its table was divided for another group
            rule = "folded" if _divide(graph, own, group, factors) else "inserted"
            log.matches[rule] = log.matches.get(rule, 0) + 1
            for node in {node.args["weight"]: node for node in group}.values():
                _scale_columns(graph, node, factors)
        graph.prune()
        return log

    def _are_meant(self, group: Sequence[Node]) -> bool:
        return all(matches(module_of(node), self.modules) for node in group)

    def _factors(
        self, graph: Graph, group: Sequence[Node], largest: Tensor, sample: Tensor | None, context: Context
    ) -> Tensor | None:
        """What to divide the channels by; None if the search found nothing better than the channels as they are."""
        weight = torch.cat([_weight(graph, node) for node in group])
        if sample is None:
            assert isinstance(self.strength, float | int)
            return smoothing(largest, weight, float(self.strength))

        def error(factors: Tensor) -> float:
            return _error(sample, weight, factors, None if self.rounds == "token" else largest)

        errors = {strength: error(smoothing(largest, weight, strength)) for strength in _STRENGTHS}
        best = min(errors, key=errors.__getitem__)
        none = error(torch.ones_like(largest))
        kept = errors[best] < none
        names = ", ".join(module_of(node) for node in group)
        gain = f"strength {best:g}, error {errors[best] / none:.2f} of that without" if kept else "as they are"
        context.notes.append(f"{names}: {gain}")
        return smoothing(largest, weight, best) if kept else None


def smoothing(largest: Tensor, weight: Tensor, strength: float) -> Tensor:
    """``s`` ``[K]`` of the magnitudes of K channels and the weights ``[N, K]`` that read them."""
    low = 1e-5
    own = largest.clamp(min=low * float(largest.max()))
    read = weight.abs().amax(0)
    read = read.clamp(min=low * float(read.max()))
    return own**strength / read ** (1 - strength)


def _error(sample: Tensor, weight: Tensor, factors: Tensor, largest: Tensor | None) -> float:
    """How far products of a sample are off with both sides rounded to 8 bits, as a share of each token's own: few tokens with
    large numbers must not decide for all. Inputs are rounded by the ``largest`` of all channels, or by token."""
    smooth = sample / factors
    step = (smooth.abs().amax(1, keepdim=True) if largest is None else (largest / factors).max()).clamp(
        min=1e-30
    ) / LEVELS
    own = weight * factors
    scale = row_scale(own)[:, None]
    product = (smooth / step).round().clamp(-LEVELS, LEVELS) * step @ ((own / scale).round() * scale).T
    expected = sample @ weight.T
    return float(((product - expected).square().sum(1) / expected.square().sum(1).clamp(min=1e-30)).mean())


def _groups(graph: Graph) -> dict[Value, list[Node]]:
    """Linears with weights of the graph, by their input."""
    found: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if is_linear(graph, node):
            found.setdefault(node.args["input"], []).append(node)
    return found


def _reason_not_to(graph: Graph, group: Sequence[Node]) -> str | None:
    for node in group:
        weight = node.args["weight"]
        elsewhere = any(user not in group and user.op != LOOKUP for user in weight.users)
        if elsewhere or graph.is_output(weight):
            return f"%{node.args['weight'].name} is read elsewhere as well"
    return None


def _weight(graph: Graph, node: Node) -> Tensor:
    weight = graph.weight_of(node.args["weight"])
    assert weight is not None
    return weight.load()


def _scale_columns(graph: Graph, node: Node, factors: Tensor) -> None:
    """Tokens that are looked up in the same table are divided again."""
    for user in [user for user in node.args["weight"].users if user.op == LOOKUP]:
        rows = user.output
        product = _product(graph, rows, factors, list(rows.users))
        for name in [name for name, value in graph.outputs.items() if value is rows]:
            graph.outputs[name] = product
    _change(graph, node, "weight", lambda weight: weight * factors.to(weight.dtype))


def _product(graph: Graph, value: Value, factors: Tensor, users: Sequence[Node]) -> Value:
    """``value`` divided by the factors, for these users."""
    inverse = graph.add_weight(graph.unique(f"{value.name}.smooth"), Weight.of((1 / factors).to(value.type.dtype)))
    before = min(users, key=list(graph.nodes).index) if users else None
    origin = (before or value.producer).origin if before or value.producer else ()  # type: ignore[union-attr]
    made = graph.insert(
        "aten.mul.Tensor", {"self": value, "other": inverse}, before=before, origin=(*origin, "smooth_activations")
    ).output
    for user in users:
        graph.set_args(
            user, {name: map_arg(arg, lambda leaf: made if leaf is value else leaf) for name, arg in user.args.items()}
        )
    return made


def _divide(graph: Graph, x: Value, group: Sequence[Node], factors: Tensor) -> bool:
    """Divide the channels of ``x`` where they are made; if that cannot be, by a product in between, and say so."""
    made = _maker(graph, x, group)
    if made is None:
        _product(graph, x, factors, group)
        return False
    node, parts = made
    for part in parts:
        _change(graph, node, part, lambda weight: _divided(weight, factors))
    return True


def _divided(weight: Tensor, factors: Tensor) -> Tensor:
    """A norm's weight or a bias ``[K]``, or the rows of a linear's weight ``[K, ...]``."""
    own = factors.to(weight.dtype)
    return weight / own.reshape(-1, *[1] * (weight.ndim - 1))


def _maker(graph: Graph, x: Value, group: Sequence[Node]) -> tuple[Node, list[str]] | None:
    """The node with the weights that give ``x`` the magnitudes of its channels, and which of its weights those are."""
    node = x.producer
    if node is None or graph.is_output(x) or any(user not in group for user in x.users):
        return None
    if node.op.rpartition(".")[0] in _NORMS and x is node.outputs[0]:
        parts = [part for part in ("weight", "bias") if node.args.get(part) is not None]
        one_axis = all(len(node.args[part].type.shape) == 1 for part in parts)
        return (node, parts) if "weight" in parts and one_axis and _are_own(graph, node, parts) else None
    if node.op == "graphopt.gated_activation.default":
        return _linear_behind(graph, node.args["up"], x)
    if node.op == "aten.mul.Tensor":
        makers = (
            _linear_behind(graph, node.args[name], x)
            for name in ("self", "other")
            if isinstance(node.args[name], Value)
        )
        return next((maker for maker in makers if maker is not None), None)
    return None


def _linear_behind(graph: Graph, value: Value, x: Value) -> tuple[Node, list[str]] | None:
    """The linear whose rows are the channels of ``x``, if nothing else reads them."""
    node = value.producer
    if node is None or node.op != "aten.linear.default" or sum(value.users.values()) > 1 or graph.is_output(value):
        return None
    if value.type.shape[-1] != x.type.shape[-1]:
        return None
    parts = [part for part in ("weight", "bias") if node.args[part] is not None]
    return (node, parts) if _are_own(graph, node, parts) else None


def _are_own(graph: Graph, node: Node, parts: Sequence[str]) -> bool:
    """Whether a node's weights are of the model, and read by it alone."""
    weights = [node.args[part] for part in parts]
    return all(
        graph.weight_of(weight) is not None and sum(weight.users.values()) == 1 and not graph.is_output(weight)
        for weight in weights
    )


def _change(graph: Graph, node: Node, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """Let a weight have other numbers, computed when it is read."""
    name = node.args[part].name
    weight = graph.weights[name]
    graph.set_weight(name, Weight(weight.type, lambda: change(weight.load())))
