"""What a build did: a report for each pass, and how each stage compares with eager."""

from __future__ import annotations

from pydantic import Field

from graphopt.schemas.common import Schema
from graphopt.schemas.pipeline import HIGHER_IS_BETTER, Budget


class OutputParity(Schema):
    """One output against eager. ``compared`` counts elements; ``left_out`` those at positions the mask leaves out."""

    max_abs: float
    relative: float
    cosine: float
    snr: float
    compared: int
    left_out: int


class ProbeParity(Schema):
    """One stage on one probe: the sizes of the probe, and each output."""

    sizes: dict[str, int]
    outputs: dict[str, OutputParity]


class StageParity(Schema):
    """One stage on all probes. ``metric`` is what the contract bounds, ``worst`` its worst value, ``limit`` the bound."""

    contract: str
    metric: str
    worst: float
    limit: float
    holds: bool
    probes: list[ProbeParity]

    @property
    def max_abs(self) -> float:
        return max((o.max_abs for p in self.probes for o in p.outputs.values()), default=0.0)


class DecodeDifference(Schema):
    """The first token of a row that is not eager's. ``margin``: how much eager's logit of its own token is larger."""

    step: int
    eager: int
    engine: int
    margin: float

    def __str__(self) -> str:
        return f"step {self.step}: token {self.engine}, eager prefers {self.eager} by {self.margin:.3g}"


class DecodeRow(Schema):
    """One prompt's greedy tokens: how many there are, and how many of them eager takes after the same text."""

    prompt_tokens: int
    tokens: int
    equal: int
    first_difference: DecodeDifference | None = None


class DecodeParity(Schema):
    """A batch that an engine generated, against eager. ``drift``: at each step the largest absolute difference of logits of
    any row; ``scale``: eager's largest logit."""

    rows: list[DecodeRow]
    drift: list[float]
    scale: float

    @property
    def agreement(self) -> float:
        """The share of tokens that are eager's."""
        return sum(row.equal for row in self.rows) / sum(row.tokens for row in self.rows)

    @property
    def holds(self) -> bool:
        return self.agreement == 1.0

    @property
    def worst_drift(self) -> float:
        """The largest difference of logits on the way, relative to the largest logit."""
        worst = max(self.drift, key=lambda each: (not each <= float("inf"), each))  # NaN is worse than any number
        return worst / self.scale if self.scale else worst


class RefusalReport(Schema):
    rule: str
    where: str
    reason: str


class LayerPrecision(Schema):
    """What a layer computes in after a pass, and why not in less. ``effect``: the budget's metric with this layer alone in few
    bits, where that was measured."""

    module: str
    precision: str
    reason: str | None = None
    effect: float | None = None


class Sensitivity(Schema):
    """A layer's effect on the metric, as a ``share`` of what the most sensitive one loses; whether it ``kept`` more bits."""

    module: str
    precision: str
    effect: float
    share: float
    kept: bool


def _loss(metric: str, value: float) -> float:
    """How much is lost, on a scale that begins at 0."""
    if metric == "snr":
        return 10 ** (-value / 20)
    return max(0.0, 1 - value if metric in HIGHER_IS_BETTER else value)


class PassReport(Schema):
    """What one pass did. Bytes and parameters are those of the weights."""

    kind: str
    options: dict[str, object] = Field(default_factory=dict)
    matches: dict[str, int]
    refusals: list[RefusalReport] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    layers: list[LayerPrecision] = Field(default_factory=list)
    nodes_before: int
    nodes_after: int
    bytes_before: int
    bytes_after: int
    parameters_before: int
    parameters_after: int
    seconds: float
    parity: StageParity | None = None
    diff: str = ""

    @property
    def changes(self) -> int:
        return sum(self.matches.values())

    @property
    def sensitivities(self) -> list[Sensitivity]:
        """What each layer costs alone in few bits, where that was measured: the most sensitive first."""
        measured = [(layer, layer.effect) for layer in self.layers if layer.effect is not None]
        if not measured:
            return []
        metric = Budget.model_validate(self.options["budget"]).metric
        losses = [_loss(metric, effect) for _, effect in measured]
        most = max(losses) or 1.0
        found = [
            Sensitivity(
                module=layer.module,
                precision=layer.precision,
                effect=effect,
                share=loss / most,
                kept=layer.reason is not None,
            )
            for (layer, effect), loss in zip(measured, losses, strict=True)
        ]
        return sorted(found, key=lambda each: -each.share)

    @property
    def layers_by_precision(self) -> dict[tuple[str, str], list[str]]:
        """The modules of each precision, with the reason for it."""
        found: dict[tuple[str, str], list[str]] = {}
        for layer in self.layers:
            found.setdefault((layer.precision, layer.reason or ""), []).append(layer.module)
        return found


class AttentionReport(Schema):
    """One attention of a graph: sizes as the graph names them, its mask as proven. ``unproven``: why a
    part of the mask stays a bias; ``refusal``: why the attention is not one op."""

    name: str
    where: str
    heads: str = ""
    kv_heads: str = ""
    size: str = ""
    value_size: str = ""
    queries: str = ""
    keys: str = ""
    mask: str = ""
    extras: list[str] = Field(default_factory=list)
    unproven: str = ""
    refusal: str = ""

    @property
    def fused(self) -> bool:
        return not self.refusal


class TacticReport(Schema):
    """The candidates for one op signature: milliseconds by name (None: refused or wrong, see ``notes``), the one taken."""

    signature: str
    chosen: str
    how: str
    milliseconds: dict[str, float | None]
    notes: dict[str, str] = Field(default_factory=dict)
    uses: int = 1


class BuildReport(Schema):
    """One build: stages in order, the graph's op counts before and after them, tactics, the engine's own op counts and
    parity, seconds of each part."""

    trace: StageParity | None = None
    traced_ops: dict[str, int] = Field(default_factory=dict)
    final_ops: dict[str, int] = Field(default_factory=dict)
    passes: list[PassReport] = Field(default_factory=list)
    attentions: list[AttentionReport] = Field(default_factory=list)
    tactics: list[TacticReport] = Field(default_factory=list)
    emitted: StageParity | None = None
    """Of the model that the engine was built of, where the engine itself cannot run."""
    engine: StageParity | None = None
    engine_ops: dict[str, int] = Field(default_factory=dict)
    kernels: dict[str, int] = Field(default_factory=dict)
    """What the engine's inspector counts: products by precision, fused attentions, sparse products."""
    warnings: list[str] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)

    @property
    def last(self) -> tuple[str, StageParity | None]:
        """The last stage by name: the engine, or the model that stands in for it."""
        return ("engine", self.engine) if self.emitted is None else ("emitted model", self.emitted)

    @property
    def broken(self) -> list[str]:
        """The stages whose contracts do not hold, by name, which ``force`` writes down."""
        stages = [("trace", self.trace), *((step.kind, step.parity) for step in self.passes), self.last]
        return [name for name, parity in stages if parity is not None and not parity.holds]
