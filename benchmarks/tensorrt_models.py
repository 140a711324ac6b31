"""MiniLM and SmolLM2 with their real weights as TensorRT engines on a GPU: parity, STS-B, greedy tokens, and ONNX Runtime's CUDA
provider with the same passes beside them. A part of ``python -m benchmarks.tensorrt_gpu``."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import graphopt
from benchmarks.assets import minilm, sentences, smollm2
from benchmarks.cuda_decoding import engine_steps
from benchmarks.decoding import decoder_passes
from benchmarks.demo import sts_b_spearman
from benchmarks.measure import Goal, Results, Table
from benchmarks.minilm import inputs_of, tokenizer_of
from graphopt.backends.tensorrt.backend import TensorRtBackend
from graphopt.eager import eager
from graphopt.errors import GraphoptError
from graphopt.parity import compare
from graphopt.runtime import Generator
from graphopt.runtime.generation import load_tokenizer

PARITY = {"fp32": 1e-4, "fp16": 5e-3}
SIZES = ((1, 128), (8, 128), (5, 77))
TEXTS = ("The capital of France is", "Once upon a time", "def fibonacci(n):", "Water boils at")
NEW, ROOM = 64, 512
HALF = {"kind": "cast", "norms": "half"}
Steps = Sequence[Mapping[str, Any]]


def minilm_engines(results: Results) -> None:
    """MiniLM in fp32, fp16 and int8."""
    source, tokenizer = graphopt.load_model(str(minilm())), tokenizer_of(minilm())
    calibration = {"data": sentences(512), "samples": 512}
    int8 = {"kind": "quantize", "scheme": "int8_static", "embeddings": False, "calibration": calibration}
    schemes: dict[str, Steps] = {"fp32": [], "fp16": [HALF], "int8": [HALF, int8]}
    table = Table("MiniLM: largest difference from fp32 eager, of the output's scale; STS-B", "engine")
    table.add("eager", Spearman=sts_b_spearman(eager(source.module), tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        for name, steps in schemes.items():
            try:
                graphopt.compile(
                    source, Path(folder) / name, passes=[*TensorRtBackend.standard_passes, *steps],
                    target={"backend": "tensorrt"}, dims={"batch": (1, 64), "sequence": (2, 128)},
                )  # fmt: skip
            except GraphoptError as error:
                table.notes.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            engine = graphopt.load(Path(folder) / name)
            cells = {f"{batch} x {sequence}": off(engine, source.module, batch, sequence) for batch, sequence in SIZES}
            table.add(name, **cells, Spearman=sts_b_spearman(engine, tokenizer))
            if name in PARITY:
                goal = f"MiniLM in {name}: largest difference from eager"
                results.goals.append(Goal.at_most(goal, PARITY[name], max(cells.values())))
    results.tables.append(table)


def off(engine: graphopt.Engine, module: torch.nn.Module, batch: int, sequence: int) -> float:
    """On random words, padded: how far the tokens that the mask keeps are from eager, of the output's scale."""
    feeds = inputs_of(batch, sequence)
    wanted = {"last_hidden_state": eager(module)(**feeds)["last_hidden_state"]}
    return compare(wanted, engine(**feeds), feeds["attention_mask"])["last_hidden_state"].relative


def smollm2_engines(results: Results) -> None:
    """SmolLM2's greedy tokens: in fp32 and fp16 on the GPU, in fp32 on the CPU."""
    source = graphopt.load_model(str(smollm2()))
    assert source.files is not None
    tokenizer = load_tokenizer(source.files)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    rows: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
        "CPU, onnxruntime fp32": ("onnxruntime", "cpu", []),
        "TensorRT fp32": ("tensorrt", "", []),
        "TensorRT fp16": ("tensorrt", "", [HALF]),
        "CUDA, onnxruntime fp16": ("onnxruntime", "cuda", [HALF]),
    }
    table = Table(f"SmolLM2: {NEW} greedy tokens of {len(TEXTS)} prompts, a static cache", "engine")
    expected: list[list[int]] = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (name, (backend, provider, steps)) in enumerate(rows.items()):
            try:
                made = compiled(source, Path(folder) / str(index), backend, provider, steps)
                rows_of = Generator(made).generate(prompts, max_new_tokens=NEW)
                tokens = [row.tokens for row in rows_of]
                seconds = engine_steps(made, prompts[0])[1]
            except (GraphoptError, RuntimeError) as error:
                table.notes.append(f"{name}: {str(error).splitlines()[0]}")
                continue
            expected = expected or tokens
            equal = sum(
                a == b for own, other in zip(tokens, expected, strict=True) for a, b in zip(own, other, strict=True)
            )
            table.add(
                name, tokens_as_the_CPU=equal, of=NEW * len(TEXTS), tokens_a_second=1 / statistics.median(seconds)
            )
            if name == "TensorRT fp32":
                results.goals.append(Goal.at_least("SmolLM2: tokens as the CPU engine's", NEW * len(TEXTS), equal))
    results.tables.append(table)


def compiled(source: graphopt.Source, folder: Path, backend: str, provider: str, steps: Steps) -> graphopt.Engine:
    dtype, own = "fp16" if steps else "fp32", {"provider": provider, "tactics": "fixed"} if provider else {}
    if backend == "tensorrt":
        passes = with_cache(**static_cache(ROOM, dtype))
    else:
        passes = [
            {**step, "dtype": dtype} if step["kind"] == "insert_kv_cache" else step
            for step in decoder_passes("static", ROOM)
        ]
    dims = {"batch": (1, 8), "sequence": (1, ROOM)}
    graphopt.compile(source, folder, passes=[*passes, *steps], target={"backend": backend, **own}, dims=dims)
    return graphopt.load(folder)


def static_cache(room: int, dtype: str) -> dict[str, Any]:
    return {"layout": "static", "max_length": room, "logits": "last", "dtype": dtype}


def with_cache(**options: Any) -> list[dict[str, Any]]:
    """TensorRT's passes with a cache, behind the attention's fusion. ``options`` are insert_kv_cache's."""
    standard = [dict(step) for step in TensorRtBackend.standard_passes]
    after = [step["kind"] for step in standard].index("fuse_attention") + 1
    return [*standard[:after], {"kind": "insert_kv_cache", **options}, *standard[after:]]
