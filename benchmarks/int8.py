"""Quantized MiniLM and SmolLM2 on CPU: how fast beside their peers and beside their integer products alone, how good, how large.

MiniLM: STS-B's Spearman correlation and latency in turns, in one process. SmolLM2: perplexity on prose that was not used for
calibration; prefill and decode of sides in processes of their own, in turns (benchmarks/decoding_sides.py)."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

import graphopt
from benchmarks.assets import minilm, prose, sentences, smollm2
from benchmarks.decoding import decoder_passes, in_turns, job, sides_of
from benchmarks.decoding_sides import ROOT, SideError, Worker, build_genai
from benchmarks.demo import sts_b_spearman
from benchmarks.gguf_sides import llama_logits
from benchmarks.inputs import as_numpy
from benchmarks.kernels import kernel_table
from benchmarks.measure import THREADS, Goal, Results, Table, Timing, interleaved, quiet, use_threads
from benchmarks.minilm import LATENCY_SIZES, engine_run, inputs_of, tokenizer_of, torch_run
from benchmarks.peers import INPUTS, Export, load, session, write
from graphopt.backends.onnxruntime.backend import OnnxRuntimeBackend
from graphopt.eager import eager
from graphopt.runtime import Decoder

SENTENCES = 512  # that MiniLM is calibrated on
SPEARMAN, AGAINST_PEERS, AGAINST_PRODUCTS = 0.815, 0.7, 1.6
CALIBRATION_SECONDS = 60.0
INT8_SIZE, INT4_SIZE = 0.27, 0.17  # of the fp32 weights
NEAR = 1.02  # of fp32's perplexity
W8A8_PREFILL, DECODE_GAIN, INT8_LOSS, INT4_LOSS = 0.35, 1.3, 0.01, 0.06
CHUNKS, LENGTH = 20, 512  # of the prose that perplexity is of
PROMPT, LONG_PROMPT, ROOM = 128, 512, 1024
STEPS, RUNS = 24, 3
CALIBRATED = 24  # times 512 tokens, for GPTQ

FP32, STATIC, DYNAMIC = "graphopt fp32", "graphopt int8_static", "graphopt int8_dynamic"
SMOOTH = "graphopt int8_smooth"
W8A8, W8 = "graphopt W8A8", "graphopt weights int8"
RTN, W4 = "graphopt weights int4, nearest", "graphopt weights int4, GPTQ"
APART = "graphopt weights int4, GPTQ, embedding int8"
GENAI_INT4, LLAMA = "onnxruntime-genai int4", "llama.cpp Q4_1"
PEERS = {
    "onnxruntime-genai fp32": "genai",
    GENAI_INT4: "genai_int4",
    LLAMA: "llama_cpp",
    "OpenVINO GenAI, Q4_1": "openvino_genai",
}
NNCF = ROOT / "build" / "nncf-venv" / "bin" / "python"
Call = Callable[[], Any]


def measure() -> Results:
    use_threads()
    results = Results("int8")
    with tempfile.TemporaryDirectory() as folder:
        decoder(results, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        encoder(results, Path(folder))
    return results


def size_of(folder: Path) -> int:
    """Bytes of a model's files."""
    return sum(file.stat().st_size for file in folder.glob("model.onnx*"))


# MiniLM


