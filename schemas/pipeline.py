"""The pipeline file: what to compile, with which passes, for which target, proven how."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, FiniteFloat, field_validator, model_validator

from graphopt.schemas.common import Schema

Metric = Literal["max_abs", "relative", "cosine", "snr", "kl", "top1"]
#: Metrics of which more is better; for the others less is.
HIGHER_IS_BETTER: frozenset[str] = frozenset({"cosine", "snr", "top1"})

_ANY = float("inf")
#: Between which values a limit means something.
_RANGES: dict[str, tuple[float, float]] = {
    "max_abs": (0, _ANY), "relative": (0, _ANY), "cosine": (-1, 1), "snr": (-_ANY, _ANY), "kl": (0, _ANY),
    "top1": (0, 1),
}  # fmt: skip


class Budget(Schema):
    """How far a stage may be from eager: ``metric`` no worse than ``limit``, over all probes and outputs.

    max_abs: largest absolute difference. relative: that over the reference's largest absolute value. cosine: smallest
    similarity. snr: signal to noise, in dB. kl: mean divergence of the softmax over the last axis, in nats. top1: share of
    positions whose largest element is the same."""

    metric: Metric
    limit: FiniteFloat

    @model_validator(mode="after")
    def _can_hold(self) -> Budget:
        least, most = _RANGES[self.metric]
        if not least <= self.limit <= most:
            raise ValueError(f"a limit of {self.metric} is from {least:g} to {most:g}, not {self.limit:g}")
        return self


class Exact(Schema):
    """Differences of rounding size only: ``relative`` at most ``rounding`` times the epsilon of each output's dtype, 16 times in
    fp16 and 8 times in bf16."""

    rounding: float = 1000.0


class TargetConfig(Schema):
    """What to build for. ``options`` are the backend's own: see ``graphopt doctor``."""

    backend: str = "onnxruntime"
    provider: Literal["cpu", "cuda", "tensorrt", "tensorrt_rtx"] = "cpu"
    tactics: Literal["timed", "fixed"] = "timed"
    threads: int | None = Field(default=None, ge=1)
    options: dict[str, Any] = Field(default_factory=dict)


class PipelineConfig(Schema):
    """One pipeline file. ``passes`` None is the standard list of the target."""

    model: str
    dims: dict[str, tuple[int, int | None]] = Field(default_factory=dict)
    passes: list[dict[str, Any]] | None = None
    target: TargetConfig = TargetConfig()
    parity: Budget | None = None

    @field_validator("dims")
    @classmethod
    def _ranges(cls, dims: dict[str, tuple[int, int | None]]) -> dict[str, tuple[int, int | None]]:
        for name, (low, high) in dims.items():
            if low < 1 or (high is not None and high < low):
                raise ValueError(f"{name}: [{low}, {high}] is no range of sizes")
        return dims

    @field_validator("passes")
    @classmethod
    def _kinds(cls, passes: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for index, entry in enumerate(passes or ()):
            if not isinstance(entry.get("kind"), str):
                raise ValueError(f"passes[{index}] has no kind")
        return passes
