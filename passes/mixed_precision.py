"""Mixed precision by sensitivity: how much each layer costs by itself, and the fewest layers that must keep more bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from graphopt.execution import run
from graphopt.ir import Graph
from graphopt.parity import Outputs, Probe, judge
from graphopt.schemas.pipeline import HIGHER_IS_BETTER, Budget
from graphopt.schemas.quantization import Treatment


@dataclass(frozen=True)
class Sensitivity:
    """The metric with each layer alone in few bits, by its output's name, those that keep more, and the result in a line."""

    effects: dict[str, float]
    kept: list[str]
    summary: str


def fewest_kept(
    graph: Graph,
    probes: Sequence[Probe],
    treatments: Mapping[str, Treatment],
    kept_as: Treatment,
    budget: Budget,
    variant: Callable[[dict[str, Treatment]], Graph],
    progress: Callable[[float], None],
) -> Sensitivity:
    """Layers go back to ``kept_as`` in the order of what they cost by themselves, until the budget holds on the probes; how many
    is found by halving, so that a budget which a longer list happens to break is not missed by more than that.

    ``treatments``: by the name of each layer's output. ``variant`` makes a graph of them."""
    with torch.no_grad():
        references = [run(graph, probe.inputs) for probe in probes]
    higher = budget.metric in HIGHER_IS_BETTER
    steps = len(treatments) + 1

    def worst(chosen: dict[str, Treatment]) -> float:
        made = variant(chosen)
        with torch.no_grad():
            outputs: list[Outputs] = [run(made, probe.inputs) for probe in probes]
        return judge(budget, probes, references, outputs).worst

    def holds(value: float) -> bool:
        return value >= budget.limit if higher else value <= budget.limit

    effects = {}
    for index, (name, own) in enumerate(treatments.items()):
        effects[name] = worst({name: own})
        progress((index + 1) / steps)
    order = sorted(effects, key=effects.__getitem__, reverse=not higher)

    def with_kept(count: int) -> float:
        return worst({**treatments, **dict.fromkeys(order[:count], kept_as)})

    found = {0: with_kept(0)}
    low, high = 0, len(order)
    if not holds(found[0]):
        while high - low > 1:
            middle = (low + high) // 2
            found[middle] = with_kept(middle)
            low, high = (low, middle) if holds(found[middle]) else (middle, high)
    count = 0 if holds(found[0]) else high
    value = found[count] if count in found else with_kept(count)
    verdict = "meets" if holds(value) else "does not meet"
    summary = (
        f"{count} of {len(order)} layers stay in {kept_as}: {budget.metric} {value:.4g} {verdict} {budget.limit:g} on "
        f"{len(probes)} batches ({found[0]:.4g} with none)"
    )
    return Sensitivity(effects, order[:count], summary)
