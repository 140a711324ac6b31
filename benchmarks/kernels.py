"""Where an engine's time goes: milliseconds of each kind of kernel, by onnxruntime's own profiler."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime

import graphopt
from benchmarks.measure import THREADS, Table
from graphopt.backends.onnxruntime.engine import OnnxRuntimeEngine

RUNS = 12


def kernel_times(folder: Path, call: Callable[[graphopt.Engine], Any]) -> dict[str, float]:
    """Milliseconds of a call by kinds of nodes, the longest first: each node's median over several calls."""
    engine = graphopt.load(folder)
    assert isinstance(engine, OnnxRuntimeEngine)
    with tempfile.TemporaryDirectory() as inside:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
        options.enable_profiling, options.profile_file_prefix = True, str(Path(inside) / "profile")
        engine.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        for _ in range(RUNS):
            call(engine)
        events = json.loads(Path(engine.session.end_profiling()).read_text())
    nodes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event["dur"] / 1000)
    kinds: dict[str, float] = defaultdict(float)
    for (kind, _), times in nodes.items():
        kinds[kind] += statistics.median(times)
    return dict(sorted(kinds.items(), key=lambda item: -item[1]))


def kernel_table(
    title: str, calls: Mapping[str, tuple[Path, Callable[[graphopt.Engine], Any]]], rows: int = 8
) -> Table:
    """The kinds that take longest, one column for each call; all others together."""
    found = {column: kernel_times(*each) for column, each in calls.items()}
    longest = sorted({kind for each in found.values() for kind in each}, key=lambda kind: -sum(
        each.get(kind, 0.0) / sum(each.values()) for each in found.values()
    ))  # fmt: skip
    table = Table(title, "kernel")
    for kind in longest[:rows]:
        table.add(kind, **{column: each.get(kind, 0.0) for column, each in found.items()})
    table.add(
        "others", **{column: sum(each.get(kind, 0.0) for kind in longest[rows:]) for column, each in found.items()}
    )
    table.add("all", **{column: sum(each.values()) for column, each in found.items()})
    table.notes.append("milliseconds, a median for each node, with the profiler on")
    return table
