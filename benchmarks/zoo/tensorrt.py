"""``python -m benchmarks.zoo.tensorrt [NAME ...]``: engines of TensorRT-RTX of the whole zoo, on a machine without a GPU.

Each class that compiles for ONNX Runtime (``results/zoo_rows.json``) is built in fp32, fp16 and static int8. What cannot run
here is proven by its emitted model: ONNX Runtime runs it beside eager PyTorch. Writes ``results/zoo_tensorrt.json`` and
``.md``; exits with 1 where a target is missed."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks.measure import RESULTS, Goal, Table
from benchmarks.zoo.catalog import Animal
from benchmarks.zoo.runs import guarded, main, reason_of
from benchmarks.zoo.small import implementations
from benchmarks.zoo.small import source as small_source
from graphopt.backends.tensorrt.backend import TensorRtRtxBackend
from graphopt.errors import GraphoptError
from graphopt.sources import Source

PRECISIONS = "fp32", "fp16", "int8"
SHARE = 90.0  # percent of the classes
LARGEST = 32  # of a size that the model does not bound


@dataclass
class Row:
    """One class in one precision: how many attentions are one layer, how far the emitted model is from eager."""

    name: str
    family: str
    precision: str
    built: bool = False
    attentions: int = 0
    contract: str = ""
    worst: float | None = None
    holds: bool = False
    remark: str = ""
    refused: str = ""
    seconds: float = 0.0


def attempt(work: tuple[Animal, str]) -> Row:
    animal, precision = work
    return guarded(lambda: measure(animal, precision), Row(animal.name, animal.family, precision))


def measure(animal: Animal, precision: str) -> Row:
    """Compile as a class is by default, with its fastest attention implementation."""
    row = Row(animal.name, animal.family, precision)
    source = small_source(animal, implementations(animal)[-1])
    start = time.perf_counter()
    target = {"backend": "tensorrt_rtx", "options": {"compute_capabilities": ["8.9"], "optimization_level": 0}}
    with tempfile.TemporaryDirectory() as folder:
        try:
            made = graphopt.compile(
                source, Path(folder) / "engine", passes=passes_for(source, precision), target=target,
                dims=sizes_of(source), force=True,
            )  # fmt: skip
        except GraphoptError as error:
            row.refused = str(error)
            return row
    row.built, row.seconds = True, time.perf_counter() - start
    row.attentions = made.report.engine_ops.get("ATTENTION_INPUT", 0)
    emitted = made.report.emitted
    if emitted is None:
        row.remark = next((warning for warning in made.report.warnings if "not run" in warning), "")
    else:
        row.contract, row.worst, row.holds = emitted.contract, emitted.worst, emitted.holds
    return row


def passes_for(source: Source, precision: str) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = [dict(step) for step in TensorRtRtxBackend.standard_passes]
    if precision != "fp32":
        steps.append({"kind": "cast"})
    if precision == "int8":
        data = examples(source)
        steps.append({
            "kind": "quantize", "scheme": "int8_static", "embeddings": False, "min_weights": 1,
            "calibration": {"data": data},
        })  # fmt: skip
    return steps


def examples(source: Source, count: int = 3) -> list[dict[str, Any]]:
    """Calibration data of the traced sizes: as many pictures as texts where a model reads both."""
    batches = {axes[0] for axes in source.axes.values() if axes}
    sizes = {name: count if name in batches else traced for name, traced in source.traced.items()}
    return [dict(source.sample()(sizes, torch.Generator().manual_seed(seed))) for seed in range(4)]


def sizes_of(source: Source) -> dict[str, tuple[int, int]]:
    """Every size with an end, which TensorRT needs."""
    sizes = {}
    for name, traced in source.traced.items():
        bounds = source.dims.get(name)
        low = bounds.min if bounds else 1
        high = max(LARGEST, 4 * traced)
        sizes[name] = low, min(high, bounds.max) if bounds and bounds.max else high
    return sizes


def tables(rows: Sequence[Row]) -> list[Table]:
    built = Table("Built by TensorRT-RTX without a GPU", "class")
    built.notes.append(
        "the emitted model in onnxruntime against eager, at three untraced sizes with padding: fp32 the largest difference,"
        " fp16 and int8 the smallest cosine; attentions: how many are one layer"
    )
    for name in dict.fromkeys(row.name for row in rows):
        each = {row.precision: row for row in rows if row.name == name}
        cells = {precision: _word(each[precision]) for precision in PRECISIONS if precision in each}
        first = next(iter(each.values()))
        built.add(name, family=first.family, attentions=first.attentions, **cells)
    refused = Table("Not built, or not run", "class")
    for row in rows:
        if row.refused or row.remark:
            refused.add(row.name, precision=row.precision, **reason_of(row.refused or row.remark))
    return [table for table in (built, refused) if table.rows]


def _word(row: Row) -> str:
    if row.refused:
        return "refused"
    if row.worst is None:
        return "built"
    return (f"{row.worst:.0e}" if row.precision == "fp32" else f"{row.worst:.5f}") + ("" if row.holds else " !")


def goals(rows: Sequence[Row]) -> list[Goal]:
    classes = list(dict.fromkeys(row.name for row in rows))
    found = []
    for precision in PRECISIONS:
        built = sum(row.built for row in rows if row.precision == precision)
        found.append(
            Goal.at_least(f"classes built in {precision}, of {len(classes)}", SHARE, 100 * built / len(classes), " %")
        )
    whole = [name for name in classes if all(row.built for row in rows if row.name == name)]
    found.append(Goal.at_least(f"built in all three, of {len(classes)}", SHARE, 100 * len(whole) / len(classes), " %"))
    wrong = sum(row.precision == "fp32" and row.worst is not None and not row.holds for row in rows)
    found.append(Goal.at_most("built in fp32, and the emitted model is wrong", 0, wrong))
    return found


def state(row: Row) -> str:
    return f"{row.precision}: {_word(row)}"


def work_of(animals: list[Animal]) -> list[tuple[Animal, str]]:
    """Classes that ONNX Runtime's compilation is right for, in each precision."""
    known = json.loads((RESULTS / "zoo_rows.json").read_text())
    right = {row["name"] for row in known if row["graphopt"]["worst"] is not None}
    return [(animal, precision) for animal in animals if animal.name in right for precision in PRECISIONS]


if __name__ == "__main__":
    sys.exit(main("tensorrt", "the zoo, built by TensorRT-RTX", None, work_of, attempt, state, tables, goals))
