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

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from graphopt.calibration import Tapped
from graphopt.ir import Graph, Node
from graphopt.passes.quantized_weights import module_of
from graphopt.passes.rescaling import meant, reason_not_to, rescale, searched_smoothing, smoothing, weights_of
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refused, RewriteLog
from graphopt.schemas.calibration import Calibration


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
        groups = meant(graph, self.kind, self.modules, context)
        taps = [Tapped(x.name, (len(x.type.shape) - 1,)) for x in groups]
        largest = context.calibrate(graph, self.calibration, taps)
        samples: Mapping[str, Tensor] = {}
        if self.strength == "search":
            samples = context.sample(graph, self.calibration, [x.name for x in groups], self.rows)
        for x, group in groups.items():
            reason = reason_not_to(graph, group)
            if reason is not None:
                log.refusals.append(Refused("SmoothActivations", group[0].where, reason))
                continue
            factors = self._factors(graph, group, largest[x.name], samples.get(x.name), context)
            if factors is None:
                continue
            rule = rescale(graph, group, factors, self.kind)
            log.matches[rule] = log.matches.get(rule, 0) + 1
        graph.prune()
        return log

    def _factors(
        self, graph: Graph, group: Sequence[Node], largest: Tensor, sample: Tensor | None, context: Context
    ) -> Tensor | None:
        """What to divide the channels by; None if the search found nothing better than the channels as they are."""
        weight = weights_of(graph, group)
        if sample is None:
            assert isinstance(self.strength, float | int)
            return smoothing(largest, weight, float(self.strength))
        factors, gain = searched_smoothing(sample, weight, largest, self.rounds)
        context.notes.append(f"{', '.join(module_of(node) for node in group)}: {gain}")
        return factors