def encoder(results: Results, folder: Path) -> None:
    texts = sentences(SENTENCES)
    calibration = {"data": texts, "samples": SENTENCES, "batch": 32, "observer": "percentile"}
    schemes: dict[str, list[dict[str, Any]]] = {
        FP32: [],
        STATIC: [{"kind": "quantize", "scheme": "int8_static", "calibration": calibration}],
        SMOOTH: [{"kind": "quantize", "scheme": "int8_smooth", "calibration": {**calibration, "observer": "mse"}}],
        DYNAMIC: [{"kind": "quantize", "scheme": "int8_dynamic"}],
    }
    compiled = {}
    with quiet():
        source = graphopt.load_model(str(minilm()))
        for index, (name, steps) in enumerate(schemes.items()):
            passes = [*OnnxRuntimeBackend.standard_passes, *steps]
            target = {"backend": "onnxruntime", "threads": THREADS}
            compiled[name] = graphopt.compile(source, folder / f"engine{index}", passes=passes, target=target)
        peers, notes = int8_peers(folder, texts)
    table = quality(results, compiled, peers, source.module)
    table.notes += notes
    calibrated = next(step for step in compiled[STATIC].report.passes if step.kind == "quantize")
    table.notes.append(f"calibration on {SENTENCES} sentences and quantization: {calibrated.seconds:.1f} s")
    results.goals.append(Goal.at_most("MiniLM: seconds of calibration", CALIBRATION_SECONDS, calibrated.seconds))
    encoder_latency(results, compiled, peers, source.module)


