"""How linears are quantized."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from graphopt.schemas.common import Schema

Scheme = Literal[
    "int8_static", "int8_smooth", "int8_dynamic", "int8_token", "llm_int8", "fp8", "weight_only", "nf4", "fp32"
]  # fmt: skip
Bits = Literal[4, 8]
Group = Literal[16, 32, 64, 128, 256]
Algorithm = Literal["rtn", "gptq", "awq"]
Scales = Literal["fp32", "fp16"]


def _named(given: Any) -> Any:
    return {"scheme": given} if isinstance(given, str) else given


class LayerScheme(Schema):
    """A linear's scheme; what is not given is as the pass has it."""

    scheme: Scheme
    bits: Bits | None = None
    group: Group | None = None
    symmetric: bool | None = None
    fractions: bool | None = None
    scales: Scales | None = None
    algorithm: Algorithm | None = None


#: A scheme by its name alone, or with options.
AnyScheme = Annotated[LayerScheme, BeforeValidator(_named)]


class Treatment(Schema):
    """What becomes of a linear. ``fp32`` leaves it as it is, whatever its dtype."""

    scheme: Scheme
    bits: Bits = 4
    group: Group = 32
    symmetric: bool = True
    fractions: bool = False
    scales: Scales = "fp32"
    algorithm: Algorithm = "rtn"

    @model_validator(mode="after")
    def _is_of_weights(self) -> Treatment:
        if self.scheme != "weight_only" and self.algorithm != "rtn":
            raise ValueError(f"algorithm: {self.algorithm} is for scheme: weight_only, not for {self.scheme}")
        if self.fractions and (self.scheme != "weight_only" or self.symmetric):
            raise ValueError("fractions: true is for scheme: weight_only with symmetric: false")
        if self.scales == "fp16" and self.scheme != "weight_only":
            raise ValueError(f"scales: fp16 is for scheme: weight_only, not for {self.scheme}")
        return self

    @property
    def is_static(self) -> bool:
        """Whether inputs are scaled by what calibration found."""
        return self.scheme in ("int8_static", "int8_smooth", "fp8")

    def __str__(self) -> str:
        if self.scheme not in ("weight_only", "nf4"):
            return self.scheme
        numbers = "nf4" if self.scheme == "nf4" else f"int{self.bits}"
        how = "" if self.algorithm == "rtn" else f", {self.algorithm}"
        zeros = "" if self.symmetric or self.scheme == "nf4" else " with zero points"
        zeros += " between whole numbers" if self.fractions else ""
        zeros += ", scales of fp16" if self.scales == "fp16" else ""
        return f"{numbers} in groups of {self.group}{zeros}{how}"
