"""Dividing the channels of linears' inputs and multiplying the weights that read them: the same function, other magnitudes.

The division goes into what makes the channels where that can take it, a norm's weight or the rows of an earlier linear;
elsewhere a product is inserted. What to divide by: :func:`smoothing` (SmoothQuant), :func:`protecting` (AWQ), :func:`evening`
(cross-layer equalization)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from graphopt.ir import Graph, Node, Value, map_arg
from graphopt.passes.quantized_weights import LEVELS, is_linear, matches, module_of, refuse_unknown, row_scale
from graphopt.pipeline import Context
from graphopt.tensors import Weight

_NORMS = frozenset({"aten.rms_norm", "aten.layer_norm", "graphopt.add_rms_norm", "graphopt.add_layer_norm"})
LOOKUP = "aten.embedding.default"
_STRENGTHS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
_SHARES = tuple(step / 20 for step in range(1, 20))
_LOW = 1e-5  # of the largest magnitude: smaller ones count as this


def by_input(nodes: Iterable[Node]) -> dict[Value, list[Node]]:
    """Linears by the value that they read."""
    found: dict[Value, list[Node]] = {}
    for node in nodes:
        found.setdefault(node.args["input"], []).append(node)
    return found


def meant(graph: Graph, kind: str, modules: Sequence[str], context: Context) -> dict[Value, list[Node]]:
    """The linears of a graph by the value that they read, where ``modules`` match all that read it."""
    groups = by_input(node for node in graph.nodes if is_linear(graph, node))
    paths = [module_of(node) for group in groups.values() for node in group]
    refuse_unknown(kind, modules, paths, context)
    return {x: group for x, group in groups.items() if all(matches(module_of(node), modules) for node in group)}


def reason_not_to(graph: Graph, group: Sequence[Node]) -> str | None:
    for node in group:
        weight = node.args["weight"]
        elsewhere = any(user not in group and user.op != LOOKUP for user in weight.users)
        if elsewhere or graph.is_output(weight):
            return f"%{node.args['weight'].name} is read elsewhere as well"
    return None


def rescale(graph: Graph, group: Sequence[Node], factors: Tensor, kind: str) -> Literal["folded", "inserted"]:
    """Divide the channels of a group's input by ``factors`` ``[K]``, and multiply the columns of its weights."""
    x = group[0].args["input"]  # a product by now, if its table was divided for another group
    folded = _divide(graph, x, group, factors, kind)
    for node in {node.args["weight"]: node for node in group}.values():
        _scale_columns(graph, node, factors, kind)
    return "folded" if folded else "inserted"


def weights_of(graph: Graph, group: Sequence[Node]) -> Tensor:
    """All rows ``[N, K]``, f32, that read an input."""
    found = [graph.weight_of(node.args["weight"]) for node in group]
    return torch.cat([weight.load().float() for weight in found if weight is not None])


# What to divide by


def smoothing(largest: Tensor, weight: Tensor, strength: float) -> Tensor:
    """``s`` ``[K]`` of the magnitudes of K channels and the weights ``[N, K]`` that read them."""
    low = 1e-5
    own = largest.clamp(min=low * float(largest.max()))
    read = weight.abs().amax(0)
    read = read.clamp(min=low * float(read.max()))
    return own**strength / read ** (1 - strength)


#: Rows of calibration, of which the largest magnitudes say little of those of others.
_FEW = 1024


def searched_smoothing(
    sample: Tensor, weight: Tensor, largest: Tensor, rounds: Literal["tensor", "token"]
) -> tuple[Tensor | None, str]:
    """The strength that rounds products of a sample ``[rows, K]`` least, and what it gains; None if none does.

    ``rounds``: whether inputs are rounded by one scale, or by one for each token. One scale cuts off what is larger than the
    ``largest`` of calibration: where that saw few rows, each half of the sample is rounded by what is known without it."""
    halves = (sample[0::2], sample[1::2])
    folds = [(sample, largest)]
    share = float((sample.abs().amax(0) >= largest).float().mean())  # of all rows, as far as their largest tell
    if rounds == "tensor" and 1 < len(sample) < share * _FEW:
        folds = [(held, _without(held, seen, largest)) for seen, held in (halves, halves[::-1])]

    def error(strength: float | None) -> float:
        total = 0.0
        for held, known in folds:
            factors = torch.ones_like(known) if strength is None else smoothing(known, weight, strength)
            total += _error(held, weight, factors, None if rounds == "token" else known)
        return total

    errors = {strength: error(strength) for strength in _STRENGTHS}
    best = min(errors, key=errors.__getitem__)
    none = error(None)
    if errors[best] >= none:
        return None, "as they are"
    gain = f"strength {best:g}, error {errors[best] / none:.2f} of that without"
    return smoothing(largest, weight, best), gain