def int8_peers(folder: Path, texts: Sequence[str]) -> tuple[dict[str, Callable[[Mapping[str, Any]], Any]], list[str]]:
    """onnxruntime's own quantization of the plain export, and OpenVINO's default, as calls from feeds to results."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static

    plain = folder / "plain.onnx"
    write(Export("plain", "eager"), load(minilm(), "eager"), inputs_of(2, 6), plain)
    quantize_dynamic(plain, folder / "dynamic.onnx", weight_type=QuantType.QInt8)
    quantize_static(
        plain, folder / "static.onnx", Reader(texts), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"],
    )  # fmt: skip
    found: dict[str, Callable[[Mapping[str, Any]], Any]] = {}
    for name in ("dynamic", "static"):
        own = session(folder / f"{name}.onnx")
        found[f"onnxruntime quantize_{name}"] = partial(_run_session, own)
    notes = []
    if importlib.util.find_spec("openvino") is None:
        notes.append("OpenVINO is not installed: left out")
    else:
        import openvino

        core = openvino.Core()
        made = core.compile_model(str(plain), "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"})
        found[f"OpenVINO {openvino.__version__.split('-')[0]}, default precision"] = lambda feeds: list(
            made(feeds).values()
        )
        if NNCF.is_file():
            version, model = nncf_int8(plain, texts)
            made8 = core.compile_model(
                str(model), "CPU", {"INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
            )
            found[f"OpenVINO, NNCF {version} int8"] = lambda feeds: list(made8(feeds).values())
        else:
            notes.append(f"NNCF is left out: there is no {NNCF.relative_to(ROOT)}")
    return found, notes


def nncf_int8(plain: Path, texts: Sequence[str]) -> tuple[str, Path]:
    """NNCF's version, and its int8 model of the plain export, calibrated on the same sentences."""
    tokenizer = tokenizer_of(minilm())
    encoded = tokenizer(list(texts), padding="max_length", max_length=64, truncation=True, return_tensors="np")
    data, out = plain.with_name("calibration.npz"), plain.with_name("nncf.xml")
    np.savez(data, **{name: encoded[name].astype(np.int64) for name in INPUTS})
    command = [str(NNCF), "-W", "ignore", "-m", "benchmarks.nncf_side", str(plain), str(data), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()[-1], out


def _run_session(own: Any, feeds: Mapping[str, Any]) -> list[Any]:
    known = {given.name for given in own.get_inputs()}
    return list(own.run(None, {name: array for name, array in feeds.items() if name in known}))


class Reader:
    """Calibration data as onnxruntime reads it: a batch of sentences at a time."""

    def __init__(self, texts: Sequence[str]) -> None:
        tokenizer = tokenizer_of(minilm())
        starts = range(0, len(texts), 32)
        encoded = (tokenizer(list(texts[start : start + 32]), padding=True, return_tensors="np") for start in starts)
        self.batches = iter([{name: batch[name].astype(np.int64) for name in INPUTS} for batch in encoded])

    def get_next(self) -> dict[str, Any] | None:
        return next(self.batches, None)


def quality(
    results: Results,
    compiled: Mapping[str, graphopt.Compiled],
    peers: Mapping[str, Callable[[Mapping[str, Any]], Any]],
    module: torch.nn.Module,
) -> Table:
    tokenizer = tokenizer_of(minilm())
    table = Table("MiniLM in int8: STS-B test, Spearman; size", "model")
    whole = 4 * sum(parameter.numel() for parameter in module.parameters())
    scores = {"eager fp32": sts_b_spearman(eager(module), tokenizer)}
    table.add("eager fp32", Spearman=scores["eager fp32"], MB=whole / 1e6)
    for name, made in compiled.items():
        scores[name] = sts_b_spearman(made.engine, tokenizer)
        size = size_of(made.folder)
        table.add(name, Spearman=scores[name], MB=size / 1e6, of_fp32=size / whole)
    for name, run in peers.items():

        def call(run: Callable[[Mapping[str, Any]], Any] = run, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"last_hidden_state": torch.from_numpy(np.asarray(run(as_numpy(inputs))[0]))}

        scores[name] = sts_b_spearman(call, tokenizer)
        table.add(name, Spearman=scores[name])
    results.tables.append(table)
    int8 = [scores[name] for name in peers if "default" not in name]
    for name in (STATIC, SMOOTH, DYNAMIC):
        results.goals.append(Goal.at_least(f"MiniLM: Spearman of {name}", max(SPEARMAN, *int8), scores[name]))
        share = size_of(compiled[name].folder) / whole
        results.goals.append(Goal.at_most(f"MiniLM: size of {name} / fp32", INT8_SIZE, share))
    return table


def encoder_latency(
    results: Results,
    compiled: Mapping[str, graphopt.Compiled],
    peers: Mapping[str, Callable[[Mapping[str, Any]], Any]],
    module: torch.nn.Module,
) -> None:
    table = Table(f"MiniLM in int8: latency in ms, {THREADS} threads, no padding", "candidate")
    table.notes.append("integer products: the linears alone, uint8 by int8 to float, one after another in one model")
    times: dict[str, dict[str, Timing]] = {}
    half = load(minilm(), "sdpa").to(torch.bfloat16)
    for batch, length in LATENCY_SIZES:
        inputs = inputs_of(batch, length, padded_rows=False)
        feeds = as_numpy(inputs)
        torch._dynamo.reset()
        fast = torch.compile(half, dynamic=False)
        calls: dict[str, Call] = {name: partial(engine_run, made.engine, feeds) for name, made in compiled.items()}
        calls |= {name: partial(run, feeds) for name, run in peers.items()}
        calls["torch.compile bf16"] = partial(torch_run, fast, inputs)
        calls["integer products"] = products(module, batch * length)
        times[f"{batch}x{length}"] = interleaved(calls)
    for name in calls:
        numbers = {f"{size}_{part}": getattr(times[size][name], part) for size in times for part in ("median", "p20")}
        table.add(name, **numbers)
    results.tables.append(table)
    feeds_of = {f"{b}x{s}": as_numpy(inputs_of(b, s, padded_rows=False)) for b, s in LATENCY_SIZES}
    results.tables.append(
        kernel_table(
            f"{STATIC}: where its time goes",
            {size: (compiled[STATIC].folder, partial(engine_run, feeds=given)) for size, given in feeds_of.items()},
        )
    )
    others = [*peers, "torch.compile bf16"]
    for size, each in times.items():
        ours = min((STATIC, SMOOTH, DYNAMIC), key=lambda name: each[name].median)
        best = min(others, key=lambda name: each[name].median)
        row = f"MiniLM at {size}: {ours} / the best peer ({best})"
        results.goals.append(Goal.at_most(row, AGAINST_PEERS, each[ours].median / each[best].median))
        row = f"MiniLM at {size}: {ours} / its integer products alone"
        results.goals.append(Goal.at_most(row, AGAINST_PRODUCTS, each[ours].median / each["integer products"].median))


def products(module: torch.nn.Module, tokens: int) -> Call:
    """All linears of a module on ``tokens`` rows as integer products by constants."""
    shapes = Counter(tuple(each.weight.shape) for each in module.modules() if isinstance(each, torch.nn.Linear))
    shapes = Counter({shape: count for shape, count in shapes.items() if count > 1})  # the pooler sees one row
    random = np.random.default_rng(0)
    nodes, weights, inputs, outputs, feeds = [], [], [], [], {}
    scale = [
        numpy_helper.from_array(np.array(0.01, np.float32), "s"),
        numpy_helper.from_array(np.array(128, np.uint8), "z"),
    ]
    for index, ((channels, features), count) in enumerate(shapes.items()):
        inputs.append(helper.make_tensor_value_info(f"x{index}", TensorProto.UINT8, [tokens, features]))
        feeds[f"x{index}"] = random.integers(0, 255, (tokens, features), np.uint8)
        for copy in range(count):
            name = f"{index}.{copy}"
            weights.append(
                numpy_helper.from_array(random.integers(-127, 127, (features, channels), np.int8), f"w{name}")
            )
            outputs.append(helper.make_tensor_value_info(f"y{name}", TensorProto.FLOAT, [tokens, channels]))
            given = [f"x{index}", f"w{name}", "s", "s", "z"]
            nodes.append(helper.make_node("MatMulIntegerToFloat", given, [f"y{name}"], domain="com.microsoft"))
    graph = helper.make_graph(nodes, "products", inputs, outputs, [*weights, *scale])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "products.onnx")
        own = session(Path(folder) / "products.onnx")
    return lambda: own.run(None, feeds)


