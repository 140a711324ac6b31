"""SmolLM2-135M generates on CPU: as eager does, how fast beside its peers and the machine's limits, in how much memory.

Every side is a process of its own (decoding_sides.py); in each round all have their turns, in an order shuffled anew.
"graphopt" is the engine with a static cache, "graphopt, growing" the one with optimum's names and shapes. With QUICK in the
environment a few short turns only say whether everything runs; nothing that they measure counts."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks.assets import smollm2
from benchmarks.decoding_sides import OPTIMUM, SideError, Worker
from benchmarks.inputs import padded
from benchmarks.measure import PAUSE, THREADS, Cell, Goal, Results, Table, Timing, quiet, summary, use_threads
from benchmarks.smollm2 import text_tokens
from graphopt.runtime.decoder import Decoder
from graphopt.runtime.generation import Generator
from graphopt.sources import transformers_source

QUICK = bool(os.environ.get("QUICK"))
ROUNDS, RUNS, STEPS = (1, 1, 4) if QUICK else (4, 2, 24)
NEW_TOKENS = 8 if QUICK else 128
GROWTH_STEPS = 16 if QUICK else 512
LENGTHS = (5, 9, 17, 33, 64, 96, 128, 200)  # of the prompts of the agreement
CHUNK = 16
PROMPT, LONG_PROMPT, LONG_PAST = (128, 192, 256) if QUICK else (128, 512, 4096)
ROOM, LONG_ROOM = (256, 512) if QUICK else (1024, 4352)

WINDOW = 32 if QUICK else 512
FASTER, PREFILL_RATIO, LONG_RATIO = 1.15, 0.7, 1.6
CACHE_BYTES = 2 * 30 * 3 * 64 * 4  # keys and values of a token: layers, heads, size, bytes

STATIC, GROWING, LONG = "graphopt", "graphopt, growing", f"graphopt, {LONG_ROOM} positions"
EAGER, COMPILED = "torch eager", "torch.compile, static cache"
PEERS = {
    "onnxruntime-genai": "genai",
    EAGER: "eager",
    COMPILED: "compiled",
    "optimum, ORTModelForCausalLM": "optimum",
}

Jobs = Mapping[tuple[str, str], Callable[[], list[float]]]
Times = dict[tuple[str, str], Timing]


def decoder_passes(layout: str, max_length: int | None = None) -> list[dict[str, Any]]:
    """The passes of an engine that decodes, with a static cache of ``max_length`` positions or a growing one."""
    static = layout == "static"
    fused: list[dict[str, Any]] = [{"kind": "fuse_cached_attention"}, {"kind": "merge_linears", "allow_no_match": True}]
    cache: dict[str, Any] = {"kind": "insert_kv_cache", "layout": layout, "logits": "last"}
    kinds = ["fuse_norm", "fuse_activation"]
    return [
        {"kind": "canonicalize", "allow_no_match": True},
        {"kind": "fuse_attention"},
        {**cache, "max_length": max_length} if static else cache,
        *(fused if static else []),
        *({"kind": kind, "allow_no_match": True} for kind in kinds),
    ]


@dataclass
class Model:
    """What all parts need of SmolLM2. ``linear``: the layers' weights; ``head``: those of the logits, tied to the embedding."""

    files: Path
    tokens: list[int]
    linear: int
    head: int
    weights: int
    engines: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def measure() -> Results:
    """Build the engines; then agreement in this process, speed and memory in others."""
    use_threads()
    results = Results("decoding")
    with tempfile.TemporaryDirectory() as folder:
        with quiet():
            model = build(Path(folder))
            agreement(results, model)
            windows(results)
        speed(results, model, Path(folder))
        memory(results, model)
    return results


def build(folder: Path) -> Model:
    source = graphopt.load_model(str(smollm2()))
    assert source.files is not None
    parameters = {each.data_ptr(): (name, each.numel()) for name, each in source.module.named_parameters()}
    sizes = {name: count for name, count in parameters.values() if "norm" not in name}
    head = next(count for name, count in sizes.items() if "embed" in name)
    weights = 4 * sum(count for _, count in parameters.values())
    model = Model(source.files, text_tokens(source), sum(sizes.values()) - head, head, weights)
    layouts = {STATIC: ("static", ROOM), GROWING: ("growing", None), LONG: ("static", LONG_ROOM)}
    target = {"backend": "onnxruntime", "threads": THREADS, "tactics": "fixed"}
    for index, (name, (layout, room)) in enumerate(layouts.items()):
        model.engines[name] = folder / f"engine{index}"
        made = graphopt.compile(source, model.engines[name], passes=decoder_passes(layout, room), target=target)
        model.notes.append(f"{name} runs {', '.join(f'{n} {op}' for op, n in made.report.engine_ops.items())}")
    return model


