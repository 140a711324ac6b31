"""all-MiniLM-L6-v2 on CPU: is the engine right, does it keep the model's quality, how fast is it beside its peers.

Accuracy: largest absolute difference of ``last_hidden_state`` from eager PyTorch at positions the mask keeps, and the
Spearman correlation on the STS benchmark. Latency: every candidate in one process, in turns, with ragged padding and
without. "graphopt" is the pipeline of examples/minilm.yaml; "graphopt, dense" the target's standard list, which leaves
remove_padding out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks.assets import minilm, sts_b
from benchmarks.demo import sts_b_spearman
from benchmarks.inputs import as_numpy, max_difference, padded, padding_share, ragged_lengths
from benchmarks.measure import THREADS, Cell, Goal, Results, Table, Timing, interleaved, quiet, use_threads
from benchmarks.peers import Peer, make_peers
from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend
from graphopt.eager import eager

ACCURACY_SIZES = ((1, 7), (3, 33), (8, 128), (2, 300))
LATENCY_SIZES = ((1, 128), (8, 128), (1, 512))
ROUNDING = 1e-4  # hidden states are of the order of 1
STS_B = 0.8203  # of the eager model in fp32
AGAINST_BEST = 0.85
DENSE = "graphopt, dense"
NAMED = ("export, sdpa", "export, sdpa + optimizer")  # torch.onnx.export as it comes
BEST = "the best ONNX Runtime peer"
TOKENS = 128

Call = Callable[..., Mapping[str, Any]]


def measure() -> Results:
    """Build the engine, then measure accuracy and latency."""
    use_threads()
    results = Results("minilm")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            source = graphopt.load_model(str(minilm()))
            target = {"backend": "onnxruntime", "threads": THREADS}
            standard = [*OnnxRuntimeBackend.standard_passes]
            engines = {
                "graphopt": [*standard, {"kind": "remove_padding"}],
                DENSE: standard,
            }
            compiled = {
                name: graphopt.compile(source, Path(folder) / f"engine{index}", passes=passes, target=target)
                for index, (name, passes) in enumerate(engines.items())
            }
        reference = eager(source.module)
        accuracy(results, reference, compiled["graphopt"].engine)
        similarity(results, reference, compiled["graphopt"].engine)
        peers, notes = make_peers(minilm(), inputs_of(2, 6), Path(folder))
        notes += [f"{peer.name}: fused {peer.fused or 'nothing'}" for peer in peers if peer.name.endswith("optimizer")]
        for padded_rows in (True, False):
            latency(results, source.module, compiled, peers, notes, padded_rows)
    return results


def inputs_of(batch: int, length: int, padded_rows: bool = True) -> dict[str, Tensor]:
    """Random words of the vocabulary; ragged padding on the right, or none."""
    tokens = torch.randint(1000, 30000, (batch * length,), generator=torch.Generator().manual_seed(length)).tolist()
    inputs = padded(tokens, ragged_lengths(batch, length) if padded_rows else [length] * batch, length)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


# Accuracy


def accuracy(results: Results, reference: Call, engine: Call) -> None:
    """Largest difference of ``last_hidden_state`` at the real positions, at sizes that were not traced."""
    table = Table("MiniLM: engine against eager fp32", "batch x length")
    table.notes.append("largest absolute difference of last_hidden_state where the attention mask is 1")
    worst = 0.0
    for batch, length in ACCURACY_SIZES:
        inputs = inputs_of(batch, length)
        expected, got = (call(**inputs)["last_hidden_state"] for call in (reference, engine))
        difference = max_difference(expected, got, inputs["attention_mask"])
        table.add(f"{batch}x{length}", padding=share(inputs), max_abs_difference=difference)
        worst = max(worst, difference)
    results.tables.append(table)
    results.goals.append(Goal.at_most("MiniLM: largest difference from eager", ROUNDING, worst))


def share(inputs: Mapping[str, Tensor]) -> str:
    return f"{padding_share(inputs['attention_mask']):.0%}"


def similarity(results: Results, reference: Call, engine: Call) -> None:
    """Spearman correlation of the cosine of two sentences' embeddings with people's scores."""
    rows = sts_b("test")
    tokenizer = tokenizer_of(minilm())
    table = Table("MiniLM: STS benchmark, test", "model")
    table.notes.append(
        f"{len(rows)} pairs, mean over the mask, at most {TOKENS} tokens, cosine; batches of 64 sorted by length"
    )
    found = {}
    for name, call in (("eager fp32", reference), ("graphopt", engine)):
        start = time.perf_counter()
        found[name] = sts_b_spearman(call, tokenizer)
        table.add(name, Spearman=found[name], seconds=time.perf_counter() - start)
    results.tables.append(table)
    right = round(found["eager fp32"], 4) == STS_B
    results.goals.append(Goal("MiniLM: STS-B of eager", str(STS_B), f"{found['eager fp32']:.4f}", right))
    kept = round(found["graphopt"], 4) == round(found["eager fp32"], 4)
    results.goals.append(Goal("MiniLM: STS-B of the engine", "as eager, to 4 digits", f"{found['graphopt']:.4f}", kept))


def tokenizer_of(folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


# Latency


def latency(
    results: Results,
    module: torch.nn.Module,
    compiled: Mapping[str, graphopt.Compiled],
    peers: Sequence[Peer],
    notes: list[str],
    padded_rows: bool,
) -> None:
    """One table of all candidates at all sizes, one of graphopt's ratios to them."""
    kind = "ragged padding" if padded_rows else "no padding"
    table = Table(f"MiniLM: latency in ms, {THREADS} threads, {kind}", "candidate", notes=[*notes])
    sizes = {f"{batch}x{length}": inputs_of(batch, length, padded_rows) for batch, length in LATENCY_SIZES}
    times: dict[str, dict[str, Timing]] = {}
    differences: dict[str, dict[str, float]] = {}
    for size, inputs in sizes.items():
        calls = candidates(module, compiled, peers, inputs)
        differences[size] = {name: difference(calls["torch eager"], call, inputs) for name, call in calls.items()}
        times[size] = interleaved(calls)
    for name in calls:
        numbers = {f"{size}_{part}": getattr(times[size][name], part) for size in sizes for part in ("median", "p20")}
        worst = max(each[name] for each in differences.values())
        table.add(name, **numbers, max_abs_difference=worst)
    table.notes.append("padding: " + ", ".join(f"{size} {share(inputs)}" for size, inputs in sizes.items()))
    results.tables.append(table)
    for name, each in compiled.items():
        table.notes.append(f"{name} runs {', '.join(f'{n} {op}' for op, n in each.report.engine_ops.items())}")
        results.tables.append(ratios(name, kind, times, peers))
    if padded_rows:
        add_goals(results, times, peers)