# SmolLM2


def prefill(engine: graphopt.Engine, tokens: Sequence[int]) -> None:
    Decoder(engine, 1).feed([tokens])


def decoder(results: Results, folder: Path) -> None:
    with quiet():
        source = graphopt.load_model(str(smollm2()))
    assert source.files is not None
    tokenizer = tokenizer_of(source.files)
    prose_of_tests = tokenizer(prose()[1])["input_ids"]
    unseen, used = prose_of_tests[: CHUNKS * LENGTH], prose_of_tests[CHUNKS * LENGTH :]
    data = [
        {
            "input_ids": torch.tensor([used[start : start + LENGTH]]),
            "attention_mask": torch.ones(1, LENGTH, dtype=torch.int64),
        }
        for start in range(0, CALIBRATED * LENGTH, LENGTH)
    ]
    calibration = {"data": data, "samples": CALIBRATED, "batch": 1, "max_length": LENGTH}
    smooth = {
        "kind": "smooth_activations", "strength": 0.7, "modules": ["model.layers.*"],
        "calibration": {**calibration, "data": data[:4], "samples": 4},
    }  # fmt: skip
    integers = {
        "kind": "quantize", "scheme": "int8_dynamic", "bits": 8, "group": 64,
        "overrides": {"*down_proj": "int8_token", "model.embed_tokens": "weight_only"},
    }  # fmt: skip
    packed = {"kind": "quantize", "scheme": "weight_only", "budget": {"metric": "cosine", "limit": 0.5}}
    four = {**packed, "symmetric": False}
    gptq = {**four, "fractions": True, "scales": "fp16", "algorithm": "gptq", "calibration": calibration}
    finer = {"model.embed_tokens": {"scheme": "weight_only", "group": 16}}
    schemes: dict[str, list[dict[str, Any]]] = {
        FP32: [], W8A8: [smooth, integers], W8: [{**packed, "bits": 8, "group": 64}], RTN: [four],
        W4: [{**gptq, "overrides": finer}], APART: [{**gptq, "embeddings": "int8"}],
    }  # fmt: skip
    engines, losses = {}, {}
    table = Table("SmolLM2 quantized: perplexity and size", "model")
    table.notes.append(f"{CHUNKS} x {LENGTH} tokens of news; GPTQ on {CALIBRATED} x {LENGTH} tokens of other news")
    whole = 4 * sum(parameter.numel() for parameter in source.module.parameters())
    for index, (name, steps) in enumerate(schemes.items()):
        engines[name] = folder / f"decoder{index}"
        with quiet():
            target = {"backend": "onnxruntime", "threads": THREADS, "tactics": "fixed"}
            graphopt.compile(source, engines[name], passes=[*decoder_passes("static", ROOM), *steps], target=target)
            plain = decoder_passes("growing")
            plain = [each | ({"logits": "all"} if each["kind"] == "insert_kv_cache" else {}) for each in plain]
            whole_text = graphopt.compile(source, folder / f"whole{index}", passes=[*plain, *steps], target=target)
        losses[name] = perplexity_of(whole_text.engine, unseen)
        size = size_of(engines[name])
        table.add(
            name,
            perplexity=losses[name],
            over_fp32=losses[name] / losses[FP32] - 1,
            MB=size / 1e6,
            of_fp32=size / whole,
        )
    genai = genai_perplexity(source.files, folder / "genai", unseen, table)
    if genai is not None:
        size = size_of(folder / "genai")
        over = genai / losses[FP32] - 1
        table.add(GENAI_INT4, perplexity=genai, over_fp32=over, MB=size / 1e6, of_fp32=size / whole)
        losses[GENAI_INT4] = genai
    llama = llama_perplexity(unseen, table)
    if llama is not None:
        losses[LLAMA] = llama
        table.add(LLAMA, perplexity=llama, over_fp32=llama / losses[FP32] - 1)
    results.tables.append(table)
    sizes = {name: size_of(engines[name]) / whole for name in engines}
    results.goals += [
        Goal.at_most("SmolLM2: perplexity of W8A8 over fp32", INT8_LOSS, losses[W8A8] / losses[FP32] - 1),
        Goal.at_most("SmolLM2: perplexity of int8 weights over fp32", INT8_LOSS, losses[W8] / losses[FP32] - 1),
        Goal.at_most("SmolLM2: perplexity of int4 weights over fp32", INT4_LOSS, losses[W4] / losses[FP32] - 1),
        Goal.at_most("SmolLM2: perplexity of GPTQ / nearest, int4", 1.0, losses[W4] / losses[RTN]),
        Goal.at_most("SmolLM2: size of W8A8 / fp32", INT8_SIZE, sizes[W8A8]),
        Goal.at_most("SmolLM2: size of int4 weights / fp32", INT4_SIZE, sizes[W4]),
    ]
    good = [name for name, loss in losses.items() if loss / losses[FP32] <= NEAR and name != FP32]
    decoder_speed(results, source.files, folder, engines, unseen, good)


