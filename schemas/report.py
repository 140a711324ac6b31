"""What a build did: a report for each pass, and how each stage compares with eager."""

from __future__ import annotations

from pydantic import Field

from graphopt.schemas.common import Schema


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


class RefusalReport(Schema):
    rule: str
    where: str
    reason: str


class PassReport(Schema):
    """What one pass did. Bytes and parameters are those of the weights."""

    kind: str
    options: dict[str, object] = Field(default_factory=dict)
    matches: dict[str, int]
    refusals: list[RefusalReport] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
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
    engine: StageParity | None = None
    engine_ops: dict[str, int] = Field(default_factory=dict)
    warnings: list[str] = Field(default_factory=list)
    seconds: dict[str, float] = Field(default_factory=dict)