def _without(held: Tensor, seen: Tensor, largest: Tensor) -> Tensor:
    """The largest magnitudes ``[K]`` of calibration without some of its rows, as far as others and ``seen`` ones tell."""
    return torch.where(largest > held.abs().amax(0), largest, seen.abs().amax(0)).clamp(min=1e-30)


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


def protecting(weight: Tensor, moment: Tensor, rounded: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, str]:
    """The power of the inputs' magnitudes that lets rounded weights ``[N, K]`` keep their products best for inputs with the
    second moment ``[K, K]`` (AWQ, Lin et al. 2023), and what it gains; None if none does.

    ``rounded``: what becomes of weights."""
    magnitude = moment.diagonal().sqrt()
    magnitude = magnitude.clamp(min=_LOW * float(magnitude.max()))

    def error(factors: Tensor) -> float:
        off = rounded(weight * factors) / factors - weight
        return float(((off @ moment) * off).sum())

    def factors_of(share: float) -> Tensor:
        own = magnitude**share
        return own / (own.max() * own.min()).sqrt()

    none = error(torch.ones_like(magnitude))
    errors = {share: error(factors_of(share)) for share in _SHARES}
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= none:
        return None, "as they are"
    return factors_of(best), f"power {best:g}, error {errors[best] / none:.2f} of that without"


def evening(makes: Tensor, reads: Tensor) -> Tensor:
    """Factors ``[K]`` that give the rows of one linear ``[K, ...]`` and the columns of the next ``[N, K]`` one range each
    (Nagel et al. 2019)."""
    made, read = makes.flatten(1).abs().amax(1), reads.abs().amax(0)
    usable = (made > 0) & (read > 0)
    return torch.where(usable, (made / torch.where(usable, read, 1.0)).sqrt(), 1.0)


# Where the division goes


def _scale_columns(graph: Graph, node: Node, factors: Tensor, kind: str) -> None:
    """Tokens that are looked up in the same table are divided again."""
    for user in [user for user in node.args["weight"].users if user.op == LOOKUP]:
        rows = user.output
        product = _product(graph, rows, factors, list(rows.users), kind)
        for name in [name for name, value in graph.outputs.items() if value is rows]:
            graph.outputs[name] = product
    change_weight(graph, node, "weight", lambda weight: weight * factors.to(weight.dtype))


def _product(graph: Graph, value: Value, factors: Tensor, users: Sequence[Node], kind: str) -> Value:
    """``value`` divided by the factors, for these users."""
    inverse = graph.add_weight(graph.unique(f"{value.name}.smooth"), Weight.of((1 / factors).to(value.type.dtype)))
    before = min(users, key=list(graph.nodes).index) if users else None
    origin = (before or value.producer).origin if before or value.producer else ()  # type: ignore[union-attr]
    made = graph.insert(
        "aten.mul.Tensor", {"self": value, "other": inverse}, before=before, origin=(*origin, kind)
    ).output
    for user in users:
        graph.set_args(
            user, {name: map_arg(arg, lambda leaf: made if leaf is value else leaf) for name, arg in user.args.items()}
        )
    return made


def _divide(graph: Graph, x: Value, group: Sequence[Node], factors: Tensor, kind: str) -> bool:
    """Divide the channels of ``x`` where they are made; if that cannot be, by a product in between, and say so."""
    made = maker_of(graph, x, group)
    if made is None:
        _product(graph, x, factors, group, kind)
        return False
    node, parts = made
    for part in parts:
        change_weight(graph, node, part, lambda weight: _divided(weight, factors))
    return True


def _divided(weight: Tensor, factors: Tensor) -> Tensor:
    """A norm's weight or a bias ``[K]``, or the rows of a linear's weight ``[K, ...]``."""
    own = factors.to(weight.dtype)
    return weight / own.reshape(-1, *[1] * (weight.ndim - 1))


def maker_of(graph: Graph, x: Value, group: Sequence[Node]) -> tuple[Node, list[str]] | None:
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


def change_weight(graph: Graph, node: Node, part: str, change: Callable[[Tensor], Tensor]) -> None:
    """Let a weight have other numbers, computed when it is read."""
    name = node.args[part].name
    weight = graph.weights[name]
    graph.set_weight(name, Weight(weight.type, lambda: change(weight.load())))