def genai_perplexity(files: Path, folder: Path, tokens: Sequence[int], table: Table) -> float | None:
    """Of the model that onnxruntime-genai's builder makes in 4 bits, run by onnxruntime."""
    try:
        build_genai(files, folder, THREADS, "int4", all_logits=True)
    except SideError as error:
        table.notes.append(f"{GENAI_INT4}: left out, {error}")
        return None
    own = session(folder / "model.onnx")
    config = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    past = np.zeros((1, config["num_key_value_heads"], 0, config["head_size"]), np.float32)
    empty = {given.name: past for given in own.get_inputs() if given.name.startswith("past")}

    def logits(feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.from_numpy(own.run(["logits"], {**as_numpy(feeds), **empty})[0])

    return perplexity(logits, tokens)


def llama_perplexity(tokens: Sequence[int], table: Table) -> float | None:
    """Of llama.cpp on the file's own 4 bits, which are the weights that all others begin with."""
    try:
        run = llama_logits(THREADS, LENGTH)
    except SideError as error:
        table.notes.append(f"{LLAMA}: left out, {error}")
        return None
    return perplexity(lambda feeds: torch.from_numpy(run(feeds["input_ids"][0].tolist()))[None], tokens)


def perplexity_of(engine: graphopt.Engine, tokens: Sequence[int]) -> float:
    empty = engine.cache_layout.empty(1)

    def logits(feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = engine(**feeds, **empty)["logits"]
        return found

    return perplexity(logits, tokens)


def perplexity(run: Callable[[dict[str, torch.Tensor]], torch.Tensor], tokens: Sequence[int]) -> float:
    loss, count = 0.0, 0
    for start in range(0, CHUNKS * LENGTH, LENGTH):
        text = torch.tensor(tokens[start : start + LENGTH])
        feeds = {"input_ids": text[None], "attention_mask": torch.ones(1, LENGTH, dtype=torch.int64)}
        logits = run(feeds)[0].float()
        loss -= float(logits[:-1].log_softmax(-1).gather(1, text[1:, None]).sum())
        count += len(text) - 1
    return math.exp(loss / count)


def decoder_speed(
    results: Results, files: Path, folder: Path, engines: Mapping[str, Path], tokens: Sequence[int], good: Sequence[str]
) -> None:
    table = Table(f"SmolLM2 quantized: speed, batch 1, {THREADS} threads", "side")
    sides = {**dict.fromkeys(engines, "graphopt"), **PEERS}
    with ExitStack() as stack:
        jobs = {}
        for name, side in sides.items():
            try:
                worker = Worker(side, files, engines.get(name, folder / side), THREADS)
            except SideError as error:
                table.notes.append(f"{name}: left out, {error}")
                continue
            stack.callback(worker.stop)
            jobs["decode", name] = job(worker, "decode", tokens[:PROMPT], ROOM, steps=STEPS)
            for length in (PROMPT, LONG_PROMPT):
                jobs[f"prefill {length}", name] = job(worker, "prefill", tokens[:length], ROOM, runs=RUNS)
        times = in_turns(jobs)
    works = {work: sides_of(times, work) for work in ("decode", f"prefill {PROMPT}", f"prefill {LONG_PROMPT}")}
    for name in works["decode"]:
        table.add(
            name, tokens_a_second=1000 / works["decode"][name].median,
            **{f"{work} ms": each[name].median for work, each in works.items()},
        )  # fmt: skip
    results.tables.append(table)
    calls = {
        f"{name}, {length}": (engines[name], partial(prefill, tokens=tokens[:length]))
        for name in (FP32, W8A8)
        for length in (PROMPT, LONG_PROMPT)
    }
    results.tables.append(kernel_table("SmolLM2's prefill: where its time goes", calls))
    for length in (PROMPT, LONG_PROMPT):
        each = works[f"prefill {length}"]
        row = f"SmolLM2: prefill of {length}, W8A8 / our fp32"
        results.goals.append(Goal.at_most(row, W8A8_PREFILL, each[W8A8].median / each[FP32].median))
        peers = [name for name in PEERS if name in each]
        if peers:
            best = min(peers, key=lambda name: each[name].median)
            row = f"SmolLM2: prefill of {length}, W8A8 / the best peer ({best})"
            results.goals.append(Goal.at_most(row, 1.0, each[W8A8].median / each[best].median))
    each = works["decode"]
    ours = min((name for name in good if name in engines), key=lambda name: each[name].median)
    for which, among in (("", list(PEERS)), (" within +2 %", [name for name in good if name in PEERS])):
        peers = [name for name in among if name in each]
        if peers:
            best = min(peers, key=lambda name: each[name].median)
            row = f"SmolLM2: decode speed of {ours} (within +2 % perplexity) / the best peer{which} ({best})"
            results.goals.append(Goal.at_least(row, DECODE_GAIN, each[best].median / each[ours].median))
