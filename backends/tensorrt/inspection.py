"""What the builder made of an engine, by its own inspector: precisions of products, fused attentions, sparse tactics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import BackendError

#: Precisions as tactics are named (``sm80_xmma_gemm_i8f16_...``: operands in int8) and as operands are described.
_BY_TACTIC = (
    (re.compile(r"(?:^|_)(?:i8|s8|imma)"), "int8"),
    (re.compile(r"(?:^|_)e4m3"), "fp8"),
    (re.compile(r"(?:^|_)(?:f16|hmma|h884|h1688)"), "fp16"),
    (re.compile(r"(?:^|_)bf16"), "bf16"),
    (re.compile(r"(?:^|_)(?:f32|tf32|sgemm)"), "fp32"),
)
_BY_OPERAND = (
    ("int8", "int8"), ("fp8", "fp8"), ("bf", "bf16"), ("half", "fp16"), ("fp16", "fp16"), ("float", "fp32"), ("fp32", "fp32"),
)  # fmt: skip
_ATTENTION = re.compile(r"mha|fmha|flash", re.IGNORECASE)
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PART = re.compile(r"_(myl\d+)_\d+$")
_PRODUCT = re.compile(r"gemm|gemv|matrixmultiply|matmul|conv(?!ert)", re.IGNORECASE)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: its name, its kind, its kernel, and the types of what it reads."""

    name: str
    kind: str
    tactic: str
    reads: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        """Whether products and softmax of an attention are one kernel."""
        own = self.name.startswith(("_gemm_mha", "CustomQKVToContext"))
        return own or bool(_ATTENTION.search(self.kind) or _ATTENTION.search(self.tactic))

    @property
    def is_product(self) -> bool:
        return not self.is_attention and bool(_PRODUCT.search(self.kind) or _PRODUCT.search(self.tactic))

    @property
    def is_sparse(self) -> bool:
        return "sparse" in self.tactic.lower() or "spmma" in self.tactic.lower()

    @property
    def precision(self) -> str | None:
        """Of the operands; None if neither kernel nor operands tell."""
        tactic = self.tactic.lower()
        for pattern, name in _BY_TACTIC:
            if pattern.search(tactic):
                return name
        first = self.reads[0].lower() if self.reads else ""
        return next((name for part, name in _BY_OPERAND if part in first), None)


def layers_of(trt: Any, engine: Any) -> list[Layer]:
    """The layers of an engine's first profile. The library writes them only for engines with ``ProfilingVerbosity.DETAILED``."""
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return parsed(json.loads(text)["Layers"])


def parsed(layers: Iterable[Any]) -> list[Layer]:
    """Layers of the first profile as the inspector's JSON has them; without details they are names alone.

    Each profile has compiled parts of its own (``..._myl2_92``); one that makes mostly what parts before it make is a later
    profile's, whether its layers' names say so (``[profile 2]``) or not."""
    entries: list[dict[str, Any]] = [{"Name": layer} if isinstance(layer, str) else layer for layer in layers]
    parts: dict[str, set[str]] = {}
    for entry in entries:
        part = _part_of(entry)
        if part is not None:
            parts.setdefault(part, set()).update(_ONNX_LAYER.findall(entry.get("Metadata", "")))
    seen: set[str] = set()
    later = {_part_of(entry) for entry in entries if _is_later(entry)} - {None}
    for part, made in parts.items():
        if 2 * len(made & seen) > len(made):
            later.add(part)
        seen |= made
    return [_layer(entry) for entry in entries if not _is_later(entry) and _part_of(entry) not in later]


def _layer(entry: Mapping[str, Any]) -> Layer:
    reads = tuple(str(operand.get("Format/Datatype", "")) for operand in entry.get("Inputs", ()))
    return Layer(entry["Name"], entry.get("LayerType", ""), entry.get("TacticName", ""), reads)


def _is_later(entry: Mapping[str, Any]) -> bool:
    return "[profile " in entry["Name"]


def _part_of(entry: Mapping[str, Any]) -> str | None:
    found = _PART.search(entry["Name"])
    return None if found is None else found[1]


def kernels_of(layers: Sequence[Layer]) -> dict[str, int]:
    """Counts for the report: ``products in int8``, ``fused attentions``, ``sparse products``."""
    found: dict[str, int] = {}
    for layer in layers:
        if layer.is_attention:
            _count(found, "fused attentions")
        elif layer.is_product:
            _count(found, f"products in {layer.precision or 'another precision'}")
            if layer.is_sparse:
                _count(found, "sparse products")
    return found


def _count(found: dict[str, int], name: str) -> None:
    found[name] = found.get(name, 0) + 1


def check_kernels(kernels: dict[str, int], asked: dict[str, int], sparse: bool) -> list[str]:
    """Things to tell the user. ``asked``: how many products the graph has by precision.

    BackendError if a precision was asked for and no product has it."""
    known = sum(count for name, count in kernels.items() if name.startswith("products in"))
    for precision, count in asked.items():
        if count and known and not kernels.get(f"products in {precision}", 0):
            found = ", ".join(f"{count} {name}" for name, count in kernels.items())
            raise BackendError(
                f"{count} products were to be in {precision}, and the engine has none: {found}",
                hint=f"leave {precision} out for this device, or build with another version",
            )
    if sparse and not kernels.get("sparse products", 0):
        return ["sparse_weights: no sparse kernel was faster, none was taken"]
    return []
