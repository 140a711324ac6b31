"""How the passes' time grows with the graph: tiny Llama models of 6 to 96 layers, random weights.

``python -m benchmarks.scaling 24`` measures one depth and prints it as JSON; ``measure`` runs each depth in its own process."""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from typing import Any

import torch

import graphopt
from benchmarks.measure import Goal, Results, Table, in_fresh_process, quiet, use_threads
from graphopt.backend import backend_class
from graphopt.pipeline import Context, load_passes, run_passes
from graphopt.schemas.pipeline import TargetConfig
from graphopt.sources import transformers_source

DEPTHS = (6, 12, 24, 48, 96)
ROUNDS = 3
DOUBLING = 2.3
COLUMNS = ("passes", "all", "all CPU", "trace")


def measure() -> Results:
    """One row for each depth, each over the one of half the depth."""
    results = Results("scaling")
    table = Table("Seconds of the passes by depth (Llama, hidden size 64)", "layers")
    table.notes += [
        f"medians of {ROUNDS} in one process, after one run that is not counted; without proof, tactics fixed",
        "passes: the sum of the reports' seconds (run and verify); all: run_passes with its copies and diffs; all CPU: the",
        "processor's seconds in it, which other processes do not stretch",
        "trace: torch.export and import, once, the first trace of the process",
    ]
    last: dict[str, Any] = {}
    worst = 0.0
    for depth in DEPTHS:
        found = in_fresh_process("benchmarks.scaling", str(depth))
        ratios = {f"{key} ratio": found[key] / last[key] if last else None for key in COLUMNS}
        table.add(str(depth), nodes=found["nodes"], **{key: found[key] for key in COLUMNS}, **ratios)
        worst = max(worst, ratios["passes ratio"] or 0.0)
        last = found
    results.tables += [table, slowest(last)]
    results.goals.append(Goal.at_most("passes: largest ratio for a doubling of the layers", DOUBLING, worst))
    return results


def slowest(found: dict[str, Any]) -> Table:
    """Each pass at the largest depth."""
    table = Table(f"Seconds of each pass at {DEPTHS[-1]} layers", "pass")
    for kind, seconds in found["each"].items():
        table.add(kind, seconds=seconds)
    return table


def one_depth(layers: int) -> dict[str, Any]:
    """Trace once, then run the target's standard passes on copies of the graph."""
    use_threads()
    source = tiny_llama(layers)
    start = time.perf_counter()
    graph = graphopt.trace(source.module, source.inputs, source.axes, defaults=source.dims)
    trace = time.perf_counter() - start
    rounds = [one_round(graph) for _ in range(ROUNDS + 1)][1:]
    totals = {key: statistics.median(each[key] for each in rounds) for key in ("all", "all CPU")}
    kinds = [key for key in rounds[0] if key not in totals]
    every = {kind: statistics.median(each[kind] for each in rounds) for kind in kinds}
    passes = statistics.median(sum(each[kind] for kind in kinds) for each in rounds)
    return {"nodes": len(graph), "trace": trace, "passes": passes, **totals, "each": every}


def one_round(graph: graphopt.Graph) -> dict[str, float]:
    """Seconds of each pass, and of all of them with what is around them. The collector rests, as in a compile."""
    backend = backend_class("onnxruntime")(TargetConfig(tactics="fixed"))
    copy, steps = graph.clone(), load_passes(backend.standard_passes)
    gc.collect()
    gc.disable()
    try:
        start, processor = time.perf_counter(), time.process_time()
        reports = run_passes(copy, steps, context=Context(stopwatch=None))
        wall, processor = time.perf_counter() - start, time.process_time() - processor
    finally:
        gc.enable()
    return {"all": wall, "all CPU": processor, **{report.kind: report.seconds for report in reports}}


def tiny_llama(layers: int) -> graphopt.Source:
    import transformers

    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers_source(transformers.LlamaForCausalLM(config), name=f"llama-{layers}")


if __name__ == "__main__":
    with quiet():
        measured = one_depth(int(sys.argv[1]))
    print(json.dumps(measured))