# Agreement


@dataclass
class Reference:
    """What eager generates, padded on the left: tokens ``[batch, new]``, logits ``[batch, new, vocabulary]``."""

    prompts: list[list[int]]
    tokens: Tensor
    logits: Tensor


def agreement(results: Results, model: Model) -> None:
    """Greedy tokens of a padded batch, and the logits along eager's tokens, of both layouts."""
    reference = eager_tokens(model)
    size = f"{len(LENGTHS)} prompts of {LENGTHS[0]} to {LENGTHS[-1]} tokens, {NEW_TOKENS} new ones"
    table = Table(f"SmolLM2: greedy generation against eager fp32, {size}", "engine")
    table.notes += [
        "one batch, eager (transformers' generate) padded on the left; no token ends a text; first difference: row, step,",
        "and how much eager prefers its token there; drift: largest absolute difference of logits along eager's tokens",
        f"chunks: the prompts read {CHUNK} tokens at a time against at once",
    ]
    for name in (STATIC, GROWING):
        engine = graphopt.load(model.engines[name])
        generated = Generator(engine, end=()).generate(reference.prompts, max_new_tokens=NEW_TOKENS)
        tokens = torch.tensor([each.tokens for each in generated])
        equal = float((tokens == reference.tokens).float().mean())
        drift = drift_of(engine, reference)
        table.add(
            name, equal_tokens=f"{equal:.2%}", first_difference=first_difference(tokens, reference),
            drift_at_step_1=drift[0], half_way=drift[len(drift) // 2], at_the_end=drift[-1], drift=max(drift),
            **chunks(engine, reference, tokens),
        )  # fmt: skip
        results.goals.append(Goal.at_least(f"SmolLM2: greedy tokens equal to eager, {name}", 100.0, 100 * equal, "%"))
    table.notes.append(f"largest logit: {float(reference.logits.abs().max()):.4g}")
    results.tables.append(table)


def eager_tokens(model: Model) -> Reference:
    import transformers

    module: Any = transformers.AutoModelForCausalLM.from_pretrained(model.files, dtype=torch.float32).eval()
    module.generation_config.eos_token_id = None
    inputs = padded(model.tokens, LENGTHS, max(LENGTHS), "left", pad=0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        made = module.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    rows = zip(inputs["input_ids"], LENGTHS, strict=True)
    prompts = [row[len(row) - length :].tolist() for row, length in rows]
    return Reference(prompts, made.sequences[:, max(LENGTHS) :], torch.stack(made.logits, 1))


def first_difference(tokens: Tensor, reference: Reference) -> str | None:
    """The earliest step at which a row goes its own way."""
    places = (tokens != reference.tokens).nonzero().tolist()
    if not places:
        return None
    row, step = min(places, key=lambda place: int(place[1]))
    there = reference.logits[row, step]
    gap = float(there[reference.tokens[row, step]] - there[tokens[row, step]])
    return f"row {row}, step {step}, {gap:.2g}"


def drift_of(engine: graphopt.Engine, reference: Reference) -> list[float]:
    """Largest difference of logits at each step, along eager's tokens."""
    decoder = Decoder(engine, len(reference.prompts))
    found, rows = [], reference.prompts
    for step in range(NEW_TOKENS):
        found.append(float((decoder.feed(rows) - reference.logits[:, step]).abs().max()))
        rows = reference.tokens[:, step : step + 1].tolist()
    return found


def chunks(engine: graphopt.Engine, reference: Reference, at_once: Tensor) -> dict[str, Cell]:
    """Prompts in chunks: the largest difference of the logits behind them, of rows alone, and the tokens of the batch."""
    worst = 0.0
    for prompt in reference.prompts:
        whole, parts = Decoder(engine, 1).feed([prompt]).clone(), Decoder(engine, 1)
        for start in range(0, len(prompt), CHUNK):
            last = parts.feed([prompt[start : start + CHUNK]])
        worst = max(worst, float((last - whole).abs().max()))
    generator = Generator(engine, end=(), prefill_chunk=CHUNK)
    generated = generator.generate(reference.prompts, max_new_tokens=NEW_TOKENS)
    equal = float((torch.tensor([each.tokens for each in generated]) == at_once).float().mean())
    return {"chunks: logits": worst, "chunks: equal tokens": f"{equal:.2%}"}


# Speed


def speed(results: Results, model: Model, folder: Path) -> None:
    """Every job of every side in one run, in turns."""
    with ExitStack() as stack:
        limits = Worker("limits", model.files, folder, THREADS)
        stack.callback(limits.stop)
        workers, equal, notes = start(model, folder, stack)
        short = model.tokens[:PROMPT]
        jobs: dict[tuple[str, str], Callable[[], list[float]]] = {
            ("read", "limits"): lambda: limits.ask("read", runs=RUNS),
            ("multiply", "limits"): lambda: limits.ask("multiply", runs=RUNS),
        }
        for name, worker in workers.items():
            if name == LONG:
                continue
            jobs["decode", name] = job(worker, "decode", short, ROOM, steps=STEPS)
            for length in (PROMPT, LONG_PROMPT):
                jobs[f"prefill {length}", name] = job(worker, "prefill", model.tokens[:length], ROOM, runs=RUNS)
        long = model.tokens * (1 + LONG_PAST // len(model.tokens))
        for name in [name for name in workers if name not in (STATIC, COMPILED)]:
            jobs["short", name] = job(workers[name], "decode", short, LONG_ROOM, steps=STEPS)
            jobs["long", name] = job(workers[name], "decode", long[:LONG_PAST], LONG_ROOM, steps=STEPS)
        times = in_turns(jobs)
        decode(results, times, notes, equal)
        prefill(results, times)
        long_past(results, times)
        roofline(results, times, model, limits.facts)


def start(model: Model, folder: Path, stack: ExitStack) -> tuple[dict[str, Worker], dict[str, float], list[str]]:
    """The sides that run here, the share of each one's greedy tokens that are torch eager's, and notes."""
    workers: dict[str, Worker] = {}
    tokens: dict[str, list[int]] = {}
    notes = [*model.notes]
    for name, side in {**PEERS, **dict.fromkeys(model.engines, "graphopt")}.items():
        if side == "optimum" and not OPTIMUM.is_file():
            notes.append(f"{name}: left out, optimum-onnx 0.1.0 needs transformers below 4.58 (no {OPTIMUM.parts[-3]})")
            continue
        try:
            python = OPTIMUM if side == "optimum" else None
            worker = Worker(side, model.files, model.engines.get(name, folder / side), THREADS, python)
            stack.callback(worker.stop)
            tokens[name] = worker.ask("tokens", prompt=model.tokens[:PROMPT], room=ROOM, count=NEW_TOKENS)
        except SideError as error:
            notes.append(f"{name}: left out, {error}")
            continue
        workers[name] = worker
        notes += [f"{name}: {key} {value}" for key, value in worker.facts.items()]
    expected = tokens[EAGER]
    equal = {name: sum(map(int.__eq__, own, expected)) / len(expected) for name, own in tokens.items()}
    return workers, equal, notes


def job(worker: Worker, do: str, prompt: Sequence[int], room: int, **options: int) -> Callable[[], list[float]]:
    def turn() -> list[float]:
        times: list[float] = worker.ask(do, prompt=list(prompt), room=room, **options)
        return times

    return turn


def in_turns(jobs: Jobs) -> Times:
    """A turn of every job in each round, in an order shuffled anew, after a pause in which the threads of the one before come
    to rest; the first round is not counted."""
    found: dict[tuple[str, str], list[float]] = {key: [] for key in jobs}
    order, shuffler = list(jobs), random.Random(0)
    for round_ in range(ROUNDS + 1):
        shuffler.shuffle(order)
        for key in order:
            time.sleep(PAUSE)
            times = jobs[key]()
            found[key] += times if round_ else []
    return {key: summary(times) for key, times in found.items()}


def sides_of(times: Times, work: str) -> dict[str, Timing]:
    return {name: timing for (other, name), timing in times.items() if other == work}


def best_peer(each: Mapping[str, Timing]) -> str:
    return min((name for name in each if name in PEERS), key=lambda name: each[name].median)


def decode(results: Results, times: Times, notes: list[str], equal: Mapping[str, float]) -> None:
    each = sides_of(times, "decode")
    best = best_peer(each)
    table = Table(f"SmolLM2: decode after {PROMPT} tokens, fp32, batch 1, {THREADS} threads", "side", notes=[*notes])
    table.notes += [
        f"a step reads a token and gives the most likely next one; {ROUNDS} rounds of {STEPS} steps behind the same prompt",
        f"equal: share of {NEW_TOKENS} greedy tokens that are torch eager's; caches of {ROOM} positions where they are static",
        "torch.compile: compile time is left out; onnxruntime-genai: built with prune_lm_head=true",
    ]
    for name, timing in each.items():
        table.add(
            name, tokens_a_second=1000 / timing.median, ms=timing.median, ms_p20=timing.p20, ms_least=timing.least,
            speed_over_best_peer=each[best].median / timing.median, equal=f"{equal[name]:.0%}",
        )  # fmt: skip
    results.tables.append(table)
    ratio = each[best].median / each[STATIC].median
    results.goals.append(Goal.at_least(f"SmolLM2: decode speed / the best peer ({best})", FASTER, ratio))


def prefill(results: Results, times: Times) -> None:
    table = Table(f"SmolLM2: ms from a prompt's tokens to the next one, fp32, batch 1, {THREADS} threads", "side")
    table.notes.append(f"into a fresh cache, which is part of the time; {ROUNDS} rounds of {RUNS} runs")
    works = {length: sides_of(times, f"prefill {length}") for length in (PROMPT, LONG_PROMPT)}
    best = {length: best_peer(each) for length, each in works.items()}
    for name in works[PROMPT]:
        cells: dict[str, Cell] = {}
        for length, each in works.items():
            cells |= {f"{length}": each[name].median, f"{length} p20": each[name].p20}
            cells[f"{length} over best peer"] = each[name].median / each[best[length]].median
        table.add(name, **cells)
    results.tables.append(table)
    for length, each in works.items():
        ratio = each[STATIC].median / each[best[length]].median
        row = f"SmolLM2: prefill of {length} / the best peer ({best[length]})"
        results.goals.append(Goal.at_most(row, PREFILL_RATIO, ratio))


def long_past(results: Results, times: Times) -> None:
    """A step after a long text over one after a short text, by the same engine or peer."""
    short, long = sides_of(times, "short"), sides_of(times, "long")
    table = Table(f"SmolLM2: ms of a step after {PROMPT} and after {LONG_PAST} tokens", "side")
    table.notes.append(f"static caches have {LONG_ROOM} positions in both columns; {COMPILED} is left out")
    for name in long:
        cells = {f"after {PROMPT}": short[name].median, f"after {LONG_PAST}": long[name].median}
        table.add(name, **cells, ratio=long[name].median / short[name].median)
    results.tables.append(table)
    ratio = long[LONG].median / short[LONG].median
    results.goals.append(Goal.at_most(f"SmolLM2: a step after {LONG_PAST} / after {PROMPT} tokens", LONG_RATIO, ratio))


def roofline(results: Results, times: Times, model: Model, facts: Mapping[str, int]) -> None:
    """What the machine allows: a step reads every weight once, a prefill multiplies by every weight."""
    read, product = times["read", "limits"], times["multiply", "limits"]
    table = Table("SmolLM2: the machine's limits", "work")
    table.notes += [
        f"read: torch's sum of {facts['bytes'] / 1e6:.0f} MB; multiply: onnxruntime's MatMul of {facts['operations'] / 1e9:.1f} "
        f"GFLOP; {THREADS} threads, in the same rounds; the rate is that of the fastest run",
        f"decode: {model.weights / 1e6:.1f} MB of weights and {PROMPT * CACHE_BYTES / 1e6:.1f} MB of cache",
        "prefill: the layers' weights for all tokens, the logits' for the last one; attention is left out",
    ]
    amounts = {"decode": (model.weights + PROMPT * CACHE_BYTES, facts["bytes"], read, "GB/s")}
    for length in (PROMPT, LONG_PROMPT):
        work = 2 * (length * model.linear + model.head)
        amounts[f"prefill {length}"] = work, facts["operations"], product, "GFLOP/s"
    for name, (amount, measured, timing, unit) in amounts.items():
        each, limit = sides_of(times, name), timing.least * amount / measured
        best = each[best_peer(each)].median
        table.add(
            name, amount=f"{amount / 1e9:.4g} {unit[:-2]}", rate=f"{measured / timing.least / 1e6:.4g} {unit}",
            limit_ms=limit, limit_ms_at_median_rate=timing.median * amount / measured, graphopt_ms=each[STATIC].median,
            best_peer_ms=best, graphopt_over_limit=each[STATIC].median / limit, best_peer_over_limit=best / limit,
        )  # fmt: skip
    results.tables.append(table)


# Memory


def memory(results: Results, model: Model) -> None:
    """Bytes a token by which the cache and its process grow, each layout in a fresh process."""
    table = Table(f"SmolLM2: memory by {GROWTH_STEPS} steps after {PROMPT} tokens", "engine")
    table.notes.append("cache: the bytes of its tensors; process: resident memory after freed memory was given back")
    for name, wanted in ((STATIC, 0), (GROWING, CACHE_BYTES)):
        worker = Worker("graphopt", model.files, model.engines[name], THREADS)
        found = worker.ask("memory", prompt=model.tokens[:PROMPT], steps=GROWTH_STEPS)
        worker.stop()
        cache, process = ((found[key][1] - found[key][0]) / GROWTH_STEPS for key in ("cache", "resident"))
        table.add(
            name, cache_MB_before=found["cache"][0] / 1e6, cache_MB_after=found["cache"][1] / 1e6,
            cache_bytes_a_token=int(cache), process_bytes_a_token=round(process),
        )  # fmt: skip
        row = f"SmolLM2: bytes a token by which the cache grows, {name}"
        results.goals.append(Goal(row, str(wanted), f"{cache:g}", cache == wanted))
    results.tables.append(table)


def windows(results: Results) -> None:
    """A Gemma 3 of six layers, five of them with a window, filled to the end: bytes of its caches, and eager's logits."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, sliding_window=WINDOW, max_position_embeddings=LONG_ROOM,
        query_pre_attn_scalar=32,
    )  # fmt: skip
    source = transformers_source(transformers.Gemma3ForCausalLM(config), name="gemma3-like")
    passes = decoder_passes("static", LONG_ROOM)
    passes[2] |= {"window": True}
    target = {"backend": "onnxruntime", "threads": THREADS, "tactics": "fixed"}
    tokens = torch.randint(3, 512, (1, LONG_PAST + 1), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        engine = graphopt.compile(source, Path(folder) / "engine", passes=passes, target=target).engine
        decoder = Decoder(engine, 1)
        decoder.feed([tokens[0, :-1].tolist()])
        got = decoder.feed([tokens[0, -1:].tolist()])[0]
        sizes = [tensor.nbytes for tensor in decoder.cache.tensors.values()]
    with torch.inference_mode():
        expected = source.module(tokens, logits_to_keep=1).logits[0, -1]
    row = 32 * 4  # bytes of a position in one layer's keys
    bound = (2 * WINDOW - 1) * row
    table = Table(f"Gemma-3-like, window {WINDOW}: caches at {LONG_PAST} tokens", "layers")
    table.add("of windows", count=sum(size == bound for size in sizes), bytes_each=min(sizes))
    table.add("of the whole text", count=sum(size != bound for size in sizes), bytes_each=max(sizes))
    drift = float((got - expected).abs().max() / expected.abs().max())
    table.notes.append(
        f"keys and values apart; logits after {LONG_PAST} tokens differ from eager by {drift:.1e} of their scale"
    )
    results.tables.append(table)
    name = f"window {WINDOW} at {LONG_PAST} tokens: bytes of a windowed layer over the window's"
    results.goals.append(Goal.at_most(name, 2.0, min(sizes) / (WINDOW * row), "x"))
    results.goals.append(Goal.at_most(f"window {WINDOW} at {LONG_PAST} tokens: logits from eager", 1e-4, drift))
