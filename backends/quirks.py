"""Known faults of backend versions, as data. Every emission asks them; ``graphopt doctor`` prints those in force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet

from graphopt.ir import Node


@dataclass(frozen=True)
class Quirk:
    """``backend`` at ``versions`` goes wrong where ``condition(node, form)`` holds, ``form`` being the lowering's name.

    ``rewrite`` takes another form of the op; ``refuse`` stops the build; ``widen`` builds for two rows of a product where a
    profile expects one and allows more."""

    backend: str
    versions: str
    condition: Callable[[Node, str], bool]
    action: Literal["refuse", "rewrite", "widen"]
    text: str
    reference: str

    def in_force(self, backend: str, version: str) -> bool:
        return backend == self.backend and SpecifierSet(self.versions, prereleases=True).contains(version)


def _causal_of_unequal_lengths(node: Node, form: str) -> bool:
    if node.op != "graphopt.attention.default" or not form.startswith("attention"):
        return False
    sequence = 1 if node.args["heads_last"] else 2
    queries, keys = (node.args[name].type.shape[sequence] for name in ("q", "k"))
    return bool(node.args["causal"] != "none" and queries != keys)


def _masked_multi_head_attention(node: Node, form: str) -> bool:
    return form.startswith("multi_head") and node.args.get("key_mask") is not None


def _integers_of_attention(node: Node, form: str) -> bool:
    if node.op != "graphopt.static_linear.default" or not form.startswith("integers"):
        return False
    made = node.args["x"].producer
    while made is not None and (made.op in _MOVES or made.op == "graphopt.quantize.default"):
        made = next(iter(made.operands)).producer
    return made is not None and made.op == "graphopt.attention.default" and made.output.type.dtype == torch.float16


def _one_row_of_many_columns(node: Node, form: str) -> bool:
    if node.op != "aten.linear.default":
        return False
    weight = node.args["weight"].type
    return weight.dtype == torch.float32 and isinstance(weight.shape[0], int) and weight.shape[0] > _MANY


#: Columns: with 2,048 such a product built, with 49,152 it did not; between them it was not tried.
_MANY = 2048

_MOVES = {f"aten.{name}" for name in ("transpose.int", "reshape.default", "view.default", "permute.default")}
_MOVES |= {"graphopt.pack_tokens.default"}

QUIRKS: tuple[Quirk, ...] = (
    Quirk(
        "onnxruntime", "<1.27", _causal_of_unequal_lengths, "rewrite",
        "Attention's is_causal counts from the lower right on CPU where the standard counts from the upper left",
        "onnxruntime releases up to 1.26",
    ),
    Quirk(
        "onnxruntime", "<1.28", _masked_multi_head_attention, "rewrite",
        "MultiHeadAttention with a mask is slower than separate products", "microsoft/onnxruntime#29655",
    ),
    Quirk(
        "tensorrt", ">=10.6,<10.7", _integers_of_attention, "rewrite",
        "an int8 product of attention's result does not build in fp16: the product stays in fp16", "seen in 10.6 on an H100",
    ),
    Quirk(
        "tensorrt", ">=10.6,<10.7", _one_row_of_many_columns, "widen",
        "an fp32 product with many columns may not build where one row is expected and more are allowed: two are expected",
        "seen in 10.6 on an H200",
    ),
)  # fmt: skip


def quirks_in_force(backend: str, version: str) -> list[Quirk]:
    return [quirk for quirk in QUIRKS if quirk.in_force(backend, version)]


def faults_in_force(backend: str, version: str) -> str:
    """What ``graphopt doctor`` says of them."""
    faults = [f"{quirk.text} ({quirk.action}, {quirk.reference})" for quirk in quirks_in_force(backend, version)]
    return "; ".join(faults) or "none known"
