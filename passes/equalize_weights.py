"""Rows of one linear and columns of the next with ranges alike, before both are quantized (Nagel et al. 2019, cross-layer
equalization).

::

    %u = aten.linear.default(input=%x, weight=%up)              %u = aten.linear.default(input=%x, weight=%up / s)
    %h = graphopt.gated_activation.default(                     %h = graphopt.gated_activation.default(
        gate=%g, up=%u)                                  ->         gate=%g, up=%u)
    %y = aten.linear.default(input=%h, weight=%down)            %y = aten.linear.default(input=%h, weight=%down * s)

Channel j between them is divided by ``s[j] = sqrt(max|up[j]| / max|down[:, j]|)``: the same function, and no data is needed. Only
what carries channels through unchanged may stand between the two: a product with a gate.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from graphopt.ir import Graph
from graphopt.passes.rescaling import evening, maker_of, meant, reason_not_to, rescale, weights_of
from graphopt.pipeline import Context, Pass
from graphopt.rewrite import Refused, RewriteLog


class EqualizeWeights(Pass):
    """Give linears that follow each other ranges alike."""

    kind: Literal["equalize_weights"] = "equalize_weights"
    modules: tuple[str, ...] = ("*",)
    """The paths of the later linears, with ``*`` and ``?``."""

    requires: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: Graph, context: Context) -> RewriteLog:
        log = RewriteLog()
        for x, group in meant(graph, self.kind, self.modules, context).items():
            made = maker_of(graph, x, group)
            reason = reason_not_to(graph, group)
            if made is None or made[0].op != "aten.linear.default":
                reason = "no linear of its own makes the channels of its input"
            if reason is not None or made is None:
                log.refusals.append(Refused("EqualizeWeights", group[0].where, str(reason)))
                continue
            rows = graph.weight_of(made[0].args["weight"])
            assert rows is not None
            rescale(graph, group, evening(rows.load().float(), weights_of(graph, group)), self.kind)
            log.matches["pair"] = log.matches.get("pair", 0) + 1
        graph.prune()
        return log