def candidates(
    module: torch.nn.Module,
    compiled: Mapping[str, graphopt.Compiled],
    peers: Sequence[Peer],
    inputs: Mapping[str, Tensor],
) -> dict[str, Callable[[], Any]]:
    """Everything as a call without arguments that computes the same outputs."""
    feeds = as_numpy(inputs)
    torch._dynamo.reset()
    fast = torch.compile(module, dynamic=False)
    engines = {name: each.engine for name, each in compiled.items()}
    return {
        **{name: partial(engine_run, engine, feeds) for name, engine in engines.items()},
        **{peer.name: peer.run(feeds, 2) for peer in peers},
        "torch eager": lambda: torch_run(module, inputs),
        "torch.compile": lambda: torch_run(fast, inputs),
    }


def engine_run(engine: graphopt.Engine, feeds: Mapping[str, Any]) -> list[Any]:
    return list(engine(**feeds).values())


def torch_run(module: Callable[..., Any], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.inference_mode():
        return list(module(**inputs).to_tuple())


def difference(reference: Callable[[], Any], call: Callable[[], Any], inputs: Mapping[str, Tensor]) -> float:
    """Of the first output: a peer that is fast and wrong shows it."""
    expected, got = (torch.as_tensor(each()[0]) for each in (reference, call))
    return max_difference(expected, got, inputs["attention_mask"])


def ratios(name: str, kind: str, times: Mapping[str, Mapping[str, Timing]], peers: Sequence[Peer]) -> Table:
    """One engine's time over the best of each group of peers: by the medians, and by the 20th percentiles beside."""
    groups = {
        BEST: [peer.name for peer in peers],
        "the best of them at the exporter's defaults": [peer.name for peer in peers if peer.default],
        "the best sdpa export in ONNX Runtime": [peer.name for peer in peers if peer.sdpa],
        "torch eager": ["torch eager"],
        "torch.compile": ["torch.compile"],
    }
    table = Table(f"MiniLM: time of {name} over, {kind}", "peer")
    for group, names in groups.items():
        cells: dict[str, Cell] = {}
        for size, each in times.items():
            cells[size] = each[name].median / min(each[other].median for other in names)
            cells[f"{size} p20"] = each[name].p20 / min(each[other].p20 for other in names)
        table.add(group, **cells)
    return table


def add_goals(results: Results, times: Mapping[str, Mapping[str, Timing]], peers: Sequence[Peer]) -> None:
    for size, each in times.items():
        best = min((peer.name for peer in peers), key=lambda name: each[name].median)
        ratio = each["graphopt"].median / each[best].median
        results.goals.append(Goal.at_most(f"MiniLM: latency at {size} / {BEST} ({best})", AGAINST_BEST, ratio))
        named = min(each[name].median for name in NAMED)
        for engine in ("graphopt", DENSE):
            row = f"MiniLM: {engine} at {size} / the better of the plain export and its optimizer"
            results.goals.append(Goal.at_most(row, AGAINST_BEST, each[engine].median / named))
