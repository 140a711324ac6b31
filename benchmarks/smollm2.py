"""SmolLM2-135M on CPU: are the engine's logits right, how long does a build take, how much memory does it need."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import graphopt
from benchmarks.assets import smollm2, sts_b
from benchmarks.inputs import Side, equal_choices, max_difference, padded, padding_share, ragged_lengths
from benchmarks.measure import THREADS, Goal, Results, Table, in_fresh_process, quiet, use_threads
from graphopt.eager import eager

LENGTHS = (1, 7, 128, 300)
BATCH = 3
LOGITS = 2e-3
BUILD_RATIO = 1.6
MEMORY_RATIO = 2.5
ROUNDS = 3
WORKS = {
    "export": "torch.export.export alone",
    "timed": "graphopt.compile, nothing kept",
    "kept": "graphopt.compile, tactics kept from before",
    "fixed": "graphopt.compile, tactics: fixed",
    "onnx": "torch.onnx.export",
}


def measure() -> Results:
    """The builds first, each in its own process, then the logits in this one."""
    results = Results("smollm2")
    with tempfile.TemporaryDirectory() as store:
        in_fresh_process("benchmarks.building", "kept", store)  # fills the store; not counted
        rounds = [{work: in_fresh_process("benchmarks.building", work, store) for work in WORKS} for _ in range(ROUNDS)]
    runs = {work: [each[work] for each in rounds] for work in WORKS}
    build_time(results, runs)
    memory(results, runs)
    logits(results)
    return results


# Build time and memory


def build_time(results: Results, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Seconds from the loaded model to the file or engine on disk, with graphopt's proofs of every stage."""
    seconds = {work: median(each, "seconds") for work, each in runs.items()}
    parts = dict.fromkeys(part for each in runs.values() for run in each for part in run["parts"])
    table = Table("SmolLM2: seconds to build", "build")
    table.notes += [
        f"a fresh process each, medians of {ROUNDS}, in turns; batch and sequence dynamic, strict=False; the model is loaded",
        "CPU: the processor's seconds over all threads, which other processes stretch less",
        "graphopt: trace, probes, passes, engine on disk, each stage proven against eager, engine loaded and proven",
    ]
    for work, name in WORKS.items():
        own = {part: statistics.median(run["parts"].get(part, 0.0) for run in runs[work]) for part in parts}
        shown = own if runs[work][0]["parts"] else {}
        spread = f"{min(run['seconds'] for run in runs[work]):.1f} to {max(run['seconds'] for run in runs[work]):.1f}"
        over = seconds[work] / seconds["export"]
        table.add(name, seconds=seconds[work], from_to=spread, over_export=over, CPU=median(runs[work], "cpu"), **shown)
    results.tables.append(table)
    ratio = seconds["timed"] / seconds["export"]
    results.goals.append(Goal.at_most("SmolLM2: build, nothing kept / torch.export", BUILD_RATIO, ratio))
    ratio = seconds["kept"] / seconds["export"]
    results.goals.append(Goal.at_most("SmolLM2: build, tactics kept / torch.export", BUILD_RATIO, ratio))


def median(runs: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(run[key] for run in runs))


def memory(results: Results, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Peak resident memory of the same processes above what they held with the model loaded."""
    table = Table("SmolLM2: peak memory of the build", "build")
    table.notes.append(
        "MB of resident memory, anonymous and file pages, above that of the process with the model loaded and read; the "
        "kernel's high-water mark, its kinds from samples every 10 ms; the weights themselves are in 'before'"
    )
    for work, name in WORKS.items():
        above = [(run["peak"] - run["rss_before"]) / run["weights"] for run in runs[work]]
        numbers = {key: median(runs[work], key) / 1e6 for key in ("weights", "rss_before", "peak", "anonymous", "file")}
        table.add(
            name, weights=numbers["weights"], before=numbers["rss_before"], peak=numbers["peak"],
            anonymous_above=numbers["anonymous"], file_above=numbers["file"], peak_above_over_weights=max(above),
        )  # fmt: skip
        if work == "timed":
            results.goals.append(
                Goal.at_most("SmolLM2: peak memory above the model / weights", MEMORY_RATIO, max(above))
            )
    results.tables.append(table)


# Logits


def logits(results: Results) -> None:
    """Logits against eager fp32 on English text, ragged padding on either side, at real positions only."""
    use_threads()
    table = Table(f"SmolLM2: logits of the engine against eager fp32, batch of {BATCH}", "length")
    table.notes.append("sentences of the STS benchmark; compared where the attention mask is 1")
    worst, least = 0.0, 1.0
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            source = graphopt.load_model(str(smollm2()))
            tokens = text_tokens(source)
            target = {"backend": "onnxruntime", "threads": THREADS}
            engine = graphopt.compile(source, Path(folder) / "engine", target=target).engine
        reference = eager(source.module)
        for length in LENGTHS:
            for side in ("right", "left"):
                name = f"{length}, padded {side}"
                difference, equal = compare(table, name, tokens, length, side, reference, engine)
                worst, least = max(worst, difference), min(least, equal)
    results.tables.append(table)
    results.goals.append(Goal.at_most("SmolLM2: largest difference of logits", LOGITS, worst))
    results.goals.append(Goal.at_least("SmolLM2: equal arg-max", 100.0, 100 * least, "%"))


def text_tokens(source: graphopt.Source) -> list[int]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(source.files)
    tokens: list[int] = tokenizer(" ".join(sentence for _, sentence, _ in sts_b("test")[:200]))["input_ids"]
    return tokens


def compare(
    table: Table, name: str, tokens: Sequence[int], length: int, side: Side, reference: Any, engine: Any
) -> tuple[float, float]:
    """Add one row: largest difference and share of equal arg-max."""
    inputs = padded(tokens, ragged_lengths(BATCH, length), length, side)
    mask = inputs["attention_mask"]
    expected, got = reference(**inputs)["logits"], engine(**inputs)["logits"]
    difference, equal = max_difference(expected, got, mask), equal_choices(expected, got, mask)
    table.add(
        name, padding=f"{padding_share(mask):.0%}", positions=int(mask.sum()), max_abs_difference=difference,
        largest_logit=float(expected[mask.bool()].abs().max()), equal_arg_max=f"{equal:.2%}",
    )  # fmt: skip
    return difference, equal
