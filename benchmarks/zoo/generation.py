"""``python -m benchmarks.zoo.generation [NAME ...]``: every class of the zoo that generates, with a cache.

Each is compiled for ONNX Runtime with a growing and with a static cache, and generates 16 tokens greedily for three prompts of
different lengths at once. The reference is eager PyTorch without a cache: every row alone, without padding, the whole text
again for each token. Writes ``results/zoo_generation.json`` and ``.md``; exits with 1 where a target is missed."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import graphopt
from benchmarks.measure import Goal, Table
from benchmarks.zoo.catalog import Animal
from benchmarks.zoo.runs import guarded, main, reason_of
from benchmarks.zoo.small import source as small_source
from graphopt.decode_parity import decode_parity, sample_prompts
from graphopt.errors import GraphoptError
from graphopt.sources import Source

STEPS = 16
PROMPTS = 5, 8, 2  # tokens of each row; of an encoder's text
LAYOUTS: dict[str, dict[str, Any]] = {
    "growing": {"layout": "growing", "logits": "last"},
    "static": {"layout": "static", "max_length": 24, "logits": "last"},
}
BEFORE = "decompose_complex", "canonicalize", "fuse_attention"
AFTER = "fuse_cached_attention", "fuse_norm", "fuse_activation", "heads_last", "flatten_tokens"


@dataclass
class Row:
    """One class with one layout: how many tokens were eager's, and the worst difference of logits on the way."""

    name: str
    family: str
    layout: str
    equal: int = 0
    drift: float = 0.0
    refused: str = ""
    kernels: str = ""
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        return self.equal == STEPS * len(PROMPTS)


def generates(animal: Animal) -> bool:
    """Whether transformers generates text with the class."""
    import transformers

    cls: Any = getattr(transformers, animal.model)
    return animal.family in ("decoder", "experts", "encoder-decoder") and bool(cls.can_generate())


def attempt(work: tuple[Animal, str]) -> Row:
    animal, layout = work
    return guarded(lambda: measure(animal, layout), Row(animal.name, animal.family, layout))


def measure(animal: Animal, layout: str) -> Row:
    """Compile with a cache and generate beside eager."""
    row = Row(animal.name, animal.family, layout)
    start = time.perf_counter()
    free = [{"kind": kind, "allow_no_match": True} for kind in (*BEFORE, *AFTER)]
    passes = [*free[: len(BEFORE)], {"kind": "insert_kv_cache", **LAYOUTS[layout]}]
    passes += [each for each in free[len(BEFORE) :] if layout == "static" or each["kind"] != "fuse_cached_attention"]
    target = {"backend": "onnxruntime", "tactics": "fixed", "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = graphopt.compile(
                small_source(animal, "eager"), Path(folder) / "engine", passes=passes, target=target
            )
        except GraphoptError as error:
            row.refused = str(error)
            return row
        row.seconds = time.perf_counter() - start
        ops = compiled.report.engine_ops
        known = ("GroupQueryAttention", "TensorScatter", "Attention")
        row.kernels = ", ".join(op for op in known if op in ops) or "products"
        _generate(row, compiled.engine, small_source(animal, "eager"))
    return row


def _generate(row: Row, engine: graphopt.Engine, source: Source) -> None:
    prompts, reads = sample_prompts(source, engine, PROMPTS)
    parity = decode_parity(source.module, engine, prompts, source=reads, steps=STEPS)
    row.equal = sum(each.equal for each in parity.rows)
    row.drift = parity.worst_drift


def tables(rows: Sequence[Row]) -> list[Table]:
    done = Table("Generation", "class")
    done.notes.append(
        f"{STEPS} greedy steps for prompts of {', '.join(map(str, PROMPTS))} tokens together, against eager without a cache,"
        " row by row without padding; drift: largest difference of logits relative to their scale."
    )
    refused = Table("Refused", "class")
    for row in rows:
        if row.refused:
            refused.add(row.name, layout=row.layout, **reason_of(row.refused))
            continue
        tokens = f"{row.equal} of {STEPS * len(PROMPTS)}"
        done.add(
            row.name, layout=row.layout, family=row.family, tokens=tokens, drift=f"{row.drift:.0e}", kernels=row.kernels,
            seconds=round(row.seconds, 1),
        )  # fmt: skip
    return [table for table in (done, refused) if table.rows]


def goals(rows: Sequence[Row]) -> list[Goal]:
    classes = list(dict.fromkeys(row.name for row in rows))
    right = [name for name in classes if all(row.right for row in rows if row.name == name)]
    wrong = {row.name for row in rows if not row.refused and not row.right}
    return [
        Goal.at_least(
            f"classes that generate as eager in both layouts, of {len(classes)}",
            95.0,
            100 * len(right) / len(classes),
            " %",
        ),
        Goal.at_most("classes compiled and wrong", 0, len(wrong)),
    ]


def state(row: Row) -> str:
    if row.refused:
        return f"{row.layout}: refused"
    return f"{row.layout}: {row.equal} tokens, drift {row.drift:.0e}" + ("" if row.right else " WRONG")


def work_of(animals: list[Animal]) -> list[tuple[Animal, str]]:
    return [(animal, layout) for animal in animals if generates(animal) for layout in LAYOUTS]


if __name__ == "__main__":
    sys.exit(main("generation", "the zoo, generating", None, work_of, attempt, state, tables, goals))
